"""Two fast and two slow agents: how near a step comes to an exact division of the work, before and after rebalancing.

An agent's speed is made by sleeping for each virtual worker: agents do not compete for the cores of one machine.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
from ray.train import RunConfig, ScalingConfig
from torch import nn

from benchmarks import small
from benchmarks.tables import Claim, Table
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.events import GenerationFormed, Progress
from ray_dnn.plan import sizes

AGENTS, SLOW = 4, 2
FAST_S, TIMES = 0.01, 3  # that a virtual worker takes on a fast agent; how many times as long on a slow one
WORKERS = (8, 16, 64)
TARGET = 1.15  # with 64 virtual workers
_LOOKS = 8  # at the progress, once the plan is the last one


@cache
def _is_slow(folder: Path) -> bool:
    """Whether this process is one of the slow ones."""
    for number in range(SLOW):
        try:
            (folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def uneven(folder: Path) -> Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]:
    """The loss, after so long a sleep as this process's agent is slow."""

    def slow(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        time.sleep(FAST_S * (TIMES if _is_slow(folder) else 1))
        return small.loss(model, batch)

    return slow


def run() -> Table:
    """The table."""
    rows, claims = [], []
    with small.cluster():
        for workers in WORKERS:
            with tempfile.TemporaryDirectory() as folder:
                before, after, bounds = _measured(workers, Path(folder))
            ideal = workers * FAST_S / (AGENTS - SLOW + SLOW / TIMES)
            ratios = [seconds / ideal for seconds in after]
            divided = ", ".join(str(size) for size in sizes(bounds))
            by_speed = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append((str(workers), divided, f"{before / ideal:.2f}", by_speed))
            what = f"two of four agents {TIMES} times slower, {workers} virtual workers: a step, to an exact division"
            claims.append(Claim(what, f"{median(ratios):.2f}", brief=workers == max(WORKERS)))
    return Table(
        name="mixed",
        title="How near a step comes to an exact division of the work among unequal agents",
        header=("virtual workers", "of each agent, at last", "divided evenly", "divided by speed"),
        rows=tuple(rows),
        notes=(
            f"Times of a step against that of an exact division, {AGENTS - SLOW} agents with {FAST_S * 1e3:g} ms for a "
            f"virtual worker and {SLOW} with {TIMES * FAST_S * 1e3:g} ms; all that a step takes beside is counted. "
            f"Target with 64 virtual workers: {TARGET}.",
        ),
        claims=tuple(claims),
    )


def _measured(workers: int, folder: Path) -> tuple[float, list[float], list[int]]:
    """Seconds of a step, while virtual workers are divided evenly and often afterwards; and how they are at last."""
    handle = Trainer(
        TrainSpec(
            model=partial(small.build_model, 64),  # computing is to take no time beside the sleep
            optimizer=small.build_optimizer,
            loss=uneven(folder),
        ),
        {"train": small.rows()},
        TrainConfig(batch_size=2 * workers, virtual_workers=workers, steps=1_000_000),
        scaling_config=ScalingConfig(num_workers=AGENTS),
        run_config=RunConfig(name="run", storage_path=str(folder / "storage")),
    ).start()
    looks: dict[tuple[int, ...], list[Progress]] = {}  # by plan
    for event in handle.events():
        if isinstance(event, GenerationFormed):
            bounds = tuple(event.bounds)
            looks[bounds] = []
        elif isinstance(event, Progress):
            looks[bounds].append(event)
            if len(looks) > 1 and len(looks[bounds]) > _LOOKS:
                handle.stop()
                break
    handle.result()
    first, *_, last = looks.values()
    return median(_step_s(first)), list(_step_s(last)), list(bounds)


def _step_s(looks: list[Progress]) -> Iterator[float]:
    for before, after in itertools.pairwise(looks):
        yield (after.time - before.time) / (after.step - before.step)
