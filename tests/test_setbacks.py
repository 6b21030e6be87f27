"""What follows from losses: counted until the run makes progress again."""

from hypothesis import given
from hypothesis import strategies as st

from ray_dnn.setbacks import Setbacks, backoff


@given(st.integers(1, 8), st.integers(-1, 5), st.lists(st.integers(1, 10), max_size=40))
def test_only_falls_below_the_minimum_count_as_failures(minimum: int, allowed: int, counts: list[int]) -> None:
    setbacks = Setbacks(minimum, allowed)
    falls, below = 0, False
    for count in counts:  # a loss that leaves so many, then a generation of as many
        if count < minimum and not below:
            falls += 1
        below = count < minimum
        end = setbacks.left(count, 7, "agent-1 lost")
        assert (end is not None) == (below and falls > allowed >= 0)
        if end is not None:
            assert f"max_failures={allowed}" in end
            return
        setbacks.formed(count)


@given(st.integers(1, 8), st.integers(-1, 5), st.integers(1, 100))
def test_without_anybody_left_there_is_nothing_to_go_on_from(minimum: int, allowed: int, step: int) -> None:
    end = Setbacks(minimum, allowed).left(0, step, "agent-1 lost")
    assert end is not None
    assert f"after step {step}" in end


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 3))
def test_newcomers_are_asked_for_ever_later_until_one_proves_itself(events: list[bool], count: int) -> None:
    setbacks = Setbacks(2, -1)
    row, now = 0, 0.0
    for lost in events:
        now += 1000
        if not lost:
            setbacks.committed(proven=True)
            row = 0
            assert setbacks.wait_s(now) == 0
            continue
        row += 1
        end = setbacks.false_start("agent-9 died", count, now)
        assert (end is not None) == (row >= 5 and count < 2)
        assert setbacks.wait_s(now) == backoff(row)
        assert setbacks.wait_s(now + backoff(row)) == 0


def test_waits_grow_and_end_growing() -> None:
    assert [backoff(n) for n in range(1, 10)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["lost", "late report", "step", "time"]), st.integers(1, 6)), max_size=40),
)
def test_who_goes_on_after_a_loss_comes_to_a_step_before_newcomers_are_asked_for(
    minimum: int, events: list[tuple[str, int]]
) -> None:
    setbacks = Setbacks(minimum, -1)
    now, until = 0.0, 0.0
    for event, count in events:
        if event == "lost":
            setbacks.left(count, 7, "agent-1 lost")
            until = 0.0  # below the minimum nobody goes on before a newcomer is there
            if count >= minimum:
                setbacks.go_on(now)
                setbacks.formed(count)
                until = now + 2
        elif event == "time":
            now += count / 2
        else:
            setbacks.committed(proven=False, newest=event == "step")
            until = until if event == "late report" else 0.0
        assert setbacks.wait_s(now) == max(0.0, until - now)


@given(st.lists(st.sampled_from("abcd"), max_size=20), st.lists(st.booleans(), min_size=4, max_size=4))
def test_after_three_breaks_in_a_row_somebody_goes_but_never_the_last_who_holds_the_state(
    accused: list[str], proven: list[bool]
) -> None:
    setbacks = Setbacks(1, 0)
    for name in accused:
        setbacks.accuse(name)
    members = dict(zip("abcd", proven, strict=True))
    assert setbacks.broke(members) is None
    assert setbacks.broke(members) is None
    blamed = setbacks.broke(members)
    assert blamed is not None
    assert not (members[blamed] and sum(proven) == 1)
    alike = [name for name in members if members[name] == members[blamed]]
    assert members[blamed] == all(proven)  # newcomers go first
    most = max(accused.count(name) for name in alike)
    assert blamed == [name for name in alike if accused.count(name) == most][-1]  # the newest of equals
    setbacks.committed(proven=False)
    assert setbacks.broke(members) is None


def test_the_only_member_is_never_blamed() -> None:
    setbacks = Setbacks(1, 0)
    assert [setbacks.broke({"a": True}) for _ in range(9)] == [None] * 9


def test_a_step_that_hangs_three_times_is_the_jobs_fault() -> None:
    setbacks = Setbacks(1, 0)
    assert setbacks.hung(4, "agent-1", "is idle") is None
    assert setbacks.hung(5, "agent-2", "is idle") is None
    assert setbacks.hung(5, "agent-3", "is idle") is None
    end = setbacks.hung(5, "agent-4", "is idle")
    assert end is not None
    assert "Step 5 hung on 3 agents in a row; the last one, agent-4, is idle" in end
