"""From what users call a dataset to units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_dnn.errors import ConfigError
from ray_dnn.feed.raydata import open_dataset
from ray_dnn.feed.samples import Samples, is_map_style
from ray_dnn.feed.source import Branch, Source


def open_datasets(datasets: Mapping[str, Any]) -> dict[str, Source]:
    """Make out the units of all datasets.

    Raises:
        ConfigError: something is not a dataset, has no rows, or holds an operator that cannot be honoured.
    """
    return {name: _open(name, dataset) for name, dataset in datasets.items()}


def _open(name: str, dataset: Any) -> Source:
    import ray.data

    if isinstance(dataset, ray.data.Dataset):
        return open_dataset(name, dataset)
    if not is_map_style(dataset):
        raise ConfigError(
            f"datasets[{name!r}] is a {type(dataset).__name__}; it must be a ray.data.Dataset (ray.data.read_parquet, "
            "from_numpy, …) or a map-style PyTorch dataset (with __getitem__ and __len__)."
        )
    if not len(dataset):
        raise ConfigError(f"datasets[{name!r}] has no rows.")
    return Source(name, [Branch(Samples(name, dataset))])
