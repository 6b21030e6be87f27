"""How long one of four agents that is killed or stopped holds up the others: from the signal to the next new step."""

import os
import signal
import tempfile
import time
from statistics import median

import ray
from ray.train import RunConfig, ScalingConfig

from benchmarks import small
from benchmarks.tables import Claim, Table, bar, spread
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.events import AgentStarted, FirstStep, GenerationFormed, Progress
from ray_dnn.testing import read_events

AGENTS = 4
ROUNDS = 6  # of each kind
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


def run() -> Table:
    """The table."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder:
            gaps, step_s = _struck(folder)
    finally:
        ray.shutdown()
    return Table(
        name="recovery",
        title="How long an agent that is killed or stopped holds up the others",
        header=(f"one of {AGENTS} agents", "times", "signal to next new step"),
        rows=tuple((name, str(len(seconds)), spread(seconds, "s", 3)) for name, seconds in gaps.items()),
        notes=(f"A step takes {step_s:.3f} s. From the signal to the end of the first step that is new.",),
        claims=tuple(
            Claim(f"from {name} of one of {AGENTS} agents to the next new step", f"{median(seconds):.3f} s")
            for name, seconds in gaps.items()
        ),
        bars=tuple(bar(name, "ray_dnn", seconds) for name, seconds in gaps.items()),
        unit="s",
    )


def _struck(folder: str) -> tuple[dict[str, list[float]], float]:
    """The gaps by signal, and the median time of a step."""
    spec = TrainSpec(model=small.build_model, optimizer=small.build_optimizer, loss=small.loss)
    handle = Trainer(
        spec,
        {"train": small.rows()},
        TrainConfig(batch_size=64, virtual_workers=8, steps=1_000_000),
        scaling_config=ScalingConfig(num_workers=(1, AGENTS)),
        run_config=RunConfig(name="run", storage_path=folder),
    ).start()
    pids: dict[str, int] = {}
    members: list[str] = []
    struck: list[tuple[str, float]] = []
    steps: list[float] = []
    kinds = [name for _ in range(ROUNDS) for name in SIGNALS]
    waiting = False  # for the recovery from the last one
    for event in handle.events():
        if isinstance(event, AgentStarted):
            pids[event.agent] = event.pid
        elif isinstance(event, GenerationFormed):
            members = event.agents
        elif isinstance(event, FirstStep):
            waiting = False
        elif isinstance(event, Progress) and not waiting and len(members) == AGENTS:
            steps.append(64 / max(event.rows_per_s, 1e-9))
            if not kinds:
                handle.stop()
                break
            name, waiting = kinds.pop(0), True
            struck.append((name, time.time()))
            os.kill(pids[members[len(struck) % AGENTS]], SIGNALS[name])
    first = [e.committed for e in read_events(handle.result()) if isinstance(e, FirstStep)]
    gaps: dict[str, list[float]] = {name: [] for name in SIGNALS}
    for name, when in struck:
        gaps[name].append(min(t for t in first if t > when) - when)
    return gaps, median(steps)
