"""For tests of jobs: runs whose membership changes at named steps, and what to compare afterwards."""

from __future__ import annotations

from collections.abc import Mapping

from ray.train import Result

from ray_dnn.errors import ConfigError
from ray_dnn.events import Event, parse
from ray_dnn.ledger import Ledger
from ray_dnn.storage import EVENTS, LEDGER, read_lines
from ray_dnn.trainer import Handle, Trainer


def start_resizing(trainer: Trainer, sizes: Mapping[int, int]) -> Handle:
    """Start a run whose number of replicas is exactly as named, from each named step on.

    Args:
        sizes: replicas by step; step 0 must be named. A step waits for the agents that it needs.

    Raises:
        ConfigError: a size is outside of what the trainer's ScalingConfig allows.
    """
    least, most = trainer._limits().least, trainer._limits().most
    if 0 not in sizes or not all(least <= size <= most for size in sizes.values()):
        raise ConfigError(f"sizes={dict(sizes)}: must name step 0, and sizes from {least} to {most}.")
    return trainer._start(dict(sizes))


def fit_resizing(trainer: Trainer, sizes: Mapping[int, int]) -> Result:
    """`start_resizing`, to the end."""
    return start_resizing(trainer, sizes).result()


def read_events(path: str, attempt: int | None = None) -> list[Event]:
    """The event log in a run's folder; ``attempt``: None for the last one."""
    return [parse(line) for line in read_lines(path, EVENTS, attempt)]


def read_ledger(path: str, attempt: int | None = None) -> Ledger:
    """The ledger in a run's folder; ``attempt``: None for the last one."""
    return Ledger(read_lines(path, LEDGER, attempt))
