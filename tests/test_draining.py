"""Nodes to get away from: announced to end, as a spot notice does it, or slow. Several raylets on this machine."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nodes
from jobs_for_tests import assert_as_undisturbed, digest, loss, slowly, trainer
from ray.train import FailureConfig, Result, RunConfig
from test_nodes import processes_of
from torch import nn

from ray_dnn.events import (
    AgentsSlow,
    AgentStarted,
    CheckpointWritten,
    Event,
    GenerationFormed,
    NodeDraining,
    Progress,
    RunResumed,
    Waiting,
)
from ray_dnn.testing import read_events, read_ledger

ENDLESS: dict[str, Any] = {"epochs": None, "steps": 10**6}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node that has no place for agents; tests add others with a place each."""
    with nodes(num_cpus=2, object_store_memory=150 * 2**20) as cluster:
        yield cluster


def add(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, resources={"place": 1}, object_store_memory=80 * 2**20)


def drain(cluster: Any, node: Any, seconds: int) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True, capture_output=True)


def job(path: Path, agents: tuple[int, int]) -> Any:
    made = trainer(path, agents, {"loss": slowly(0.01)}, ENDLESS)
    made.scaling_config.resources_per_worker = {"place": 1}
    return made


def follow(handle: Any, *acts: tuple[Callable[[Any], bool], Callable[[], None]]) -> Result:
    """Wait for one event after the other, and do what belongs to it."""
    left = list(acts)
    for event in handle.events():
        if left and left[0][0](event):
            left.pop(0)[1]()
    result: Result = handle.result()
    assert not left, f"{len(left)} of {len(acts)} events never came"
    return result


def of(result: Result, kind: type[Event]) -> list[Any]:
    return [event for event in read_events(result) if isinstance(event, kind)]


def grown(count: int) -> Callable[[Any], bool]:
    return lambda event: isinstance(event, GenerationFormed) and len(event.agents) == count


def progress(event: Any) -> bool:
    return isinstance(event, Progress)


def test_an_agent_is_replaced_before_its_node_ends(cluster: Any, tmp_path: Path) -> None:
    first, second = add(cluster), add(cluster)
    handle = job(tmp_path, (1, 2)).start()
    spare: list[Any] = []

    def notice() -> None:
        drain(cluster, second, 600)
        spare.append(add(cluster))

    def replaced(event: Any) -> bool:
        return isinstance(event, GenerationFormed) and bool(spare) and bool(event.joined) and bool(event.left)

    result = follow(handle, (grown(2), lambda: None), (progress, notice), (replaced, handle.stop))
    draining, *_ = of(result, NodeDraining)
    (swap,) = [e for e in of(result, GenerationFormed) if e.left]
    assert swap.left == draining.agents  # at the boundary at which the other came
    assert len(swap.joined) == 1
    assert not any(e.lost for e in of(result, GenerationFormed))
    assert_as_undisturbed(result, tmp_path / "alone")
    for node in (first, second, *spare):
        cluster.remove_node(node)


def test_without_a_replacement_it_leaves_before_its_node_ends(cluster: Any, tmp_path: Path) -> None:
    first, second = add(cluster), add(cluster)
    handle = job(tmp_path, (1, 2)).start()

    def left(event: Any) -> bool:
        return isinstance(event, GenerationFormed) and bool(event.left)

    result = follow(handle, (grown(2), lambda: drain(cluster, second, 10)), (left, handle.stop))
    draining, *_ = of(result, NodeDraining)
    (formed,) = [e for e in of(result, GenerationFormed) if e.left]
    assert formed.left == draining.agents
    assert formed.lost == []
    assert formed.time - draining.time < draining.left_s
    assert_as_undisturbed(result, tmp_path / "alone")
    for node in (first, second):
        cluster.remove_node(node)


def slow_on(node: str) -> Callable[..., torch.Tensor]:
    """A loss that takes a long time on one node."""

    def uneven(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        import ray

        here = ray.get_runtime_context().get_node_id()
        return slowly(0.3 if here == node else 0.003)(model, batch)

    return uneven


def test_an_agent_that_is_slow_beyond_sense_is_replaced_on_another_node(cluster: Any, tmp_path: Path) -> None:
    there = [add(cluster) for _ in range(3)]
    made = job(tmp_path, (2, 3))
    uneven = replace(made.spec, loss=slow_on(there[0].node_id))
    handle = replace(made, spec=uneven).start()

    def gone(event: Any) -> bool:
        return isinstance(event, GenerationFormed) and bool(event.left)

    # The place that is free now is not taken, for it is on the slow node.
    acts = [(grown(3), lambda: None), (gone, lambda: there.append(add(cluster))), (grown(3), handle.stop)]
    result = follow(handle, *acts)
    (slow,) = of(result, AgentsSlow)
    (left,) = [e for e in of(result, GenerationFormed) if e.left]
    assert left.left == slow.agents
    assert len(left.agents) == 2  # at once, not when there was a replacement
    assert not any(e.lost for e in of(result, GenerationFormed))
    assert_as_undisturbed(result, tmp_path / "alone")
    for node in there:
        cluster.remove_node(node)


def waits(event: Any) -> bool:
    return isinstance(event, Waiting) and "holding the state" in event.what


def test_where_all_nodes_end_the_state_is_written_and_handed_to_whoever_comes(cluster: Any, tmp_path: Path) -> None:
    first = add(cluster)
    handle = job(tmp_path, (1, 1)).start()
    others: list[Any] = []

    def alone(event: Any) -> bool:
        return isinstance(event, GenerationFormed) and event.agents == ["agent-2"]

    result = follow(
        handle,
        (progress, lambda: drain(cluster, first, 10)),
        (waits, lambda: others.append(add(cluster))),
        (alone, handle.stop),
    )
    (draining,) = of(result, NodeDraining)
    written = [e for e in of(result, CheckpointWritten) if e.time > draining.time]
    assert len(written) >= 3  # at once, when it stopped, and at the end
    assert_as_undisturbed(result, tmp_path / "alone")
    for node in (first, *others):
        cluster.remove_node(node)


def test_the_only_agent_that_a_job_has_work_for_hands_on_through_a_checkpoint(cluster: Any, tmp_path: Path) -> None:
    first, second = add(cluster), add(cluster)
    made = job(tmp_path, (1, 1))
    handle = replace(made, config=replace(made.config, virtual_workers=1)).start()

    def begun(event: Any) -> bool:
        return isinstance(event, AgentStarted)

    ended: list[Any] = []

    def notice() -> None:
        pid = next(e.pid for e in handle.events() if isinstance(e, AgentStarted))
        node = first if pid in processes_of(first) else second
        ended.append(node)
        drain(cluster, node, 12)

    def resumed(event: Any) -> bool:
        return isinstance(event, RunResumed)

    result = follow(handle, (begun, lambda: None), (progress, notice), (resumed, lambda: None), (progress, handle.stop))
    (again,) = of(result, RunResumed)
    assert len(read_ledger(result, attempt=1).lines) == again.step
    alone = trainer(
        tmp_path / "alone",
        1,
        {"loss": loss},
        {"virtual_workers": 1, **ENDLESS, "steps": len(read_ledger(result).lines)},
    )
    assert digest(result) == digest(alone.fit())
    for node in (first, second):
        cluster.remove_node(node)


def test_where_all_nodes_have_ended_nothing_is_computed_again(cluster: Any, tmp_path: Path) -> None:
    first = add(cluster)
    patient = RunConfig(name="run", storage_path=str(tmp_path), failure_config=FailureConfig(max_failures=1))
    handle = replace(job(tmp_path, (1, 1)), run_config=patient).start()
    others: list[Any] = []

    def end() -> None:
        cluster.remove_node(first, allow_graceful=False)
        others.append(add(cluster))

    def resumed(event: Any) -> bool:
        return isinstance(event, RunResumed)

    result = follow(
        handle,
        (progress, lambda: drain(cluster, first, 10)),
        (waits, end),
        (resumed, lambda: None),
        (progress, handle.stop),
    )
    (again,) = of(result, RunResumed)
    assert len(read_ledger(result, attempt=1).lines) == again.step
    assert len(list(of(result, AgentStarted))) == 1
    assert_as_undisturbed(result, tmp_path / "alone")
    for node in others:
        cluster.remove_node(node)
