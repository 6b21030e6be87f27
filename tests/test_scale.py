"""The driver of a thousand agents, in simulation: it survives their deaths, and what it keeps and sends is small."""

import functools
import json

from benchmarks.simulation import Simulation
from ray_dnn.agent import Generation
from ray_dnn.events import AgentGone, GenerationFormed, RunFailed

AGENTS, WORKERS, SECONDS = 1000, 2000, 5


class Watched(Simulation):
    """A simulation that remembers the generations that agents were told of, and the lines that were written."""

    def __init__(self, agents: int, workers: int, every_s: float) -> None:
        super().__init__(agents, workers, every_s)
        self.told: dict[int, Generation] = {}
        original = self.world.on_run

        def on_run(agent, generation, *more):
            self.told[generation.number] = generation
            return original(agent, generation, *more)

        self.world.on_run = on_run  # type: ignore[method-assign]


@functools.cache
def simulated() -> Watched:
    simulation = Watched(AGENTS, WORKERS, 1.0)
    outcome = simulation.run(SECONDS)
    assert outcome.error is None
    assert outcome.step > 0
    return simulation


def formed() -> list[GenerationFormed]:
    return [event for event in simulated().log.follow() if isinstance(event, GenerationFormed)]


def test_a_thousand_agents_outlive_the_deaths_of_some() -> None:
    simulation = simulated()
    events = list(simulation.log.follow())
    died = {e.agent for e in events if isinstance(e, AgentGone) and "died" in e.reason}
    assert len(died) == simulation.world.deaths >= SECONDS - 1
    lost = [name for event in formed() for name in event.lost]
    assert set(lost) <= died
    assert len(lost) == len(set(lost)) > 0
    assert not any(isinstance(e, RunFailed) for e in events)


def test_the_event_log_says_who_took_part_though_its_lines_say_only_what_changed() -> None:
    told = simulated().told
    for event in formed():
        assert event.agents == list(told[event.generation].names)
        assert event.bounds == list(told[event.generation].plan.bounds)
    assert {event.generation for event in formed()} == told.keys()
    lines = [len(event.to_json()) for event in formed()]
    assert lines[0] > 10 * AGENTS  # all of them joined
    assert all(
        length < 20 * (len(e.joined) + len(e.left) + len(e.lost)) + 10 * shares(e) + 200
        for length, e in zip(lines, formed(), strict=True)
    )


def shares(event: GenerationFormed) -> int:
    """Of which the division is made up, in its line."""
    return len(json.loads(event.to_json())["shares"])


def test_a_decision_calls_no_agent_more_than_twice() -> None:
    costs = [cost for cost in simulated().world.costs if cost.lost]
    assert costs
    for cost in costs:
        assert cost.calls <= 2 * cost.agents + 50  # those who start and watch newcomers


def test_what_is_known_of_agents_that_are_gone_is_forgotten() -> None:
    simulation = Simulation(20, 40, 1.0, least=1)
    sizes = []
    original = simulation.world.strike

    def strike() -> None:
        original()
        driver = simulation.driver
        sizes.append(
            len(driver._recorder._speeds)
            + len(driver._guard._agents)
            + len(driver._guard._nodes)
            + len(driver._fleet._owners)
            + len(driver._fleet._gangs)
            + len(driver._followings._all)
        )

    simulation.world.strike = strike  # type: ignore[method-assign]
    assert simulation.run(300).error is None
    first, second = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
    assert max(second) <= max(first) + 10
    assert simulation.world.deaths > 10 * 20
