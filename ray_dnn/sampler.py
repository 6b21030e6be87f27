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

_ROUNDS = 6
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

    Attributes:
        rows: in the dataset.
        seed: of the job.
        window: rows in a window; windows are permuted, and rows inside each. ``rows`` or more: one global permutation.
            0: no shuffling.
    """

    rows: int
    seed: int
    window: int

    def at(self, epoch: int, start: int, stop: int) -> Rows:
        """The rows at positions ``start..stop`` of an epoch. Shape: (stop - start,)."""
        positions = np.arange(start, stop, dtype=np.int64)
        if self.window == 0:
            return positions
        if self.window >= self.rows:
            return permute(positions, self.rows, derive_seed("rows", self.seed, epoch, 0))
        return self._windowed(epoch, positions)

    def _windowed(self, epoch: int, positions: Rows) -> Rows:
        windows = -(-self.rows // self.window)
        short = windows - 1  # the only window that may hold fewer rows
        lacking = windows * self.window - self.rows
        key = derive_seed("windows", self.seed, epoch)
        sequence = permute(np.arange(windows, dtype=np.int64), windows, key)
        short_place = int(np.flatnonzero(sequence == short)[0])
        # Positions behind the short window are shifted back by what it lacks.
        shifted = positions + np.where(positions >= short_place * self.window + self.window - lacking, lacking, 0)
        place, inside = shifted // self.window, shifted % self.window
        out = np.empty_like(positions)
        for p in np.unique(place):
            window, chosen = int(sequence[p]), place == p
            size = self.window - lacking if window == short else self.window
            row_key = derive_seed("rows", self.seed, epoch, window)
            out[chosen] = window * self.window + permute(inside[chosen], size, row_key)
        return out


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
        rows: in the training set.
        batch_size, virtual_workers, min_rows: as in TrainConfig.
        local_batches: batches that one step uses (more than one for strategies that take local steps).
        epochs / steps: exactly one of them.
    """

    rows: int
    batch_size: int
    virtual_workers: int
    min_rows: int = 1
    local_batches: int = 1
    epochs: int | None = None
    steps: int | None = None

    @property
    def batches_per_epoch(self) -> int:
        """A last batch of fewer than ``min_rows`` rows joins the one before it, if there is one."""
        whole, rest = divmod(self.rows, self.batch_size)
        return whole + (rest >= self.min_rows or (rest > 0 and whole == 0))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.local_batches)

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * self.steps_per_epoch

    def batches(self, step: int) -> tuple[tuple[int, int, int], ...]:
        """The batches ``(epoch, start, stop)`` of a step. A step never crosses the end of an epoch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.local_batches
        last = min(first + self.local_batches, self.batches_per_epoch)
        return tuple((epoch, *self._bounds(b)) for b in range(first, last))

    def _bounds(self, batch: int) -> tuple[int, int]:
        is_last = batch == self.batches_per_epoch - 1
        return batch * self.batch_size, self.rows if is_last else (batch + 1) * self.batch_size

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


def rows_of_job(config: TrainConfig, rows: int, local_batches: int) -> tuple[RowOrder, Schedule]:
    """The order and the schedule that a job's numbers ask for. ``rows``: in the training set."""
    window = {"none": 0, "windowed": config.shuffle_window, "global": rows}[config.shuffle]
    schedule = Schedule(
        rows=rows,
        batch_size=config.batch_size,
        virtual_workers=config.virtual_workers,
        min_rows=config.min_rows,
        local_batches=local_batches,
        epochs=config.epochs,
        steps=config.steps,
    )
    return RowOrder(rows, config.seed, window), schedule
