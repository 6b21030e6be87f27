"""Losses at every place of the engine, without Ray: what a job learns is what it would have learned without them.

Each run with losses is compared with an undisturbed one of the same job: every bit of the state, every metric and
evaluation, every row's checksum, the states of virtual workers, and reports without a gap.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from ray_dnn.errors import AgentLostError
from ray_dnn.faults import Fault, Kill, Partition
from tests import zoo
from tests.local import Job, Make, Run, assert_same, close
from tests.losses import Deaf, Disturbed, Driver, Hold, StopWithLies, Tell, disturb, enduring, recover, second

IN_A_STEP = (
    "reading",
    "computing",
    "exchange-first",
    "exchange-middle",
    "exchange-last",
    "combined",
    "applying",
)


def plain() -> Job:
    """AdamW, evaluated on the way and at the end."""
    made = zoo.job(40, {"virtual_workers": 5, "batch_size": 11, "steps": 6, "evaluate_every": 2}, evaluate=zoo.errors)
    return replace(made, validation=zoo.table(11, seed=1))


def unevaluated() -> Job:
    return replace(plain(), validation=None)


JOBS: dict[str, Make] = {
    "plain": plain,
    "unevaluated": unevaluated,
    "batch_norm": partial(zoo.batch_norm, 5),
    "gan": zoo.gan,
    "combined_worker_states": zoo.combined_worker_states,
    "mirrored_worker_states": zoo.mirrored_worker_states,
    "fp16_overflows": zoo.fp16_overflows,
    "early_stopping": zoo.early_stopping,
}


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> Iterator[None]:
    yield
    close()


@functools.cache
def undisturbed(name: str) -> Run:
    return disturb(JOBS[name], agents=1).run


def survive(name: str, *faults: Fault, **more: Any) -> Disturbed:
    """A run of the job with these faults, which ends as if nothing had been."""
    disturbed = disturb(JOBS[name], *faults, **more)
    assert_same(undisturbed(name), disturbed.run)
    return disturbed


def once(*indexes: int, act: Callable[[Driver], None] = Driver.abandon) -> Callable[[Driver, int], None]:
    """Do it when the last of these faults strikes."""

    def struck(driver: Driver, index: int) -> None:
        if index in indexes and {*indexes} <= driver.struck.keys():
            act(driver)

    return struck


def sizes(disturbed: Disturbed) -> list[int]:
    return [len(generation.members) for generation in disturbed.generations]


# -- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("phase", IN_A_STEP)
def test_a_death_anywhere_in_a_step_changes_no_bit(phase: str, rank: int) -> None:
    assert sizes(survive("plain", Kill(phase, step=3, rank=rank))) == [3, 2]


@pytest.mark.parametrize(
    ("phase", "step", "generations"),
    [("forming", 0, 2), ("computing", 0, 2), ("evaluating", 2, 2), ("evaluating", 6, 2), ("finishing", 6, 1)],
)
def test_a_death_before_between_and_after_steps_changes_no_bit(phase: str, step: int, generations: int) -> None:
    assert len(survive("plain", Kill(phase, step=step, rank=1)).generations) == generations


@pytest.mark.parametrize("first", range(2))
@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("plain", "unevaluated")])
def test_one_death_after_another_and_a_newcomer_each_time_change_no_bit(name: str, first: int) -> None:
    steps = min(len(IN_A_STEP), len(undisturbed(name).reports) - 2)
    faults = [Kill(phase, step=1 + at, rank=(first + at) % 3) for at, phase in enumerate(IN_A_STEP[:steps])]
    disturbed = survive(name, *faults, joins=dict.fromkeys(range(1, steps + 1), 1))
    assert sizes(disturbed) == [3] * (steps + 1)


@pytest.mark.parametrize("phase", ["computing", "exchange-middle", "exchange-last", "applying"])
def test_a_death_between_the_updates_of_two_optimizers_changes_no_bit(phase: str) -> None:
    survive("gan", second(Kill(phase, step=2, rank=0)), second(Kill(phase, step=4, rank=1)), joins={1: 1})


@pytest.mark.parametrize("phase", ["exchange-first", "exchange-middle", "exchange-last"])
def test_a_death_while_buffers_are_combined_changes_no_bit(phase: str) -> None:
    survive("batch_norm", second(Kill(phase, step=2, rank=0)), second(Kill(phase, step=4, rank=1)), joins={1: 1})


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("phase", ["exchange-middle", "applying"])
def test_mirrored_states_outlive_their_host_and_their_mirror(phase: str, rank: int) -> None:
    survive("mirrored_worker_states", Kill(phase, step=2, rank=rank), Kill(phase, step=4, rank=rank % 3), agents=4)


def test_the_loss_of_host_and_mirror_at_once_is_an_error_that_says_so() -> None:
    with pytest.raises(AgentLostError, match="its host and its mirror, were lost at once"):
        disturb(JOBS["mirrored_worker_states"], Kill("computing", 2, rank=1), Kill("computing", 2, rank=2), agents=4)


@pytest.mark.parametrize("name", ["plain", "combined_worker_states", "batch_norm"])
def test_all_but_one_die_at_once(name: str) -> None:
    ranks = [Kill("exchange-middle", step=2, rank=rank) for rank in (0, 1, 3)]
    assert sizes(survive(name, *ranks, agents=4))[-1] == 1


def test_all_but_one_die_one_after_another() -> None:
    deaths = [Kill("computing", step=1, rank=2), Kill("applying", step=2, rank=0), Kill("combined", step=4, rank=1)]
    assert sizes(survive("plain", *deaths, agents=4)) == [4, 3, 2, 1]


def test_one_agent_alone_goes_on_where_a_newcomer_died() -> None:
    disturbed = survive("plain", Kill("copying", agent=2), agents=1, until={0: 2}, joins={1: 1})
    assert sizes(disturbed) == [1, 2, 1]


@pytest.mark.parametrize("phase", ["computing", "exchange-last", "applying"])
def test_a_death_while_the_next_generation_forms_changes_no_bit(phase: str) -> None:
    disturbed = survive("plain", Kill(phase, step=3, rank=1), second(Kill("forming", agent=1)), agents=4)
    assert sizes(disturbed) == [4, 3, 2]


@pytest.mark.parametrize("phase", ["computing", "exchange-first", "exchange-middle"])
def test_a_death_in_the_step_that_is_taken_again_changes_no_bit(phase: str) -> None:
    disturbed = survive("plain", Kill(phase, step=3, rank=1), second(Kill(phase, step=3, agent=1)), agents=4)
    assert sizes(disturbed) == [4, 3, 2]


# -- newcomers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "phase"),
    [("plain", phase) for phase in ("forming", "copying", "computing", "exchange-middle")]
    + [(name, "copying") for name in ("gan", "mirrored_worker_states")],
)
@pytest.mark.parametrize("agent", [1, 4])
def test_one_of_two_newcomers_dies_or_whom_they_copy_from(name: str, phase: str, agent: int) -> None:
    disturbed = survive(
        name, Kill(phase, step=0 if (phase, agent) == ("forming", 4) else 2, agent=agent), until={0: 2}, joins={1: 2}
    )
    assert sizes(disturbed) == [3, 5, 4]
    assert disturbed.last["agent-5"].copied


@pytest.mark.parametrize("phase", IN_A_STEP)
def test_a_newcomer_joins_where_another_died(phase: str) -> None:
    disturbed = survive("plain", Kill(phase, step=3, rank=0), joins={1: 2})
    assert sizes(disturbed) == [3, 4]
    assert {name: answer.copied for name, answer in disturbed.last.items()} == {
        "agent-2": 0,
        "agent-3": 0,
        "agent-4": 1,
        "agent-5": 1,
    }


def test_reports_that_died_with_all_who_made_them_come_from_whoever_copied_the_state() -> None:
    deaths = [Kill("computing", step=3, rank=rank) for rank in range(2)]
    disturbed = survive("plain", *deaths, agents=2, until={0: 2}, joins={1: 1}, unheard=["agent-1", "agent-2"])
    assert disturbed.last.keys() == {"agent-3"}


# -- some have committed and others have not -------------------------------------------------------------------------


def left_behind(
    step: int, *behind: int, ahead: tuple[int, ...], at: str = "exchange-middle", but: int = 0
) -> list[Fault]:
    """Nothing that those ahead send from there on reaches those behind."""
    return [Deaf(at, step=step, rank=rank, peer=peer, but=but) for rank in ahead for peer in behind]


def only_one_commits(step: int) -> list[Fault]:
    """Of three agents the second one alone gets everything. Three faults."""
    return [*left_behind(step, 0, 2, ahead=(1,)), *left_behind(step, 2, ahead=(0,))]


def caught_up(disturbed: Disturbed) -> dict[str, int]:
    """Who took over what others had combined, how often."""
    return {name: answer.caught_up for name, answer in disturbed.last.items() if answer.caught_up}


def nobody_copied(disturbed: Disturbed) -> bool:
    return not any(answer.copied for answer in disturbed.last.values())


@pytest.mark.parametrize("name", ["plain", "combined_worker_states", "mirrored_worker_states", "fp16_overflows"])
@pytest.mark.parametrize(("ahead", "behind"), [((0, 1), (2,)), ((1, 2), (0,)), ((1,), (0, 2))])
def test_whoever_is_a_step_behind_applies_what_the_others_combined(
    name: str, ahead: tuple[int, ...], behind: tuple[int, ...]
) -> None:
    faults = left_behind(2, *behind, ahead=ahead)
    faults += left_behind(2, *(r for r in behind if r != behind[0]), ahead=behind[:1])
    there = [Tell("computing", step=3, rank=rank) for rank in ahead]
    told = range(len(faults), len(faults) + len(there))
    disturbed = survive(name, *faults, *there, struck=once(*told))
    assert caught_up(disturbed) == {f"agent-{rank + 1}": 1 for rank in behind}
    assert nobody_copied(disturbed)


def test_whoever_is_behind_by_one_of_two_updates_of_a_step_catches_up() -> None:
    there = [second(Tell("computing", step=3, rank=rank)) for rank in (0, 2)]
    disturbed = survive("gan", *left_behind(3, 1, ahead=(0, 2)), *there, struck=once(2, 3))
    assert caught_up(disturbed) == {"agent-2": 1}
    assert nobody_copied(disturbed)


def test_whoever_lacks_combined_buffers_catches_up() -> None:
    there = [Tell("computing", step=4, rank=rank) for rank in (0, 1)]
    faults = [second(fault) for fault in left_behind(3, 2, ahead=(0, 1))]
    disturbed = survive("batch_norm", *faults, *there, struck=once(2, 3))
    assert caught_up(disturbed) == {"agent-3": 1}
    assert nobody_copied(disturbed)


def test_whoever_lacks_an_evaluation_is_given_it() -> None:
    there = [Tell("computing", step=2, rank=rank) for rank in (0, 1)]
    lengths = 8  # which are exchanged before the results
    faults = left_behind(2, 2, ahead=(0, 1), at="evaluating", but=lengths)
    disturbed = survive("plain", *faults, *there, struck=once(2, 3))
    assert caught_up(disturbed) == {"agent-3": 1}
    assert nobody_copied(disturbed)


@pytest.mark.parametrize(
    ("name", "at", "step", "but"), [("plain", "evaluating", 6, 8), ("unevaluated", "exchange-middle", 5, 0)]
)
def test_whoever_lacks_the_end_of_the_job_is_given_it(name: str, at: str, step: int, but: int) -> None:
    disturbed = survive(name, *left_behind(step, 2, ahead=(0, 1), at=at, but=but))
    assert caught_up(disturbed)["agent-3"] == 1


def test_early_stopping_is_decided_alike_by_whoever_lacks_the_last_evaluation() -> None:
    disturbed = survive("early_stopping", *left_behind(6, 0, ahead=(1, 2), at="evaluating", but=8))
    assert caught_up(disturbed)["agent-1"] == 1


@pytest.mark.parametrize("name", ["plain", "mirrored_worker_states"])
def test_the_step_is_taken_again_where_nobody_is_left_who_has_it(name: str) -> None:
    """The only agent that has committed dies."""
    disturbed = survive(name, *only_one_commits(2), Kill("computing", step=3, rank=1))
    assert [g.members for g in disturbed.generations] == [("agent-1", "agent-2", "agent-3"), ("agent-1", "agent-3")]
    assert caught_up(disturbed) == {}


def test_the_step_is_taken_again_where_who_has_it_dies_before_it_could_be_given() -> None:
    faults = [*only_one_commits(2), Tell("computing", step=3, rank=1)]
    disturbed = survive("plain", *faults, Kill("copying", agent=2), struck=once(3))
    assert caught_up(disturbed) == {}
    assert sizes(disturbed) == [3, 3, 2]


def test_who_was_given_a_step_gives_it_on_when_the_giver_dies() -> None:
    """The giver's words reach one of two only, and it dies."""
    faults = [*only_one_commits(2), Tell("computing", step=3, rank=1)]
    faults += [Deaf("copying", agent=2, peer=2), Tell("applying", agent=1, step=2)]

    def struck(driver: Driver, index: int) -> None:
        if index == 3:
            driver.abandon()
        if index == 5:
            driver.kill("agent-2")

    disturbed = survive("plain", *faults, struck=struck, unheard=["agent-2"])
    assert caught_up(disturbed) == {"agent-1": 1, "agent-3": 1}
    assert nobody_copied(disturbed)
    assert sizes(disturbed) == [3, 3, 2]


@pytest.mark.parametrize("name", ["plain", "mirrored_worker_states", "batch_norm", "gan"])
def test_a_newcomer_copies_the_state_after_all_others_have_caught_up(name: str) -> None:
    wrap = second if name == "batch_norm" else lambda fault: fault
    tell = second if name == "gan" else lambda fault: fault
    step = 2 if name == "gan" else 3
    faults = [wrap(fault) for fault in left_behind(2, 2, ahead=(0, 1))]
    there = [tell(Tell("computing", step=step, rank=rank)) for rank in (0, 1)]
    disturbed = survive(name, *faults, *there, joins={1: 1}, struck=once(2, 3))
    assert caught_up(disturbed) == {"agent-3": 1}
    assert {n: a.copied for n, a in disturbed.last.items()} == {"agent-1": 0, "agent-2": 0, "agent-3": 0, "agent-4": 1}


def test_a_newcomers_death_while_it_copies_leaves_those_who_caught_up_where_they_are() -> None:
    there = [Tell("computing", step=3, rank=rank) for rank in (0, 1)]
    faults = [*left_behind(2, 2, ahead=(0, 1)), *there, second(Kill("copying", agent=4))]
    disturbed = survive("plain", *faults, joins={1: 1, 2: 1}, struck=once(2, 3))
    assert caught_up(disturbed) == {"agent-3": 1}
    assert sizes(disturbed) == [3, 4, 4]


# -- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [*IN_A_STEP, "evaluating"])
def test_broken_connections_change_no_bit(phase: str) -> None:
    disturbed = survive("plain", Partition(phase, step=2, rank=1, closed=True))
    assert nobody_copied(disturbed)
    assert sizes(disturbed)[-1] == 3


@pytest.mark.parametrize("phase", ["forming", *IN_A_STEP, "evaluating"])
def test_a_generation_that_is_abandoned_while_all_live_changes_no_bit(phase: str) -> None:
    # Connections fall silent: nobody would notice.
    fault = Tell("forming", rank=1) if phase == "forming" else Partition(phase, step=2, rank=1)
    disturbed = survive("plain", fault, struck=once(0))
    assert nobody_copied(disturbed)
    assert sizes(disturbed) == [3, 3]


# -- agents that were left behind and wake up ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "mirrored_worker_states"])
@pytest.mark.parametrize("phase", ["computing", "exchange-first", "exchange-middle", "exchange-last", "applying"])
def test_whoever_wakes_up_while_the_others_train_on_reaches_nobody(name: str, phase: str) -> None:
    woken = {}

    def struck(driver: Driver, index: int) -> None:
        if index == 1:
            woken["then"] = driver.wake("agent-3")
            woken["again"] = driver.again("agent-3")  # as the highest rank, which connects to all others
            driver.go("agent-1")

    faults = (StopWithLies(phase, step=2, rank=2), Hold("exchange-first", step=4, rank=0))
    disturbed = survive(name, *faults, joins={1: 1}, struck=struck)
    assert sizes(disturbed) == [3, 3]
    assert {answer.lost.kind for answer in woken.values()} == {"PeerLostError"}
    assert not any(answer.finished or answer.copied for answer in woken.values())


# -- many losses -----------------------------------------------------------------------------------------------------


def test_many_recoveries_leave_nothing_behind() -> None:
    """``python -m tests.losses 1000`` has more of them and prints the figures."""
    count = 100
    recovered = recover(count)
    assert recovered.generations == count + 1
    for early, late in zip(recovered.early, recovered.late, strict=True):
        assert late[:3] == early[:3]  # descriptors, sockets, threads
        assert late.memory_bytes < early.memory_bytes + 8 * 2**20
    assert_same(disturb(enduring(count), agents=1).run, recovered.run)
