"""Rows are taken into their order and dealt out to virtual workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_dnn.feed.raydata import concat
from ray_dnn.feed.source import Lot
from ray_dnn.sampler import RowOrder


@dataclass(frozen=True)
class Deal:
    """What is to be dealt out: positions ``start..stop`` of an epoch.

    Attributes:
        lots: that hold all rows that come there.
        begin: the place of the first row of the first lot.
        rows: of the epoch's stream, as `RowOrder.places` asks for it.
        counts: rows for each virtual worker, in each batch of each step; -1 where a step has fewer batches. Shape:
            (steps, batches, workers).
    """

    order: RowOrder
    epoch: int
    start: int
    stop: int
    lots: tuple[Lot, ...]
    begin: int
    rows: int
    counts: NDArray[np.int32]

    def tables(self) -> list[pa.Table]:
        """The rows of each virtual worker, step after step."""
        places = self.order.places(self.epoch, self.start, self.stop, self.rows) - self.begin
        ends = np.cumsum([lot.rows for lot in self.lots])
        lots = np.searchsorted(ends, places, side="right")
        by_lot = np.argsort(lots, kind="stable")
        bounds = np.searchsorted(lots[by_lot], np.arange(len(self.lots) + 1))
        parts = []
        for index, lot in enumerate(self.lots):
            chosen = by_lot[bounds[index] : bounds[index + 1]]
            if len(chosen):
                parts.append(lot.load().take(pa.array(places[chosen] - (ends[index] - lot.rows))))
        taken = concat(parts).combine_chunks()  # in the order of lots
        at = np.empty_like(by_lot)
        at[by_lot] = np.arange(len(by_lot))
        steps, batches, workers = self.counts.shape
        worker = np.repeat(np.tile(np.arange(workers), steps * batches), np.maximum(self.counts, 0).reshape(-1))
        return [taken.take(pa.array(at[worker == w])) for w in range(workers)]
