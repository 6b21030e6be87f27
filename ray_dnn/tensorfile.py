"""Tensors in the safetensors format, without a copy on either way.

The format is that of https://github.com/huggingface/safetensors: the length of the header (8 bytes, little-endian), the
header (JSON: dtype, shape and place of each tensor), the bytes of the tensors. The library of that name reads what is
written here, and writes what is read here; but it copies all bytes on each way, which takes longer than a disk does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from ray_dnn.engine.codec import tensor_bytes

_ALIGNED = 64  # the tensors begin at a multiple of this
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def chunks(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """A file's bytes, in order. They share memory with the tensors.

    Raises:
        ValueError: the format has no such dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest elements first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].element_size())
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors files cannot hold")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(tensor_bytes(tensor) for _, tensor in ordered)]


def tensors(whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a file. They share memory with ``whole``, its bytes: uint8, shape (bytes,)."""
    length = int.from_bytes(whole[:8].numpy().tobytes(), "little")
    header = json.loads(whole[8 : 8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    data = whole[8 + length :]
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = _view(data[begin:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def _view(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not len(data):
        return torch.empty(0, dtype=dtype)
    aligned = data.data_ptr() % dtype.itemsize == 0 == data.storage_offset() % dtype.itemsize
    return (data if aligned else data.clone()).view(dtype)
