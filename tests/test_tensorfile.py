"""Files of tensors: what is written here the safetensors library reads, and the other way round."""

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_dnn import tensorfile
from ray_dnn.engine.codec import tensor_bytes

DTYPES = sorted(tensorfile._DTYPES.values(), key=str)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Of any dtype and shape, also without elements, also as they lie in channels-last networks."""
    names = draw(
        st.lists(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), unique=True, max_size=5)
    )
    found = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(found))).to(dtype)
        if tensor.dim() == 4 and draw(st.booleans()):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        found[name] = tensor
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    kinds = [{name: (t.dtype, t.shape, bytes(tensor_bytes(t))) for name, t in side.items()} for side in (one, other)]
    return kinds[0] == kinds[1]


def whole(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(tensors())
def test_the_library_reads_what_is_written(given: dict[str, torch.Tensor]) -> None:
    data = b"".join(tensorfile.chunks(given))
    assert same(safetensors.torch.load(data), given)
    assert same(tensorfile.tensors(whole(data)), given)


@given(tensors())
def test_what_the_library_writes_is_read(given: dict[str, torch.Tensor]) -> None:
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in given.items()})
    assert same(tensorfile.tensors(whole(data)), given)


def test_nothing_is_copied() -> None:
    tensor = torch.arange(1000, dtype=torch.float32)
    (_, chunk) = tensorfile.chunks({"a": tensor})
    tensor[0] = 7.0
    assert bytes(chunk[:4]) == bytes(tensor_bytes(torch.tensor([7.0])))
    data = whole(b"".join(tensorfile.chunks({"a": tensor})))
    view = tensorfile.tensors(data)["a"]
    view[1] = 9.0
    assert tensorfile.tensors(data)["a"][1] == 9.0


def test_a_dtype_that_the_format_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a is of torch\.complex128"):
        tensorfile.chunks({"a": torch.zeros(1, dtype=torch.complex128)})
