"""Keeps what agents report: the ledger, the evaluations, the progress, the speeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray_dnn.agent import Job
from ray_dnn.engine.step import StepReport
from ray_dnn.errors import ProtocolError
from ray_dnn.events import Evaluated, EventLog, FirstStep, Progress, StepSkipped
from ray_dnn.fleet import Replica
from ray_dnn.ledger import LedgerHead, LedgerLine
from ray_dnn.storage import LEDGER, RunFolder

_PROGRESS_LEAST_S, _PROGRESS_MOST_S = 1.0, 30.0


class Recorder:
    """What is known of the committed steps.

    Attributes:
        steps: committed and recorded; the next report must be of this step.
        history: evaluations, as ``TrainSpec.stop`` sees them.
    """

    def __init__(self, job: Job, folder: RunFolder, log: EventLog):
        self._job, self._log = job, log
        self._ledger = folder.append_file(LEDGER)
        self._ledger.write(LedgerHead(job.order, job.schedule).to_json())
        self._speeds: dict[str, float] = {}  # contributions per second, smoothed, by replica
        self._last: StepReport | None = None
        self._rows = 0
        self._started = self._told = time.time()
        self._told_step = self._told_rows = 0
        self._skipped = 0
        self._agents: set[str] = set()
        self._generations = 0
        self.steps = 0
        self.history: list[dict[str, float]] = []

    def add(self, report: StepReport, members: Sequence[Replica]) -> None:
        """Record a committed step. Reports that are known already are passed over."""
        if report.step < self.steps:
            return
        if self._last is None:  # the clock starts with the first step, not with the agents
            self._started = self._told = report.began
        if report.step > self.steps:
            raise ProtocolError(f"step {report.step} was reported where step {self.steps} is due")
        self.steps += 1
        self._rows += report.rows
        line = LedgerLine(
            report.step, report.generation, report.worker_rows, report.worker_digests, report.metrics, report.skipped
        )
        self._ledger.write(line.to_json())
        for replica, speed in zip(members, report.speeds, strict=True):
            old = self._speeds.get(replica.name, speed)
            self._speeds[replica.name] = 0.8 * old + 0.2 * speed
        if self._last is None or self._last.generation != report.generation:
            self._generations += 1
            self._agents |= {name for replica in members for name in replica.names}
            gap = report.time - self._last.time if self._last else 0.0
            self._log.add(FirstStep(report.generation, report.step, gap))
        if report.skipped:
            self._skipped += 1
            self._log.add(StepSkipped(report.step, report.skipped))
        self._last = report
        if report.evaluation is not None:
            self.evaluated(report.step + 1, report.evaluation)
        self._progress(sum(len(replica.names) for replica in members))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append({"step": float(step)} | metrics)
        self._log.add(Evaluated(step, metrics))

    def speeds(self, members: Sequence[Replica]) -> list[float]:
        """Speeds for the plan: measured ones where all are known, else all alike."""
        known = [self._speeds.get(replica.name) for replica in members]
        if any(speed is None for speed in known):
            return [1.0] * len(known)
        return [speed for speed in known if speed is not None]

    def _progress(self, agents: int) -> None:
        now = time.time()
        total = self._job.schedule.total_steps
        every = min(max(_PROGRESS_LEAST_S, (now - self._started) / 30), _PROGRESS_MOST_S)
        if now - self._told < every and self.steps < total:
            return
        seconds = max(now - self._told, 1e-9)
        steps, rows = self.steps - self._told_step, self._rows - self._told_rows
        left = (total - self.steps) * seconds / steps if steps else 0.0
        assert self._last is not None
        loss = next((v for k, v in self._last.metrics.items() if k.split("/")[-1] == "loss"), float("nan"))
        epoch = (self.steps - 1) // self._job.schedule.steps_per_epoch
        self._log.add(Progress(self.steps, total, epoch, loss, rows / seconds, agents, left))
        self._told, self._told_step, self._told_rows = now, self.steps, self._rows

    def final(self, exact: bool) -> dict[str, Any]:
        """The metrics of the result."""
        metrics: dict[str, Any] = dict(self._last.metrics) if self._last else {}
        if self.history:
            metrics |= {k: v for k, v in self.history[-1].items() if k != "step"}
        return metrics | {
            "steps": self.steps,
            "rows": self._rows,
            "skipped_steps": self._skipped,
            "agents": len(self._agents),
            "generations": self._generations,
            "same_bits": exact,
        }

    def close(self) -> None:
        self._ledger.close()
