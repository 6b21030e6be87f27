"""State as bytes, without executing anything: a JSON description and raw tensor memory.

A *tree* is built of dict (keys: str or int), list, tuple, str, int, float, bool, None and tensors. It is what
optimizer, schedule and extra states are made of; anything else is refused by the path at which it stands.

A tree becomes bytes as a whole (`encode`), or is taken apart (`take_apart`): into a head, which is small, and its large
tensors, which are not copied. `ray_dnn.engine.stream` moves those.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ray_dnn.errors import ConfigError

Tree = Any

_ALIGN = 64
_LARGE_BYTES = 4096  # tensors above this are no part of a head
_LENGTH = struct.Struct("<q")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor in row-major order, little-endian. Shape of the view: (bytes,)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def encode(tree: Tree, where: str = "state") -> bytes:
    """A tree as bytes.

    Raises:
        ConfigError: something in it is not a tensor, a number, a string, or a container of these.
    """
    return b"".join(_parts(tree, where))


def take_apart(tree: Tree, where: str = "state") -> tuple[bytes, list[torch.Tensor]]:
    """A tree as a head and its large tensors. These are the tree's own, not copies; `Outline` reads the head.

    Raises:
        ConfigError: as `encode`.
    """
    large: list[torch.Tensor] = []
    return b"".join(_parts(tree, where, large)), large


def _parts(tree: Tree, where: str, large: list[torch.Tensor] | None = None) -> Iterator[bytes | memoryview]:
    tensors: list[torch.Tensor] = []
    spec = _describe(tree, tensors, where, large)
    head = json.dumps({"spec": spec, "tensors": [_head(t) for t in tensors]}).encode()
    yield _LENGTH.pack(len(head))
    yield head
    at = _LENGTH.size + len(head)
    for tensor in tensors:
        pad = -at % _ALIGN
        data = tensor_bytes(tensor)
        yield bytes(pad)
        yield data
        at += pad + len(data)


def check(tree: Tree, where: str = "state") -> None:
    """Raise what `encode` would raise, without copying any tensor."""
    _describe(tree, [], where)


def decode(data: bytes | bytearray | memoryview) -> Tree:
    """What `encode` was given. Tensors are fresh copies in memory of their own."""
    return _rebuild(*_read(data), [])


class Outline:
    """A tree that was taken apart, without its large tensors."""

    def __init__(self, head: bytes | bytearray | memoryview):
        self._spec, self._small = _read(head)

    def memory(self, home: Tree = None) -> list[torch.Tensor]:
        """Tensors for the large ones of the tree to be copied to, as they lay in memory there.

        Where ``home`` has a tensor of the same shape, dtype and strides at the same place, in host memory, it is that
        one; else it is a fresh one.
        """
        found: list[torch.Tensor] = []
        _find_memory(self._spec, home, found)
        return found

    def put_together(self, large: list[torch.Tensor]) -> Tree:
        """The tree, with these large tensors."""
        return _rebuild(self._spec, self._small, large)


def _find_memory(spec: Any, home: Tree, found: list[torch.Tensor]) -> None:
    if not isinstance(spec, dict):
        return
    ((kind, value),) = spec.items()
    if kind == "m":
        _, name, shape, strides = value
        found.append(home if _is_like(home, name, shape, strides) else _empty(name, shape, strides))
    elif kind == "d":
        for key, item in value:
            _find_memory(item, home.get(key) if isinstance(home, Mapping) else None, found)
    elif kind in "lu":
        for index, item in enumerate(value):
            there = isinstance(home, list | tuple) and index < len(home)
            _find_memory(item, home[index] if there else None, found)


def _is_like(tensor: Tree, name: str, shape: list[int], strides: list[int] | None) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
        return False
    if tensor.dtype != getattr(torch, name) or list(tensor.shape) != shape:
        return False
    return tensor.is_contiguous() if strides is None else list(tensor.stride()) == strides


def _empty(name: str, shape: list[int], strides: list[int] | None) -> torch.Tensor:
    dtype = getattr(torch, name)
    return torch.empty(shape, dtype=dtype) if strides is None else torch.empty_strided(shape, strides, dtype=dtype)


def raw(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor as it lies there; of a copy without gaps where there are gaps in it.

    Tensors that `Outline.memory` gave lie in memory like those that were taken apart. Shape of the view: (bytes,).
    """
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    dense = tensor.detach().permute(order)
    return tensor_bytes(dense) if dense.is_contiguous() else raw(torch.empty_like(tensor).copy_(tensor))


def _read(data: bytes | bytearray | memoryview) -> tuple[Any, list[torch.Tensor]]:
    """The description and the tensors that `_parts` wrote."""
    view = memoryview(data)
    (length,) = _LENGTH.unpack(view[: _LENGTH.size])
    at = _LENGTH.size + length
    head = json.loads(bytes(view[_LENGTH.size : at]))
    tensors = []
    for name, shape, strides in head["tensors"]:
        at += -at % _ALIGN
        tensor = _empty(name, shape, None)
        if size := tensor.numel() * tensor.element_size():
            target = tensor.reshape(-1).view(torch.uint8).numpy().data
            target[:] = view[at : at + size]
            at += size
        if strides is not None:
            tensor = _empty(name, shape, strides).copy_(tensor)
        tensors.append(tensor)
    return head["spec"], tensors


def digest(tree: Tree) -> str:
    """SHA-256 of a tree, equal exactly when every value, every bit and the order of elements in memory are."""
    sha = hashlib.sha256()
    for part in _parts(tree, "state"):
        sha.update(part)
    return sha.hexdigest()


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over sorted (name, dtype, shape, little-endian bytes)."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def first_difference(one: Tree, other: Tree, where: str = "") -> str | None:
    """The path of the first place at which two trees differ by a bit; None where they are equal."""
    left, right = leaf_digests(one, where), leaf_digests(other, where)
    return next((path for path in left | right if left.get(path) != right.get(path)), None)


def leaf_digests(tree: Tree, where: str = "") -> dict[str, str]:
    """The digest of everything in a tree that is no container, by path."""
    return {path: digest(leaf) for path, leaf in _leaves(tree, where)}


def _leaves(tree: Tree, path: str) -> Iterator[tuple[str, Tree]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, tree


def _strides(tensor: torch.Tensor) -> list[int] | None:
    """The strides of a copy; None for row-major order. Fused optimizers depend on them."""
    copy = tensor if tensor.is_contiguous() else torch.empty_like(tensor, device="meta")
    return None if copy.is_contiguous() else list(copy.stride())


def _head(tensor: torch.Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _strides(tensor)]


def _describe(tree: Tree, tensors: list[torch.Tensor], where: str, large: list[torch.Tensor] | None = None) -> Any:
    """What stands at a place of a tree, with numbers for tensors; these are put into one of the two lists."""
    if isinstance(tree, torch.Tensor):
        if tree.layout != torch.strided or tree.is_quantized:
            raise ConfigError(f"{where} is a {tree.layout} tensor; only dense tensors can be kept in state.")
        if large is not None and tree.numel() * tree.element_size() > _LARGE_BYTES:
            large.append(tree)
            return {"m": [len(large) - 1, *_head(tree)]}
        tensors.append(tree)
        return {"t": len(tensors) - 1}
    if isinstance(tree, np.floating | np.integer | np.bool_) and tree.itemsize <= 8:
        # Kept as what it is: a float32 computes otherwise than the float of the same value.
        return {"n": [tree.dtype.str, tree.item()]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Mapping):
        if bad := [key for key in tree if not isinstance(key, str | int)]:
            raise ConfigError(f"{where} has the key {bad[0]!r}; keys must be strings or whole numbers.")
        return {"d": [[key, _describe(value, tensors, f"{where}.{key}", large)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [_describe(value, tensors, f"{where}[{i}]", large) for i, value in enumerate(tree)]
        return {"u" if isinstance(tree, tuple) else "l": items}
    raise ConfigError(
        f"{where} is a {type(tree).__module__}.{type(tree).__qualname__}; state may hold tensors, numbers, strings, "
        "None, and dicts, lists and tuples of these. Give the object a state_dict made of them."
    )


def _rebuild(spec: Any, tensors: list[torch.Tensor], large: list[torch.Tensor]) -> Tree:
    if not isinstance(spec, dict):
        return spec
    ((kind, value),) = spec.items()
    if kind == "t":
        return tensors[value]
    if kind == "m":
        return large[value[0]]
    if kind == "n":
        return np.dtype(value[0]).type(value[1])
    if kind == "d":
        return {key: _rebuild(item, tensors, large) for key, item in value}
    items = [_rebuild(item, tensors, large) for item in value]
    return tuple(items) if kind == "u" else items
