"""From what users call a dataset to units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_dnn.feed.raydata import open_dataset
from ray_dnn.feed.source import Source


def open_datasets(datasets: Mapping[str, Any]) -> dict[str, Source]:
    """Make out the units of all datasets.

    Raises:
        ConfigError: something is not a dataset, has no rows, or holds an operator that cannot be honoured.
    """
    return {name: open_dataset(name, dataset) for name, dataset in datasets.items()}
