"""Letting the user look at the contributions of one step, while it is run again (see `ray_dnn.replay`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ray_dnn.engine import codec
from ray_dnn.engine.batches import BatchSource
from ray_dnn.engine.contribute import Contributor, Given, Leaf, guarded
from ray_dnn.engine.outlet import Ready
from ray_dnn.engine.rng import seed_everything
from ray_dnn.engine.state import TrainingState
from ray_dnn.strategies.base import Batch, Strategy, WorkerState


@dataclass(frozen=True)
class Seen:
    """What one virtual worker contributed in the step that is looked at.

    Where a GPU computes, model, batches and activations are in its memory. What `Look` returns comes back in
    the host's.

    Attributes:
        step, worker: whose contribution it is.
        phase: the optimizer whose turn it was, for jobs with several.
        rank: of the agent in its replica, for replicas of several agents, which each see their part.
        model: as it was before the step.
        rows: the rows that the worker used, as they were read, of type `pyarrow.Table`.
        row_ids: their numbers in the dataset, int64. Shape: (rows,).
        batches: what ``collate`` made of them.
        metrics: means over these rows; "loss" among them.
        weight: of the contribution: rows, tokens, or whatever the mean is over.
        gradients: by parameter, of the mean over these rows (for strategies that take local steps: what they give
            instead). Parameters that nothing depended on are not there.
        activations: by module, what it returned each time it was called, in order. Of the modules that were asked for.
    """

    step: int
    worker: int
    phase: str
    rank: int
    model: nn.Module
    rows: pa.Table
    row_ids: Any
    batches: Sequence[Batch]
    metrics: Mapping[str, float]
    weight: float
    gradients: Mapping[str, torch.Tensor]
    activations: Mapping[str, list[Any]]


Look = Callable[[Seen], Any]


@dataclass(frozen=True)
class Watch:
    """What is looked at.

    Attributes:
        look: called with each contribution; what it returns is kept.
        step: of these contributions.
        activations: names of modules whose activations are wanted, as `nn.Module.named_modules` gives them; ``*`` in
            a name stands for anything.
    """

    look: Look
    step: int
    activations: tuple[str, ...] = ()


class WatchedContributor(Contributor):
    """Computes the same contributions, and shows those of one step."""

    def __init__(self, state: TrainingState, strategy: Strategy, source: BatchSource, watch: Watch, rank: int = 0):
        super().__init__(state, strategy, source)
        self._watch, self._rank = watch, rank
        self._probing = False

    def first(self, worker: int = 0) -> tuple[Given, codec.Tree]:
        self._probing = True
        try:
            return super().first(worker)
        finally:
            self._probing = False

    def contribute(
        self, worker: int, worker_state: WorkerState, leaf: Leaf, agent: str = "", ready: Ready | None = None
    ) -> Given:
        watch = self._watch
        place = (self.state.phases.index(self.state.phase), worker, self._rank)
        # Where the sum is not finite, contributions are computed once more.
        wanted = self.state.step == watch.step and place not in self.seen and not self._probing
        if not wanted or not self.source.rows(watch.step, worker):
            return super().contribute(worker, worker_state, leaf, agent, ready)
        with _activations(self.state.model, watch.activations) as activations:
            given = super().contribute(worker, worker_state, leaf, agent, ready)
        seen = self._seen(worker, given, leaf, activations)
        where = f"agent {agent}, step {watch.step}, virtual worker {worker}"
        self.seen[place] = guarded("look", where, lambda: watch.look(seen))
        return given

    def _seen(self, worker: int, given: Given, leaf: Leaf, activations: dict[str, list[Any]]) -> Seen:
        step, source = self.state.step, self.source
        # Collated anew: those that the model has seen, it may have changed.
        seed_everything("collate", self.state.config.seed, step, worker)
        return Seen(
            step=step,
            worker=worker,
            phase=self.state.phase,
            rank=self._rank,
            model=self.state.model,
            rows=source.table(step, worker),
            row_ids=source.row_ids(step, worker),
            batches=source.batches(step, worker),
            metrics={name: total / weight for name, (total, weight) in given.metrics.items() if weight},
            weight=given.weight,
            gradients={name: leaf.slots[name] / (given.weight or 1.0) for name in leaf.slots if name in given.touched},
            activations=activations,
        )


@contextmanager
def _activations(model: nn.Module, patterns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Copies of what modules return meanwhile."""
    found: dict[str, list[Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, returned: Any) -> None:
            found.setdefault(name, []).append(tree_map_only(torch.Tensor, lambda t: t.detach().clone(), returned))

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
