"""Newcomers that follow members while these train: the same bits, whatever happens meanwhile."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import nn

from ray_dnn.faults import Fault, Kill, Partition, _flip
from tests import zoo
from tests.followers import Driver, following
from tests.local import Job, Make, Run, Took, assert_same, close
from tests.losses import Deaf, Disturbed, disturb
from tests.test_faults_local import JOBS as SMALL


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> Iterator[None]:
    yield
    close()


def model(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def large() -> Job:
    """With more state than sockets hold: 15 MB with AdamW."""
    config = {"virtual_workers": 4, "batch_size": 9, "steps": 12, "evaluate_every": 2}
    made = zoo.job(40, config, model=lambda: model(1100), evaluate=zoo.errors)
    return replace(made, validation=zoo.table(11, seed=1))


JOBS: dict[str, Make] = SMALL | {"large": large}


@functools.cache
def undisturbed(name: str) -> Run:
    return disturb(JOBS[name], agents=1).run


def join(name: str, *faults: Fault, **more: Any) -> tuple[Disturbed, Driver]:
    """A run of the job in which newcomers follow, which ends as if nothing had been."""
    disturbed, driver = following(JOBS[name], *faults, **more)
    assert_same(undisturbed(name), disturbed.run)
    return disturbed, driver


def copied(disturbed: Disturbed) -> dict[str, int]:
    """How often newcomers took over a state: once from their leader, and again at the boundary where they had to."""
    return {name: answer.copied for name, answer in disturbed.last.items() if name > "agent-3"}


@pytest.mark.parametrize("name", list(JOBS))
def test_a_newcomer_that_follows_comes_to_the_same_bits(name: str) -> None:
    disturbed, driver = join(name)
    assert driver.outcomes == {"agent-4": None}
    assert copied(disturbed) == {"agent-4": 1}


def test_a_state_arrives_as_it_was_when_the_leader_commits_meanwhile() -> None:
    disturbed, driver = join("large", late=True)
    assert driver.outcomes == {"agent-4": None}
    assert copied(disturbed) == {"agent-4": 1}


def test_a_newcomer_that_is_too_slow_holds_up_nobody_and_copies_at_the_boundary() -> None:
    """Its leader would have to keep more than a state and two vectors."""
    disturbed, driver = join("large", late=True, reach=10)
    assert "LineLostError" in str(driver.outcomes["agent-4"])
    assert copied(disturbed) == {"agent-4": 1}


def test_two_newcomers_follow_one_member_through_a_broken_generation() -> None:
    disturbed, driver = join("plain", Partition("computing", step=2, rank=2, closed=True), newcomers=2, joins=2)
    assert driver.outcomes == {"agent-4": None, "agent-5": None}
    assert copied(disturbed) == {"agent-4": 1, "agent-5": 1}
    assert [len(generation.members) for generation in disturbed.generations] == [3, 3, 5]


@pytest.mark.parametrize("step", [None, 2])
def test_the_death_of_a_newcomer_that_follows_costs_nothing(step: int | None) -> None:
    disturbed, _ = join("large", Kill("following", agent=4, step=step))
    assert [generation.members for generation in disturbed.generations[:2]] == [("agent-1", "agent-2", "agent-3")] * 2


def kill(leader: str, at: Took) -> Any:
    def took(driver: Driver, name: str, message: Took) -> None:
        if message == at:
            driver.kill(leader)

    return took


def test_the_death_of_a_leader_while_it_streams_costs_a_copy_at_the_boundary() -> None:
    disturbed, driver = join("large", took=kill("agent-1", Took("begin", 0)))
    assert disturbed.generations[1].members == ("agent-2", "agent-3", "agent-4")
    assert "LineLostError" in str(driver.outcomes["agent-4"])
    assert copied(disturbed)["agent-4"]


def test_the_death_of_a_leader_that_is_closely_followed_costs_no_copy() -> None:
    disturbed, driver = join("large", took=kill("agent-1", Took("RESULT", 3)))
    assert disturbed.generations[1].members == ("agent-2", "agent-3", "agent-4")
    assert driver.outcomes == {"agent-4": None}
    assert copied(disturbed) == {"agent-4": 1}


def test_a_newcomer_that_is_ahead_of_all_survivors_takes_their_state() -> None:
    """Its leader alone has committed step 2, and dies."""
    faults = [Deaf("exchange-middle", step=2, rank=ahead, peer=peer) for ahead, peer in ((1, 0), (1, 2), (0, 2))]
    disturbed, _ = join("plain", *faults, leader=1, took=kill("agent-2", Took("RESULT", 3)))
    assert [g.members for g in disturbed.generations][1] == ("agent-1", "agent-3", "agent-4")
    assert copied(disturbed) == {"agent-4": 2}


@dataclass(frozen=True)
class FlipWeights(Fault):
    """One bit of the weights flips."""

    def strike(self, victim: Any) -> None:
        _flip(next(iter(victim.engine.state.parameters.values())))


def test_a_newcomer_with_a_wrong_bit_copies_the_state_anew() -> None:
    disturbed, driver = join("large", FlipWeights("following", agent=4, step=3))
    assert driver.outcomes == {"agent-4": None}
    assert copied(disturbed) == {"agent-4": 2}
