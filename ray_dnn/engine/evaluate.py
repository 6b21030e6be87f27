"""Evaluation, split over agents, with the same bits for every number of them.

A dataset is cut into pieces of ``ceil(batch_size / virtual_workers)`` rows. Each piece is computed on its own by some
agent; the results are gathered and added in the order of the pieces in float64. Agents take turns at runs of pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa
import torch

from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine import codec
from ray_dnn.engine.batches import Collate, placed
from ray_dnn.engine.contribute import guarded
from ray_dnn.engine.loss import Pairs, as_pairs
from ray_dnn.engine.rng import generator, seed_everything
from ray_dnn.engine.state import TrainingState
from ray_dnn.marks import Marks
from ray_dnn.phases import Phase

Together = Callable[[Callable[[], list[bytes]]], list[bytes]]
Check = Callable[[], None]
_RUN_ROWS = 256  # of consecutive pieces that one agent computes; as many as make up so many rows, at least one


class Evaluation(Protocol):
    """Where the rows of datasets that are evaluated come from."""

    @property
    def names(self) -> Sequence[str]:
        """The datasets."""

    def rows(self, name: str, start: int, stop: int, check: Check) -> pa.Table:
        """The rows ``start..stop`` of a dataset; fewer at its end. May wait, and calls ``check`` meanwhile."""


class Evaluator:
    """Evaluates the model on every dataset but the training set."""

    def __init__(self, state: TrainingState, source: Evaluation, collate: Collate):
        self._state = state
        self._source = source
        self._collate = collate
        config = state.config
        self._piece = -(-config.batch_size // config.virtual_workers)
        self._run = max(1, _RUN_ROWS // self._piece)

    def run(self, mesh: Mesh, marks: Marks, together: Together, check: Check) -> dict[str, float]:
        """Metrics of all datasets, named ``dataset/metric``. Called by all members of the mesh together.

        Args:
            together: runs what may fail by the loss of a peer.
            check: raises where rows are not to be waited for any longer.
        """
        state = self._state
        state.model.eval()
        try:
            with torch.no_grad(), state.autocast():
                results = {name: self._dataset(name, mesh, marks, together, check) for name in self._source.names}
        finally:
            state.model.train()
            state.buffers.restore()
        return {f"{name}/{key}": value for name, metrics in results.items() for key, value in metrics.items()}

    def _dataset(self, name: str, mesh: Mesh, marks: Marks, together: Together, check: Check) -> dict[str, float]:
        mine = codec.encode(self._mine(name, mesh, marks, check))
        with marks.during(Phase.GATHERING):
            gathered = together(lambda: mesh.gather_variable(mine))
        everyone: dict[int, Pairs] = {}
        for raw in gathered:
            everyone |= codec.decode(raw)
        sums: dict[str, tuple[float, float]] = {}
        for _, pairs in sorted(everyone.items()):
            for key, (total, weight) in pairs.items():
                have = sums.get(key, (0.0, 0.0))
                sums[key] = (have[0] + total, have[1] + weight)
        return {key: total / weight if weight else float("nan") for key, (total, weight) in sums.items()}

    def _mine(self, name: str, mesh: Mesh, marks: Marks, check: Check) -> dict[int, Pairs]:
        """What the pieces of this agent give, by piece."""
        found: dict[int, Pairs] = {}
        first = mesh.rank * self._run
        while True:
            with marks.during(Phase.SUPPLY):
                table = self._source.rows(name, first * self._piece, (first + self._run) * self._piece, check)
            for index in range(-(-table.num_rows // self._piece)):
                piece = table.slice(index * self._piece, self._piece)
                found[first + index] = self._compute(name, piece, first + index)
            if table.num_rows < self._run * self._piece:
                return found
            first += mesh.size * self._run

    def _compute(self, name: str, table: pa.Table, piece: int) -> Pairs:
        state = self._state
        evaluate = state.spec.evaluate
        assert evaluate is not None
        seed_everything("evaluate", state.config.seed, state.step, name, piece)
        rng = generator("evaluate collate", state.config.seed, name, piece)

        def call() -> Pairs:
            batch: Any = placed(self._collate(table, rng), state.device)
            return as_pairs(evaluate(state.model, batch), table.num_rows, "evaluate")

        first = piece * self._piece
        where = f"dataset {name!r}, rows {first}..{first + table.num_rows - 1}, step {state.step}"
        return guarded("evaluate", where, call)
