"""For tests of jobs: runs whose membership changes at named steps, and what to compare afterwards."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow.fs
from ray.train import Result

from ray_dnn.checkpoint import open_folder
from ray_dnn.errors import ConfigError
from ray_dnn.events import Event, parse
from ray_dnn.ledger import Ledger
from ray_dnn.storage import EVENTS, LEDGER, read_lines
from ray_dnn.trainer import Handle, Trainer


def start_resizing(trainer: Trainer, sizes: Mapping[int, int]) -> Handle:
    """Start a run whose number of agents is exactly as named, from each named step on.

    Args:
        sizes: agents by step; step 0 must be named. A step waits for the agents that it needs.

    Raises:
        ConfigError: a size is outside of what the trainer's ScalingConfig allows.
    """
    each = trainer.replica_size
    least, most = trainer._limits().least * each, trainer._limits().most * each
    if 0 not in sizes or not all(least <= size <= most and size % each == 0 for size in sizes.values()):
        raise ConfigError(f"sizes={dict(sizes)}: must name step 0, and whole replicas from {least} to {most} agents.")
    return trainer._start({step: size // each for step, size in sizes.items()})


def fit_resizing(trainer: Trainer, sizes: Mapping[int, int]) -> Result:
    """`start_resizing`, to the end."""
    return start_resizing(trainer, sizes).result()


def read_events(run: Result | str, attempt: int | None = None) -> list[Event]:
    """The event log of a run: its result, or the path or URI of its folder. ``attempt``: None for the last one."""
    return [parse(line) for line in read_lines(*_folder(run), EVENTS, attempt)]


def read_ledger(run: Result | str, attempt: int | None = None) -> Ledger:
    """The ledger of a run: its result, or the path or URI of its folder. ``attempt``: None for the last one."""
    return Ledger(read_lines(*_folder(run), LEDGER, attempt))


def _folder(run: Result | str) -> tuple[pyarrow.fs.FileSystem, str]:
    if isinstance(run, Result):
        return run._storage_filesystem or pyarrow.fs.LocalFileSystem(), run.path
    return open_folder(run)
