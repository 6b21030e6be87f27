"""Synchronous data parallelism: the gradient of the mean loss over the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ray_dnn.parallel import clip_gradients, current_group
from ray_dnn.strategies.base import Batch, Combined, Contribution, Strategy, WorkerState

if TYPE_CHECKING:
    from ray_dnn.engine.state import TrainingState


@dataclass(frozen=True)
class DataParallel(Strategy):
    """What one process would do with the whole batch, divided over virtual workers."""

    only_reads: ClassVar[bool] = True
    hands_over: ClassVar[bool] = True

    def contribute(
        self, state: TrainingState, worker_state: WorkerState, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Contribution, WorkerState]:
        (batch,) = batches
        parameters = state.trainable()
        gradients = state.gradients(parameters, batch, final=True)
        return Contribution(gradients.sums, gradients.weight, gradients.metrics), worker_state

    def apply(self, state: TrainingState, combined: Combined) -> None:
        parameters = state.trainable()
        for name, parameter in parameters.items():
            mean = combined.means.get(name)
            # None, not zeros, for what nobody touched: AdamW moves weights on a zero gradient.
            parameter.grad = None if mean is None else _like(parameter, mean)
        if state.config.clip_norm is not None:
            clip_gradients(parameters.values(), state.config.clip_norm, current_group())
        state.optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None


def _like(parameter: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The mean in the parameter's dtype and order of elements, which fused optimizers take for granted."""
    if parameter.is_contiguous():
        return mean.to(parameter.dtype)
    return torch.empty_like(parameter).copy_(mean)
