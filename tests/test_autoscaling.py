"""Ray's own autoscaler, with machines that are raylets on this one: what it brings for a run, and takes back."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import RAY_DIR, free_ports, nothing_left, our_processes
from jobs_for_tests import assert_as_undisturbed, slowly, trainer
from ray.util import placement_group_table

from ray_dnn.events import AgentStarted, GenerationFormed
from ray_dnn.testing import read_events
from tests.hosts import wait_for

MACHINES = 3  # that there can be, each with a place for one agent
HEAD = "f" * 51 + "00000"  # the number that the provider of such machines expects a head to have
HEAD_TYPE = "ray.head.default"
PLACE = {"place": 1}


def soon(what: str, is_so: Callable[[], bool]) -> None:
    """Wait until something is so. A failure says what runs, and what the autoscaler did last."""
    try:
        wait_for(what, is_so, seconds=120.0, pause_s=0.1)
    except TimeoutError as error:
        log = Path(RAY_DIR, "autoscaled", "session_latest", "logs", "monitor.log").read_text()[-10_000:]
        running = "\n".join(f"{pid} {command}" for pid, command in our_processes().items())
        raise TimeoutError(f"{error}\n{running}\n{ray.nodes()}\n{log}") from error


def cluster_file(address: str) -> dict[str, Any]:
    """What the autoscaler reads. A machine without work for 3 seconds is taken back."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    commands = [f"{who}{what}_commands" for who in ("head_", "worker_") for what in ("setup", "start_ray")]
    machine = {"resources": PLACE | {"CPU": 0, "object_store_memory": 80_000_000}, "node_config": {}}
    return {
        "cluster_name": "fake",
        "max_workers": MACHINES,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "machine": machine | {"max_workers": MACHINES},
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{key: [] for key in ("initialization_commands", "setup_commands", *commands)},
    }


@contextlib.contextmanager
def head(folder: Path) -> Iterator[str]:
    """A head without a place for agents, and its autoscaler; gives the address."""
    port, client = free_ports(2)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    config = folder / "cluster.json"  # which is YAML, too
    config.write_text(json.dumps(cluster_file(address)))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += ["--object-store-memory=100000000", "--include-dashboard=false", f"--port={port}"]
    command += [f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0", "--min-worker-port=0"]
    command += ["--max-worker-port=0", f"--temp-dir={RAY_DIR}/autoscaled", f"--autoscaling-config={config}"]
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTOSCALER_RECONCILE_RAY_STOP_REQUESTED_STATUS_TIMEOUT_S": "20",  # after which it asks again, else 300
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        while "Ray runtime started" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield address
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def autoscaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with nothing_left(), head(tmp_path_factory.mktemp("autoscaler")) as address:
        ray.init(address=address, log_to_driver=False)
        yield
        # A machine that Ray counts as gone leaves a process behind, which its provider ends a little later.
        soon("end of the rest", lambda: sum("log_monitor" in command for command in our_processes().values()) <= 1)
        ray.shutdown()


def machines() -> int:
    """How many there are now."""
    return sum(bool(node["Alive"] and node["Resources"].get("place")) for node in ray.nodes())


def requests() -> list[int]:
    """The requests for places that have not been met: for how many each, the largest first."""
    pending = [about for about in placement_group_table().values() if about["state"] == "PENDING"]
    return sorted((len(about["bundles"]) for about in pending), reverse=True)


def formed(handle: Any, agents: int, after: int = 0) -> GenerationFormed:
    """The first generation of so many agents after generation ``after``."""
    generations = (e for e in handle.events() if isinstance(e, GenerationFormed) and e.generation > after)
    return next(e for e in generations if len(e.agents) == agents)


def test_an_autoscaler_brings_machines_for_a_run_and_takes_them_back_while_it_trains(
    autoscaler: None, tmp_path: Path
) -> None:
    job = trainer(tmp_path / "grown", (2, MACHINES + 2), {"loss": slowly(0.01)}, {"epochs": None, "steps": 10**6})
    job.scaling_config.resources_per_worker = PLACE
    handle = job.start()
    soon("requests for [2]", lambda: requests() == [2])  # the minimum, all at once or none
    full = formed(handle, MACHINES)
    # Each by itself: neither can be met, and neither kept the last one back.
    soon("requests for [1, 1]", lambda: requests() == [1, 1])
    handle.resize(2)
    small = formed(handle, 2, full.generation)
    soon("requests for []", lambda: requests() == [])
    soon("2 machines", lambda: machines() == 2)  # nobody watches on the third any more
    handle.resize(MACHINES + 2)
    again = formed(handle, MACHINES, small.generation)
    assert again.step > small.step > 0  # the others went on meanwhile
    soon("requests for [1, 1]", lambda: requests() == [1, 1])
    handle.stop()
    result = handle.result()
    assert requests() == []
    assert_as_undisturbed(result, tmp_path / "alone")
    soon("0 machines", lambda: machines() == 0)
    events = read_events(result)
    assert not any(e.lost for e in events if isinstance(e, GenerationFormed))
    assert len([e for e in events if isinstance(e, AgentStarted)]) == MACHINES + 1  # nobody was started anew
