"""`ray job submit` as users type it: two nodes on which this package is not installed, and a token that all must show.

Each of the two nodes has a temporary folder of its own, so each gets its own copy of the working directory.
"""

import contextlib
import os
import re
import secrets
import subprocess
import sysconfig
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import RAY_DIR, free_ports, nothing_left

from ray_dnn.events import AgentGone, AgentStarted, CheckpointWritten, Progress, RunInterrupted, RunResumed
from ray_dnn.testing import read_events, read_ledger

ROOT = Path(__file__).parent.parent
STEPS = 200
FLAGS = (
    "--layers=1 --width=32 --context=32 --batch=8 --virtual-workers=4 --eval-bytes=8192 --sample=0 --name=run "
    f"--steps={STEPS}"
).split()
# An evaluation after each step changes nothing but the time that the run takes: enough to stop it on the way.
SLOWLY = "--evaluate-every=1"
MORE_TIME = ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}']


@dataclass(frozen=True)
class Jobs:
    """A cluster that takes jobs.

    Attributes:
        python: of its nodes; Ray and torch are installed there, this package is not.
        environment: of its nodes, and of those who submit.
        dashboard, client: where it takes jobs, and Ray clients.
    """

    python: Path
    environment: dict[str, str]
    dashboard: str
    client: str

    def start(self, command: list[str], name: str, until: str) -> tuple[subprocess.Popen[str], str]:
        """``ray start`` until it says something like this. Returns the process, which goes on, and what was found."""
        folder = Path(RAY_DIR) / name
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        size = ["--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}"]
        node = self.popen(["start", "--block", *command, *ports, *size])
        assert node.stdout is not None
        said = []
        for line in node.stdout:
            said.append(line)
            if found := re.search(until, line):
                return node, found[0]
        pytest.fail("".join(said))

    def popen(self, words: list[str]) -> subprocess.Popen[str]:
        """A ``ray`` command, run at the root of the checkout."""
        return subprocess.Popen(
            [self.python, "-m", "ray.scripts.scripts", *words],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, storage: Path, *flags: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Submit the language model, learning from a page of this project; the process shows the job's log."""
        script = ["python", "jobs/language_model.py", "docs/operations.md", *FLAGS, f"--storage={storage}", *flags]
        where = ["--address", self.dashboard, "--working-dir", "."]
        return self.popen(["job", "submit", *where, *options, "--", *script])

    def stop(self, job: str) -> str:
        """``ray job stop``: returns when the job has ended. Gives what it says."""
        stopping = self.popen(["job", "stop", "--address", self.dashboard, job])
        said, _ = stopping.communicate(timeout=60)
        return said


def bare_python(folder: Path) -> Path:
    """An environment with all that is installed here except for what is installed in editable form: this package."""
    venv.create(folder, symlinks=True)
    installed = sysconfig.get_paths()["purelib"]
    where = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(where) / "rest.pth").write_text(installed + "\n")  # of folders added like this no .pth file is read
    return folder / "bin" / "python"


@contextlib.contextmanager
def ended(node: subprocess.Popen[str]) -> Iterator[None]:
    """A node, until it is told to end."""
    try:
        yield
    finally:
        node.terminate()
        node.communicate()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    python = bare_python(folder / "bare")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": "",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the one that the head finds
    }
    dashboard, client = free_ports(2)
    found = Jobs(python, environment, f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}")
    with nothing_left():
        head = ["--head", "--port=0", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        first, address = found.start(head, "head", r"(?<=ray start --address=')[\w.:]+")
        with ended(first):
            second, _ = found.start([f"--address={address}"], "node", "Ray runtime started")
            with ended(second):
                yield found


def test_the_package_is_not_installed_on_the_nodes(jobs: Jobs, tmp_path: Path) -> None:
    command = [jobs.python, "-c", "import ray, torch, ray_dnn"]
    tried = subprocess.run(command, cwd=tmp_path, env=jobs.environment, capture_output=True, text=True, check=False)
    assert "No module named 'ray_dnn'" in tried.stderr


def follow(submitted: subprocess.Popen[str], until: str) -> str:
    """Read the job's log up to a line that begins like this. Returns the job's id."""
    assert submitted.stdout is not None
    said = []
    for line in submitted.stdout:
        said.append(line)
        if line.startswith(until):
            found = re.search(r"Job '(\w+)' submitted", "".join(said))
            assert found is not None
            return found[1]
    pytest.fail("".join(said))


def finished(submitted: subprocess.Popen[str]) -> str:
    """The rest of the log of a job that succeeds."""
    said, _ = submitted.communicate(timeout=120)
    assert submitted.returncode == 0, said
    return said


def digest(said: str) -> str:
    found = re.search(r"^weights digest (\w{64})$", said, re.MULTILINE)
    assert found is not None, said
    return found[1]


def uses(run: Path) -> list[Any]:
    """Which rows each virtual worker used in each committed step."""
    return [(use.step, use.epoch, use.worker, use.row_ids.tolist()) for use in read_ledger(str(run)).uses()]


def test_a_job_that_is_stopped_and_submitted_again_ends_like_one_that_was_not(jobs: Jobs, tmp_path: Path) -> None:
    stopped, alone = tmp_path / "stopped", tmp_path / "alone"
    # Of four agents two are on the node on which the driver is not: all CPUs are taken.
    first = jobs.submit(stopped, "--agents=4", SLOWLY, options=MORE_TIME)
    said = jobs.stop(follow(first, "step "))
    assert "was stopped" in said
    log, _ = first.communicate(timeout=60)
    assert "interrupted after" in log
    assert "terminated gracefully" in supervisor()  # and was not killed after 3 seconds, as without MORE_TIME
    events = read_events(str(stopped / "run"))
    assert [e for e in events if isinstance(e, Progress)]
    (written,) = (e for e in events if isinstance(e, CheckpointWritten))
    (ended,) = (e for e in events if isinstance(e, RunInterrupted))
    assert 0 < written.step <= ended.step < STEPS
    assert {e.agent for e in events if isinstance(e, AgentGone)} == {f"agent-{n}" for n in range(1, 5)}
    assert_gone({e.pid for e in events if isinstance(e, AgentStarted)})

    both = jobs.submit(stopped, "--agents=1:2"), jobs.submit(alone, "--agents=1")
    again, undisturbed = map(finished, both)
    resumed = [e for e in read_events(str(stopped / "run")) if isinstance(e, RunResumed)]
    assert [e.step for e in resumed] == [written.step]
    assert digest(again) == digest(undisturbed)
    assert uses(stopped / "run") == uses(alone / "run")
    assert re.search(rf"^step {STEPS}/{STEPS}  epoch \d+  loss ", again, re.MULTILINE)  # plain lines, as on a console


def supervisor() -> str:
    """What Ray's processes say that started and stopped the jobs."""
    logs = (Path(RAY_DIR) / "head" / "session_latest" / "logs").glob("worker-*.err")
    return "".join(log.read_text() for log in logs)


def assert_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


SCRIPT = """
import ray
import sys
from jobs_for_tests import trainer
from pathlib import Path

ray.init()
trainer(Path(sys.argv[1]), 1).fit()
"""


def test_through_a_ray_client_nothing_is_started(jobs: Jobs, tmp_path: Path) -> None:
    code = [jobs.python, "-c", SCRIPT, str(tmp_path / "runs")]
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = jobs.environment | {"RAY_ADDRESS": jobs.client, "PYTHONPATH": places}
    for _ in range(3):
        tried = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=90, check=False)
        if "Starting Ray client server failed" not in tried.stderr:  # Ray waits for it for half a minute
            break
    assert tried.returncode == 1
    assert "ConfigError: Ray is connected through a Ray Client address" in tried.stderr
    assert "ray job submit" in tried.stderr
    assert not (tmp_path / "runs").exists()
