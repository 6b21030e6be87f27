"""From rows to a batch, where the user says nothing else."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from ray_dnn.engine.batches import as_numpy
from ray_dnn.errors import ConfigError
from ray_dnn.feed.samples import in_form


def default_collate(rows: pa.Table, rng: torch.Generator) -> Any:
    """One tensor a column, the rows along its first dimension: a dict of them, or what samples of PyTorch were.

    ``rng`` is not used.

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
    return in_form(rows, batch)


def _as_array(column: pa.ChunkedArray) -> Any:
    """A column of numbers, or of tensors of one shape, as an array; None where it is neither."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no chunk or of several
        whole = pa.concat_arrays(whole.chunks)
    kind = whole.type
    if hasattr(whole, "to_numpy_ndarray"):  # tensors of Ray Data, or Arrow's own
        return whole.to_numpy_ndarray()
    if pa.types.is_fixed_size_list(kind) and whole.null_count == 0:
        return as_numpy(whole.flatten()).reshape(len(whole), kind.list_size)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return as_numpy(whole)
    return None
