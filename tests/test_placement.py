"""Where agents are: the first ones, newcomers, and those that take the places of the dead."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import nodes
from hypothesis import given
from hypothesis import strategies as st
from jobs_for_tests import assert_as_undisturbed, slowly, trainer
from ray.train import Result, ScalingConfig

from ray_dnn import Handle
from ray_dnn.events import AgentStarted, Event, GenerationFormed, Waiting
from ray_dnn.placement import NODE, Wish, free_slots, matches, wish
from ray_dnn.testing import read_events

NODES = st.sampled_from("abcdef")
AGENTS = st.dictionaries(NODES, st.integers(0, 3)).map(Counter)
STRATEGIES = st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])


# -- decisions -------------------------------------------------------------------------------------------------------


def allowed(wished: Wish) -> set[str]:
    """The nodes that are selected."""
    return {node for node in "abcdef" if matches({NODE: node}, wished.selector({}))}


@given(STRATEGIES, AGENTS, st.frozensets(NODES), st.frozensets(NODES))
def test_newcomers_go_where_the_strategy_wants_them(strategy: str, agents: Any, room: Any, bad: Any) -> None:
    wished = wish(strategy, agents, room, bad)
    here = {node for node in agents if agents[node]}
    chosen = allowed(wished)
    if strategy == "STRICT_PACK":
        assert chosen == here if here else chosen == set("abcdef") - bad
    elif strategy == "STRICT_SPREAD":
        assert chosen == set("abcdef") - here - bad
    else:
        assert not chosen & bad
        assert not wished.must
        assert not room - bad or chosen & room
        if strategy == "SPREAD":
            least = min((agents[node] for node in room - bad), default=0)
            assert {agents[node] for node in chosen & room} <= {least}
        elif here & room - bad:
            assert chosen & room <= here


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [("a", {"a"}), ("!a", {"b", "c", None}), ("in(a,b)", {"a", "b"}), ("!in(a, b)", {"c", None})],
)
def test_labels_are_matched_as_ray_does(wanted: str, fits: set[str | None]) -> None:
    for value in ("a", "b", "c", None):
        labels = {"zone": value} if value else {}
        assert matches(labels, {"zone": wanted}) == (value in fits)


def test_a_selector_that_names_nodes_itself_stays_as_it_is() -> None:
    assert Wish(only=frozenset("ab")).selector({"zone": "x"}) == {NODE: "in(a,b)", "zone": "x"}
    assert Wish(only=frozenset("ab")).selector({NODE: "c"}) == {NODE: "c"}


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 4))
def test_a_newcomer_takes_a_slot_that_nobody_has(used: list[int], count: int) -> None:
    slots = free_slots(count, 6, used)
    assert len(set(slots)) == len(slots) == count
    free = sorted(set(range(6)) - set(used))
    assert slots[: len(free)] == free[:count]


# -- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zones() -> Iterator[dict[str, str]]:
    """Three nodes with room for two agents each; gives their zones by id."""
    import ray

    each = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    special = {"seat": 2, "accelerator_type:A100": 1}
    with nodes(labels={"zone": "x"}, resources=special, **each) as cluster:
        cluster.add_node(labels={"zone": "y"}, resources=special, **each)
        cluster.add_node(labels={"zone": "z"}, resources={"seat": 2}, **each)
        cluster.wait_for_nodes()
        yield {node["NodeID"]: node["Labels"]["zone"] for node in ray.nodes()}


def run(path: Path, act: Callable[[Event, Handle, dict[str, AgentStarted]], None], **scaling: Any) -> Result:
    """Train until ``act``, which is told of each event and of all agents so far, has it stopped."""
    job = trainer(path, 1, {"loss": slowly(0.005)}, {"epochs": None, "steps": 10**6})
    wanted = ScalingConfig(**{"resources_per_worker": {"seat": 1}} | scaling)
    handle, started = replace(job, scaling_config=wanted).start(), {}
    for event in handle.events():
        if isinstance(event, AgentStarted):
            started[event.agent] = event
        act(event, handle, started)
    return handle.result()


def formed(result: Result) -> list[list[str]]:
    """The nodes of the agents of each generation."""
    where = {e.agent: e.node for e in read_events(result) if isinstance(e, AgentStarted)}
    return [[where[name] for name in e.agents] for e in read_events(result) if isinstance(e, GenerationFormed)]


def test_agents_stay_apart_as_newcomers_and_after_a_death(zones: dict[str, str], tmp_path: Path) -> None:
    struck = waited = False
    whole = 0  # how often there were three

    def act(event: Event, handle: Handle, started: dict[str, AgentStarted]) -> None:
        nonlocal struck, waited, whole
        waited |= isinstance(event, Waiting) and "could join" in event.what  # a fourth one has no node of its own
        whole += isinstance(event, GenerationFormed) and len(event.agents) == 3
        if whole == 1 and waited and not struck:
            os.kill(started[min(started)].pid, signal.SIGKILL)
            struck = True
        elif whole == 2:
            handle.stop()
            whole += 1

    result = run(tmp_path / "apart", act, num_workers=(1, 4), placement_strategy="STRICT_SPREAD")
    for where in formed(result):
        assert len(set(where)) == len(where)
    assert set(formed(result)[-1]) == set(zones)
    assert_as_undisturbed(result, tmp_path / "alone")


def test_each_agent_has_the_labels_that_are_meant_for_it(zones: dict[str, str], tmp_path: Path) -> None:
    struck = False

    def act(event: Event, handle: Handle, started: dict[str, AgentStarted]) -> None:
        nonlocal struck
        if not isinstance(event, GenerationFormed) or len(event.agents) < 3:
            return
        if struck:
            handle.stop()
        else:
            os.kill(next(a.pid for a in started.values() if zones[a.node] == "x"), signal.SIGKILL)
            struck = True

    labels = [{"zone": "z"}, {"zone": "x"}, {"zone": "in(y,z)"}]
    result = run(tmp_path / "labels", act, num_workers=(2, 3), label_selector=labels)
    of_zones = [Counter(zones[node] for node in where) for where in formed(result)]
    assert all(where <= Counter("xzz") for where in of_zones)  # packed
    assert sum(where == Counter("xzz") for where in of_zones) >= 2
    assert_as_undisturbed(result, tmp_path / "alone")


def stop_when_two(event: Event, handle: Handle, _: dict[str, AgentStarted]) -> None:
    if isinstance(event, GenerationFormed) and len(event.agents) == 2:
        handle.stop()


def test_a_newcomer_is_put_beside_the_first_agent_or_away_from_it(zones: dict[str, str], tmp_path: Path) -> None:
    half = {"resources_per_worker": {"seat": 0.5}, "accelerator_type": "A100"}
    packed = run(tmp_path / "packed", stop_when_two, num_workers=(1, 2), **half)
    spread = run(tmp_path / "spread", stop_when_two, num_workers=(1, 2), placement_strategy="SPREAD")
    (where,) = {zones[node] for node in formed(packed)[-1]}
    assert where in "xy"  # which have such accelerators
    assert len(set(formed(spread)[-1])) == 2
