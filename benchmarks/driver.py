"""What the driver costs while agents take steps much faster than any training does, and that nobody waits for it.

The driver, its watchers, and everything on the agents' side that talks to them are the real ones. Only what an agent
does in a generation is pretended: it makes up the reports of steps, at a fixed rate.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray.train import RunConfig, ScalingConfig

from benchmarks import small
from benchmarks.tables import Claim, Table
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.agent import Agent, Built, Generation, Job, Stopped
from ray_dnn.checkpoint import File, Place
from ray_dnn.comm.mesh import Address
from ray_dnn.engine.probe import FirstContribution
from ray_dnn.engine.reports import Joined, StepReport
from ray_dnn.engine.saving import Taken
from ray_dnn.events import FirstStep
from ray_dnn.phases import Phase
from ray_dnn.testing import read_ledger

AGENTS, WORKERS, ROWS = 4, 16, 64  # of a step
RATES = (20, 2_000)  # steps a second
SECONDS = 10
HELD_S = 1.0  # for which the driver is held up in the middle of a run
TICK_S = 0.001
_FOLDER = "BENCHMARK_FOLDER"
_RATE = "BENCHMARK_RATE"


class Pretender(Agent):
    """An agent that trains nothing."""

    def _build(self, job: Job, rank: int, group: tuple[Address, ...], twice: bool) -> Built:
        self._job = job
        self.marks.enter(Phase.READY)
        return Built({}, FirstContribution("", {}, {}), "", {}, 0.0)

    def _run(self, generation: Generation, replica: int, founding: bool, called: float) -> Stopped:
        """Take steps when they are due, whatever the driver does."""
        rate, steps, self._replica = int(os.environ[_RATE]), self._job.config.steps, replica
        now = time.time()
        joined = Joined(called, now, now, now)
        self.marks.enter(Phase.COMPUTING, 0)
        begun = time.monotonic()
        late, handing, step = 0.0, 0.0, 0
        while step < steps:
            time.sleep(TICK_S)
            now = time.monotonic()
            due = min(steps, int((now - begun) * rate))
            if due > step:
                late = max(late, now - begun - (step + 1) / rate)
            while step < due:
                report = self._made_up(generation, step, joined)
                began = time.perf_counter()
                self._report(report)
                handing += time.perf_counter() - began
                step += 1
            self.marks.enter(Phase.COMPUTING, step)
        numbers = json.dumps([late, handing / steps, (time.monotonic() - begun) / steps])
        (Path(os.environ[_FOLDER]) / f"agent.{self.name}").write_text(numbers)
        return Stopped(steps, None, "", "")

    def _made_up(self, generation: Generation, step: int, joined: Joined) -> StepReport:
        rows = ROWS // WORKERS
        return StepReport(
            serial=step + 1,
            step=step,
            generation=generation.number,
            members=generation.names,
            metrics={"loss": 1 / (step + 1)},
            rows=ROWS,
            worker_rows=(rows,) * WORKERS,
            worker_digests=tuple(range(2**62 + step, 2**62 + step + WORKERS)),
            skipped=None,
            held=0,
            compute_s=1e-4,
            exchange_s=1e-4,
            wait_s=0.0,
            speeds=(1e4,) * len(generation.names),
            began=time.time(),
            joined=joined,
        )

    def snapshot(self, number: int) -> None:
        """Of nothing, as all below."""

    def taken(self, number: int) -> Taken:
        steps = self._job.config.steps
        assert steps is not None
        return Taken(steps, [], AGENTS, self._replica, {}, [])

    def write(self, number: int, writer: int, place: Place) -> dict[str, File]:
        name = f"nothing-{writer}"
        return {name: place.write(name)}

    def drop(self, number: int) -> None:
        pass


@dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
        rate, steps: that the agents took.
        cpu: seconds of CPU that the driver's process used in a second.
        late_s: the longest that a step came after it was due, on any agent, while the driver was held up once.
        report_s: that an agent spends on handing over a report, on average.
        recorded: steps in the ledger, none twice and none left out.
    """

    rate: int
    steps: int
    cpu: float
    late_s: float
    report_s: float
    recorded: int


def measure(rate: int, data: Any, folder: str) -> Cost:
    """Run at a rate of steps; hold the driver up once."""
    steps = rate * SECONDS
    variables = {_FOLDER: folder, _RATE: str(rate)}
    with patch("ray_dnn.cluster.Agent", Pretender):
        handle = Trainer(
            TrainSpec(small.build_model, small.build_optimizer, small.loss),
            {"train": data},
            TrainConfig(ROWS, virtual_workers=WORKERS, steps=steps),
            scaling_config=ScalingConfig(num_workers=AGENTS),
            run_config=RunConfig(name="run", storage_path=folder, worker_runtime_env={"env_vars": variables}),
        ).start()
        next(event for event in handle.events() if isinstance(event, FirstStep))
    time.sleep(1.0)  # for what starting has left behind
    begun, used = time.monotonic(), time.process_time()
    time.sleep(SECONDS / 2)
    cpu = (time.process_time() - used) / (time.monotonic() - begun)
    handle._driver._loop.post(lambda: time.sleep(HELD_S))
    result = handle.result()
    agents = [json.loads(path.read_text()) for path in Path(folder).glob("agent.*")]
    assert len(agents) == AGENTS
    return Cost(rate, steps, cpu, max(a[0] for a in agents), max(a[1] for a in agents), len(read_ledger(result).lines))


def run() -> Table:
    """The table."""
    with small.cluster():
        # In one epoch: the feed's work for thousands of them would be measured too, of which no training has as many.
        data = ray.data.range(max(RATES) * SECONDS * ROWS, override_num_blocks=8).materialize()
        costs = []
        for rate in RATES:
            with tempfile.TemporaryDirectory() as folder:
                costs.append(measure(rate, data, folder))
    slow, fast = costs[0], costs[-1]
    each = (fast.cpu - slow.cpu) / (fast.rate - slow.rate) * 1000
    return Table(
        name="driver",
        title="The driver while agents take up to 2,000 steps a second",
        header=(
            "steps a second",
            "driver: CPU",
            "an agent hands over a report in",
            f"a step is late by at most, driver held up for {HELD_S:g} s",
            "steps taken",
            "in the ledger",
        ),
        rows=tuple(
            (
                f"{cost.rate:,}",
                f"{100 * cost.cpu:.1f} % of a core",
                f"{1e6 * cost.report_s:.0f} µs",
                f"{1e3 * cost.late_s:.0f} ms",
                f"{cost.steps:,}",
                f"{cost.recorded:,}",
            )
            for cost in costs
        ),
        notes=(
            f"{AGENTS} agents that train nothing and make up the reports of {WORKERS} virtual workers at a fixed rate "
            f"for {SECONDS} s; all else is real. One run at each rate. CPU is that of the driver's whole process, over "
            f"{SECONDS / 2:g} s. Between the rates, 1,000 steps cost {each * 1e3:.0f} ms.",
            f"Once in each run the driver's loop is held up for {HELD_S:g} s. Agents keep their reports until the "
            "driver asks for them, so their steps go on; that none comes late by as much shows it. How late steps are "
            "apart from that is the operating system's doing, which runs all of this on the same cores.",
        ),
        claims=(
            Claim(
                f"driver's CPU at {fast.rate:,} steps a second, {AGENTS} agents",
                f"{100 * fast.cpu:.1f} % of a core, {each * 1e3:.0f} ms for 1,000 steps",
            ),
        ),
    )
