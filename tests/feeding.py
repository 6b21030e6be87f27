"""What feeds give, step by step."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

from benchmarks.feed_alone import feed
from ray_dnn.config import TrainConfig
from ray_dnn.sampler import NUMBERS


def numbers(datasets: Any, config: TrainConfig, first_step: int = 0) -> list[list[list[int]]]:
    """The numbers of the rows of each step and virtual worker."""
    with closing(feed(datasets, config, first_step)) as fed:
        return [[table.column(NUMBERS).to_pylist() for table in tables] for tables in fed.steps()]


def column(datasets: Any, config: TrainConfig, name: str) -> list[list[Any]]:
    """A column's values in each step, over all virtual workers."""
    with closing(feed(datasets, config)) as fed:
        return [[value for table in tables for value in table.column(name).to_pylist()] for tables in fed.steps()]


def alive() -> list[threading.Thread]:
    """Threads of feeds that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name == "ray_dnn-feed"]
