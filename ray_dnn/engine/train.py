"""The training loop of one agent inside a generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ray_dnn.engine.reports import Report
from ray_dnn.engine.step import Engine


class Decisions(Protocol):
    """The driver's decisions, as this agent knows them."""

    def held(self) -> int:
        """The newest decision such that this agent holds all decisions up to it."""

    def save(self, step: int, agreed: int) -> None:
        """Take the snapshots that are due before ``step``, when every agent holds the decisions up to ``agreed``."""

    def due(self, step: int, agreed: int) -> int | None:
        """The decision to stop for before ``step``, when every agent holds those up to ``agreed``; None: go on."""


def train(
    engine: Engine, decisions: Decisions, settled: int, finish: bool, report: Callable[[Report], None]
) -> int | None:
    """Take steps until a decision says stop, and return its number; or to the end of the job, and return None.

    Args:
        settled: decisions up to this number are held by every agent before the first exchange.
        finish: take no further step; evaluate, and that is the end.
        report: takes the report of each step and evaluation when it is committed.
    """
    agreed = settled
    while True:
        if engine.evaluation_due:
            report(engine.evaluate())
            continue
        if engine.at_boundary:
            decisions.save(engine.state.step, agreed)
            if finish or engine.finished:
                break
            if (decision := decisions.due(engine.state.step, agreed)) is not None:
                return decision
        if (step := engine.advance(decisions.held())) is not None:
            report(step)
            agreed = step.held
    if engine.news:
        report(engine.evaluate())
    return None
