"""A cluster whose autoscaler is Ray's own and whose machines are processes of this one: a head, and up to three."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import RAY_DIR, nothing_left
from jobs_for_tests import assert_every_row_once, dataset, digest, loss, slowly, trainer
from ray.train import Result

from ray_dnn import Handle, Trainer
from ray_dnn.events import AgentGone, Event, GenerationFormed, Waiting
from ray_dnn.testing import read_events

HEAD = "f" * 51 + "00000"  # the number that the provider of such machines expects a head to have
WORKERS = 3
ONE_CPU = {"CPU": 1}


def cluster_file(address: str) -> dict[str, Any]:
    """As for `ray up`: what the autoscaler reads. Nodes that are idle for 3 seconds are given back."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    commands = [f"{who}{what}_commands" for who in ("head_", "worker_") for what in ("setup", "start_ray")]
    return {
        "cluster_name": "fake",
        "max_workers": WORKERS,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 8,
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
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": ONE_CPU, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": ONE_CPU | {"object_store_memory": 80_000_000},
                "node_config": {},
                "max_workers": WORKERS,
            },
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{key: [] for key in ("initialization_commands", "setup_commands", *commands)},
    }


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def head(folder: Path) -> Iterator[str]:
    """The head and its autoscaler; gives the address."""
    port, client = free_ports(2)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump(cluster_file(address)))
    size = ["--num-cpus=1", "--object-store-memory=100000000", "--include-dashboard=false"]
    ports = [f"--port={port}", f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"]
    ports += ["--min-worker-port=0", "--max-worker-port=0"]
    where = [f"--temp-dir={RAY_DIR}/scaled", f"--autoscaling-config={config}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *size, *ports, *where],
        env=os.environ
        | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(said))
        yield address
    finally:
        process.terminate()
        process.communicate()


def nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with nothing_left(), head(tmp_path_factory.mktemp("scaled")) as address:
        ray.init(address=address, log_to_driver=False)
        yield
        until(lambda: nodes() == 1)
        ray.shutdown()


def growing(path: Path, agents: tuple[int, int]) -> Trainer:
    job = trainer(path, agents, {"loss": slowly(0.01)}, {"epochs": None, "steps": 10**6})
    return replace(job, datasets={"train": dataset(blocks=1)})


def alone(path: Path, result: Result) -> Result:
    """One agent, for as many steps."""
    assert result.metrics is not None
    return trainer(path, 1, {"loss": loss}, {"epochs": None, "steps": result.metrics["steps"]}).fit()


def formed(events: Iterator[Event], agents: int) -> GenerationFormed:
    """The next generation of so many agents."""
    return next(e for e in events if isinstance(e, GenerationFormed) and len(e.agents) == agents)


def finished(handle: Handle) -> Result:
    handle.stop()
    return handle.result()


def test_a_job_starts_with_its_minimum_grows_with_the_cluster_and_gives_nodes_back(
    scaled: None, tmp_path: Path
) -> None:
    handle = growing(tmp_path / "grown", (1, 4)).start()
    formed(handle.events(), 4)
    assert nodes() == 1 + WORKERS
    handle.resize(1)
    until(lambda: nodes() < 1 + WORKERS)  # while it trains
    result = finished(handle)
    until(lambda: nodes() == 1)
    undisturbed = alone(tmp_path / "alone", result)
    assert digest(result) == digest(undisturbed)
    assert result.metrics is not None
    assert_every_row_once(result, result.metrics["steps"] // 7)
    events = read_events(result)
    assert {e.reason for e in events if isinstance(e, AgentGone)} <= {"left as planned", "the run has ended"}
    generations = [e for e in events if isinstance(e, GenerationFormed)]
    assert not any(e.lost for e in generations)
    # It asked for all at once.
    hints = [found for e in events if isinstance(e, Waiting) if (found := re.match(r"(\d) more agents? could", e.what))]
    assert len(hints) <= 1
