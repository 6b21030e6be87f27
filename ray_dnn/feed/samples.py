"""Map-style PyTorch datasets: objects that give a sample for an index.

A sample becomes a row: a dict's keys, or a tuple's positions, become columns. The table's metadata says what it was, so
that `ray_dnn.feed.collate` makes batches of the same form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ray_dnn.errors import ConfigError
from ray_dnn.feed.raydata import table_of_samples
from ray_dnn.feed.source import Unit
from ray_dnn.sampler import even_units

FORM = b"ray_dnn_sample"  # the key of the metadata
_UNIT_SAMPLES = 256
_HOW = "Return a tensor, an array, a number or a string, or a dict or a tuple of these, or use a ray.data.Dataset."


def is_map_style(dataset: Any) -> bool:
    """Whether samples can be asked for by their index, and it is a dataset by intent, not any container."""
    containers = (list, tuple, dict, set, str, bytes, np.ndarray)
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, containers)


class Samples:
    """A map-style dataset as units of consecutive samples."""

    def __init__(self, name: str, dataset: Any):
        self._dataset = dataset
        sizes = even_units(len(dataset), _UNIT_SAMPLES)
        if len(sizes):
            _row(name, dataset[0])  # refused here rather than in the middle of a run
        self._starts = np.cumsum(sizes) - sizes
        self.units = [
            Unit(f"samples {start}..{start + size - 1}", int(size))
            for start, size in zip(self._starts, sizes, strict=True)
        ]

    def read(self, index: int) -> Iterator[Any]:
        start = int(self._starts[index])
        samples = [self._dataset[at] for at in range(start, start + (self.units[index].rows or 0))]
        table = table_of_samples([_row("sample", sample) for sample in samples])
        form = "dict" if isinstance(samples[0], Mapping) else "tuple" if isinstance(samples[0], list | tuple) else "one"
        yield table.replace_schema_metadata({**(table.schema.metadata or {}), FORM: json.dumps(form)})


def in_form(table: pa.Table, columns: dict[str, Any]) -> Any:
    """A batch's columns in the form that samples had; a dict where rows are no samples."""
    form = json.loads((table.schema.metadata or {}).get(FORM, b'"dict"'))
    if form == "dict":
        return columns
    return tuple(columns.values()) if form == "tuple" else columns["0"]


def _row(name: str, sample: Any) -> dict[str, Any]:
    if isinstance(sample, Mapping):
        return {str(key): _value(name, value) for key, value in sample.items()}
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        raise ConfigError(f"datasets[{name!r}]: a sample is a {type(sample).__name__}. {_HOW}")
    if isinstance(sample, list | tuple):
        return {str(at): _value(name, value) for at, value in enumerate(sample)}
    return {"0": _value(name, sample)}


def _value(name: str, value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return value[()] if value.ndim == 0 else value
    if isinstance(value, bool | int | float | str | bytes | np.generic):
        return value
    raise ConfigError(f"datasets[{name!r}]: a sample holds a {type(value).__name__}. {_HOW}")
