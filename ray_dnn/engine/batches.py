"""From a step and a virtual worker to tensors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import is_dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from ray_dnn.engine.device import CPU
from ray_dnn.engine.rng import generator
from ray_dnn.sampler import NUMBERS, Rows, split_micro
from ray_dnn.strategies.base import Batch, Micro

Collate = Callable[[pa.Table, torch.Generator], Any]


class Supply(Protocol):
    """Where the rows of every virtual worker at every step come from."""

    def wait(self, step: int, check: Callable[[], None]) -> bool:
        """Wait until the rows of a step are known. Returns whether the job has such a step.

        ``check``: called again and again meanwhile; raises where it is not to wait any longer.
        """

    def counts(self, step: int, worker: int) -> tuple[int, ...]:
        """How many rows each of a worker's batches of a step has. The step is known."""

    def table(self, step: int, worker: int) -> pa.Table:
        """All rows of a worker in a step, batch after batch, with their `NUMBERS`. There are some."""

    def prefetch(self, step: int, workers: range) -> None:
        """These will be asked for soon, and none of the steps before the last one."""


class BatchSource:
    """The batches of every virtual worker at every step.

    Attributes:
        waited_s: how long rows were waited for, in all.
    """

    def __init__(
        self,
        supply: Supply,
        collate: Collate,
        seed: int,
        microbatch_size: int | None,
        min_rows: int,
        device: torch.device = CPU,
    ):
        """``device``: where batches are computed with."""
        self._supply = supply
        self._collate = collate
        self._seed = seed
        self._microbatch_size = microbatch_size
        self._min_rows = min_rows
        self._device = device
        self.prefetch = supply.prefetch
        self.waited_s = 0.0

    def wait(self, step: int, check: Callable[[], None]) -> bool:
        """See `Supply.wait`."""
        with self._waiting():
            return self._supply.wait(step, check)

    def rows(self, step: int, worker: int) -> int:
        """How many rows a worker has in a step."""
        return sum(self._supply.counts(step, worker))

    def row_ids(self, step: int, worker: int) -> Rows:
        """The numbers of a worker's rows in a step. Shape: (rows,)."""
        return _numbers(self._supply.table(step, worker))

    def table(self, step: int, worker: int) -> pa.Table:
        """A worker's rows of a step, as they were read."""
        return self._supply.table(step, worker).drop_columns([NUMBERS])

    def batches(self, step: int, worker: int) -> list[Batch]:
        """A worker's batches of a step, read and collated."""
        out = []
        with self._waiting():
            whole = self._supply.table(step, worker)
        ids, table = _numbers(whole), whole.drop_columns([NUMBERS])
        at = 0
        for index, count in enumerate(self._supply.counts(step, worker)):
            micros, begin = [], at
            for number, size in enumerate(split_micro(count, self._microbatch_size, self._min_rows)):
                rng = generator("collate", self._seed, step, worker, index, number)
                micros.append(Micro(placed(self._collate(table.slice(at, size), rng), self._device), size))
                at += size
            out.append(Batch(micros, ids[begin:at]))
        return out

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began


def _numbers(table: pa.Table) -> Rows:
    return np.asarray(as_numpy(table.column(NUMBERS).combine_chunks()), np.int64)


def as_numpy(array: pa.Array) -> Any:
    """An array of numbers, in the same memory where it can be.

    ``pa.Array.to_numpy`` loads pandas when it is called first, which takes a fresh agent a quarter of a second.
    """
    if array.null_count or pa.types.is_boolean(array.type):
        return array.to_numpy(zero_copy_only=False)
    return np.from_dlpack(array)


def placed(data: Any, device: torch.device = CPU) -> Any:
    """A batch as it is computed with: in memory that is aligned to 64 bytes, for kernels choose their path by address.

    Where a GPU computes: in its memory, which is. Whatever has a method ``to`` is moved by it.
    """
    if device != CPU and callable(getattr(data, "to", None)):
        return data.to(device)
    if isinstance(data, torch.Tensor):
        return data.clone() if data.data_ptr() % 64 else data
    if type(data) in (list, tuple):
        return type(data)(placed(item, device) for item in data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(placed(item, device) for item in data))
    if isinstance(data, MutableMapping):
        for key, value in list(data.items()):
            data[key] = placed(value, device)
    elif is_dataclass(data) and not isinstance(data, type):
        vars(data).update({name: placed(value, device) for name, value in vars(data).items()})  # frozen ones too
    return data
