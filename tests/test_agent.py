"""When an agent stops: the same answer on every agent, however late a decision reached it."""

from types import SimpleNamespace
from typing import Any

from ray_dnn.agent import Agent, Command, Generation, Stopped
from ray_dnn.plan import lay


class Engine:
    """Counts steps; ``everybody[n]`` is the newest decision that all agents report to hold in step n."""

    def __init__(self, everybody: list[int]):
        self.state = SimpleNamespace(step=0)
        self.finished = False
        self.said: list[int] = []
        self._everybody = everybody

    def step(self, held: int) -> Any:
        self.said.append(held)
        self.state.step += 1
        return SimpleNamespace(held=self._everybody[self.state.step - 1])


def generation(settled: int = 0, commands: tuple[Command, ...] = ()) -> Generation:
    plan = lay(1, 2, [1.0, 1.0])
    return Generation(1, plan, 0, ("a", "b"), (("h", 1), ("h", 2)), 0, (), settled, commands)


def stops(agent: Agent, engine: Any, given: Generation) -> Stopped:
    agent._settled = given.settled
    agent._commands |= {c.number: c for c in given.commands}
    return agent._steps(engine, given)


def test_a_decision_that_the_others_may_not_hold_yet_stops_nobody() -> None:
    agent, engine = Agent("a"), Engine([0, 0, 1])
    agent.command(Command(1))  # it arrives here before the first exchange, elsewhere later
    assert stops(agent, engine, generation()) == Stopped(3, 1)
    assert engine.said == [1, 1, 1]


def test_an_agent_says_what_it_holds_without_gaps() -> None:
    agent, engine = Agent("a"), Engine([1, 3])
    agent.command(Command(3))
    agent.command(Command(1))
    engine.step = _then(engine.step, lambda: agent.command(Command(2)))
    assert stops(agent, engine, generation()) == Stopped(1, 1)
    assert engine.said == [1]


def test_a_decision_for_a_named_step_waits_for_it() -> None:
    agent, engine = Agent("a"), Engine([2] * 9)
    given = generation(settled=2, commands=(Command(1, at_step=4), Command(2, at_step=7)))
    assert stops(agent, engine, given) == Stopped(4, 1)


def test_a_decision_that_was_carried_out_is_not_carried_out_again() -> None:
    agent, engine = Agent("a"), Engine([5, 5, 6])
    agent.command(Command(6))
    assert stops(agent, engine, generation(settled=5)) == Stopped(3, 6)


def _then(call: Any, after: Any) -> Any:
    def both(held: int) -> Any:
        result = call(held)
        after()
        return result

    return both
