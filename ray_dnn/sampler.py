"""Which rows a step uses, in which order, and which virtual worker gets which: pure functions of the job.

The order of an epoch is never stored. A row's place comes from a keyed permutation that is evaluated where it is
needed (a Feistel network with cycle walking: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so any
position of any epoch is known at once and costs no memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_dnn.config import TrainConfig

Rows = NDArray[np.int64]

NUMBERS = "__row_number__"  # the column of a table that holds its rows' numbers

UNIT_ROWS = 1024
_ROUNDS = 6
_FIRST_WINDOW = 16  # times smaller than a whole one
_UNIT_BITS = 32  # of a row's number, for its place in its unit
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def derive_seed(*parts: int | str, bits: int = 64) -> int:
    """A number of ``bits`` bits from any names and numbers. The same parts give the same number everywhere."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[: bits // 8], "little")


def permute(index: Rows, size: int, key: int) -> Rows:
    """Where a keyed permutation of ``0..size`` sends each index. ``index``: any shape, int64, in ``0..size``."""
    if size <= 1:
        return index.copy()
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_seed("round", r, key)) for r in range(_ROUNDS)]
    out = index.astype(np.uint64)
    walking = np.arange(out.size)
    flat = out.reshape(-1)
    while walking.size:  # values that fell outside of 0..size walk on along their cycle until they are inside
        values = flat[walking]
        left, right = values >> half, values & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        values = (left << half) | right
        flat[walking] = values
        walking = walking[values >= np.uint64(size)]
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014); wraps around modulo 2**64 by intent."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class RowOrder:
    """The order of the rows of every epoch.

    A dataset is a sequence of units (a row group, a few small files, a thousand rows in memory), each with some rows.
    An epoch reads all units, one after the other: that is its stream, in which a row has a place. The epoch's order
    says which place comes at which position.

    Attributes:
        seed: of the job.
        shuffle: "none": units in their order, rows as they come. "windowed": units in a random order; the stream is
            cut into windows, and rows are in random order inside each. "global": one permutation of all rows.
        window: rows in a window. The first ones are smaller, so that an epoch begins soon (see `window_at`).
    """

    seed: int
    shuffle: str
    window: int

    def units(self, epoch: int, count: int) -> Rows:
        """The numbers of all units in the order in which an epoch reads them. Shape: (count,)."""
        places = np.arange(count, dtype=np.int64)
        if self.shuffle != "windowed":
            return places
        return permute(places, count, derive_seed("units", self.seed, epoch))

    def window_at(self, position: int) -> tuple[int, int]:
        """Where the window that holds a position begins, and where it ends if the stream is long enough.

        A sixteenth of a window comes first, then an eighth, and so on up to whole ones.
        """
        start, size = 0, max(1, self.window // _FIRST_WINDOW)
        while size < self.window and position >= start + size:
            start, size = start + size, min(2 * size, self.window)
        if size == self.window:
            start += (position - start) // size * size
        return start, start + size

    def span(self, start: int, stop: int) -> tuple[int, int | None]:
        """The places that positions ``start..stop`` are taken from: from where to where, or to the stream's end."""
        if self.shuffle == "none":
            return start, stop
        if self.shuffle == "global":
            return 0, None
        return self.window_at(start)[0], self.window_at(stop - 1)[1]

    def places(self, epoch: int, start: int, stop: int, rows: int) -> Rows:
        """The places of positions ``start..stop``. Shape: (stop - start,).

        Args:
            rows: in the stream; where that is not known yet, how many there are at least, `span` included.
        """
        positions = np.arange(start, stop, dtype=np.int64)
        if self.shuffle == "none":
            return positions
        if self.shuffle == "global":
            return permute(positions, rows, derive_seed("rows", self.seed, epoch, 0))
        out = np.empty_like(positions)
        at = start
        while at < stop:
            begin, end = self.window_at(at)
            end = min(end, rows)
            until = min(end, stop)
            inside = positions[at - start : until - start] - begin
            row_key = derive_seed("rows", self.seed, epoch, begin)
            out[at - start : until - start] = begin + permute(inside, end - begin, row_key)
            at = until
        return out


class Numbering:
    """The numbers of a dataset's rows.

    Where all units' rows are counted beforehand, rows are numbered through from 0. Else a row's number is its unit's
    times 2**32, plus its place in the unit.

    Attributes:
        counts: rows of each unit, or None. Shape: (units,).
    """

    def __init__(self, counts: Rows | None):
        self.counts = counts
        self._bases = None if counts is None else np.cumsum(counts) - counts

    def first(self, unit: int) -> int:
        """The number of a unit's first row."""
        return unit << _UNIT_BITS if self._bases is None else int(self._bases[unit])


class Epoch:
    """The stream of one epoch, as far as its units' rows are counted.

    Attributes:
        units: their numbers, in the order in which they come. Shape: (units,).
        counted: how many of them are counted.
    """

    def __init__(self, order: RowOrder, epoch: int, units: int, numbering: Numbering):
        self._order, self._epoch, self._numbering = order, epoch, numbering
        self.units = order.units(epoch, units)
        # Where each unit counted so far begins, where the next one does, and where that one ends as far as is known.
        self._starts = np.zeros(units + 1, np.int64)
        self._firsts = np.zeros(units, np.int64)  # the numbers of their first rows
        self.counted = 0

    @property
    def rows(self) -> int:
        """Counted so far."""
        return int(self._starts[self._begun])

    @property
    def _begun(self) -> int:
        """Units of which rows are counted."""
        return min(self.counted + 1, len(self.units))

    @property
    def complete(self) -> bool:
        """Whether all units are counted."""
        return self.counted == len(self.units)

    def add(self, rows: int) -> None:
        """The next unit has so many rows, or more."""
        self._firsts[self.counted] = self._numbering.first(int(self.units[self.counted]))
        self._starts[self.counted + 1] += rows

    def end(self) -> None:
        """The next unit has no more rows than were added."""
        self.counted += 1
        if not self.complete:
            self._starts[self.counted + 1] = self._starts[self.counted]

    def count(self, rows: int) -> None:
        """The next unit has so many rows."""
        self.add(rows)
        self.end()

    def count_all(self, counts: Rows) -> Epoch:
        """Count all units. ``counts``: by the number of the unit."""
        for unit in self.units[self.counted :]:
            self.count(int(counts[unit]))
        return self

    def numbers(self, start: int, stop: int) -> Rows:
        """The numbers of the rows at positions ``start..stop`` of the epoch. Shape: (stop - start,)."""
        places = self._order.places(self._epoch, start, stop, self.rows)
        units = np.searchsorted(self._starts[1 : self._begun + 1], places, side="right")
        return self._firsts[units] + places - self._starts[units]


class Counted:
    """The order of a dataset whose units' rows are all counted.

    Args:
        counts: rows of each unit. Shape: (units,).
        through: whether rows are numbered through (see `Numbering`).
    """

    def __init__(self, order: RowOrder, counts: Rows, through: bool = True):
        self._order, self._counts, self._numbering = order, counts, Numbering(counts if through else None)
        self._epoch: tuple[int, Epoch] | None = None  # the last one that was asked for

    def at(self, epoch: int, start: int, stop: int) -> Rows:
        """The numbers of the rows at positions ``start..stop`` of an epoch. Shape: (stop - start,)."""
        if self._epoch is None or self._epoch[0] != epoch:
            stream = Epoch(self._order, epoch, len(self._counts), self._numbering)
            self._epoch = epoch, stream.count_all(self._counts)
        return self._epoch[1].numbers(start, stop)


def even_units(rows: int, size: int = UNIT_ROWS) -> Rows:
    """The rows of each unit of a dataset that has no units by nature. Shape: (units,)."""
    starts = np.arange(0, rows, size, dtype=np.int64)
    return np.minimum(rows - starts, size)


def split_evenly(rows: int, parts: int, least: int) -> tuple[int, ...]:
    """Split ``rows`` over ``parts`` as evenly as possible, no part with 1..least-1 rows. Earlier parts get more.

    Fewer than ``least`` rows in all cannot be split: they go to the first part together.
    """
    active = max(1, min(parts, rows // least))
    small, extra = divmod(rows, active)
    return tuple(small + (part < extra) if part < active else 0 for part in range(parts))


def split_micro(rows: int, size: int | None, least: int) -> tuple[int, ...]:
    """Cut ``rows`` into pieces of ``size``; a remainder below ``least`` joins the piece before it."""
    if size is None or rows <= size:
        return (rows,) if rows else ()
    whole, rest = divmod(rows, size)
    if rest == 0:
        return (size,) * whole
    if rest < least:
        return (*(size,) * (whole - 1), size + rest)
    return (*(size,) * whole, rest)


@dataclass(frozen=True)
class Piece:
    """The rows of one virtual worker in one batch: positions ``start..stop`` of ``epoch``."""

    epoch: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """Steps, epochs and batches of a job.

    Attributes:
        rows: in the training set; None: not known before the first epoch has been read.
        batch_size, virtual_workers, min_rows: as in TrainConfig.
        local_batches: batches that one step uses (more than one for strategies that take local steps).
        epochs / steps: exactly one of them.
    """

    rows: int | None
    batch_size: int
    virtual_workers: int
    min_rows: int = 1
    local_batches: int = 1
    epochs: int | None = None
    steps: int | None = None

    @property
    def batches_per_epoch(self) -> int:
        """A last batch of fewer than ``min_rows`` rows joins the one before it, if there is one."""
        assert self.rows is not None
        whole, rest = divmod(self.rows, self.batch_size)
        return whole + (rest >= self.min_rows or (rest > 0 and whole == 0))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.local_batches)

    @property
    def total_steps(self) -> int | None:
        """None: not known yet."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return None if self.rows is None else self.epochs * self.steps_per_epoch

    def known(self, step: int, rows: int) -> bool:
        """Whether it is known which rows a step uses, when the first epoch has ``rows`` rows, or more."""
        last = (step + 1) * self.local_batches * self.batch_size
        return self.rows is not None or rows >= last + self.min_rows

    def batches(self, step: int) -> tuple[tuple[int, int, int], ...]:
        """The batches ``(epoch, start, stop)`` of a step that is known. A step never crosses the end of an epoch."""
        if self.rows is None:
            epoch, first, last = 0, step * self.local_batches, (step + 1) * self.local_batches
        else:
            epoch, within = divmod(step, self.steps_per_epoch)
            first = within * self.local_batches
            last = min(first + self.local_batches, self.batches_per_epoch)
        return tuple((epoch, *self._bounds(b)) for b in range(first, last))

    def _bounds(self, batch: int) -> tuple[int, int]:
        start, stop = batch * self.batch_size, (batch + 1) * self.batch_size
        if self.rows is not None and batch == self.batches_per_epoch - 1:
            return start, self.rows
        return start, stop

    def pieces(self, step: int, worker: int) -> tuple[Piece, ...]:
        """What a virtual worker uses in a step: one piece for each batch of the step, some of which may be empty."""
        pieces = []
        for epoch, start, stop in self.batches(step):
            counts = split_evenly(stop - start, self.virtual_workers, self.min_rows)
            begin = start + sum(counts[:worker])
            pieces.append(Piece(epoch, begin, begin + counts[worker]))
        return tuple(pieces)

    def smallest_computation(self, microbatch_size: int | None) -> int:
        """The fewest rows that any one computation of the job sees (what decides whether BatchNorm can work)."""
        sizes: set[int] = set()
        for batch in {0, self.batches_per_epoch - 1}:
            start, stop = self._bounds(batch)
            for count in set(split_evenly(stop - start, self.virtual_workers, self.min_rows)) - {0}:
                sizes.update(split_micro(count, microbatch_size, self.min_rows))
        return min(sizes)


def rows_of_job(config: TrainConfig, rows: int | None, held: bool, local_batches: int) -> tuple[RowOrder, Schedule]:
    """The order and the schedule that a job's numbers ask for.

    Args:
        rows: in the training set, if that is known.
        held: whether the training set is in memory as it is.
    """
    schedule = Schedule(
        rows=rows,
        batch_size=config.batch_size,
        virtual_workers=config.virtual_workers,
        min_rows=config.min_rows,
        local_batches=local_batches,
        epochs=config.epochs,
        steps=config.steps,
    )
    shuffle = ("global" if held else "windowed") if config.shuffle == "auto" else config.shuffle
    return RowOrder(config.seed, shuffle, config.shuffle_window), schedule
