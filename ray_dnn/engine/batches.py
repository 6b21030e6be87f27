"""From a step and a virtual worker to tensors."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import is_dataclass
from typing import Any, Protocol

import pyarrow as pa
import torch

from ray_dnn.engine.rng import generator
from ray_dnn.sampler import RowOrder, Rows, Schedule, split_micro
from ray_dnn.strategies.base import Batch, Micro

Collate = Callable[[pa.Table, torch.Generator], Any]


class TableReader(Protocol):
    """Where rows come from."""

    def rows(self, row_ids: Rows) -> pa.Table:
        """The rows with these numbers, in this order."""

    def prefetch(self, row_ids: Rows) -> None:
        """These rows will be asked for soon."""


class BatchSource:
    """The batches of every virtual worker at every step: a pure function of the job."""

    def __init__(
        self,
        reader: TableReader,
        order: RowOrder,
        schedule: Schedule,
        collate: Collate,
        seed: int,
        microbatch_size: int | None,
    ):
        self.schedule = schedule
        self._reader = reader
        self._order = order
        self._collate = collate
        self._seed = seed
        self._microbatch_size = microbatch_size
        self._known: dict[int, dict[int, list[Rows]]] = {}  # row_ids by step and worker, from the step before on

    def row_ids(self, step: int, worker: int) -> list[Rows]:
        """The rows of each of a worker's batches of a step."""
        if step not in self._known:
            self._known = {other: ids for other, ids in self._known.items() if other >= step - 1} | {step: {}}
        known = self._known[step]
        if worker not in known:
            known[worker] = [self._order.at(p.epoch, p.start, p.stop) for p in self.schedule.pieces(step, worker)]
        return known[worker]

    def batches(self, step: int, worker: int) -> list[Batch]:
        """A worker's batches of a step, read and collated."""
        out = []
        for index, ids in enumerate(self.row_ids(step, worker)):
            sizes = split_micro(len(ids), self._microbatch_size, self.schedule.min_rows)
            table = self._reader.rows(ids) if len(ids) else None
            micros, at = [], 0
            for number, size in enumerate(sizes):
                assert table is not None
                rng = generator("collate", self._seed, step, worker, index, number)
                micros.append(Micro(align(self._collate(table.slice(at, size), rng)), size))
                at += size
            out.append(Batch(micros, ids))
        return out

    def prefetch(self, step: int, workers: range) -> None:
        """Start reading what these workers need in a step, if the job has such a step."""
        if step < self.schedule.total_steps:
            for worker in workers:
                for ids in self.row_ids(step, worker):
                    if len(ids):
                        self._reader.prefetch(ids)


def align(data: Any) -> Any:
    """Copy tensors that do not start at a multiple of 64 bytes: kernels choose their path by address."""
    if isinstance(data, torch.Tensor):
        return data.clone() if data.data_ptr() % 64 else data
    if type(data) in (list, tuple):
        return type(data)(align(item) for item in data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(align(item) for item in data))
    if isinstance(data, MutableMapping):
        for key, value in list(data.items()):
            data[key] = align(value)
    elif is_dataclass(data) and not isinstance(data, type):
        vars(data).update({name: align(value) for name, value in vars(data).items()})  # frozen ones too
    return data
