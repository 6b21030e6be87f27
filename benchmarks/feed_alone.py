"""Feeds without agents: this process takes their rows, as one agent would that hosts all virtual workers.

For the benchmark of the feed, and for the feed's own tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from ray_dnn import TrainConfig
from ray_dnn.feed.collate import default_collate
from ray_dnn.feed.datasets import open_datasets
from ray_dnn.feed.feed import Feed, Hears
from ray_dnn.feed.supply import Supply
from ray_dnn.sampler import NUMBERS, rows_of_job


@dataclass
class Fed:
    """A feed, and one agent's supply.

    Attributes:
        workers: virtual workers.
        first_step: where it begins.
        said: what the feed said that it waits for.
        counts: rows of the units that it counted.
    """

    feed: Feed
    supply: Supply
    workers: int
    first_step: int
    said: list[str] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)

    def check(self) -> None:
        """Raise what the feed failed with."""
        if self.failures:
            raise self.failures[0]

    def steps(self) -> Iterator[list[pa.Table]]:
        """The rows of each virtual worker in all steps, each committed when the next one is asked for."""
        step = self.first_step
        while self.supply.wait(step, self.check):
            self.supply.prefetch(step, range(self.workers))
            yield [self.supply.table(step, worker) for worker in range(self.workers)]
            step += 1
            self.feed.committed(step)

    def batches(self) -> Iterator[list[Any]]:
        """As `steps`, collated."""
        for tables in self.steps():
            yield [default_collate(table.drop_columns([NUMBERS]), torch.Generator()) for table in tables]

    @property
    def rows_read(self) -> int:
        """Rows that tasks have read so far, the ones that were only counted included."""
        return self.feed._train.read

    def close(self) -> None:
        """Stop feeding."""
        self.feed.close()


def feed(
    datasets: Any, config: TrainConfig, first_step: int = 0, counts: Mapping[int, int] | None = None, batches: int = 1
) -> Fed:
    """Begin to feed.

    Args:
        datasets: the training set, or all by name.
        first_step: where to begin.
        counts: rows of units, where an earlier run has counted them.
        batches: in a step.
    """
    sources = open_datasets(datasets if isinstance(datasets, dict) else {"train": datasets})
    order, schedule = rows_of_job(config, sources["train"].rows, sources["train"].held, batches)
    supply = Supply()
    supply.names = [name for name in sources if name != "train"]
    said, found, failures = list[str](), dict[int, int](), list[Exception]()

    def failed(error: Exception) -> None:
        failures.append(error)
        supply.wake()

    hears = Hears(supply.tell, found.update, said.append, failed)
    made = Feed(sources, order, schedule, hears, first_step, counts)
    supply.tell(made.news())
    made.start()
    return Fed(made, supply, config.virtual_workers, first_step, said, found, failures)
