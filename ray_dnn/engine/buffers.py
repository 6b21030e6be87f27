"""A model's buffers between steps, and what each virtual worker does to them.

Every contribution starts from the committed buffers. Afterwards only buffers whose bits changed count:

* floating point: the committed value plus the weighted mean of the workers' changes;
* integers and booleans: the value that the lowest-numbered worker which changed it gave it (so a BatchNorm's
  ``num_batches_tracked`` counts forward passes as one process would).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ray_dnn.comm.exchange import Vector
from ray_dnn.engine.device import CPU
from ray_dnn.engine.layout import Layout
from ray_dnn.errors import ConfigError


class _Owned(NamedTuple):
    """A buffer: the module and key that hold it, the tensor that belongs there, and its committed value."""

    module: nn.Module
    key: str
    tensor: torch.Tensor
    committed: torch.Tensor


class Buffers:
    """The buffers of a model with their committed values."""

    def __init__(self, model: nn.Module):
        self._owned: dict[str, _Owned] = {}
        self._shared: dict[str, list[_Owned]] = {}  # further places of the same tensor
        self._model = model
        self._holders = [module._buffers for module in model.modules()]
        self._count = self._there()
        first: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for key, tensor in module.named_buffers(recurse=False):
                name = f"{prefix}.{key}" if prefix else key
                if id(tensor) in first:
                    known = self._owned[first[id(tensor)]]
                    self._shared.setdefault(first[id(tensor)], [known]).append(_Owned(module, key, *known[2:]))
                    continue
                first[id(tensor)] = name
                if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
                    raise ConfigError(f"The buffer {name} is {tensor.dtype}, {tensor.layout}: not supported.")
                self._owned[name] = _Owned(module, key, tensor, tensor.clone())
        self.floats = [n for n, o in self._owned.items() if o.tensor.is_floating_point()]
        self.others = [n for n, o in self._owned.items() if not o.tensor.is_floating_point()]
        self.layout = Layout({name: self._owned[name].tensor for name in self.floats})

    def committed(self, name: str) -> torch.Tensor:
        return self._owned[name].committed

    def all_committed(self) -> dict[str, torch.Tensor]:
        """All of them, by name."""
        return {name: self.committed(name) for name in self.floats + self.others}

    def restore(self) -> None:
        """Give every buffer its committed value, also where a module put another tensor in its place."""
        for owned in self._owned.values():
            owned.module._buffers[owned.key] = owned.tensor
            owned.tensor.copy_(owned.committed)

    def commit(self) -> None:
        """Declare the present values committed."""
        for name, owned in self._owned.items():
            owned.committed.copy_(self._present(name))
        self.restore()

    def changed(self) -> set[str]:
        """The names of the buffers that differ by a bit from their committed values."""
        self._check_places()
        return {name for name in self._owned if not _same_bits(self._present(name), self._owned[name].committed)}

    def deltas(self, changed: set[str], weight: float, vector: Vector) -> None:
        """Write ``weight * (present - committed)`` of changed floats to their slots, and zeros to all others."""
        for name in self.floats:
            target = self.layout.view(vector, name)
            if name not in changed:
                target.zero_()
                continue
            old, new = self._owned[name].committed.to(CPU), self._present(name).to(CPU)
            same = (new == old) | (new.isnan() & old.isnan())
            # where() before the subtraction's result is used: inf - inf would be NaN in elements that did not change.
            if bool((~same & ~old.isfinite()).any()):
                raise ConfigError(
                    f"The buffer {name} went from infinity or NaN to another value. Changes of buffers are combined as "
                    "means of differences, which this has not. Start it with a finite value."
                )
            delta = torch.where(same, torch.zeros((), dtype=target.dtype), new.to(target.dtype) - old.to(target.dtype))
            torch.mul(delta, weight, out=target)

    def values(self, names: list[str]) -> list[torch.Tensor]:
        """Copies of present values, in host memory."""
        return [self._present(name).detach().to(CPU, copy=True) for name in names]

    def apply(self, changed: set[str], sums: Vector, weight: float, values: dict[str, torch.Tensor]) -> None:
        """Move the committed values by the combined changes (``sums / weight``), or to the given ``values``."""
        for name in self.floats:
            if name in changed and weight > 0:
                committed = self._owned[name].committed
                change = self.layout.view(sums, name) / weight
                committed.copy_(committed.to(CPU, change.dtype) + change)
        for name, value in values.items():
            self._owned[name].committed.copy_(value)
        self.restore()

    def _there(self) -> int:
        return sum(tensor is not None for holder in self._holders for tensor in holder.values())

    def _check_places(self) -> None:
        """Refuse new buffers, and shared ones that a module replaced for itself."""
        if self._there() > self._count:
            known = {id(tensor) for owned in self._owned.values() for tensor in (owned.tensor, self._now(owned))}
            new = [name for name, tensor in self._model.named_buffers() if id(tensor) not in known]
            raise ConfigError(
                f"The buffers {', '.join(new[:3])} appeared while a contribution was computed, so only the agent that "
                "computed it has them. Register them with their dtype and shape in the module's constructor."
            )
        for name, places in self._shared.items():
            if any(self._now(place) is not place.tensor for place in places):
                raise ConfigError(
                    f"The buffer {name} belongs to several modules, and one of them put another tensor in its place. "
                    "Change it in place."
                )

    @staticmethod
    def _now(owned: _Owned) -> torch.Tensor | None:
        return owned.module._buffers.get(owned.key)

    def _present(self, name: str) -> torch.Tensor:
        owned = self._owned[name]
        present = self._now(owned)
        if present is None or present.shape != owned.tensor.shape or present.dtype != owned.tensor.dtype:
            now = "None" if present is None else f"{present.dtype} of shape {tuple(present.shape)}"
            raise ConfigError(
                f"The buffer {name} was {owned.tensor.dtype} of shape {tuple(owned.tensor.shape)} and became {now}; "
                "buffers must keep their dtype and shape."
            )
        return present


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_contiguous() and other.is_contiguous():
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    return _same_bits(one.contiguous(), other.contiguous())
