"""The decisions that are pure functions, held by their properties."""

import itertools
import json
import struct
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_dnn.balance import Balance, Stragglers, beyond_sense
from ray_dnn.comm.buckets import additions, cut, slice_bounds
from ray_dnn.engine import codec
from ray_dnn.engine.audit import state_sum
from ray_dnn.engine.records import Header, Place, RecordFormat
from ray_dnn.engine.step import Position
from ray_dnn.engine.transfer import roles
from ray_dnn.engine.worker_states import holders, moves
from ray_dnn.errors import AgentLostError, ConfigError, ProtocolError
from ray_dnn.membership import Decision, View, decide, to_give_up
from ray_dnn.plan import Plan, lay, step_s
from ray_dnn.sampler import (
    UNIT_ROWS,
    Counted,
    Epoch,
    Numbering,
    RowOrder,
    Schedule,
    even_units,
    permute,
    split_evenly,
    split_micro,
)
from ray_dnn.setbacks import Setbacks, backoff
from ray_dnn.tree import Node, cover, fold

examples = settings(deadline=None, derandomize=True, max_examples=60)


# -- tree ------------------------------------------------------------------------------------------------------------


def nodes(root: Node) -> list[Node]:
    """The nodes of a tree, the root first."""
    return [root] if root.is_leaf else [root, *(n for child in root.children() for n in nodes(child))]


@examples
@given(st.integers(1, 70), st.data())
def test_a_cover_is_the_range_cut_into_its_largest_subtrees(leaves: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, leaves))
    stop = data.draw(st.integers(start, leaves))
    parts = cover(start, stop, leaves)
    assert [leaf for part in parts for leaf in range(part.start, part.stop)] == list(range(start, stop))
    inside = {n for n in nodes(Node(0, leaves)) if start <= n.start and n.stop <= stop}
    below = {child for n in inside if not n.is_leaf for child in n.children()}
    assert set(parts) == inside - below


def grouped(left: str, right: str) -> str:
    """An addition that shows the order and the grouping of its operands."""
    return f"({left}{right})"


@examples
@given(st.integers(1, 40), st.data())
def test_folding_the_covers_of_any_ranges_is_folding_the_leaves(leaves: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, leaves - 1)))) if leaves > 1 else []
    known = {Node(leaf, leaf + 1): f"<{leaf}>" for leaf in range(leaves)}
    covers = [part for a, b in zip([0, *cuts], [*cuts, leaves], strict=True) for part in cover(a, b, leaves)]
    folded = {part: fold(part, known.get, grouped) for part in covers}
    root = Node(0, leaves)
    assert fold(root, folded.get, grouped) == fold(root, known.get, grouped)


def test_the_tree_splits_at_the_largest_power_of_two() -> None:
    known = {Node(leaf, leaf + 1): name for leaf, name in enumerate("abcdef")}
    assert fold(Node(0, 6), known.get, grouped) == "(((ab)(cd))(ef))"


def test_a_range_outside_of_the_tree_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2\.\.5"):
        cover(2, 5, 4)


# -- plan ------------------------------------------------------------------------------------------------------------


@examples
@given(st.integers(1, 200), st.lists(st.floats(0.01, 100), min_size=1, max_size=12))
def test_a_plan_gives_every_worker_to_one_replica_in_proportion_to_speed(workers: int, speeds: list[float]) -> None:
    assume(len(speeds) <= workers)
    plan = lay(3, workers, speeds)
    assert [w for r in range(plan.replicas) for w in plan.hosted(r)] == list(range(workers))
    assert plan.replicas == len(speeds)
    assert all(len(plan.hosted(r)) >= 1 for r in range(plan.replicas))
    assert all(w in plan.hosted(plan.host(w)) for w in range(workers))
    exact = [workers * speed / sum(speeds) for speed in speeds]
    if min(exact) >= 1:
        assert all(abs(len(plan.hosted(r)) - share) < 1 + 1e-9 for r, share in enumerate(exact))


@examples
@given(st.integers(0, 6), st.data())
def test_equal_replicas_align_with_the_tree(exponent: int, data: st.DataObject) -> None:
    workers = 2**exponent
    replicas = 2 ** data.draw(st.integers(0, exponent))
    plan = lay(0, workers, [1.7] * replicas)
    assert all(len(plan.cover(r)) == 1 for r in range(replicas))


def rebalanced(workers: int, speeds: list[list[float]], seconds: float) -> list[tuple[float, Plan]]:
    """The plans that follow each other while speeds are as named, step after step: when, and which."""
    balance, plans = Balance(), [(0.0, lay(0, workers, [1.0] * len(speeds[0])))]
    balance.begin(changed=True)
    for step, now in enumerate(speeds):
        if balance.look(plans[-1][1], now, step * seconds):
            plans.append((step * seconds, lay(len(plans), workers, now)))
            balance.begin(changed=False)
    return plans


def test_an_agent_three_times_slower_gets_a_third_within_a_few_steps() -> None:
    (_, first), (when, second) = rebalanced(64, [[3.0, 3.0, 1.0, 1.0]] * 100, seconds=1.0)
    assert first.bounds == (0, 16, 32, 48, 64)
    assert second.bounds == (0, 24, 48, 56, 64)
    assert when <= 3
    assert step_s(second.bounds, [3.0, 3.0, 1.0, 1.0]) <= 1.15 * 64 / 8


@examples
@given(
    st.integers(3, 40),
    st.lists(st.lists(st.floats(0.1, 50), min_size=3, max_size=3), min_size=1, max_size=300),
    st.floats(0.001, 5),
)
def test_whatever_speeds_do_plans_change_more_and_more_rarely(
    workers: int, speeds: list[list[float]], seconds: float
) -> None:
    plans = rebalanced(workers, speeds, seconds)
    times = [when for when, _ in plans]
    for number, (before, after) in enumerate(itertools.pairwise(times)):
        assert after - before >= min(2.0 * 2**number, 600.0) - 1e-6
    for (_, before), (when, plan) in itertools.pairwise(plans):
        now = speeds[round(when / seconds)]
        assert step_s(plan.bounds, now) < step_s(before.bounds, now)


def test_equal_agents_and_small_gains_change_nothing() -> None:
    assert len(rebalanced(10, [[1.0, 1.0, 1.05]] * 1000, 1.0)) == 1
    assert len(rebalanced(10, [[1e5, 1e5, 3e5]] * 1000, 1.0)) == 1  # a step takes microseconds


def test_who_is_so_slow_that_others_are_better_off_without() -> None:
    assert beyond_sense(8, [1.0, 1.0, 0.05, 1.0]) == ([2], pytest.approx(20 / 3))
    assert beyond_sense(8, [0.05, 1.0, 0.06, 1.0])[0] == [0, 2]
    assert beyond_sense(8, [1.0, 1.0, 0.3, 1.0])[0] == []  # three times slower: fewer virtual workers will do
    assert beyond_sense(8, [1.0])[0] == []


@examples
@given(st.lists(st.sampled_from([0.01, 0.1, 0.4, 1.0, 1.3]) | st.floats(0.001, 10), min_size=1, max_size=9), st.data())
def test_without_those_beyond_sense_a_step_takes_less_than_half(speeds: list[float], data: st.DataObject) -> None:
    workers = data.draw(st.integers(len(speeds), 70))
    slow, times = beyond_sense(workers, speeds)
    others = [speed for index, speed in enumerate(speeds) if index not in slow]
    present, without = (step_s(lay(0, workers, given).bounds, given) for given in (speeds, others))
    assert others
    assert times == pytest.approx(present / without)
    assert all(1 / speeds[index] > 2 * without for index in slow)
    if slow:
        assert times > 2
        assert max(speeds[index] for index in slow) < min(others)
        assert beyond_sense(workers, others)[0] == []


def test_stragglers_are_named_when_it_has_been_so_for_a_while_and_once() -> None:
    stragglers, names, uneven = Stragglers(), ["a", "b", "c"], [1.0, 0.01, 1.0]
    said = [stragglers.look(9, names, uneven, step * 1.0) for step in range(12)]
    assert [found.names for found in said if found] == [frozenset("b")]
    assert said[9] is not None
    stragglers = Stragglers()
    quick = [stragglers.look(9, names, uneven, step * 0.01) for step in range(200)]
    assert not any(quick)  # for two seconds only
    for step in range(40):  # another agent each time
        speeds = [1.0, 1.0, 1.0]
        speeds[step % 3] = 0.01
        assert stragglers.look(9, names, speeds, 100.0 * step) is None


@pytest.mark.parametrize("speeds", [[], [1.0] * 5, [1.0, 0.0], [1.0, float("nan")]])
def test_a_plan_that_cannot_be_is_refused(speeds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"virtual workers|speeds must be"):
        lay(0, 4, speeds)


@pytest.mark.parametrize("bounds", [(1, 2), (0, 2, 2), (0, 3, 2)])
def test_bounds_that_do_not_rise_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rise strictly"):
        Plan(0, bounds)


# -- sampler ---------------------------------------------------------------------------------------------------------


@examples
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_sends_every_index_somewhere_else(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert sorted(image.tolist()) == list(range(size))
    backwards = permute(np.arange(size)[::-1], size, key)
    assert np.array_equal(backwards[::-1], image)


@st.composite
def datasets(draw: st.DrawFn) -> tuple[RowOrder, np.ndarray]:
    """An order, and the rows of each unit."""
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
    shuffle = draw(st.sampled_from(["none", "windowed", "global"]))
    return RowOrder(draw(st.integers(0, 99)), shuffle, draw(st.integers(1, 200))), np.array(counts)


@examples
@given(datasets(), st.integers(0, 3), st.booleans(), st.data())
def test_an_epoch_uses_every_row_once_and_any_part_of_it_is_known(
    dataset: tuple[RowOrder, np.ndarray], epoch: int, through: bool, data: st.DataObject
) -> None:
    order, counts = dataset
    counted, rows = Counted(order, counts, through), int(counts.sum())
    whole = counted.at(epoch, 0, rows)
    numbering = Numbering(counts if through else None)
    expected = [numbering.first(unit) + index for unit, count in enumerate(counts) for index in range(count)]
    assert sorted(whole.tolist()) == sorted(expected)
    assert not through or expected == list(range(rows))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert np.array_equal(counted.at(epoch, start, stop), whole[start:stop])


@examples
@given(datasets(), st.integers(0, 3), st.data())
def test_rows_are_known_as_soon_as_their_span_is_counted(
    dataset: tuple[RowOrder, np.ndarray], epoch: int, data: st.DataObject
) -> None:
    order, counts = dataset
    rows = int(counts.sum())
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    first, last = order.span(start, stop)
    stream = Epoch(order, epoch, len(counts), Numbering(counts))
    while not stream.complete and (last is None or stream.rows < last):
        stream.add(int(counts[stream.units[stream.counted]]))
        if last is None or stream.rows < last or data.draw(st.booleans()):
            stream.end()
    whole = Counted(order, counts).at(epoch, 0, rows)
    assert np.array_equal(stream.numbers(start, stop), whole[start:stop])
    places = order.places(epoch, start, stop, stream.rows)
    assert places.min() >= first
    assert last is None or places.max() < last


@examples
@given(st.integers(1, 400), st.integers(0, 3000))
def test_windows_follow_each_other_and_grow_to_their_size(window: int, position: int) -> None:
    order = RowOrder(0, "windowed", window)
    start, stop = order.window_at(position)
    assert start <= position < stop
    assert order.window_at(start) == order.window_at(stop - 1) == (start, stop)
    assert start == 0 or order.window_at(start - 1)[1] == start
    assert 1 <= stop - start <= window
    assert start < 2 * window or stop - start == window


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    found = {
        tuple(Counted(RowOrder(seed, "windowed", 50), even_units(50)).at(epoch, 0, 50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(found) == 9


@examples
@given(st.integers(0, 10_000))
def test_units_in_memory_have_all_rows(rows: int) -> None:
    counts = even_units(rows)
    assert counts.sum() == rows
    assert all(count == UNIT_ROWS for count in counts[:-1])


@examples
@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 9))
def test_rows_are_split_evenly_and_never_below_the_least(rows: int, parts: int, least: int) -> None:
    counts = split_evenly(rows, parts, least)
    used = [count for count in counts if count]
    assert (len(counts), sum(counts)) == (parts, rows)
    assert not used or max(used) - min(used) <= 1
    assert counts == tuple(sorted(counts, reverse=True))
    assert rows < least or min(used) >= least


@examples
@given(st.integers(0, 200), st.integers(1, 30), st.data())
def test_microbatches_have_their_size_and_never_fewer_than_the_least(rows: int, size: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, size))
    pieces = split_micro(rows, size, least)
    assert sum(pieces) == rows
    assert all(piece == size for piece in pieces[:-1])
    assert rows < least or min(pieces) >= least
    assert not pieces or pieces[-1] < size + least
    assert Schedule(rows, size, 1, least, steps=1).batches_per_epoch == len(pieces)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int | None]:
    """A schedule and a microbatch size."""
    batch = draw(st.integers(1, 40))
    least = draw(st.integers(1, min(batch, 5)))
    schedule = Schedule(
        rows=draw(st.integers(1, 150)),
        batch_size=batch,
        virtual_workers=draw(st.integers(1, 9)),
        min_rows=least,
        local_batches=draw(st.integers(1, 4)),
        epochs=2,
    )
    return schedule, draw(st.none() | st.integers(least, 12))


@examples
@given(schedules())
def test_every_row_is_used_once_an_epoch(drawn: tuple[Schedule, int | None]) -> None:
    schedule, _ = drawn
    used: dict[int, list[int]] = {0: [], 1: []}
    for step in range(schedule.total_steps):
        for batch in range(len(schedule.batches(step))):
            for worker in range(schedule.virtual_workers):
                piece = schedule.pieces(step, worker)[batch]
                used[piece.epoch] += range(piece.start, piece.stop)
    assert used == {0: list(range(schedule.rows)), 1: list(range(schedule.rows))}


@examples
@given(schedules(), st.integers(0, 150))
def test_steps_that_are_known_before_the_epoch_is_counted_do_not_change(
    drawn: tuple[Schedule, int | None], seen: int
) -> None:
    schedule, _ = drawn
    assert schedule.rows is not None
    unknown = replace(schedule, rows=None)
    for step in range(schedule.steps_per_epoch):
        if unknown.known(step, min(seen, schedule.rows)):
            assert unknown.batches(step) == schedule.batches(step)
    assert unknown.total_steps is None


@examples
@given(schedules())
def test_no_computation_sees_fewer_rows_than_said(drawn: tuple[Schedule, int | None]) -> None:
    schedule, micro = drawn
    sizes = [
        size
        for step in range(schedule.steps_per_epoch)
        for worker in range(schedule.virtual_workers)
        for piece in schedule.pieces(step, worker)
        for size in split_micro(piece.rows, micro, schedule.min_rows)
    ]
    assert min(sizes) == schedule.smallest_computation(micro)
    assert min(sizes) >= min(schedule.min_rows, schedule.rows)


# -- membership ------------------------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> View:
    minimum = draw(st.integers(1, 5))
    maximum = draw(st.integers(minimum, 9))
    names = [f"r{i}" for i in range(draw(st.integers(0, 12)))]
    there = draw(st.integers(0, len(names)))
    members = tuple(names[:there])
    return View(
        minimum=minimum,
        maximum=maximum,
        workers=draw(st.integers(minimum, 12)),
        target=draw(st.integers(1, 10)),
        members=members,
        ready=tuple(names[there:]),
        starting=draw(st.integers(0, 6)),
        leaving=frozenset(draw(st.sets(st.sampled_from(members)))) if members else frozenset(),
        expiring=frozenset(draw(st.sets(st.sampled_from(members)))) if members else frozenset(),
        slow=frozenset(draw(st.sets(st.sampled_from(members)))) if members else frozenset(),
        one_by_one=draw(st.booleans()),
        careful=draw(st.booleans()),
    )


def told_apart(view: View) -> View:
    """Slow members among those that must leave, where enough are left, or else among those that expire."""
    staying = set(view.members) - view.leaving - view.slow
    enough = staying and len(staying) + len(view.ready) >= view.minimum
    slow = {"leaving": view.leaving | view.slow} if enough else {"expiring": view.expiring | view.slow}
    return replace(view, slow=frozenset(), **slow)


@examples
@given(views())
def test_slow_members_leave_if_enough_are_left_and_else_are_replaced(view: View) -> None:
    decision = decide(view)
    assert decision == decide(told_apart(view))
    # Nobody is without work for their sake.
    assert not decision.stop or decide(replace(view, slow=frozenset())).stop


@examples
@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 4), st.integers(-3, 9), st.floats(0.1, 3))
def test_as_many_make_room_as_another_run_lacks_or_none(wanted, free, each, surplus, unit) -> None:
    amounts = [{"CPU": unit * count} for count in (wanted, free, each)]
    count = to_give_up(*amounts, surplus)
    assert 0 <= count <= max(0, surplus)
    if count:
        assert free + count * each >= wanted or count == 1
        assert free + (count - 1) * each < wanted or count == 1
    elif surplus > 0:
        assert free + surplus * each < wanted
    assert to_give_up({"GPU": 1.0}, amounts[1], amounts[2], surplus) == 0


@examples
@given(views().map(told_apart))
def test_a_generation_has_neither_too_few_members_nor_too_many(view: View) -> None:
    decision = decide(view)
    if decision.members is not None:
        assert len(decision.members) >= view.minimum
        # Where only one may leave at once, those who are too many go one after another. One may have to stay until
        # others have the state.
        alone = {*decision.members} & {*view.members} <= view.leaving | view.expiring
        most = min(view.workers, view.wanted + alone)
        assert len(decision.members) <= max(most, len(view.members) - 1 if view.one_by_one else 1)
    assert decision == decide(replace(view))


@examples
@given(views().map(told_apart))
def test_members_stay_unless_they_must_go_or_are_too_many(view: View) -> None:
    decision = decide(view)
    if decision.members is None:
        return
    may_stay = [m for m in view.members if m not in view.leaving | view.expiring]
    expiring = [m for m in view.members if m in view.expiring - view.leaving]
    stayed = [m for m in decision.members if m in view.members]
    too_many = [m for m in view.members if m not in may_stay[: view.wanted]]
    assert set(decision.leaving) == set(view.members) - set(stayed)
    assert set(decision.leaving) <= set(too_many)
    # Somebody holds the state.
    assert stayed or not view.members
    # Whoever expires stays until a newcomer takes the place, or there are more than wanted.
    lost = [m for m in expiring if m in decision.leaving]
    assert not lost or len(may_stay) + len(expiring) - len(lost) + len(view.ready) >= view.wanted
    must_go = [m for m in too_many if m not in expiring] + lost
    if view.one_by_one:
        assert len(decision.leaving) <= 1
    elif len(stayed) > 1 or not view.ready:
        assert set(decision.leaving) == set(must_go)
    assert decision.members == (*stayed, *decision.joining)
    assert decision.joining == view.ready[: len(decision.joining)]
    assert decision.changed == (decision.members != view.members)
    assert not (decision.joining and decision.dismiss) or len(decision.members) >= view.wanted


@examples
@given(views().map(told_apart))
def test_whoever_must_leave_leaves_in_time_or_the_state_is_written(view: View) -> None:
    """However long nobody else comes: it is stopped for those who cannot be done without, and the others are gone."""
    view = replace(view, starting=0)
    for _ in range(2 + 2 * len(view.members)):
        decision = decide(view)
        if decision.stop:
            assert decision.members is None
            rest = {*view.members, *view.ready} - view.leaving
            assert len(rest) < view.minimum or view.workers < 2
            return
        if not decision.changed:
            break
        view = replace(after(view, decision), starting=0, ready=view.ready[len(decision.joining) :])
    assert not view.leaving


def test_who_must_go_goes_before_who_is_too_many_and_the_newest_first() -> None:
    view = View(1, 9, 9, 2, ("a", "b", "c", "d"), leaving=frozenset("b"), one_by_one=True)
    gone = []
    while (decision := decide(view)).changed:
        gone += decision.leaving
        view = after(view, decision)
    assert gone == ["b", "d"]


def test_all_members_are_replaced_in_two_generations_so_that_the_state_is_handed_on() -> None:
    view = View(2, 2, 9, 2, ("a", "b"), ready=("c", "d"), expiring=frozenset("ab"))
    first = decide(view)
    assert (first.members, first.leaving) == (("b", "c", "d"), ("a",))
    second = decide(after(view, first))
    assert (second.members, second.leaving) == (("c", "d"), ("b",))


def test_replacements_are_asked_for_when_it_is_known_that_members_expire() -> None:
    view = View(2, 4, 9, 4, ("a", "b", "c", "d"), expiring=frozenset("bd"))
    decision = decide(view)
    assert (decision.ask, decision.changed) == (2, False)
    one = decide(replace(view, starting=1, ready=("e",)))
    assert (one.members, one.ask) == (("a", "b", "c", "e"), 0)


@examples
@given(views(), st.integers(1, 100))
def test_all_that_are_lacking_are_asked_for_at_once_but_not_without_measure(view: View, more: int) -> None:
    view = replace(view, careful=False, maximum=view.maximum + more, target=100, workers=100)
    asked = decide(view).ask
    lasting = len({*view.members} - view.leaving - view.expiring)
    lacking = view.wanted - lasting - len(view.ready) - view.starting
    assert asked == max(0, min(lacking, max(8, len(view.members)) - view.starting))
    # None that comes makes the others be asked for again.
    later = replace(view, starting=view.starting + asked)
    assert decide(later).ask == 0
    careful = decide(replace(view, careful=True))
    assert careful.ask == (lacking > 0 and view.starting == 0)


_numbers = itertools.count()


def after(view: View, decision: Decision) -> View:
    """The view when a decision has been carried out and everything that was starting is ready."""
    started = view.starting + decision.ask - decision.withdraw
    ready = [r for r in view.ready if r not in (*decision.joining, *decision.dismiss)]
    ready += [f"new{next(_numbers)}" for _ in range(started)]
    members = view.members if decision.members is None else decision.members
    gone = {*decision.leaving}
    return replace(
        view,
        members=members,
        leaving=view.leaving - gone,
        expiring=view.expiring - gone,
        ready=tuple(ready),
        starting=0,
    )


@examples
@given(views())
def test_carrying_decisions_out_leads_to_the_wanted_number_and_rest(view: View) -> None:
    careful, one_by_one = view.careful * view.wanted, view.one_by_one * len(view.members)
    for _ in range(4 + careful + 2 * one_by_one):  # one asks for a replacement, one brings it in
        view = after(view, decide(view))
    decision = decide(view)
    if decision.stop:  # nobody can take the state over beside the only agent that there can be
        assert view.workers == 1
        assert view.ready
        return
    assert decision.members == view.members
    assert len(view.members) == view.wanted
    assert (decision.changed, decision.ask, decision.withdraw) == (False, 0, 0)


# -- setbacks --------------------------------------------------------------------------------------------------------


def test_newcomers_are_asked_for_later_and_later_but_every_minute() -> None:
    assert [backoff(losses) for losses in range(10)] == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]


@examples
@given(st.integers(1, 300), st.floats(0, 1e6), st.floats(0, 100))
def test_newcomers_that_are_lost_delay_the_next_until_one_trains(losses: int, now: float, later: float) -> None:
    setbacks = Setbacks(minimum=2, max_failures=0)
    ends = [setbacks.false_start("it died", 2, now) for _ in range(losses)]
    assert ends == [None] * losses  # enough others train
    assert setbacks.wait_s(now + later) == pytest.approx(max(0.0, backoff(losses) - later), abs=1e-6)
    setbacks.committed(proven=False)
    assert setbacks.wait_s(now) == pytest.approx(backoff(losses), abs=1e-6)
    setbacks.committed(proven=True)
    assert setbacks.wait_s(now) == 0


# -- who gives what to whom in recovery -------------------------------------------------------------------------------


@st.composite
def positions(draw: st.DrawFn) -> list[Position | None]:
    """As a death leaves them: some lack the newest commit, or the newest evaluation; some are newcomers."""
    newest = Position(draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    lacks = draw(st.sampled_from([Position(1, 0), Position(0, 1)]))
    older = Position(newest.commits - lacks.commits, newest.evaluations - lacks.evaluations)
    others = draw(st.lists(st.sampled_from([newest, older, None]), max_size=7))
    return draw(st.permutations([newest, *others]))


@examples
@given(positions())
def test_who_is_newest_gives_to_all_others_what_they_lack(said: list[Position | None]) -> None:
    who = roles(said)
    newest = max(p for p in said if p is not None)
    assert said[who.source] == newest
    assert who.source == min(r for r, p in enumerate(said) if p == newest)
    even = tuple(r for r, p in enumerate(said) if p == newest)
    assert sorted((*even, *who.behind, *who.newcomers)) == list(range(len(said)))
    assert all(said[r] is None for r in who.newcomers)
    assert all(said[r] is not None for r in who.behind)


@examples
@given(positions(), st.integers(0, 3), st.integers(0, 3))
def test_positions_that_no_death_leaves_are_refused(said: list[Position | None], commits: int, more: int) -> None:
    assume(commits + more > 1)
    newest = max(p for p in said if p is not None)
    ahead = Position(newest.commits + commits, newest.evaluations + more)
    with pytest.raises(ProtocolError, match="agents of one run are at"):
        roles([*said, ahead])


def test_newcomers_alone_are_refused() -> None:
    with pytest.raises(AgentLostError, match="last agent that held the state"):
        roles([None, None])


@st.composite
def layouts(draw: st.DrawFn) -> Plan:
    workers = draw(st.integers(2, 9))
    cuts = draw(st.sets(st.integers(1, workers - 1), min_size=1, max_size=5))
    return Plan(0, (0, *sorted(cuts), workers))


@examples
@given(st.sampled_from(["mirrored", "combined"]), layouts(), st.data())
def test_worker_states_outlive_any_death_and_go_where_they_are_lacking_only(
    kind: str, before: Plan, data: st.DataObject
) -> None:
    dead = data.draw(st.integers(0, before.replicas - 1))
    held = [{w for w in range(before.workers) if r in holders(before, w, kind)} for r in range(before.replicas)]
    newcomers: list[set[int]] = [set()] * data.draw(st.integers(0, before.workers - before.replicas + 1))
    held = [*(h for r, h in enumerate(held) if r != dead), *newcomers]
    speeds = data.draw(st.lists(st.sampled_from([1.0, 3.0]), min_size=len(held), max_size=len(held)))
    after = lay(1, before.workers, speeds)
    copies = moves(kind, after, held)
    for (source, to), workers in copies.items():
        assert set(workers) <= held[source]
        assert not set(workers) & held[to]
    for worker in range(after.workers):
        for replica in holders(after, worker, kind):
            sent = [to for (_, to), workers in copies.items() if worker in workers and to == replica]
            assert len(sent) == (worker not in held[replica])


def test_the_loss_of_a_host_and_its_mirror_at_once_is_named() -> None:
    with pytest.raises(AgentLostError, match="the state of virtual worker 1, its host and its mirror"):
        moves("mirrored", Plan(1, (0, 2)), [{0}])


# -- state as bytes --------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits in any shape: NaNs of every kind, no dimension, no element, and elements in another order in memory."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype == torch.bool:
        raw = bytearray(byte % 2 for byte in raw)
    flat = torch.frombuffer(raw, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


numbers = st.integers(-(2**70), 2**70) | st.floats() | st.booleans()
numpy_numbers = st.floats(width=32).map(np.float32) | st.integers(-9, 9).map(np.int16) | st.booleans().map(np.bool_)
leaves = st.none() | st.text(max_size=4) | numbers | numpy_numbers | tensors()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(-3, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Equal in every value, bit, type and order."""
    if isinstance(one, torch.Tensor):
        same_place = (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, other.is_contiguous())
        return same_place and codec.tensor_bytes(one) == codec.tensor_bytes(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*map(repr, one)] == [*map(repr, other)] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@examples
@given(trees)
def test_a_tree_survives_being_bytes(tree: Any) -> None:
    data = codec.encode(tree)
    back = codec.decode(data)
    assert same(tree, back)
    assert codec.encode(back) == data
    assert codec.digest(back) == codec.digest(tree)
    assert codec.first_difference(tree, back) is None


def test_decoded_tensors_are_aligned_memory_of_their_own() -> None:
    data = codec.encode([torch.arange(3.0), torch.ones(5, dtype=torch.int8), torch.ones(2)])
    one, two = codec.decode(data), codec.decode(data)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in one)
    one[0].zero_()
    assert two[0].tolist() == [0, 1, 2]


@examples
@given(tensors(), st.data())
def test_a_digest_changes_with_any_bit(tensor: torch.Tensor, data: st.DataObject) -> None:
    assume(tensor.numel() > 0 and tensor.dtype != torch.bool)
    changed = tensor.clone(memory_format=torch.contiguous_format)
    raw = changed.view(-1).view(torch.uint8)
    byte = data.draw(st.integers(0, len(raw) - 1))
    raw[byte] ^= 1 << data.draw(st.integers(0, 7))
    tensor = tensor.contiguous()
    assert codec.digest({"a": tensor}) != codec.digest({"a": changed})
    assert codec.weights_digest({"a": tensor}) != codec.weights_digest({"a": changed})
    assert codec.first_difference({"a": [1, tensor]}, {"a": [1, changed]}) == "a[1]"


@examples
@given(trees, tensors(), trees, st.data())
def test_the_sum_of_a_state_changes_with_any_bit(before: Any, tensor: torch.Tensor, after: Any, data: Any) -> None:
    total = state_sum([before, {"a": tensor}, after])
    assert -(2**63) <= total < 2**63
    assert state_sum([before, {"a": tensor.clone()}, after]) == total
    assume(tensor.numel() > 0 and tensor.dtype != torch.bool)
    changed = tensor.clone(memory_format=torch.contiguous_format)
    raw = changed.view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert state_sum([before, {"a": changed}, after]) != state_sum([before, {"a": tensor.contiguous()}, after])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_the_sum_of_a_state_changes_with_every_single_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(0, 13).to(dtype)
    raw = tensor.view(torch.uint8)
    total = state_sum({"a": tensor})
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        assert state_sum({"a": tensor}) != total
        raw[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ([1], (1,)),
        ({"1": 2}, {1: 2}),
        (1.0, np.float32(1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), torch.zeros(1, 2)),
    ],
)
def test_a_digest_tells_kinds_apart(one: Any, other: Any) -> None:
    assert codec.digest(one) != codec.digest(other)


def test_a_weights_digest_depends_on_names_dtypes_and_shapes_but_not_on_order() -> None:
    a, b = torch.zeros(4), torch.ones(2)
    digest = codec.weights_digest({"a": a, "b": b})
    assert digest == codec.weights_digest({"b": b, "a": a})
    others = [{"a": b, "b": a}, {"a": a, "c": b}, {"a": a.view(2, 2), "b": b}, {"a": a.view(torch.int32), "b": b}]
    assert digest not in map(codec.weights_digest, others)


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": [1, {2, 3}]}, r"state\.a\[1\] is a builtins\.set"),
        ({"a": {"b": lambda: 0}}, r"state\.a\.b is a builtins\.function"),
        ({(1, 2): 0}, r"state has the key \(1, 2\)"),
        ({"a": torch.zeros(2).to_sparse()}, r"state\.a is a torch\.sparse_coo tensor"),
    ],
)
def test_what_is_no_tree_is_refused_by_path(tree: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        codec.encode(tree)
    with pytest.raises(ConfigError, match=path):
        codec.check(tree)


# -- records ---------------------------------------------------------------------------------------------------------

places = st.builds(Place, *[st.integers(0, 2**62)] * 5)
FORM = RecordFormat(vector=["a", "b", "c"], floats=["m"], others=[], metrics=["loss", "accuracy"])


def records_of(raw: bytes) -> np.ndarray:
    size = FORM.dtype.itemsize
    return np.frombuffer(raw[: len(raw) // size * size], FORM.dtype)


@examples
@given(places, st.integers(0, 2**40), st.floats(0, 1e6), st.binary(max_size=5 * FORM.dtype.itemsize))
def test_records_survive_being_bytes(place: Place, held: int, seconds: float, raw: bytes) -> None:
    records = records_of(raw)
    data = FORM.pack(place, Header(held, seconds, records))
    assert len(data) == FORM.size(len(records))
    back = FORM.unpack(data, place, 1)
    assert (back.held, back.seconds, back.records.tobytes()) == (held, seconds, records.tobytes())


@examples
@given(places, places)
def test_records_of_another_place_are_refused(place: Place, other: Place) -> None:
    assume(place != other)
    data = FORM.pack(place, Header(0, 0.0, FORM.empty()))
    with pytest.raises(ProtocolError, match="replica 2 is at"):
        FORM.unpack(data, other, 2)


def test_records_hold_metrics_and_names_by_worker() -> None:
    records = np.concatenate([FORM.empty() for _ in range(3)])
    FORM.set_metrics(records[:1], {"accuracy": (1.0, 4.0), "loss": (3.0, 2.0)})
    FORM.set_metrics(records[2:], {"loss": (1.0, 2.0), "accuracy": (1.0, 0.0)})
    records["touched"][0] = [1, 0, 0]
    records["touched"][2] = [0, 0, 1]
    assert FORM.sum_metrics(records) == {"accuracy": 0.5, "loss": 1.0}
    assert FORM.names("touched", records) == {"a", "c"}
    assert FORM.names("floats", records) == set()
    assert json.dumps(FORM.sum_metrics(FORM.empty())) == '{"accuracy": NaN, "loss": NaN}'


# -- slices ----------------------------------------------------------------------------------------------------------


@examples
@given(st.integers(0, 5000), st.integers(1, 20))
def test_slices_cover_a_lane_evenly_at_aligned_places(length: int, parts: int) -> None:
    bounds = slice_bounds(length, parts)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, length, parts + 1)
    assert bounds == sorted(bounds)
    assert all(bound % 16 == 0 for bound in bounds[1:-1] if bound < length)
    sizes = [stop - start for start, stop in pairwise(bounds)]
    assert max(sizes) - min(sizes) <= 32


@examples
@given(st.lists(st.integers(0, 9_000_000), min_size=1, max_size=3), st.integers(1, 9))
def test_buckets_cover_all_lanes_once_and_leave_from_the_end(lengths: list[int], parts: int) -> None:
    buckets = cut(lengths, parts)
    assert all(len(bucket.bounds) == parts + 1 for bucket in buckets)
    places = [(bucket.lane, bucket.bounds[0], bucket.bounds[-1]) for bucket in buckets]
    assert places == sorted(places, reverse=True)
    for lane, length in enumerate(lengths):
        mine = [(start, stop) for its, start, stop in reversed(places) if its == lane]
        assert [start for start, _ in mine] + [length] == [0] + [stop for _, stop in mine]
        assert len(mine) <= 10


@examples
@given(st.integers(1, 40), st.data())
def test_additions_follow_the_tree(workers: int, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, workers - 1), max_size=5)) if workers > 1 else set()
    bounds = [0, *sorted(cuts), workers]
    known = [node for start, stop in pairwise(bounds) for node in cover(start, stop, workers)]
    operands: dict[int, str] = dict(enumerate(map(str, known)))
    for left, right, into in additions(Node(0, workers), known):
        operands[into] = f"({operands[left]} + {operands[right]})"
    names = dict(zip(known, map(str, known), strict=True))
    expected = fold(Node(0, workers), names.get, lambda one, other: f"({one} + {other})")
    assert operands[len(known) if len(known) > 1 else 0] == expected


def test_a_place_fits_what_it_holds() -> None:
    with pytest.raises(struct.error):
        FORM.pack(Place(2**63, 0, 0, 0, 0), Header(0, 0.0, FORM.empty()))
