"""Feeds without agents: this process takes their rows, as one agent would that hosts all virtual workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_dnn import TrainConfig
from ray_dnn.feed.collate import default_collate
from ray_dnn.feed.datasets import open_datasets
from ray_dnn.feed.feed import Feed, Hears
from ray_dnn.feed.supply import Supply
from ray_dnn.sampler import NUMBERS, rows_of_job

WORKERS = 2


@dataclass
class Fed:
    """A feed that is read.

    Attributes:
        counts: rows of the units that it counted.
    """

    feed: Feed
    supply: Supply
    first_step: int
    counts: dict[int, int] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)

    def batches(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        """What the virtual workers get in each step, committed when the next one is asked for."""
        step = self.first_step
        while self.supply.wait(step, self._check):
            self.supply.prefetch(step, range(WORKERS))
            tables = [self.supply.table(step, worker).drop_columns([NUMBERS]) for worker in range(WORKERS)]
            yield [default_collate(table, torch.Generator()) for table in tables]
            step += 1
            self.feed.committed(step)

    @property
    def rows_read(self) -> int:
        """Rows that tasks have read so far, the ones that were only counted included."""
        return self.feed._train.read

    def _check(self) -> None:
        if self.failures:
            raise self.failures[0]


@contextlib.contextmanager
def feeding(
    data: Any, config: TrainConfig, first_step: int = 0, counts: Mapping[int, int] | None = None
) -> Iterator[Fed]:
    """A feed that begins at a step. ``counts``: rows of units, where an earlier run has counted them."""
    sources = open_datasets({"train": data})
    order, schedule = rows_of_job(config, sources["train"].rows, 1)
    supply, found, failures = Supply(), dict[int, int](), list[Exception]()

    def failed(error: Exception) -> None:
        failures.append(error)
        supply.wake()

    hears = Hears(supply.tell, found.update, lambda what: None, failed)
    feed = Feed(sources, order, schedule, hears, first_step, counts)
    supply.tell(feed.news())
    feed.start()
    try:
        yield Fed(feed, supply, first_step, found, failures)
    finally:
        feed.close()
