"""Gradients as backward computes them: added up over microbatches, and handed over one by one when they are whole.

A gradient that is handed over during backward is combined while others are still computed, is copied while it is in
the cache, and its memory is free at once. That is right only if nothing is added to it any more. Backward accumulates
each parameter once, but for a few models (shared layers in autograd functions that call backward themselves). So the
job's first contribution counts, and what came more than once waits for the end from then on.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from ray_dnn.engine.outlet import Outlet
from ray_dnn.errors import ConfigError

_HALF = (torch.float16, torch.bfloat16)
_HANDED_OVER = torch.empty(0)


class Accumulator:
    """The sums of one contribution's gradients. Half precision is accumulated in float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], unscale: float):
        self._parameters = parameters
        self._unscale = unscale
        self._wide: dict[str, torch.Tensor] = {}  # float32 sums of half-precision gradients
        self._handed: set[str] = set()

    def microbatch_done(self) -> None:
        """Backward of a microbatch is done."""
        for name, parameter in self._parameters.items():
            self._widen(name, parameter)

    def _widen(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and parameter.dtype in _HALF:
            gradient = parameter.grad.to(torch.float32)
            self._wide[name] = self._wide[name] + gradient if name in self._wide else gradient
            parameter.grad = None

    def knows(self, name: str) -> bool:
        """Whether it adds up the gradient of this parameter."""
        return name in self._parameters

    def hand_over(self, name: str, outlet: Outlet) -> None:
        """A gradient is whole: give it away."""
        self._handed.add(name)
        outlet.give(name, self._take(name))

    def take_all(self) -> dict[str, torch.Tensor | None]:
        """The sums by name; None where nothing was touched. Leaves no gradient in the model."""
        return {name: _HANDED_OVER if name in self._handed else self._take(name) for name in self._parameters}

    def _take(self, name: str) -> torch.Tensor | None:
        parameter = self._parameters[name]
        self._widen(name, parameter)
        total = self._wide.pop(name, parameter.grad)
        if total is not None and total.layout != torch.strided:
            raise ConfigError(f"The gradient of {name} is sparse; use dense ones (Embedding(sparse=False)).")
        parameter.grad = None
        return total if total is None or self._unscale == 1.0 else total * self._unscale


class Handing:
    """Hands gradients over during backward, by hooks on all parameters.

    Attributes:
        outlet: where to; None: nowhere.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.outlet: Outlet | None = None
        self._sums: Accumulator | None = None  # during a backward whose gradients are final
        self._counts: Counter[str] | None = None  # how often each came, during the first such backward of a phase
        self._late: dict[str, frozenset[str]] = {}  # what came more than once then, by phase
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._accumulated, name))

    @contextlib.contextmanager
    def during(self, phase: str, sums: Accumulator) -> Iterator[None]:
        """During a backward that is the last one to add to these sums."""
        if self.outlet is None:
            yield
            return
        self._sums, self._phase = sums, phase
        self._counts = Counter() if phase not in self._late else None
        try:
            yield
            if self._counts is not None:
                self._late[phase] = frozenset(name for name, times in self._counts.items() if times > 1)
        finally:
            self._sums = None

    def _accumulated(self, name: str, parameter: torch.Tensor) -> None:
        if self._sums is None or not self._sums.knows(name):
            return
        if self._counts is not None:
            self._counts[name] += 1
        elif name not in self._late[self._phase]:
            assert self.outlet is not None
            self._sums.hand_over(name, self.outlet)
