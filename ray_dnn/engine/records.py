"""What travels beside the vectors: a header a replica, with a record for each of its virtual workers.

Headers only report. A header that does not match the reader's own place in the run is a bug and raises.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_dnn.engine.loss import Pairs
from ray_dnn.errors import ConfigError, ProtocolError

_PLACE = struct.Struct("<qqqqq")  # generation, step, phase, plan, layout
_REPORT = struct.Struct("<qd")  # newest decision held, seconds computing

NONFINITE_GRADIENT = 1
NONFINITE_LOSS = 2


@dataclass(frozen=True)
class Place:
    """Where in the run a message belongs."""

    generation: int
    step: int
    phase: int
    plan: int
    layout: int


@dataclass(frozen=True)
class Header:
    """What one replica says about itself.

    Attributes:
        held: the newest decision of the driver that it holds.
        seconds: that it computed in this step.
        records: one for each of its virtual workers.
        sums: for the audit; as many as the format says.
    """

    held: int
    seconds: float
    records: NDArray[np.void]
    sums: tuple[int, ...] = ()


class RecordFormat:
    """The fixed layout of a worker's record for one phase.

    Fields: rows, digest (of row numbers), flags, state_bytes (of the new worker state), weight, metrics (total and
    weight each), and bitmaps: touched parameters, changed float buffers, changed other buffers.
    """

    def __init__(
        self,
        vector: Sequence[str],
        floats: Sequence[str],
        others: Sequence[str],
        metrics: Sequence[str],
        sums: int = 0,
    ):
        self._sums = struct.Struct(f"<{sums}q")
        self.vector, self.floats, self.others, self.metrics = list(vector), list(floats), list(others), sorted(metrics)
        self.dtype = np.dtype(
            [
                ("rows", "<i8"),
                ("digest", "<i8"),
                ("flags", "<i8"),
                ("state_bytes", "<i8"),
                ("weight", "<f8"),
                ("metrics", "<f8", (len(self.metrics), 2)),
                ("touched", "u1", (len(self.vector),)),
                ("floats", "u1", (len(self.floats),)),
                ("others", "u1", (len(self.others),)),
            ]
        )

    def size(self, workers: int) -> int:
        """Bytes of a header with this many records."""
        return self._before + workers * self.dtype.itemsize

    @property
    def _before(self) -> int:
        return _PLACE.size + _REPORT.size + self._sums.size

    def empty(self) -> NDArray[np.void]:
        """The record of a worker without rows. Shape: (1,)."""
        return np.zeros(1, self.dtype)

    def set_metrics(self, record: NDArray[np.void], pairs: Pairs) -> None:
        if sorted(pairs) != self.metrics:
            raise ConfigError(
                f"The loss reported the metrics {sorted(pairs)}, but {self.metrics} in the job's first contribution; "
                "the names must be the same in every step."
            )
        for index, name in enumerate(self.metrics):
            record["metrics"][0, index] = pairs[name]

    def pack(self, place: Place, header: Header) -> bytes:
        head = _PLACE.pack(place.generation, place.step, place.phase, place.plan, place.layout)
        report = _REPORT.pack(header.held, header.seconds)
        return head + report + self._sums.pack(*header.sums) + header.records.tobytes()

    def unpack(self, data: bytes, place: Place, peer: int) -> Header:
        """Read a peer's header.

        Raises:
            ProtocolError: it is at another place than this reader.
        """
        theirs = Place(*_PLACE.unpack_from(data))
        if theirs != place:
            raise ProtocolError(f"replica {peer} is at {theirs}, but this one is at {place}")
        held, seconds = _REPORT.unpack_from(data, _PLACE.size)
        sums = self._sums.unpack_from(data, _PLACE.size + _REPORT.size)
        return Header(held, seconds, np.frombuffer(data, self.dtype, offset=self._before), sums)

    def sum_metrics(self, records: NDArray[np.void]) -> dict[str, float]:
        """Means over all workers, added in the order of workers. Names whose weight is 0 are NaN."""
        means = {}
        for index, name in enumerate(self.metrics):
            total = weight = 0.0
            for pair in records["metrics"][:, index]:
                total, weight = total + float(pair[0]), weight + float(pair[1])
            means[name] = total / weight if weight else float("nan")
        return means

    def names(self, field: str, records: NDArray[np.void]) -> set[str]:
        """The names whose bit is set in any record. ``field``: "touched", "floats" or "others"."""
        names = {"touched": self.vector, "floats": self.floats, "others": self.others}[field]
        return {name for name, bit in zip(names, np.atleast_1d(records[field].any(axis=0)), strict=True) if bit}
