"""Keeps what agents report: the ledger, the evaluations, the progress, the speeds."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ray_dnn.agent import Job
from ray_dnn.engine.reports import EvaluationReport, Report, StepReport
from ray_dnn.errors import ProtocolError
from ray_dnn.events import Evaluated, EventLog, FirstStep, Progress, StepSkipped
from ray_dnn.fleet import Replica
from ray_dnn.ledger import LedgerHead, LedgerLine, units_line
from ray_dnn.storage import LEDGER, RunFolder

_LATELY = 5  # steps whose median speed counts: the first one of a process is slow
_PROGRESS_LEAST_S, _PROGRESS_MOST_S = 1.0, 30.0


class Recorder:
    """What is known of the committed steps.

    Attributes:
        steps: committed and recorded.
        first_step: where this attempt began.
        serial: of the newest report; the next one must be the one behind it.
        schedule: of the job, as far as its rows are known.
        history: evaluations, as ``TrainSpec.stop`` sees them.
        units: rows of those units of the training set that had to be counted.
    """

    def __init__(self, job: Job, folder: RunFolder, log: EventLog, head: LedgerHead):
        self._job, self._log = job, log
        self._ledger = folder.append_file(LEDGER)
        self._ledger.write(head.to_json())
        # Contributions per second in the last steps, by first agent of the replica.
        self._speeds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATELY))
        self._last: StepReport | None = None
        self._rows = 0
        self._waited = self._waited_in_all = 0.0  # seconds that the reporting agent waited for rows, lately and ever
        self._started = self._told = time.time()
        self._told_rows = 0
        self._skipped_before = 0 if job.resume is None else job.resume.manifest.skipped
        self._skipped: list[int] = []  # steps, of this attempt
        self._agents = 0  # that have committed a step
        self._generations = 0
        self.schedule = head.schedule
        self.history: list[dict[str, float]] = [] if job.resume is None else list(job.resume.manifest.history)
        self.steps = self.first_step = self._told_step = job.first_step
        self.serial = self.steps + len(self.history)
        self.units: dict[int, int] = {}
        self._through = head.through

    def counted(self, rows: Mapping[int, int]) -> None:
        """Some units of the training set have so many rows."""
        self._ledger.write(units_line(rows))
        if not self._through:
            self.units |= rows

    def skipped_before(self, step: int) -> int:
        """How many steps before this one changed nothing."""
        return self._skipped_before + sum(skipped < step for skipped in self._skipped)

    @property
    def failing_since(self) -> float | None:
        """Since when the ledger cannot be written."""
        return self._ledger.failing_since

    def unwritten(self) -> tuple[str, bytes]:
        """What of the ledger has not reached storage, and the name of the file that it belongs to."""
        return self._ledger.unwritten()

    @property
    def step_s(self) -> float:
        """Seconds that the last step took; 0: there was none."""
        return self._last.time - self._last.began if self._last is not None else 0.0

    @property
    def generation(self) -> int:
        """That has committed the last step; 0: there was none."""
        return self._last.generation if self._last is not None else 0

    def flush(self) -> None:
        """Have all that is known written."""
        self._ledger.flush()

    def add(self, report: Report) -> bool:
        """Record what was committed. Returns False where it is known already.

        A step that was committed by agents which then died, all of them, is committed again by others.
        """
        if report.serial <= self.serial:
            self._compare(report)
            return False
        if report.serial > self.serial + 1:
            raise ProtocolError(f"report {report.serial} (step {report.step}) came where {self.serial + 1} is due")
        self.serial = report.serial
        if isinstance(report, EvaluationReport):
            self.history.append({"step": float(report.step)} | report.metrics)
            self._log.add(Evaluated(report.step, report.metrics))
        else:
            self._step(report)
        return True

    def _step(self, report: StepReport) -> None:
        if self._last is None:  # the clock starts with the first step, not with the agents
            self._started = self._told = report.began
        self.steps += 1
        self._rows += report.rows
        self._waited += report.wait_s
        self._waited_in_all += report.wait_s
        line = LedgerLine(
            report.step, report.generation, report.worker_rows, report.worker_digests, report.metrics, report.skipped
        )
        self._ledger.write(line.to_json())
        for name, speed in zip(report.members, report.speeds, strict=True):
            self._speeds[name].append(speed)
        if self._last is None or self._last.generation != report.generation:
            self._generation_begins(report)
        if report.skipped:
            self._skipped.append(report.step)
            self._log.add(StepSkipped(report.step, report.skipped))
        self._last = report
        self._progress(len(report.members) * self._job.replica_size)

    def _generation_begins(self, report: StepReport) -> None:
        self._generations += 1
        # Who has left does not come back.
        self._agents += len({*report.members} - {*(self._last.members if self._last is not None else ())})
        for name in self._speeds.keys() - {*report.members}:
            del self._speeds[name]
        gap = report.time - self._last.time if self._last else 0.0
        joined = report.joined
        assert joined is not None
        self._log.add(
            FirstStep(
                generation=report.generation,
                step=report.step,
                gap_s=gap,
                called=joined.called,
                left=joined.left,
                formed=joined.formed,
                agreed=joined.agreed,
                committed=report.time,
            )
        )

    def _compare(self, report: Report) -> None:
        last = self._last
        if isinstance(report, StepReport) and last is not None and report.step == last.step:
            for name in ("metrics", "worker_rows", "worker_digests", "skipped"):
                one, other = getattr(last, name), getattr(report, name)
                if repr(one) != repr(other):  # which NaN is equal to itself in
                    raise ProtocolError(f"step {report.step} was committed twice, with {name} {one} and {other}")

    def speeds(self, members: Sequence[Replica]) -> list[float]:
        """Speeds for the plan: measured ones where all are known, else all alike."""
        known = [self._speeds[replica.names[0]] for replica in members]
        return [median(speeds) for speeds in known] if all(known) else [1.0] * len(known)

    def _progress(self, agents: int) -> None:
        now = time.time()
        total = self.schedule.total_steps
        every = min(max(_PROGRESS_LEAST_S, (now - self._started) / 30), _PROGRESS_MOST_S)
        if now - self._told < every and self.steps != total:
            return
        seconds = max(now - self._told, 1e-9)
        steps, rows = self.steps - self._told_step, self._rows - self._told_rows
        left = (total - self.steps) * seconds / steps if steps and total is not None else None
        assert self._last is not None
        loss = next((v for k, v in self._last.metrics.items() if k.split("/")[-1] == "loss"), float("nan"))
        epoch = 0 if self.schedule.rows is None else (self.steps - 1) // self.schedule.steps_per_epoch
        waited = min(1.0, self._waited / seconds)
        self._log.add(Progress(self.steps, total, epoch, loss, rows / seconds, agents, left, waited))
        self._told, self._told_step, self._told_rows, self._waited = now, self.steps, self._rows, 0.0

    def final(self, exact: bool) -> dict[str, Any]:
        """The metrics of the result."""
        metrics: dict[str, Any] = dict(self._last.metrics) if self._last else {}
        if self.history:
            metrics |= {k: v for k, v in self.history[-1].items() if k != "step"}
        return metrics | {
            "steps": self.steps,
            "rows": self._rows_before() + self._rows,
            "rows_waited_s": self._waited_in_all,
            "skipped_steps": self.skipped_before(self.steps),
            "agents": self._agents,
            "generations": self._generations,
            "same_bits": exact,
        }

    def _rows_before(self) -> int:
        """That were used before this attempt."""
        step, schedule = self.first_step, self.schedule
        if schedule.rows is None:
            return step * schedule.local_batches * schedule.batch_size
        epochs, within = divmod(step, schedule.steps_per_epoch)
        return epochs * schedule.rows + within * schedule.local_batches * schedule.batch_size

    def close(self) -> None:
        self._ledger.close()
