"""Strategies that use all of the seam: local steps, and worker state of every kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ray_dnn import Batch, Combined, Contribution, Strategy


@dataclass(frozen=True)
class LocalSGD(Strategy):
    """Several plain SGD steps of each worker on its own, then the mean of where they arrived (Stich, 2019)."""

    steps: int = 3
    rate: float = 0.05

    @property
    def local_batches(self) -> int:
        return self.steps

    def contribute(
        self, state: Any, worker_state: Any, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Contribution, Any]:
        parameters = state.trainable()
        start = {name: p.detach().clone() for name, p in parameters.items()}
        weight, metrics = 0.0, {}
        for batch in batches:
            if not batch.rows:
                continue
            given = state.gradients(parameters, batch)
            weight += given.weight
            metrics = given.metrics
            with torch.no_grad():
                for name, parameter in parameters.items():
                    gradient = given.sums[name]
                    if gradient is not None:
                        parameter.sub_(gradient / given.weight, alpha=self.rate)
        with torch.no_grad():
            moved = {name: (start[name] - p) * weight for name, p in parameters.items()}
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        return Contribution(moved, weight, metrics), self.after(worker_state)

    def after(self, worker_state: Any) -> Any:
        return worker_state

    def apply(self, state: Any, combined: Combined) -> None:
        with torch.no_grad():
            for name, parameter in state.trainable().items():
                if name in combined.means:
                    parameter.sub_(combined.means[name])


@dataclass(frozen=True)
class CountingLocalSGD(LocalSGD):
    """Local SGD whose workers count their rounds, and every agent holds every count."""

    worker_state: ClassVar[Literal["none", "combined", "mirrored"]] = "combined"

    def init_worker(self, state: Any, worker: int) -> Any:
        return {"worker": worker, "rounds": 0}

    def after(self, worker_state: Any) -> Any:
        return {"worker": worker_state["worker"], "rounds": worker_state["rounds"] + 1}


@dataclass(frozen=True)
class ErrorFeedback(Strategy):
    """Gradients rounded to bfloat16; what rounding lost is kept by the worker and added to its next gradient."""

    worker_state: ClassVar[Literal["none", "combined", "mirrored"]] = "mirrored"
    rate: float = 0.1

    def init_worker(self, state: Any, worker: int) -> Any:
        return {name: torch.zeros_like(p) for name, p in state.trainable().items()}

    def contribute(
        self, state: Any, worker_state: Any, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Contribution, Any]:
        (batch,) = batches
        given = state.gradients(state.trainable(), batch)
        sent, kept = {}, {}
        for name, lost in worker_state.items():
            gradient = given.sums[name]
            whole = lost if gradient is None else gradient / given.weight + lost
            rounded = whole.to(torch.bfloat16).to(whole.dtype)
            sent[name], kept[name] = rounded * given.weight, whole - rounded
        return Contribution(sent, given.weight, given.metrics), kept

    def apply(self, state: Any, combined: Combined) -> None:
        with torch.no_grad():
            for name, parameter in state.trainable().items():
                parameter.sub_(combined.means[name], alpha=self.rate)
