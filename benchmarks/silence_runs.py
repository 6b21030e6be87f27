"""A Ray cluster on hosts of their own (`tests/hosts.py`), set up as in cluster.yaml, and jobs on it to be struck at."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.soak_report import lines
from ray_dnn.events import AgentStarted, Event, GenerationFormed
from ray_dnn.testing import read_events, read_ledger
from tests.hosts import ROOT, Site, wait_for

NAMES = ("head", "one", "two")
PORT = 6379
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "PYTHONPATH": str(ROOT),
}
WAIT_S = 120.0  # for anything


def settings() -> tuple[dict[str, str], str]:
    """What cluster.yaml has every process see, but for the token; and the option of its head that sets up Ray."""
    file = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    variables = dict(
        option.removeprefix("--env ").split("=") for option in file["docker"]["run_options"] if "RAY_" in option
    )
    words = [word for command in file["head_start_ray_commands"] for word in shlex.split(command)]
    (system_config,) = (word for word in words if word.startswith("--system-config="))
    return variables | {"RAY_AUTH_MODE": "disabled"} | VARIABLES, system_config


class Cluster:
    """A Ray cluster on the hosts of a site, one CPU each; the first host is its head."""

    def __init__(self, site: Site):
        self.site = site
        self.head = site[NAMES[0]]
        self.variables, self._system_config = settings()

    def start(self, name: str) -> None:
        """Start Ray on a host."""
        words = ["ray", "start", "--num-cpus=1", f"--object-store-memory={200 * 2**20}", "--disable-usage-stats"]
        if name == self.head.name:
            words += ["--head", f"--port={PORT}", "--include-dashboard=false", self._system_config]
        else:
            words += [f"--address={self.head.address}:{PORT}"]
        self.site[name].run(*words, env=self.variables, timeout=WAIT_S)

    def complete(self) -> None:
        """Have Ray run on every host, where it has ended."""
        for name, host in self.site.hosts.items():
            if not host.pids("/raylet"):
                self.start(name)


class Run:
    """A job that trains on all hosts until it is told to stop."""

    def __init__(self, cluster: Cluster, name: str):
        self.name, self._cluster = name, cluster
        self.folder = cluster.site.folder / "runs"
        self.folder.mkdir(exist_ok=True)
        self.path, self._told = self.folder / name, self.folder / f"{name}.stop"
        self._told.unlink(missing_ok=True)
        self.driver = job(cluster, self.folder, name, len(NAMES))

    def events(self, since: float = 0.0) -> list[Event]:
        """What is in the event log now."""
        return [event for event in events(self.path) if event.time >= since]

    def hosts(self) -> dict[str, str]:
        """Where each agent is or was, by name."""
        return hosts(self.events())

    def where(self) -> list[str]:
        """The hosts of those who take part now."""
        return where(self.path)

    def steps(self) -> int:
        """How many are in the ledger."""
        return len(read_ledger(str(self.path)).lines) if list(self.path.glob("ledger-*")) else 0

    def settle(self) -> None:
        """Wait until all hosts take part, and have taken some steps."""
        wait_for("agent on every host", lambda: sorted(self.where()) == sorted(NAMES), WAIT_S)
        self.go_on()

    def go_on(self, steps: int = 20) -> None:
        """Wait until some more steps are done."""
        enough = self.steps() + steps
        wait_for("progress", lambda: self.steps() >= enough, WAIT_S)

    def finish(self) -> tuple[int, str]:
        """End the job. Returns its steps and the weights digest."""
        self._told.touch()
        written = self.folder / f"{self.name}.json"
        wait_for("result", lambda: written.exists() and written.read_text().endswith("]]"), WAIT_S)
        ((steps, digest),) = json.loads(written.read_text())
        return steps, digest


def job(cluster: Cluster, folder: Path, name: str, agents: int, *steps: int) -> subprocess.Popen[str]:
    """Start a driver (see `benchmarks.silence_job`)."""
    command = (sys.executable, "-m", "benchmarks.silence_job", str(folder), name, str(agents), *map(str, steps))
    with (folder / f"{name}.log").open("a") as log:
        return cluster.head.popen(*command, env=cluster.variables, stdout=log, stderr=log)


def events(run: Path) -> list[Event]:
    """What is in a run's event log now."""
    return read_events(str(run)) if list(run.glob("events-*")) else []


def hosts(told: Sequence[Event]) -> dict[str, str]:
    """Where each agent is or was, by name."""
    return {e.agent: e.host for e in told if isinstance(e, AgentStarted)}


def where(run: Path) -> list[str]:
    """The hosts of those who take part in a run now."""
    told = events(run)
    formed = [e for e in told if isinstance(e, GenerationFormed)]
    return [hosts(told)[agent] for agent in formed[-1].agents] if formed else []


def used(run: Path) -> list[str]:
    """Of a run's ledger, what is to be the same in every run."""
    return lines(read_ledger(str(run)))
