"""A dataset as units that can be read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray

from ray_dnn.sampler import NUMBERS, Rows


@dataclass(frozen=True)
class Unit:
    """A part of a dataset.

    Attributes:
        name: for people: a file, a row group, rows.
        rows: that it has, before transforms; None: nobody knows before it is read.
        size: bytes that it takes where it is stored; 0: unknown.
    """

    name: str
    rows: int | None
    size: int = 0


class Leaf(Protocol):
    """Where units come from. Travels to the tasks."""

    @property
    def units(self) -> Sequence[Unit]:
        """All units, in the dataset's order."""

    def read(self, index: int) -> Iterator[Any]:
        """A unit's rows, as blocks of Ray Data. Runs in a task."""


def numbered(table: pa.Table, first: int) -> pa.Table:
    """A table's rows with their numbers, which begin at ``first``."""
    return table.append_column(NUMBERS, pa.array(np.arange(first, first + table.num_rows, dtype=np.int64)))


@dataclass(frozen=True)
class Lot:
    """Consecutive rows of a stream, in the object store.

    Attributes:
        ref: to a block.
        start, stop: which of its rows.
        first: the number of the first one; None: the block holds their numbers.
        size: bytes of them, as far as known.
    """

    ref: Any
    start: int
    stop: int
    first: int | None = None
    size: int = 0

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def joined(self, other: Lot) -> Lot | None:
        """This lot and the one that follows it as one, where they lie together and are numbered through."""
        if self.first is None or self.ref != other.ref or self.stop != other.start:
            return None
        if self.first + self.rows != other.first:
            return None
        return replace(self, stop=other.stop)

    def load(self) -> pa.Table:
        """The rows, with their numbers."""
        return self.bare() if self.first is None else numbered(self.bare(), self.first)

    def bare(self) -> pa.Table:
        """The rows as they lie there."""
        from ray_dnn.feed.raydata import as_table

        return as_table(ray.get(self.ref)).slice(self.start, self.rows)


@dataclass(frozen=True)
class Branch:
    """A leaf and what is done with each of its units.

    Attributes:
        transform: from blocks to blocks; None: nothing is done.
        counted: whether it leaves the number of rows as it is.
        options: what its tasks ask Ray for.
    """

    leaf: Leaf
    transform: Callable[[Iterator[Any]], Iterator[Any]] | None = None
    counted: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether its rows are in the object store as they are."""
        return self.transform is None and isinstance(self.leaf, Held)


class Source:
    """A dataset.

    Attributes:
        name: in ``Trainer(datasets=…)``.
        branches: whose units make it up, one branch after the other.
        units: all of them, as (branch, index in it).
        counts: rows of each unit; None: some are not known before they are read. Shape: (units,).
    """

    def __init__(self, name: str, branches: Sequence[Branch]):
        self.name = name
        self.branches = tuple(branches)
        self.units = [(b, i) for b, branch in enumerate(self.branches) for i in range(len(branch.leaf.units))]
        self.counts: Rows | None = None
        rows = [u.rows if branch.counted else None for branch in self.branches for u in branch.leaf.units]
        if None not in rows:
            self.counts = np.array(rows, np.int64)

    @property
    def rows(self) -> int | None:
        """Of the dataset, if known."""
        return None if self.counts is None else int(self.counts.sum())

    @property
    def held(self) -> bool:
        """Whether all rows are in the object store as they are."""
        return all(branch.held for branch in self.branches)

    @cached_property
    def row_bytes(self) -> float:
        """Of an average row, as far as can be said before any is read."""
        units = [u for branch in self.branches for u in branch.leaf.units if u.rows]
        rows = sum(u.rows or 0 for u in units)
        return sum(u.size for u in units) / rows if rows else 0.0

    def unit(self, number: int) -> Unit:
        return self.branch(number).leaf.units[self.units[number][1]]

    def branch(self, number: int) -> Branch:
        """The branch that a unit belongs to."""
        return self.branches[self.units[number][0]]

    def lots(self, number: int, first: int) -> list[Lot]:
        """The rows of a unit of a branch that is held. ``first``: the number of the first one."""
        leaf = self.branch(number).leaf
        assert isinstance(leaf, Held)
        return leaf.lots(self.units[number][1], first)


class Held:
    """Rows in the object store.

    Args:
        refs: of blocks, in order.
        counts: rows of each block.
        sizes: rows of each unit.
        row_bytes: of an average row.
    """

    def __init__(self, refs: Sequence[Any], counts: Rows, sizes: Rows, row_bytes: float):
        self._refs = list(refs)
        self._ends = np.cumsum(counts)
        self._unit_ends = np.cumsum(sizes)
        self.units = [
            Unit(f"rows {end - size}..{end - 1}", int(size), int(size * row_bytes))
            for end, size in zip(self._unit_ends, sizes, strict=True)
        ]

    def lots(self, index: int, first: int = 0) -> list[Lot]:
        """Where a unit's rows lie. ``first``: the number of the first one."""
        stop = int(self._unit_ends[index])
        begin = at = stop - (self.units[index].rows or 0)
        found = []
        while at < stop:
            block = int(np.searchsorted(self._ends, at, side="right"))
            before = int(self._ends[block - 1]) if block else 0
            end = min(stop, int(self._ends[block]))
            found.append(Lot(self._refs[block], at - before, end - before, first + at - begin))
            at = end
        return found

    def read(self, index: int) -> Iterator[Any]:
        for lot in self.lots(index):
            yield lot.bare()
