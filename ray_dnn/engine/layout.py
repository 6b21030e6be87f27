"""Where each named tensor lies in a flat vector."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ray_dnn.comm.exchange import Vector
from ray_dnn.comm.shared import SharedMemory
from ray_dnn.errors import ConfigError

LANES = (torch.float32, torch.float64)
_ALIGN_ELEMENTS = 16  # 64 bytes in float32


class Slot(NamedTuple):
    """A tensor's place: its lane, the offset there in elements, and its shape."""

    lane: int
    offset: int
    shape: torch.Size

    @property
    def numel(self) -> int:
        return self.shape.numel()


class Layout:
    """Slots for named floating-point tensors, at multiples of 64 bytes, in lanes of float32 and float64.

    Half precision is accumulated in float32.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.slots: dict[str, Slot] = {}
        self.lengths = [0, 0]
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ConfigError(f"{name} has dtype {tensor.dtype}; only real floating-point tensors can be combined.")
            lane = 1 if tensor.dtype == torch.float64 else 0
            self.slots[name] = Slot(lane, self.lengths[lane], tensor.shape)
            self.lengths[lane] += -(-tensor.numel() // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
        text = repr([(n, s.lane, s.offset, tuple(s.shape)) for n, s in self.slots.items()])
        self.hash = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def zeros(self, memory: SharedMemory | None = None) -> Vector:
        """A fresh vector. The gaps between slots stay zero for ever."""
        make = memory.zeros if memory else lambda length, dtype: torch.zeros(length, dtype=dtype)
        return [make(length, dtype) for length, dtype in zip(self.lengths, LANES, strict=True)]

    def view(self, vector: Vector, name: str) -> torch.Tensor:
        """The slot of a name, in the tensor's shape."""
        slot = self.slots[name]
        return vector[slot.lane][slot.offset : slot.offset + slot.numel].view(slot.shape)

    def extent(self, name: str) -> tuple[int, int, int]:
        """The lane of a slot, and where it begins and ends there, with the gap behind it."""
        slot = self.slots[name]
        return slot.lane, slot.offset, slot.offset + -(-slot.numel // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
