"""Whole nodes that fall silent: two raylets on this machine, all processes of one of them frozen and thawed."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import nodes, our_processes
from jobs_for_tests import assert_as_undisturbed, slowly, trainer

from ray_dnn.events import AgentGone, AgentStarted, GenerationFormed, Progress
from ray_dnn.liveness import Patience
from ray_dnn.testing import read_events
from tests.hosts import wait_for


@pytest.fixture(scope="module")
def second_node() -> Iterator[Any]:
    """A cluster of two nodes with two CPUs each; gives the one on which the driver is not.

    Ray itself is to find nothing wrong with a frozen node, however long this machine takes: it would end it.
    """
    patient = {"health_check_failure_threshold": 1000}
    with nodes(num_cpus=2, object_store_memory=200 * 2**20, _system_config=patient) as cluster:
        yield cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)


def processes_of(node: Any) -> list[int]:
    """A node's raylet and everything below it."""
    raylet = node.all_processes["raylet"][0].process.pid
    parents = {}
    for pid in our_processes():
        with contextlib.suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    found, new = {raylet}, {raylet}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def test_a_node_that_freezes_is_left_behind_and_comes_back_as_new(
    second_node: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ray_dnn")
    job = trainer(
        tmp_path / "frozen",
        (1, 2),
        {"loss": slowly(0.01)},
        {"epochs": None, "steps": 10**6},
        patience=Patience(silent_s=2),
    )
    job.scaling_config.resources_per_worker = {"CPU": 2}  # so one agent on each node
    handle = job.start()
    pids: dict[str, int] = {}  # of the agents on the second node
    members: list[str] = []
    frozen: list[int] = []
    zombie, state = "", "waiting for two"
    # Silence means little before a node's watcher has been heard: it may still be starting.
    heard = f"node {second_node.node_id} is watched"
    for event in handle.events():
        if isinstance(event, AgentStarted) and event.node == second_node.node_id:
            pids[event.agent] = event.pid
        elif isinstance(event, GenerationFormed):
            members = event.agents
            if state == "frozen" and zombie not in members:
                state = "left behind"
            elif state == "thawed" and len(members) == 2:
                handle.stop()
                state = "whole again"
        elif isinstance(event, Progress) and state == "left behind":
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
            state = "thawed"
        elif isinstance(event, Progress) and state == "waiting for two" and len(members) == 2 and heard in caplog.text:
            zombie = next(agent for agent in members if agent in pids)
            frozen = processes_of(second_node)
            for pid in frozen:
                os.kill(pid, signal.SIGSTOP)
            state = "frozen"
    result = handle.result()
    assert state == "whole again"
    assert_as_undisturbed(result, tmp_path / "alone")
    gone = next(e for e in read_events(result) if isinstance(e, AgentGone) and e.agent == zombie)
    assert "nothing was heard from node" in gone.reason
    # The agent that was left behind goes away by itself once it can run again.
    wait_for("end of the one left behind", lambda: pids[zombie] not in our_processes(), seconds=20, pause_s=0.05)
