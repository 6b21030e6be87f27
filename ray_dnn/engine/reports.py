"""What agents report of what they have committed. Equal on every agent, but for times."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Joined:
    """How an agent came into a generation. Times in seconds since the epoch.

    Attributes:
        called: when it was told to.
        left: when it had left the generation before.
        formed: when it was connected to all others.
        agreed: when all had the same state.
    """

    called: float
    left: float
    formed: float
    agreed: float


@dataclass(frozen=True)
class StepReport:
    """What is known about a committed step; the same on every agent, but for the times.

    Attributes:
        serial: counts all reports of the run, from 1.
        step: its number, from 0.
        generation: that committed it.
        members: the replicas of the generation, by rank.
        metrics: means over the whole batch; "loss" among them.
        rows: used in the step, and by each virtual worker (``worker_rows``), with checksums of the row numbers.
        skipped: why nothing was updated, or None.
        held: the newest decision that every replica held.
        compute_s, exchange_s: of this agent.
        wait_s: that this agent waited for rows, before the step and, of ``compute_s``, in it.
        speeds: contributions per second, by replica.
        began: when it began, in seconds since the epoch.
        joined: how this agent came into the generation.
        time: when it was committed, in seconds since the epoch.
    """

    serial: int
    step: int
    generation: int
    members: tuple[str, ...]
    metrics: dict[str, float]
    rows: int
    worker_rows: tuple[int, ...]
    worker_digests: tuple[int, ...]
    skipped: str | None
    held: int
    compute_s: float
    exchange_s: float
    wait_s: float
    speeds: tuple[float, ...]
    began: float
    joined: Joined | None = None
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation.

    Attributes:
        serial: counts all reports of the run, from 1.
        step: committed steps.
        metrics: by ``dataset/metric``.
        time: when it was done, in seconds since the epoch.
    """

    serial: int
    step: int
    metrics: dict[str, float]
    time: float = field(default_factory=time.time)


Report = StepReport | EvaluationReport


def to_tree(report: Report) -> dict[str, Any]:
    """A report as a tree that can be encoded."""
    return {"kind": type(report).__name__} | asdict(report)


def from_tree(tree: dict[str, Any]) -> Report:
    """The report that `to_tree` was given."""
    values = dict(tree)
    kind = {"StepReport": StepReport, "EvaluationReport": EvaluationReport}[values.pop("kind")]
    if values.get("joined") is not None:
        values["joined"] = Joined(**values["joined"])
    assert values.keys() == {f.name for f in fields(kind)}
    report: Report = kind(**values)
    return report
