"""Agents that compute wrongly are found and named before what they gave is applied; the others go on without them."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_dnn.config import Audit
from ray_dnn.engine.audit import chosen, second, wrong_by_majority, wrong_contributions
from ray_dnn.errors import AuditError
from ray_dnn.faults import Corrupt, Fault, Kill
from ray_dnn.plan import Plan, lay
from tests import zoo
from tests.local import Job, Lost, Run, assert_same, close
from tests.losses import ComputesWrongly, Disturbed, disturb

WORKERS = 5
EVERY = Audit(workers=WORKERS)  # contributions are computed twice
ONE = Audit(workers=1)

examples = settings(deadline=None, derandomize=True, max_examples=60)


def audited(audit: Audit | None) -> Job:
    made = zoo.job(40, {"virtual_workers": WORKERS, "batch_size": 11, "steps": 8}, optimizer=zoo.sgd)
    return replace(made, audit=audit)


def with_buffers(audit: Audit | None) -> Job:
    return replace(zoo.batch_norm(WORKERS), audit=audit)


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> Iterator[None]:
    yield
    close()


@functools.cache
def undisturbed(make: Any = audited) -> Run:
    return disturb(partial(make, None), agents=1).run


def struck(audit: Audit, *faults: Fault, **more: Any) -> Disturbed:
    return disturb(partial(audited, audit), *faults, **more)


def found(disturbed: Disturbed) -> set[Lost]:
    """What those found who looked at the first generation's last exchange.

    Others may have been told to leave, or have seen that a connection closed, before they had all headers.
    """
    lost = [answer.lost for answer in disturbed.generations[0].answers.values()]
    return {replace(one, text="") for one in lost if one and one.kind not in ("AbandonedError", "PeerLostError")}


def convicted(name: str, late: bool = False) -> set[Lost]:
    return {Lost("ConvictedError", "", (name,), late)}


@pytest.mark.parametrize("make", [audited, with_buffers])
@pytest.mark.parametrize("audit", [ONE, EVERY, Audit(workers=2, states=0), Audit(workers=3, states=2)])
def test_an_audit_changes_no_bit_and_accuses_nobody(make: Any, audit: Audit) -> None:
    deaths = Kill("computing", step=4, rank=1), Kill("applying", step=6, rank=0)
    disturbed = disturb(partial(make, audit), *deaths, until={0: 2}, joins={1: 1})
    assert_same(undisturbed(make), disturbed.run)


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("phase", ["computing", "exchange-first", "exchange-middle", "combined", "applying"])
def test_a_wrong_bit_in_the_weights_is_found_at_the_next_exchange(phase: str, rank: int) -> None:
    disturbed = struck(ONE, Corrupt(phase, step=2, rank=rank, what="weights"))
    assert found(disturbed) == convicted(f"agent-{rank + 1}")
    assert_same(undisturbed(), disturbed.run)
    committed = sum(report.generation == 0 for report in disturbed.run.reports)
    assert committed == (2 if phase == "computing" else 3)


def test_a_wrong_bit_in_the_weights_is_found_when_it_is_looked_for() -> None:
    disturbed = struck(Audit(workers=1, states=3), Corrupt("applying", step=2, rank=1, what="weights"))
    assert found(disturbed) == convicted("agent-2", late=True)
    assert_same(undisturbed(), disturbed.run)  # the step of the fault is the one before


@pytest.mark.parametrize("agents", [2, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_bit_in_one_contribution_is_found_in_its_step_where_all_are_compared(rank: int, agents: int) -> None:
    disturbed = struck(EVERY, Corrupt("computing", step=2, rank=rank, what="gradient"), agents=agents)
    assert found(disturbed) == convicted(f"agent-{rank + 1}")
    assert sum(report.generation == 0 for report in disturbed.run.reports) == 2
    assert_same(undisturbed(), disturbed.run)


@pytest.mark.parametrize("rank", range(3))
def test_an_agent_that_always_computes_wrongly_is_found_while_each_worker_has_its_turn(rank: int) -> None:
    disturbed = struck(ONE, ComputesWrongly("computing", step=1, rank=rank))
    assert found(disturbed) == convicted(f"agent-{rank + 1}", late=True)
    assert sum(report.generation == 0 for report in disturbed.run.reports) <= 1 + WORKERS - 1


def test_an_agent_that_always_computes_wrongly_is_found_at_once_where_all_are_compared() -> None:
    disturbed = struck(EVERY, ComputesWrongly("computing", step=3, rank=1), agents=4)
    assert found(disturbed) == convicted("agent-2")
    assert_same(undisturbed(), disturbed.run)


def test_two_agents_that_compute_wrongly_one_after_another_are_both_found() -> None:
    wrong = [ComputesWrongly("computing", step=2, rank=3), ComputesWrongly("computing", step=4, rank=1)]
    disturbed = struck(EVERY, *wrong, agents=4)
    assert [len(generation.members) for generation in disturbed.generations] == [4, 3, 2]
    assert_same(undisturbed(), disturbed.run)


@pytest.mark.parametrize("phase", ["exchange-first", "exchange-middle"])
def test_bytes_that_are_garbled_on_their_way_are_not_applied(phase: str) -> None:
    disturbed = struck(ONE, Corrupt(phase, step=2, rank=1, what="wire"))
    garbled = [answer.lost for answer in disturbed.generations[0].answers.values() if answer.lost]
    assert [(one.kind, one.names) for one in garbled if one.kind == "GarbledError"] == [("GarbledError", ("agent-2",))]
    assert [len(generation.members) for generation in disturbed.generations] == [3, 3]
    assert_same(undisturbed(), disturbed.run)


def test_two_agents_with_different_states_are_an_error_for_nobody_can_tell_which_is_right() -> None:
    with pytest.raises(AuditError, match="before step 2 agents hold different states"):
        struck(ONE, Corrupt("computing", step=2, rank=1, what="weights"), agents=2)


def test_two_agents_that_always_differ_are_an_error_for_nobody_can_tell_which_is_right() -> None:
    with pytest.raises(AuditError, match="virtual worker 2 in step 2 differently"):
        struck(ONE, ComputesWrongly("computing", step=2, rank=1), agents=2)


# -- the decisions ---------------------------------------------------------------------------------------------------


@examples
@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 1000))
def test_each_worker_has_its_turn_in_the_shortest_time_and_none_twice_in_a_step(
    workers: int, each: int, start: int
) -> None:
    audit = Audit(workers=each)
    turns = [chosen(audit, step, workers) for step in range(start, start - (-workers // min(each, workers)))]
    assert {worker for turn in turns for worker in turn} == set(range(workers))
    assert all(len(turn) == len(set(turn)) == min(each, workers) for turn in turns)


@examples
@given(st.integers(2, 12), st.integers(1, 12), st.data())
def test_every_replica_but_the_host_has_its_turn_to_compute_a_worker_again(
    workers: int, each: int, data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(2, min(workers, 5)))
    plan: Plan = lay(0, workers, data.draw(st.lists(st.floats(1, 9), min_size=replicas, max_size=replicas)))
    worker = data.draw(st.integers(0, workers - 1))
    steps = [step for step in range(workers * (replicas - 1)) if worker in chosen(Audit(workers=each), step, workers)]
    again = {second(plan, worker, step) for step in steps}
    assert again == set(range(replicas)) - {plan.host(worker)}


digests = st.lists(st.integers(0, 2), min_size=1, max_size=7)


@examples
@given(digests)
def test_more_than_half_decide_who_is_wrong(values: list[int]) -> None:
    wrong = wrong_by_majority(values)
    most = [value for value in values if 2 * values.count(value) > len(values)]
    assert wrong == ([i for i, value in enumerate(values) if value != most[0]] if most else None)


@examples
@given(st.integers(2, 6), st.data())
def test_who_was_wrong_at_first_or_again_is_convicted_and_nobody_else(replicas: int, data: st.DataObject) -> None:
    right = 7
    wrong_again = data.draw(st.sets(st.integers(0, replicas - 1), max_size=(replicas - 1) // 2))
    again = [right + 1 + rank if rank in wrong_again else right for rank in range(replicas)]
    host, other = data.draw(st.permutations(range(replicas)))[:2]
    first = {host: data.draw(st.sampled_from([right, 8])), other: data.draw(st.sampled_from([right, 9]))}
    assume(len({*first.values()}) == 2)
    wrong_first = {rank for rank, digest in first.items() if digest != right}
    assert wrong_contributions(first, again) == sorted(wrong_again | wrong_first)


def test_nobody_is_convicted_without_a_majority() -> None:
    assert wrong_contributions({0: 1, 1: 2}, [1, 2]) is None
