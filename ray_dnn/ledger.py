"""The ledger: which rows were used in which committed step by which virtual worker.

The order of rows is a pure function of the job and of how many rows each unit of the dataset has (see
`ray_dnn.sampler`), so a line of the ledger needs no row numbers: it holds, for each virtual worker, how many rows it
used and a checksum of their numbers. A row's number travels with the row from where it is read to where it is used, so
the checksum says what was really used. Reading the ledger computes the row numbers anew and compares the checksums.

Lines of steps alternate with lines of units, which say how many rows each has; where all are known beforehand, one such
line comes first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from ray_dnn.errors import LedgerError
from ray_dnn.sampler import Epoch, Numbering, RowOrder, Rows, Schedule


@dataclass(frozen=True)
class LedgerHead:
    """The first line: what the order of rows is a function of.

    Attributes:
        units: of the dataset.
        first_step: where the attempt began.
        through: whether rows are numbered through (see `ray_dnn.sampler.Numbering`).
    """

    order: RowOrder
    schedule: Schedule
    units: int
    through: bool
    first_step: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def units_line(rows: Mapping[int, int]) -> str:
    """A line that says how many rows some units have."""
    return json.dumps({"units": list(rows), "rows": list(rows.values())})


@dataclass(frozen=True)
class LedgerLine:
    """One committed step.

    Attributes:
        rows, digests: by virtual worker.
        skipped: why the step changed nothing, or None.
    """

    step: int
    generation: int
    rows: tuple[int, ...]
    digests: tuple[int, ...]
    metrics: dict[str, float]
    skipped: str | None = None

    def to_json(self) -> str:
        return json.dumps(vars(self))  # as of asdict(), which copies deeply: ten times as slow


@dataclass(frozen=True)
class Use:
    """Rows that one virtual worker used in one committed step. ``row_ids``: int64, shape (rows,)."""

    step: int
    epoch: int
    worker: int
    row_ids: Rows


class Ledger:
    """A run's ledger, read and verified.

    Attributes:
        head: the first line of the last attempt.
        lines: committed steps, in order.
        units: rows of each unit that was counted.
    """

    def __init__(self, attempts: Iterable[Iterable[str]]):
        """``attempts``: the lines of each, in order. One that goes on from a checkpoint takes back what came after."""
        self.lines: list[LedgerLine] = []
        self.units: dict[int, int] = {}
        for attempt in attempts:
            self._read(iter(attempt))

    def _read(self, texts: Iterator[str]) -> None:
        first = next(texts, None)
        if first is None:
            return  # it ended before anything was written
        head = json.loads(first)
        order, schedule = RowOrder(**head.pop("order")), Schedule(**head.pop("schedule"))
        self.head = LedgerHead(order, schedule, **head)
        if self.head.first_step > len(self.lines):
            raise LedgerError(f"An attempt began at step {self.head.first_step}, of {len(self.lines)} that there are.")
        del self.lines[self.head.first_step :]
        for text in texts:
            fields = json.loads(text)
            if "units" in fields:
                self.units |= dict(zip(fields["units"], fields["rows"], strict=True))
                continue
            line = LedgerLine(**fields | {"rows": tuple(fields["rows"]), "digests": tuple(fields["digests"])})
            if line.step < len(self.lines) and line == self.lines[line.step]:
                continue  # it was written twice, for the storage had failed in between
            if line.step != len(self.lines):
                raise LedgerError(f"The ledger has step {line.step} where step {len(self.lines)} belongs.")
            self.lines.append(line)

    @property
    def rows(self) -> int | None:
        """Of the dataset; None: not all units are counted."""
        return sum(self.units.values()) if len(self.units) == self.head.units else None

    def uses(self) -> Iterator[Use]:
        """Every use of rows.

        Raises:
            LedgerError: a virtual worker used other rows than the job says.
        """
        schedule = replace(self.head.schedule, rows=self.rows)
        streams: dict[int, Epoch] = {}
        for line in self.lines:
            for worker, (rows, digest) in enumerate(zip(line.rows, line.digests, strict=True)):
                pieces = schedule.pieces(line.step, worker)
                epoch = pieces[0].epoch
                if epoch not in streams:
                    streams = {epoch: self._stream(epoch)}
                ids = np.concatenate([streams[epoch].numbers(p.start, p.stop) for p in pieces])
                if len(ids) != rows or (rows and row_checksum([ids]) != digest):
                    raise LedgerError(f"Step {line.step}, virtual worker {worker} did not use the rows {ids.tolist()}.")
                if rows:
                    yield Use(line.step, epoch, worker, ids)

    def counts(self, epoch: int) -> Rows:
        """How often each row was used in an epoch, by place in the dataset. Shape: (rows of all units counted,)."""
        units = np.array(sorted(self.units), np.int64)
        sizes = np.array([self.units[int(unit)] for unit in units], np.int64)
        numbering = self._numbering()
        firsts = np.array([numbering.first(int(unit)) for unit in units], np.int64)
        counts = np.zeros(int(sizes.sum()), np.int64)
        starts = np.cumsum(sizes) - sizes
        for use in self.uses():
            if use.epoch == epoch:
                index = np.searchsorted(firsts, use.row_ids, side="right") - 1
                np.add.at(counts, starts[index] + use.row_ids - firsts[index], 1)
        return counts

    def _numbering(self) -> Numbering:
        if not self.head.through:
            return Numbering(None)
        return Numbering(np.array([self.units[unit] for unit in range(self.head.units)], np.int64))

    def _stream(self, epoch: int) -> Epoch:
        stream = Epoch(self.head.order, epoch, self.head.units, self._numbering())
        for unit in stream.units:
            if int(unit) not in self.units:
                break
            stream.count(self.units[int(unit)])
        return stream


def row_checksum(parts: Iterable[Rows]) -> int:
    """A checksum of row numbers: 63 bits of SHA-256 over them as little-endian int64."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.astype("<i8").tobytes())
    return int.from_bytes(sha.digest()[:8], "little") >> 1
