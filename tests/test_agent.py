"""When an agent stops: the same answer on every agent, however late a decision reached it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ray_dnn.agent import Agent, Command
from ray_dnn.engine.train import train


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    """One that does not end this process when no driver speaks to it."""
    monkeypatch.setattr(Agent, "_end_when_forgotten", lambda self: None)
    return Agent("a")


class Engine:
    """Counts steps; ``everybody[n]`` is the newest decision that all agents report to hold in step n.

    Each step is committed in so many ``phases``; ``advanced`` is called after each. ``evaluations``: the steps before
    which an evaluation is due.
    """

    def __init__(self, everybody: list[int], phases: int = 1, evaluations: tuple[int, ...] = ()):
        self.state = SimpleNamespace(step=0)
        self.said: list[int] = []
        self.done: list[str] = []
        self.advanced: Callable[[], None] = lambda: None
        self._everybody, self._phases, self._phase, self._due = everybody, phases, 0, list(evaluations)

    @property
    def at_boundary(self) -> bool:
        return self._phase == 0

    @property
    def finished(self) -> bool:
        return self.state.step == len(self._everybody)

    @property
    def evaluation_due(self) -> bool:
        return self.at_boundary and self.state.step in self._due

    @property
    def news(self) -> bool:
        return f"evaluation before {self.state.step}" not in self.done

    def evaluate(self) -> str:
        if self.state.step in self._due:
            self._due.remove(self.state.step)
        return f"evaluation before {self.state.step}"

    def advance(self, held: int) -> Any:
        self.said.append(held)
        self._phase = (self._phase + 1) % self._phases
        self.advanced()
        if self._phase:
            return None
        self.state.step += 1
        return SimpleNamespace(held=self._everybody[self.state.step - 1])


def stops(agent: Agent, engine: Any, settled: int = 0, commands: tuple[Command, ...] = (), finish: bool = False) -> Any:
    """Train in a generation that names these decisions. The step and the decision that it ended with."""
    agent._settled = settled
    agent._commands |= {c.number: c for c in commands}
    decision = train(engine, agent, settled, finish, engine.done.append)
    return engine.state.step, decision


def test_a_decision_that_the_others_may_not_hold_yet_stops_nobody(agent: Agent) -> None:
    engine = Engine([0, 0, 1, 1])
    agent.command(Command(1))  # it arrives here before the first exchange, elsewhere later
    assert stops(agent, engine) == (3, 1)
    assert engine.said == [1, 1, 1]


def test_an_agent_says_what_it_holds_without_gaps(agent: Agent) -> None:
    engine = Engine([1, 3, 3])
    agent.command(Command(3))
    agent.command(Command(1))
    engine.advanced = lambda: agent.command(Command(2))
    assert stops(agent, engine) == (1, 1)
    assert engine.said == [1]
    assert agent.held() == 3


def test_a_decision_for_a_named_step_waits_for_it(agent: Agent) -> None:
    commands = (Command(1, at_step=4), Command(2, at_step=7))
    assert stops(agent, Engine([2] * 9), 2, commands) == (4, 1)


def test_a_decision_that_was_carried_out_is_not_carried_out_again(agent: Agent) -> None:
    agent.command(Command(6))
    assert stops(agent, Engine([5, 5, 6, 6]), settled=5) == (3, 6)


def test_a_decision_stops_nobody_in_the_middle_of_a_step(agent: Agent) -> None:
    engine = Engine([0, 1, 1], phases=3)
    agent.command(Command(1))
    assert stops(agent, engine) == (2, 1)
    assert len(engine.said) == 6


def test_an_evaluation_that_is_due_comes_before_a_decision_to_stop(agent: Agent) -> None:
    engine = Engine([1, 1, 1], evaluations=(2,))
    assert stops(agent, engine, settled=1, commands=(Command(1, at_step=2),)) == (2, 1)
    assert engine.done[-1] == "evaluation before 2"


def test_the_end_of_the_job_is_reported_with_an_evaluation_and_without_a_decision(agent: Agent) -> None:
    engine = Engine([0, 0])
    assert stops(agent, engine) == (2, None)
    assert engine.done[-1] == "evaluation before 2"


def test_an_agent_that_is_to_finish_takes_no_step(agent: Agent) -> None:
    engine = Engine([0, 0], evaluations=(0,))
    agent.command(Command(1))
    assert stops(agent, engine, finish=True) == (0, None)
    assert (engine.said, engine.done) == ([], ["evaluation before 0"])
