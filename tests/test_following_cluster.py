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
    """A newcomer that follows has a state: a file says so."""

    path: str = ""

    def matches(self, status: Status, rank: int, agent: int) -> bool:
        return status.step > 0 and super().matches(status, rank, agent)

    def strike(self, victim: Any) -> None:
        Path(self.path).touch()


@dataclass(frozen=True)
class KillThen(Kill):
    """The process dies when the file is there."""

    path: str = ""

    def matches(self, status: Status, rank: int, agent: int) -> bool:
        return super().matches(status, rank, agent) and Path(self.path).exists()


def test_newcomers_that_follow_and_whom_they_follow_die(tmp_path: Path) -> None:
    """The first newcomer dies while it follows, the second joins, and the leader of the third dies."""
    sign = str(tmp_path / "agent-4-has-a-state")
    faults = [Kill("following", agent=2), HasState("following", agent=4, path=sign)]
    faults.append(KillThen("computing", agent=1, path=sign))
    endless = {"epochs": None, "steps": 1_000_000}
    run = start_with_faults(trainer(tmp_path / "run", (1, 3), {"loss": slowly(0.004)}, endless), faults)
    lost = False
    for event in run.handle.events():
        lost = lost or (isinstance(event, GenerationFormed) and event.lost == ["agent-1"])
        if lost and isinstance(event, GenerationFormed) and len(event.agents) == 3:
            break
    run.handle.stop()
    result = run.result()
    steps = result.metrics["steps"] if result.metrics else 0
    alone = trainer(tmp_path / "alone", 1, config={"epochs": None, "steps": steps}).fit()
    assert digest(result) == digest(alone)
    assert read_ledger(result).counts(0).tolist() == read_ledger(alone).counts(0).tolist()
    events = read_events(result)
    assert next(e for e in events if isinstance(e, AgentFollowed) and e.failed is None).agent == "agent-3"
    # Nobody was lost but by the faults: what dies while it follows, or is followed, takes nobody with it.
    died = [e.agent for e in events if isinstance(e, AgentGone) and e.reason.startswith("died")]
    assert sorted(died) == ["agent-1", "agent-2"]
