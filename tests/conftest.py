"""What every test can count on: Ray's state in a directory of its own, and no process left behind.

Ray reads its environment once, while it is imported, so the settings below are made when this file is loaded, which is
before pytest imports the first test.
"""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Short: Ray puts Unix sockets below it, and the path of a socket ends at 107 bytes. Fresh: a stale cluster address in
# it would make ray.init() join a cluster that is dead. Unique: inherited, it marks every process that the tests start.
RAY_DIR = tempfile.mkdtemp(prefix="rd-", dir="/tmp")

os.environ |= {
    "RAY_TMPDIR": RAY_DIR,
    "RAY_AUTH_MODE": "disabled",  # unset, ray.init() would write a token into the home directory
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_prestart_worker_first_driver": "0",  # else Ray starts an idle process for each CPU that a test might want
    "PYTHONPATH": os.path.dirname(__file__),  # jobs of the tests are modules here, which agents must find
}
os.environ.pop("RAY_ADDRESS", None)


# Files that take long, the longest first: begun last, one of them would run alone while the others have ended.
LONG = (
    "test_faults",
    "test_on_premise",
    "test_jobs",
    "test_checkpoints",
    "test_draining",
    "test_silence",
    "test_autoscaling",
    "test_strategies",
    "test_feed",
    "test_cluster",
    "test_docs",
    "test_feed_cluster",
    "test_soak",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Jobs of the tests travel as those of a script do: an agent that imported their modules would load Ray Train."""
    import jobs_for_tests
    from ray import cloudpickle

    for module in {jobs_for_tests, *(item.module for item in session.items if isinstance(item, pytest.Function))}:
        cloudpickle.register_pickle_by_value(module)


def pytest_unconfigure() -> None:
    shutil.rmtree(RAY_DIR, ignore_errors=True)


def our_processes() -> dict[int, str]:
    """Pid and command line of every living process that inherited this session's RAY_TMPDIR."""
    marker = f"RAY_TMPDIR={RAY_DIR}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:  # a zombie's environment is empty; a process may end while it is looked at, or be another user's
            if marker in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        except OSError:
            continue
    return found


def wait_for_exit(before: set[int], seconds: float) -> dict[int, str]:
    """The processes that were not there before and are still there after at most so many seconds."""
    deadline = time.monotonic() + seconds
    while left := {pid: command for pid, command in our_processes().items() if pid not in before}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, neither here nor at any other address of this machine."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Whatever processes begin inside must be gone soon afterwards."""
    before = set(our_processes())
    yield
    left = wait_for_exit(before, seconds=10)
    for pid in left:  # reported below, but not handed on to the tests that follow
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"processes are left behind: {left}"


@contextlib.contextmanager
def nodes(**head: Any) -> Iterator[Any]:
    """A cluster of one node, to which others may be added; gone without a trace afterwards."""
    import ray
    from ray.cluster_utils import Cluster

    with nothing_left():
        cluster = Cluster()
        cluster.add_node(include_dashboard=False, **head)
        ray.init(address=cluster.address)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of one node with 16 logical CPUs, for all tests of a module; gone without a trace afterwards."""
    import ray

    with nothing_left():
        ray.init(
            address="local",  # always a new one, whatever else runs on this machine
            num_cpus=16,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
        )
        yield
        ray.shutdown()
