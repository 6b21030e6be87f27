"""Evaluation, split over agents, with the same bits for every number of them.

A dataset is cut into pieces of ``ceil(batch_size / virtual_workers)`` rows. Each piece is computed on its own by some
agent; the results are gathered and added in the order of the pieces in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine import codec
from ray_dnn.engine.batches import Collate, TableReader, align
from ray_dnn.engine.contribute import guarded
from ray_dnn.engine.loss import Pairs, as_pairs
from ray_dnn.engine.rng import generator, seed_everything
from ray_dnn.engine.state import TrainingState
from ray_dnn.marks import Marks
from ray_dnn.phases import Phase

Together = Callable[[Callable[[], list[bytes]]], list[bytes]]


class Evaluator:
    """Evaluates the model on every dataset but the training set."""

    def __init__(self, state: TrainingState, readers: Mapping[str, tuple[TableReader, int]], collate: Collate):
        self._state = state
        self._readers = readers  # with their numbers of rows
        self._collate = collate
        config = state.config
        self._piece = -(-config.batch_size // config.virtual_workers)

    def run(self, mesh: Mesh, marks: Marks, together: Together) -> dict[str, float]:
        """Metrics of all datasets, named ``dataset/metric``. Called by all members of the mesh together.

        ``together`` runs what may fail by the loss of a peer.
        """
        state = self._state
        state.model.eval()
        try:
            with torch.no_grad(), state.autocast():
                results = {name: self._dataset(name, mesh, marks, together) for name in self._readers}
        finally:
            state.model.train()
            state.buffers.restore()
        return {f"{name}/{key}": value for name, metrics in results.items() for key, value in metrics.items()}

    def _dataset(self, name: str, mesh: Mesh, marks: Marks, together: Together) -> dict[str, float]:
        reader, rows = self._readers[name]
        pieces = -(-rows // self._piece)
        begin, end = pieces * mesh.rank // mesh.size, pieces * (mesh.rank + 1) // mesh.size
        mine = [self._compute(name, reader, piece, rows, marks) for piece in range(begin, end)]
        everyone: list[Pairs] = []
        with marks.during(Phase.GATHERING):
            gathered = together(lambda: mesh.gather_variable(codec.encode(mine)))
        for raw in gathered:
            everyone += codec.decode(raw)
        sums: dict[str, tuple[float, float]] = {}
        for pairs in everyone:
            for key, (total, weight) in pairs.items():
                have = sums.get(key, (0.0, 0.0))
                sums[key] = (have[0] + total, have[1] + weight)
        return {key: total / weight if weight else float("nan") for key, (total, weight) in sums.items()}

    def _compute(self, name: str, reader: TableReader, piece: int, rows: int, marks: Marks) -> Pairs:
        state = self._state
        ids = np.arange(piece * self._piece, min(rows, (piece + 1) * self._piece), dtype=np.int64)
        evaluate = state.spec.evaluate
        assert evaluate is not None
        seed_everything("evaluate", state.config.seed, state.step, name, piece)
        rng = generator("evaluate collate", state.config.seed, name, piece)

        def call() -> Pairs:
            batch: Any = align(self._collate(table, rng))
            return as_pairs(evaluate(state.model, batch), len(ids), "evaluate")

        with marks.during(Phase.READING):
            table: pa.Table = reader.rows(ids)
        return guarded(f"evaluate, dataset {name!r}, rows {ids[0]}..{ids[-1]}, step {state.step}", call)
