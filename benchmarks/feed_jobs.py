"""What is fed: three shapes of rows in Parquet files, each with a cheap transform and a model that hardly computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from torch import nn

FILES = 8
COLUMNS, SIDE, TOKENS = 20, 64, 512
LOOKED_AT = 64  # rows of a batch that the model sees, with the first number of each column


@dataclass(frozen=True)
class Shape:
    """A dataset of one kind.

    Attributes:
        rows: in all; whole batches.
        group: rows of a row group.
        batch: rows in a step, over all agents.
        table: some rows, drawn at random.
        transform, format: of its ``map_batches``.
        columns: that a row has.
    """

    name: str
    rows: int
    group: int
    batch: int
    table: Callable[[np.random.Generator, int], pa.Table]
    transform: Callable[[Any], dict[str, Any]]
    format: str = "numpy"
    columns: int = 1

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.rows // self.batch

    def write(self, folder: str) -> None:
        """Write its files."""
        rows = self.rows // FILES
        for file in range(FILES):
            table = self.table(np.random.default_rng(file), rows)
            pq.write_table(table, f"{folder}/{file}.parquet", row_group_size=self.group)

    def dataset(self, folder: str) -> Any:
        """Its files as a dataset, transformed."""
        return ray.data.read_parquet(folder).map_batches(
            self.transform, batch_format=self.format, udf_modifying_row_count=False
        )

    def model(self) -> nn.Module:
        """One layer."""
        return nn.Linear(self.columns, 1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD."""
    return torch.optim.SGD(model.parameters(), lr=1e-6)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A mean over the first rows, of the first number of each column."""
    seen = [column[:LOOKED_AT].flatten(1)[:, 0] if column.ndim > 1 else column[:LOOKED_AT] for column in batch.values()]
    mean: torch.Tensor = model(torch.stack([numbers.float() for numbers in seen], dim=1)).mean()
    return mean


def tensors(rng: np.random.Generator, rows: int) -> pa.Table:
    """Tensors of float32. A row has 1 KiB."""
    from ray.data.extensions import ArrowTensorArray

    return pa.table({"data": ArrowTensorArray.from_numpy(rng.standard_normal((rows, 256), dtype=np.float32))})


def _tabular(rng: np.random.Generator, rows: int) -> pa.Table:
    """Columns of float32. A row has 80 bytes."""
    return pa.table({f"c{c:02}": rng.standard_normal(rows, dtype=np.float32) for c in range(COLUMNS)})


def _images(rng: np.random.Generator, rows: int) -> pa.Table:
    """Tensors of uint8, with labels. A row has 12 KiB."""
    from ray.data.extensions import ArrowTensorArray

    pixels = rng.integers(256, size=(rows, 3, SIDE, SIDE), dtype=np.uint8)
    return pa.table({"image": ArrowTensorArray.from_numpy(pixels), "label": rng.integers(10, size=rows)})


def _tokens(rng: np.random.Generator, rows: int) -> pa.Table:
    """Lists of int32 of one length. A row has 2 KiB."""
    flat = pa.array(rng.integers(50_000, size=rows * TOKENS, dtype=np.int32))
    return pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, TOKENS)})


def _scaled(batch: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    return {name: column * np.float32(0.5) for name, column in batch.items()}


def _inverted(batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {"image": 255 - batch["image"], "label": batch["label"]}


def _as_tensors(batch: pa.Table) -> dict[str, Any]:
    return {"tokens": batch["tokens"].combine_chunks().flatten().to_numpy().reshape(-1, TOKENS) + np.int32(1)}


SHAPES = (
    Shape(f"{COLUMNS} columns of float32", 1 << 21, 1 << 16, 1 << 14, _tabular, _scaled, columns=COLUMNS),
    Shape(f"images, 3 x {SIDE} x {SIDE} uint8", 1 << 14, 1 << 10, 1 << 8, _images, _inverted, columns=2),
    Shape(f"lists of {TOKENS} int32", 96 << 10, 4 << 10, 1 << 10, _tokens, _as_tensors, format="pyarrow"),
)
