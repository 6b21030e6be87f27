"""Who is taken for hung: properties of the pure decision."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dnn.errors import ConfigError
from ray_dnn.liveness import Patience, Sight, Verdict, judge, silence_limit
from ray_dnn.phases import STATUS_BYTES, UNTIL_READY, Patient, Phase, Status

examples = settings(deadline=None, derandomize=True, max_examples=200)

LIMITS = Patience()
NAMES = ["a", "b", "c"]


def sight(
    name: str = "a",
    phase: Phase = Phase.COMPUTING,
    starting: float = 0.0,
    still: float = 0.0,
    idle: float = 0.0,
    moves: int = 7,
    there: bool = True,
    stopped: bool = False,
) -> Sight:
    return Sight(name, there, stopped, starting, still, idle, Status(phase, 1, 12, moves, 0))


seconds = st.floats(0, 2000)
sights = st.builds(
    sight,
    name=st.sampled_from(NAMES),
    phase=st.sampled_from(Phase),
    starting=seconds,
    still=seconds,
    idle=seconds,
    moves=st.integers(0, 2),
    there=st.booleans(),
    stopped=st.booleans(),
)
views = st.lists(sights, max_size=3, unique_by=lambda s: s.name)
patiences = st.builds(Patience, **{f.name: st.floats(0.1, 1500) for f in fields(Patience)})
members = st.sets(st.sampled_from(NAMES))


def named(verdicts: list[Verdict]) -> set[str | None]:
    return {verdict.name for verdict in verdicts}


@examples
@given(views, members, patiences)
def test_a_stopped_agent_is_always_named_and_nobody_twice(
    view: list[Sight], generation: set[str], patience: Patience
) -> None:
    verdicts = judge(view, generation, patience)
    assert {s.name for s in view if s.stopped} <= named(verdicts) <= {s.name for s in view} | {None}
    assert len(named(verdicts)) == len(verdicts)


@examples
@given(views, members, patiences)
def test_an_agent_within_its_limits_is_never_named(view: list[Sight], generation: set[str], patience: Patience) -> None:
    shortest = min(patience.idle_s, patience.busy_s, patience.start_s)
    calm = [
        replace(
            s,
            stopped=False,
            starting_s=s.starting_s % shortest,
            still_s=s.still_s % shortest,
            idle_s=s.idle_s % shortest,
        )
        for s in view
    ]
    assert named(judge(calm, generation, patience)) <= {None}


@examples
@given(views, members, patiences)
def test_who_waits_for_others_is_never_named(view: list[Sight], generation: set[str], patience: Patience) -> None:
    running = {s.name for s in view if not s.stopped and s.status.phase.patient is Patient.WAITING}
    assert not running & named(judge(view, generation, patience))


@examples
@given(views, members, patiences)
def test_who_burns_is_named_after_the_busy_limit_only(
    view: list[Sight], generation: set[str], patience: Patience
) -> None:
    burning = [replace(s, stopped=False, idle_s=0.0) for s in view if s.status.phase not in UNTIL_READY]
    by_name = {s.name: s for s in burning}
    for verdict in judge(burning, generation, patience):
        assert verdict.name is None or by_name[verdict.name].still_s >= patience.busy_s


@examples
@given(views, members, patiences, st.floats(1, 10))
def test_more_patience_names_no_one_else(
    view: list[Sight], generation: set[str], patience: Patience, factor: float
) -> None:
    longer = Patience(**{f.name: getattr(patience, f.name) * factor for f in fields(patience)})
    more, fewer = (named(judge(view, generation, p)) for p in (patience, longer))
    assert fewer - {None} <= more
    # A generation with a member that is given up is formed anew anyway, and is not called stalled on top of that.
    assert None not in fewer or None in more or more & generation


@examples
@given(views, members, patiences)
def test_the_dead_are_left_to_ray(view: list[Sight], generation: set[str], patience: Patience) -> None:
    dead = [replace(s, there=False, stopped=False) for s in view]
    assert judge(dead, generation, patience) == []


@examples
@given(st.lists(sights, min_size=1, max_size=3, unique_by=lambda s: s.name), patiences)
def test_whatever_agents_do_none_can_hang_for_good(view: list[Sight], patience: Patience) -> None:
    """Nothing moves any more, and the driver forms the generation anew when told that it is stalled."""
    there = [replace(s, there=True, stopped=False) for s in view]
    if all(s.status.phase is Phase.READY for s in there) or any(s.status.phase is Phase.SUPPLY for s in there):
        return  # the driver's turn
    generation = {s.name for s in there if s.status.phase not in UNTIL_READY}
    told: dict[str, Sight] = {}
    gone: set[str | None] = set()
    for _ in range(6):
        there = [replace(s, starting_s=s.starting_s + 2000, still_s=s.still_s + 2000, idle_s=0.0) for s in there]
        gone |= (found := named(judge(there, generation, patience, told)))
        told = {s.name: s for s in there} if None in found else told
        there = [s for s in there if s.name not in gone]
        generation -= gone  # type: ignore[arg-type]
    assert all(s.status.phase is Phase.READY for s in there)


@examples
@given(views, members, patiences)
def test_waiting_for_rows_is_no_stall(view: list[Sight], generation: set[str], patience: Patience) -> None:
    view = [*view, sight("d", Phase.SUPPLY, still=2000)]
    assert None not in named(judge(view, generation | {"d"}, patience))


@examples
@given(seconds, patiences)
def test_a_node_that_was_slow_is_waited_for_longer(slowest: float, patience: Patience) -> None:
    assert silence_limit(slowest, patience) >= max(patience.silent_s, 3 * slowest)
    assert silence_limit(0.0, patience) == patience.silent_s


def test_verdicts_say_what_was_seen() -> None:
    view = [
        sight("agent-1", stopped=True, there=False),
        sight("agent-2", Phase.COMPUTING, idle=31, still=33),
        sight("agent-3", Phase.COMPUTING, still=600),
        sight("agent-4", Phase.READING, still=601, idle=601),
        sight("agent-5", Phase.BUILDING, starting=600, still=1),
    ]
    assert judge(view, [], LIMITS) == [
        Verdict("agent-1", "has been stopped in computing, step 12"),
        Verdict("agent-2", "idle for 31 s in computing, step 12, while the others wait", job=True),
        Verdict("agent-3", "has been in computing, step 12 for 600 s", job=True),
        Verdict("agent-4", "has been in reading, step 12 for 601 s", job=True),
        Verdict("agent-5", "is not ready 600 s after its start: building"),
    ]


@pytest.mark.parametrize("phase", [p for p in Phase if p.patient is Patient.SLOW])
def test_a_phase_that_waits_for_things_outside_may_be_idle(phase: Phase) -> None:
    assert judge([sight(phase=phase, starting=599, still=599, idle=599)], ["a"], LIMITS) == []


def waiting(still: dict[str, float], moves: int = 7, phase: Phase = Phase.EXCHANGE_FIRST) -> list[Sight]:
    return [sight(name, phase, still=s, moves=moves) for name, s in still.items()]


def test_a_generation_in_which_all_wait_for_each_other_is_stalled() -> None:
    view = waiting({"a": 31, "b": 30})
    reason = "all agents wait for each other (exchange-first), and nothing has moved for 30 s"
    assert judge(view, ["a", "b"], LIMITS) == [Verdict(None, reason)]
    assert judge(waiting({"a": 31, "b": 29}), ["a", "b"], LIMITS) == []
    assert judge([*view, sight("c")], ["a", "b", "c"], LIMITS) == []  # c computes
    assert judge(view, ["a", "b", "c"], LIMITS) == []  # c cannot be seen
    assert judge([*view, sight("c")], ["a", "b"], LIMITS) != []  # c takes no part
    assert judge(view, [], LIMITS) == []


def test_agents_that_are_all_ready_wait_for_the_driver() -> None:
    view = waiting({"a": 31, "b": 31}, phase=Phase.READY)
    assert judge(view, ["a", "b"], LIMITS) == []
    assert judge([*view, *waiting({"c": 40})], ["a", "b", "c"], LIMITS) != []


def test_who_does_not_move_when_a_generation_is_formed_anew_is_to_blame_for_the_next_stall() -> None:
    told = {s.name: s for s in waiting({"a": 130, "b": 30})}
    both = ["a", "b"]
    assert judge(waiting({"a": 130.5, "b": 30.5}), both, LIMITS, told) == []  # not told again at once
    fresh = waiting({"b": 29}, moves=9, phase=Phase.FORMING)
    assert judge([*waiting({"a": 161}), *fresh], both, LIMITS, told) == []
    fresh = waiting({"b": 30}, moves=9, phase=Phase.FORMING)
    reason = "did not move when the generation was to be formed anew, in exchange-first, step 12 for 161 s"
    assert judge([*waiting({"a": 161}), *fresh], both, LIMITS, told) == [Verdict("a", reason)]
    moved = [*waiting({"a": 30}, moves=8), *fresh]
    assert named(judge(moved, both, LIMITS, told)) == {None}


@pytest.mark.parametrize("value", [0, -1.0, math.nan, True, "10", None])
def test_an_impossible_patience_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"Patience\(silent_s=.*math\.inf"):
        Patience(silent_s=value)  # type: ignore[arg-type]


def test_endless_patience_names_nobody() -> None:
    endless = Patience(**{f.name: math.inf for f in fields(Patience)})
    assert judge([sight(starting=1e9, still=1e9, idle=1e9)], ["a"], endless) == []


@pytest.mark.parametrize("phase", Phase)
def test_a_status_comes_out_of_memory_as_it_went_in(phase: Phase) -> None:
    status, memory = Status(phase, 3, 2**40, 2**62, 5), bytearray(STATUS_BYTES)
    status.write(memoryview(memory))
    assert Status.read(memory) == status  # type: ignore[arg-type]
    assert phase.value in status.text()
