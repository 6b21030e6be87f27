"""Calling the user's loss, and what it may return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ray_dnn.config import Loss
from ray_dnn.errors import ConfigError

Pairs = dict[str, tuple[float, float]]


@dataclass
class GradientSums:
    """Gradients of a sum of losses.

    Attributes:
        sums: by parameter name; None where the loss did not touch the parameter.
        weight: what was summed over.
        metrics: (total, weight) by name.
    """

    sums: dict[str, torch.Tensor | None]
    weight: float
    metrics: Pairs


def as_sum(value: Any, rows: int, name: str) -> Loss:
    """A loss function's result as a sum: a mean over rows becomes total and weight."""
    if isinstance(value, Loss):
        _scalar(value.total, f"{name}: Loss.total")
        return replace(value, total=value.total.to(torch.promote_types(value.total.dtype, torch.float32)))
    _scalar(value, name)
    # A mean in half precision would lose bits, or overflow, when it is multiplied.
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return Loss(total=wide * rows, weight=rows)


def as_pairs(values: Mapping[str, Any], rows: int, name: str) -> Pairs:
    """Metrics as (total, weight): row means are weighted by rows."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} returned {type(values).__name__}; it must return a dict of names and scalars.")
    pairs = {}
    for key, value in values.items():
        if isinstance(value, tuple):
            total, weight = value
        elif isinstance(value, Loss):
            total, weight = value.total, value.weight
        else:
            total, weight = number(value) * rows, rows
        pairs[str(key)] = (number(total), number(weight))
    return pairs


def number(value: torch.Tensor | float) -> float:
    """A scalar as a Python float."""
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def add_pairs(into: Pairs, more: Pairs) -> None:
    """Add metrics of another microbatch."""
    for name, (total, weight) in more.items():
        have = into.get(name, (0.0, 0.0))
        into[name] = (have[0] + total, have[1] + weight)


def _scalar(value: Any, name: str) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = (
            f"a {value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        )
        raise ConfigError(f"{name} is {got}; it must be a floating-point tensor with one element.")
