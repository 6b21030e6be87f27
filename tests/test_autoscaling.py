"""Ray's own autoscaler, with machines that are raylets on this one: what it brings for a run, and takes back."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import RAY_DIR, nothing_left
from jobs_for_tests import assert_every_row_once, digest, loss, slowly, trainer
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.train import Result

from ray_dnn.events import AgentStarted, GenerationFormed, Progress
from ray_dnn.testing import read_events, read_ledger

MOST = 4  # machines, with a place for one agent each
ENDLESS: dict[str, Any] = {"epochs": None, "steps": 10**6}
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
CLUSTER = {
    "cluster_name": "test",
    "max_workers": MOST,
    "idle_timeout_minutes": 0.05,
    "upscaling_speed": MOST,
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    **dict.fromkeys(COMMANDS, []),
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "machine": {
            "resources": {"CPU": 1, "place": 1, "object_store_memory": 80 * 2**20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MOST,
        },
    },
}


@pytest.fixture(scope="module")
def autoscaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of a head without a place for agents, which grows."""
    config = tmp_path_factory.mktemp("autoscaler") / "config.json"
    config.write_text(json.dumps(CLUSTER))
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "3",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0", "--num-cpus=2"]
    command += ["--object-store-memory=150000000", "--include-dashboard=false", f"--temp-dir={RAY_DIR}/autoscaler"]
    with nothing_left():
        head = subprocess.Popen(
            [*command, f"--autoscaling-config={config}"], env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            assert head.stdout is not None
            said = ""
            while (found := re.search(r"(?<=ray start --address=')[\w.:]+", said)) is None:
                line = head.stdout.readline()
                assert line, said
                said += line
            ray.init(address=found[0])
            yield
        finally:
            ray.shutdown()
            head.terminate()
            head.communicate()


def machines() -> int:
    """How many there are now."""
    return sum(bool(node["Alive"] and node["Resources"].get("place")) for node in ray.nodes())


def wait_for_machines(count: int) -> None:
    deadline = time.monotonic() + 120
    while machines() != count:
        assert time.monotonic() < deadline, f"{machines()} machines"
        time.sleep(0.1)


def job(path: Path, agents: tuple[int, int]) -> Any:
    made = trainer(path, agents, {"loss": slowly(0.01)}, ENDLESS)
    made.scaling_config.resources_per_worker = {"place": 1}
    return made


def assert_as_undisturbed(result: Result, path: Path) -> None:
    assert result.metrics is not None
    steps = result.metrics["steps"]
    alone = trainer(path / "alone", 1, {"loss": loss}, {"epochs": None, "steps": steps}).fit()
    assert digest(result) == digest(alone)
    assert_every_row_once(result, steps // 7)
    assert [line.step for line in read_ledger(result).lines] == list(range(steps))


def test_a_run_gets_machines_while_it_trains_and_they_end_with_it(autoscaler: None, tmp_path: Path) -> None:
    handle = job(tmp_path, (2, MOST)).start()
    formed: list[GenerationFormed] = []
    for event in handle.events():
        if isinstance(event, GenerationFormed):
            formed.append(event)
        elif isinstance(event, Progress) and len(formed[-1].agents) == MOST:
            handle.stop()
    result = handle.result()
    assert len(formed[0].agents) == 2  # it did not wait for more
    assert formed[1].step > 0
    assert not any(e.lost or e.left for e in formed)
    assert len([e for e in read_events(result) if isinstance(e, AgentStarted)]) == MOST  # nothing was started anew
    assert_as_undisturbed(result, tmp_path)
    wait_for_machines(0)


def test_two_runs_both_get_machines_though_the_first_wants_all_there_can_be(autoscaler: None, tmp_path: Path) -> None:
    handles = []
    for name, wanted in (("first", MOST), ("second", 2)):
        handles.append(job(tmp_path / name, (2, MOST)).start())
        for event in handles[-1].events():
            if isinstance(event, GenerationFormed) and len(event.agents) == wanted:
                break
    for handle in handles:
        handle.stop()
    for name, result in zip(("first", "second"), [handle.result() for handle in handles], strict=True):
        assert not any(e.lost for e in read_events(result) if isinstance(e, GenerationFormed))
        assert_as_undisturbed(result, tmp_path / name)
