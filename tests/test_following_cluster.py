"""Newcomers follow members on a real Ray cluster, and things go wrong meanwhile."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs_for_tests import digest, slowly, trainer

from ray_dnn.events import AgentFollowed, AgentGone, GenerationFormed
from ray_dnn.faults import Fault, Kill
from ray_dnn.phases import Status
from ray_dnn.testing import read_events, read_ledger, start_with_faults

pytestmark = pytest.mark.usefixtures("cluster")


@dataclass(frozen=True)
class HasState(Fault):
    """A newcomer that follows has a state, while the file ``when`` is there: the file ``then`` says so."""

    when: str = ""
    then: str = ""

    def matches(self, status: Status, rank: int, agent: int) -> bool:
        return status.step > 0 and super().matches(status, rank, agent) and Path(self.when).exists()

    def strike(self, victim: Any) -> None:
        Path(self.then).touch()


@dataclass(frozen=True)
class KillThen(Kill):
    """The process dies when the file is there."""

    when: str = ""

    def matches(self, status: Status, rank: int, agent: int) -> bool:
        return super().matches(status, rank, agent) and Path(self.when).exists()


def test_newcomers_that_follow_and_whom_they_follow_die(tmp_path: Path) -> None:
    """The first newcomer that follows dies; when there are two members, the one that another newcomer follows."""
    grown, followed = tmp_path / "grown", tmp_path / "followed"
    faults = [Kill("following"), HasState("following", when=str(grown), then=str(followed))]
    faults.append(KillThen("computing", rank=0, when=str(followed)))
    endless = {"epochs": None, "steps": 1_000_000}
    run = start_with_faults(trainer(tmp_path / "run", (1, 3), {"loss": slowly(0.004)}, endless), faults)
    run.handle.resize(2)
    lost = False
    for event in run.handle.events():
        if isinstance(event, GenerationFormed):
            lost = lost or bool(event.lost)
            if len(event.agents) == 2 and not lost:
                grown.touch()
                run.handle.resize(3)
            if len(event.agents) == 3 and lost:
                break
    run.handle.stop()
    result = run.result()
    steps = result.metrics["steps"] if result.metrics else 0
    alone = trainer(tmp_path / "alone", 1, config={"epochs": None, "steps": steps}).fit()
    assert digest(result) == digest(alone)
    assert read_ledger(result).counts(0).tolist() == read_ledger(alone).counts(0).tolist()
    events = read_events(result)
    assert any(isinstance(e, AgentFollowed) and e.failed is None for e in events)
    # Nobody was lost but by the faults: what dies while it follows, or is followed, takes nobody with it.
    assert sum(isinstance(e, AgentGone) and e.reason.startswith("died") for e in events) == 2
