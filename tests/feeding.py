"""Feeds without agents: every step's rows, as agents would get them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ray_dnn.config import TrainConfig
from ray_dnn.feed.datasets import open_datasets
from ray_dnn.feed.feed import Feed, Hears
from ray_dnn.feed.supply import Supply
from ray_dnn.sampler import NUMBERS, rows_of_job

TIMEOUT_S = 60.0


@dataclass
class Fed:
    """A feed and one agent's supply.

    Attributes:
        said: what the feed said that it waits for.
        counted: rows of the units that it counted.
    """

    feed: Feed
    supply: Supply
    workers: int
    said: list[str] = field(default_factory=list)
    counted: dict[int, int] = field(default_factory=dict)
    failure: list[Exception] = field(default_factory=list)

    def check(self) -> None:
        """Raise what the feed failed with."""
        if self.failure:
            raise self.failure[0]

    def tables(self, step: int) -> list[pa.Table]:
        """The rows of each virtual worker in a step."""
        return [self.supply.table(step, worker) for worker in range(self.workers)]

    def steps(self, first: int = 0) -> Iterator[list[pa.Table]]:
        """All steps from one on, each committed when the next one is asked for."""
        step = first
        while self.supply.wait(step, self.check):
            yield self.tables(step)
            self.supply.prefetch(step + 1, range(self.workers))
            step += 1
            self.feed.committed(step)


def feed(
    datasets: Any, config: TrainConfig, first_step: int = 0, counts: Mapping[int, int] | None = None, batches: int = 1
) -> Fed:
    """Begin to feed. ``datasets``: the training set, or all by name."""
    sources = open_datasets(datasets if isinstance(datasets, dict) else {"train": datasets})
    order, schedule = rows_of_job(config, sources["train"].rows, sources["train"].held, batches)
    supply = Supply()
    supply.names = [name for name in sources if name != "train"]
    said: list[str] = []
    counted: dict[int, int] = {}
    failure: list[Exception] = []

    def failed(error: Exception) -> None:
        failure.append(error)
        supply.wake()

    hears = Hears(supply.tell, counted.update, said.append, failed)
    made = Feed(sources, order, schedule, hears, first_step, counts)
    supply.tell(made.news())
    made.start()
    return Fed(made, supply, config.virtual_workers, said, counted, failure)


def numbers(datasets: Any, config: TrainConfig, first_step: int = 0, **more: Any) -> list[list[list[int]]]:
    """The numbers of the rows of each step and virtual worker."""
    fed = feed(datasets, config, first_step, **more)
    try:
        return [[table.column(NUMBERS).to_pylist() for table in tables] for tables in fed.steps(first_step)]
    finally:
        fed.feed.close()


def column(datasets: Any, config: TrainConfig, name: str, first_step: int = 0, **more: Any) -> list[list[Any]]:
    """A column's values in each step, over all virtual workers."""
    fed = feed(datasets, config, first_step, **more)
    try:
        return [
            [value for table in tables for value in table.column(name).to_pylist()] for tables in fed.steps(first_step)
        ]
    finally:
        fed.feed.close()


def alive() -> list[threading.Thread]:
    """Threads of feeds that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name == "ray_dnn-feed"]
