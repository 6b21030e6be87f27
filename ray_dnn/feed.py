"""Rows by number, out of Ray Datasets.

The driver has Ray Data produce the dataset's blocks in their order, keeps references to them and their row counts, and
gives both to the agents. An agent finds a row's block by its number and reads it from the object store, without a copy.
All dealings with Ray Data's internals are in this file. Agents load Ray Data only when a block needs it: it would add a
second to the start of each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from ray_dnn.errors import ConfigError
from ray_dnn.sampler import Rows

_AHEAD = 64  # reads that may wait for their use: those of one step


@dataclass(frozen=True)
class BlockIndex:
    """A dataset as the agents see it.

    Attributes:
        refs: references to the blocks, in order.
        counts: rows in each.
        columns: names of the columns.
    """

    refs: tuple[Any, ...]
    counts: tuple[int, ...]
    columns: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(self.counts)


def index_dataset(name: str, dataset: Any) -> BlockIndex:
    """Have Ray Data produce a dataset into the object store and index its blocks.

    Raises:
        ConfigError: it is not a Ray Dataset, or it has no rows.
    """
    import ray.data

    if not isinstance(dataset, ray.data.Dataset):
        raise ConfigError(
            f"datasets[{name!r}] is a {type(dataset).__name__}; it must be a ray.data.Dataset "
            "(ray.data.from_numpy, from_pandas, from_arrow, read_parquet, …)."
        )
    context = dataset.context
    before = context.execution_options.preserve_order
    context.execution_options.preserve_order = True  # row numbers mean something only in a fixed order
    try:
        produced = dataset.materialize()
    finally:
        context.execution_options.preserve_order = before
    refs: list[Any] = []
    counts: list[int] = []
    for bundle in produced.iter_internal_ref_bundles():
        for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
            if metadata.num_rows:
                refs.append(ref)
                counts.append(int(metadata.num_rows))
    if not counts:
        raise ConfigError(f"datasets[{name!r}] has no rows.")
    return BlockIndex(tuple(refs), tuple(counts), tuple(produced.columns() or ()))


class BlockReader:
    """Rows of one dataset, on an agent."""

    def __init__(self, index: BlockIndex):
        self._refs = index.refs
        self._starts = np.concatenate([[0], np.cumsum(index.counts)])
        self._tables: dict[int, pa.Table] = {}  # blocks fetched so far; they stay in the object store's memory
        self._lock = threading.Lock()  # guards the two tables, which the prefetching thread shares
        self._ahead: OrderedDict[bytes, Future[pa.Table]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "ray_dnn-prefetch")

    def rows(self, row_ids: Rows) -> pa.Table:
        """The rows with these numbers, in this order."""
        with self._lock:
            waiting = self._ahead.pop(row_ids.tobytes(), None)
        return waiting.result() if waiting else self._read(row_ids)

    def prefetch(self, row_ids: Rows) -> None:
        """Read these rows in the background, for a later `rows`."""
        key = row_ids.tobytes()
        with self._lock:
            if key not in self._ahead:
                self._ahead[key] = self._pool.submit(self._read, row_ids)
            while len(self._ahead) > _AHEAD:  # never asked for: the plan changed
                self._ahead.popitem(last=False)

    def _read(self, row_ids: Rows) -> pa.Table:
        blocks = np.searchsorted(self._starts, row_ids, side="right") - 1
        parts, order = [], []
        for block in np.unique(blocks):
            chosen = np.flatnonzero(blocks == block)
            parts.append(self._table(int(block)).take(pa.array(row_ids[chosen] - self._starts[block])))
            order.append(chosen)
        whole = pa.concat_tables(parts) if len(parts) > 1 else parts[0]
        places = np.concatenate(order)
        if len(parts) > 1:
            whole = whole.take(pa.array(np.argsort(places)))
        return whole.combine_chunks()

    def _table(self, block: int) -> pa.Table:
        with self._lock:
            table = self._tables.get(block)
        if table is None:
            table = _as_table(ray.get(self._refs[block]))
            with self._lock:
                self._tables[block] = table
        return table


def _as_table(block: Any) -> pa.Table:
    """A block of Ray Data, which may be a pandas DataFrame, as a table."""
    if isinstance(block, pa.Table):
        return block
    from ray.data.block import BlockAccessor

    return BlockAccessor.for_block(block).to_arrow()


def default_collate(rows: pa.Table, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """One tensor a column, the rows along its first dimension. ``rng`` is not used.

    Raises:
        ConfigError: a column has no numbers, or ragged ones.
    """
    batch = {}
    for name in rows.column_names:
        array = _as_array(rows.column(name))
        if array is None or array.dtype.kind not in "biuf":
            raise ConfigError(
                f"The column {name!r} has type {rows.schema.field(name).type}, of which no tensor can be made as it "
                "is. Give TrainSpec(collate=…)."
            )
        batch[name] = torch.tensor(array)  # a copy: the object store's memory is read-only
    return batch


def _as_array(column: pa.ChunkedArray) -> Any:
    """A column of numbers, or of tensors of one shape, as an array; None where it is neither."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no chunk or of several
        whole = pa.concat_arrays(whole.chunks)
    kind = whole.type
    if hasattr(whole, "to_numpy_ndarray"):  # tensors of Ray Data, or Arrow's own
        return whole.to_numpy_ndarray()
    if pa.types.is_fixed_size_list(kind) and whole.null_count == 0:
        return whole.flatten().to_numpy(zero_copy_only=False).reshape(len(whole), kind.list_size)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return whole.to_numpy(zero_copy_only=False)
    return None
