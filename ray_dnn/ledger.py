"""The ledger: which rows were used in which committed step by which virtual worker.

The order of rows is a pure function of the job, so a line of the ledger needs no row numbers: it holds, for each
virtual worker, how many rows it used and a checksum of their numbers, taken from the rows it really read. Reading the
ledger computes the row numbers anew and compares the checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from ray_dnn.errors import LedgerError
from ray_dnn.sampler import RowOrder, Rows, Schedule


@dataclass(frozen=True)
class LedgerHead:
    """The first line: what the order of rows is a function of."""

    order: RowOrder
    schedule: Schedule

    def to_json(self) -> str:
        return json.dumps({"order": asdict(self.order), "schedule": asdict(self.schedule)})


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
        head: its first line.
        lines: committed steps, in order.
    """

    def __init__(self, lines: Iterable[str]):
        texts = iter(lines)
        head = json.loads(next(texts))
        self.head = LedgerHead(RowOrder(**head["order"]), Schedule(**head["schedule"]))
        self.lines: list[LedgerLine] = []
        for text in texts:
            fields = json.loads(text)
            line = LedgerLine(**fields | {"rows": tuple(fields["rows"]), "digests": tuple(fields["digests"])})
            if line.step != len(self.lines):
                raise LedgerError(f"The ledger has step {line.step} where step {len(self.lines)} belongs.")
            self.lines.append(line)

    def uses(self) -> Iterator[Use]:
        """Every use of rows.

        Raises:
            LedgerError: a virtual worker used other rows than the job says.
        """
        for line in self.lines:
            for worker, (rows, digest) in enumerate(zip(line.rows, line.digests, strict=True)):
                pieces = self.head.schedule.pieces(line.step, worker)
                parts = [self.head.order.at(p.epoch, p.start, p.stop) for p in pieces]
                ids = np.concatenate(parts)
                if len(ids) != rows or (rows and row_checksum(parts) != digest):
                    raise LedgerError(f"Step {line.step}, virtual worker {worker} did not use the rows {ids.tolist()}.")
                if rows:
                    yield Use(line.step, pieces[0].epoch, worker, ids)

    def counts(self, epoch: int) -> Rows:
        """How often each row of the dataset was used in an epoch. Shape: (rows of the dataset,)."""
        counts = np.zeros(self.head.order.rows, np.int64)
        for use in self.uses():
            if use.epoch == epoch:
                np.add.at(counts, use.row_ids, 1)
        return counts


def row_checksum(parts: Iterable[Rows]) -> int:
    """A checksum of row numbers: 63 bits of SHA-256 over them as little-endian int64."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.astype("<i8").tobytes())
    return int.from_bytes(sha.digest()[:8], "little") >> 1
