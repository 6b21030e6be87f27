"""How well each way to shuffle mixes rows: how far the labels of a batch are from those of the whole dataset.

No clock and no cluster: an order is a pure function, so this is exact, and the same on every machine.
"""

from __future__ import annotations

from statistics import median

import numpy as np

from benchmarks.tables import Bar, Table
from ray_dnn.sampler import Counted, RowOrder, Rows

ROWS, LABELS, BATCH = 60_000, 10, 256
WINDOWS = (1_024, 4_096, 16_384)
DATASETS = {  # rows of each unit; the rows are sorted by their label
    "row groups of 1,000 rows": np.full(60, 1_000),
    "ten files of one row group": np.full(10, 6_000),
    "one row group": np.array([60_000]),
}
ORDERS = {
    "none": RowOrder(0, "none", 1),
    **{f"windowed, {window:,}": RowOrder(0, "windowed", window) for window in WINDOWS},
    "global": RowOrder(0, "global", 1),
}


def distances(order: RowOrder, counts: Rows) -> list[float]:
    """Half the sum of what the shares of labels in a batch differ from a tenth, batch by batch."""
    labels = Counted(order, counts).at(0, 0, ROWS) * LABELS // ROWS
    found = []
    for start in range(0, ROWS - BATCH + 1, BATCH):
        shares = np.bincount(labels[start : start + BATCH], minlength=LABELS) / BATCH
        found.append(float(np.abs(shares - 1 / LABELS).sum() / 2))
    return found


def run() -> Table:
    """The table."""
    rows, bars = [], []
    for dataset, counts in DATASETS.items():
        for shuffle, order in ORDERS.items():
            found = distances(order, counts.astype(np.int64))
            typical, worst = median(found), max(found)
            rows.append((dataset, shuffle, f"{typical:.2f}", f"{worst:.2f}"))
            bars.append(Bar(dataset, f"ray_dnn, {shuffle}", typical, min(found), worst))
    return Table(
        name="shuffle",
        title="How far a batch's labels are from the dataset's, in rows sorted by label",
        header=("dataset", "shuffle", "median", "worst batch"),
        rows=tuple(rows),
        notes=(
            f"{ROWS:,} rows with {LABELS} labels, sorted by label: the hardest case. {len(found)} batches of {BATCH} "
            "rows of one epoch. The distance is the total variation: 0 where every label has its share, 0.9 where a "
            "batch has one label only. What `global` leaves is the luck of drawing 256 rows.",
            "Units are permuted and rows only inside a window, so a window mixes as many units as fit it: small row "
            "groups mix well, and one row group of everything is mixed no farther than a window reaches.",
        ),
        bars=tuple(bars),
        unit="total variation distance, 0 to 0.9",
    )
