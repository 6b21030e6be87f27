"""What an agent knows of the rows, and how it gets at them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from ray_dnn.errors import DataError
from ray_dnn.feed.raydata import concat
from ray_dnn.feed.source import Lot
from ray_dnn.sampler import NUMBERS

_TICK_S = 0.5  # between two looks whether rows are still wanted


@dataclass(frozen=True)
class Portion:
    """The rows of some consecutive steps.

    Attributes:
        first, last: the steps ``first..last``.
        counts: as of a `Deal`.
        tables: references to the rows of each virtual worker, step after step.
    """

    first: int
    last: int
    counts: NDArray[np.int32]
    tables: tuple[Any, ...]


@dataclass(frozen=True)
class Evaluated:
    """A part of a dataset that is evaluated.

    Attributes:
        name: of the dataset.
        index: of the part.
        lots: rows that follow those of the part before.
        complete: whether these are the last ones.
    """

    name: str
    index: int
    lots: tuple[Lot, ...]
    complete: bool


@dataclass(frozen=True)
class News:
    """What the driver tells agents about rows.

    Attributes:
        steps: of the whole job, once that is known.
    """

    portions: tuple[Portion, ...] = ()
    evaluated: tuple[Evaluated, ...] = ()
    steps: int | None = None


@dataclass
class _Dataset:
    """As far as it is known: lots, and where each ends."""

    parts: dict[int, Evaluated] = field(default_factory=dict)
    lots: list[Lot] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    complete: bool = False
    used: int = 0  # parts

    def add(self, part: Evaluated) -> None:
        self.parts[part.index] = part
        while (following := self.parts.get(self.used)) is not None:
            self.used += 1
            for lot in following.lots:
                self.lots.append(lot)
                self.ends.append((self.ends[-1] if self.ends else 0) + lot.rows)
            self.complete = following.complete


class Supply:
    """The rows that an agent may ask for. See `ray_dnn.engine.batches.Supply` and `ray_dnn.engine.evaluate.Evaluation`.

    Attributes:
        names: of the datasets that are evaluated.
    """

    def __init__(self) -> None:
        self.names: Sequence[str] = ()
        self._portions: list[Portion] = []  # in the order of steps; those that are over are dropped
        self._steps: int | None = None
        self._datasets: defaultdict[str, _Dataset] = defaultdict(_Dataset)
        self._fetched: dict[tuple[int, int], Future[pa.Table]] = {}  # by first step of the portion, and worker
        self._changed = threading.Condition()  # guards the four above
        self._pool = ThreadPoolExecutor(2, "ray_dnn-rows")
        self._over = 0  # steps below are not asked for any more
        self._last: tuple[Lot, pa.Table] | None = None  # the lot of a dataset that was read last

    def tell(self, news: News) -> None:
        """Take note of what the driver says. The same may be told twice, and in any order."""
        with self._changed:
            known = {portion.first for portion in self._portions}
            new = [p for p in news.portions if p.first not in known and p.last > self._over]
            self._portions = sorted([*self._portions, *new], key=lambda p: p.first)
            for part in news.evaluated:
                self._datasets[part.name].add(part)
            self._steps = news.steps if news.steps is not None else self._steps
            self._changed.notify_all()

    # -- training ------------------------------------------------------------------------------------------------------

    def wait(self, step: int, check: Callable[[], None]) -> bool:
        """See `ray_dnn.engine.batches.Supply.wait`."""
        self._until(lambda: self._find(step) is not None or (self._steps is not None and step >= self._steps), check)
        return self._steps is None or step < self._steps

    def counts(self, step: int, worker: int) -> tuple[int, ...]:
        """See `ray_dnn.engine.batches.Supply.counts`."""
        portion = self._portion(step)
        return tuple(int(n) for n in portion.counts[step - portion.first, :, worker] if n >= 0)

    def table(self, step: int, worker: int) -> pa.Table:
        """See `ray_dnn.engine.batches.Supply.table`."""
        portion = self._portion(step)
        with self._changed:
            fetched = self._fetch(portion, worker)
        index = step - portion.first
        counts = np.maximum(portion.counts[: index + 1, :, worker], 0)
        start = int(counts[:-1].sum())
        try:
            table = fetched.result()
        except Exception as error:  # a task's, or the loss of what it read from
            raise DataError(f"The rows of step {step}, virtual worker {worker} are not to be had: {error}") from error
        return table.slice(start, int(counts[-1].sum()))

    def prefetch(self, step: int, workers: range) -> None:
        """See `ray_dnn.engine.batches.Supply.prefetch`."""
        with self._changed:
            self._over = step - 2
            self._portions = [p for p in self._portions if p.last > self._over]
            firsts = {portion.first for portion in self._portions}
            self._fetched = {key: table for key, table in self._fetched.items() if key[0] in firsts}
            portion = self._find(step)
            if portion is None:
                return
            for worker in workers:
                self._fetch(portion, worker)
            following = self._find(portion.last)
            if following is not None and step == portion.last - 1:
                for worker in workers:
                    self._fetch(following, worker)

    def _find(self, step: int) -> Portion | None:
        return next((p for p in self._portions if p.first <= step < p.last), None)

    def _portion(self, step: int) -> Portion:
        with self._changed:
            portion = self._find(step)
        assert portion is not None, f"step {step} was not waited for"
        return portion

    def _fetch(self, portion: Portion, worker: int) -> Future[pa.Table]:
        key = portion.first, worker
        if key not in self._fetched:
            self._fetched[key] = self._pool.submit(ray.get, portion.tables[worker])
        return self._fetched[key]

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def rows(self, name: str, start: int, stop: int, check: Callable[[], None]) -> pa.Table:
        """See `ray_dnn.engine.evaluate.Evaluation.rows`."""
        dataset = self._datasets[name]
        self._until(lambda: dataset.complete or (bool(dataset.ends) and dataset.ends[-1] >= stop), check)
        with self._changed:
            lots, ends = list(dataset.lots), np.array(dataset.ends, np.int64)
        stop = min(stop, int(ends[-1]))
        tables = []
        while start < stop:
            index = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[index]) - lots[index].rows
            table = self._load(lots[index]).slice(start - begin, stop - start)
            tables.append(table)
            start += table.num_rows
        return concat(tables).combine_chunks() if tables else self._load(lots[0]).slice(0, 0)

    def _load(self, lot: Lot) -> pa.Table:
        if self._last is None or self._last[0] is not lot:
            self._last = lot, lot.load().drop_columns([NUMBERS])
        return self._last[1]

    def _until(self, there: Callable[[], bool], check: Callable[[], None]) -> None:
        with self._changed:
            while not there():
                check()
                self._changed.wait(_TICK_S)

    def wake(self) -> None:
        """Have whoever waits look whether it still should."""
        with self._changed:
            self._changed.notify_all()
