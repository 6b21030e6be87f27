"""For tests of jobs: runs whose membership changes and in which things go wrong at named steps, and what to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.fs
import ray
from ray.train import Result

from ray_dnn.checkpoint import Place
from ray_dnn.errors import ConfigError
from ray_dnn.events import Event, parse
from ray_dnn.faults import Claims, Corrupt, Fault, FaultPlan, Kill, Partition, Slow, Stop, claims_of
from ray_dnn.ledger import Ledger
from ray_dnn.storage import EVENTS, LEDGER, attempts, read_lines
from ray_dnn.trainer import Handle, Trainer

__all__ = [
    "Corrupt",
    "Fault",
    "FaultyRun",
    "Kill",
    "Partition",
    "Slow",
    "Stop",
    "fit_resizing",
    "fit_with_faults",
    "read_events",
    "read_ledger",
    "start_resizing",
    "start_with_faults",
]


def start_resizing(trainer: Trainer, sizes: Mapping[int, int]) -> Handle:
    """Start a run whose number of agents is exactly as named, from each named step on.

    Args:
        sizes: agents by step; step 0 must be named. A step waits for the agents that it needs; those that are lost
            afterwards are replaced, without waiting.

    Raises:
        ConfigError: a size is outside of what the trainer's ScalingConfig allows.
    """
    return trainer._start(_script(trainer, sizes))


def fit_resizing(trainer: Trainer, sizes: Mapping[int, int]) -> Result:
    """`start_resizing`, to the end."""
    return start_resizing(trainer, sizes).result()


def _script(trainer: Trainer, sizes: Mapping[int, int]) -> dict[int, int]:
    each = trainer.replica_size
    least, most = trainer._limits().least * each, trainer._limits().most * each
    if 0 not in sizes or not all(least <= size <= most and size % each == 0 for size in sizes.values()):
        raise ConfigError(f"sizes={dict(sizes)}: must name step 0, and whole replicas from {least} to {most} agents.")
    return {step: size // each for step, size in sizes.items()}


class FaultyRun:
    """A run under way in which faults strike.

    Attributes:
        handle: of the run, as `Trainer.start` gives it.
    """

    def __init__(self, trainer: Trainer, faults: Sequence[Fault], sizes: Mapping[int, int] | None):
        script = _script(trainer, sizes) if sizes else {}
        if not ray.is_initialized():
            ray.init()
        self._faults = list(faults)
        self._claims: Any = ray.remote(Claims).options(num_cpus=0).remote()
        self.handle = trainer._start(script, FaultPlan(self._faults, claims_of(self._claims)))

    def struck(self) -> dict[int, str]:
        """Which faults have struck so far: the agent, by the fault's index in the plan."""
        struck: dict[int, str] = ray.get(self._claims.struck.remote())
        return struck

    def result(self) -> Result:
        """The run's result.

        Raises:
            AssertionError: a fault never struck, so that the test would have proved nothing.
        """
        try:
            result = self.handle.result()
            struck = self.struck()
        finally:
            ray.kill(self._claims)
        missing = [fault for index, fault in enumerate(self._faults) if index not in struck]
        if missing:
            raise AssertionError(f"these faults never struck: {missing}")
        return result


def start_with_faults(trainer: Trainer, faults: Sequence[Fault], sizes: Mapping[int, int] | None = None) -> FaultyRun:
    """Start a run in which these faults strike, each once. ``sizes``: as in `start_resizing`."""
    return FaultyRun(trainer, faults, sizes)


def fit_with_faults(trainer: Trainer, faults: Sequence[Fault], sizes: Mapping[int, int] | None = None) -> Result:
    """`start_with_faults`, to the end. Raises AssertionError where a fault never struck."""
    return start_with_faults(trainer, faults, sizes).result()


def read_events(run: Result | str, attempt: int | None = None) -> list[Event]:
    """The event log of a run: its result, or the path or URI of its folder. ``attempt``: None for the last one."""
    return list(parse(read_lines(_folder(run), EVENTS, attempt)))


def read_ledger(run: Result | str, attempt: int | None = None) -> Ledger:
    """The ledger of a run: its result, or the path or URI of its folder.

    ``attempt``: as it was when that attempt ended; None for the last one.
    """
    folder = _folder(run)
    return Ledger(read_lines(folder, LEDGER, n) for n in attempts(folder, LEDGER) if attempt is None or n <= attempt)


def _folder(run: Result | str) -> Place:
    if isinstance(run, Result):
        return Place(run._storage_filesystem or pyarrow.fs.LocalFileSystem(), run.path)
    return Place.of(run)
