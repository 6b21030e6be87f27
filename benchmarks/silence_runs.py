"""A Ray cluster on hosts of their own (`tests/hosts.py`), set up as in cluster.yaml, and jobs on it to be struck at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ray_dnn.events import AgentStarted, Event, GenerationFormed
from ray_dnn.testing import read_events, read_ledger
from tests.hosts import ROOT, Host, Site, wait_for

NAMES = ("head", "one", "two")
PORT = 6379
# As in cluster.yaml.
VARIABLES = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_grpc_client_keepalive_time_ms": "1000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_prestart_worker_first_driver": "0",
    "PYTHONPATH": str(ROOT),
}
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
WAIT_S = 120.0  # for anything


class Cluster:
    """A Ray cluster on the hosts of a site, one CPU each; the first host is its head."""

    def __init__(self, site: Site):
        self.site = site
        self.head = site[NAMES[0]]

    def start(self, name: str) -> None:
        """Start Ray on a host."""
        words = ["ray", "start", "--num-cpus=1", f"--object-store-memory={200 * 2**20}", "--disable-usage-stats"]
        if name == self.head.name:
            words += ["--head", f"--port={PORT}", "--include-dashboard=false"]
            words += [f"--system-config={json.dumps(HEALTH_CHECKS)}"]
        else:
            words += [f"--address={self.head.address}:{PORT}"]
        self.site[name].run(*words, env=VARIABLES, timeout=WAIT_S)

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
        self.driver = job(cluster.head, self.folder, name, len(NAMES))

    def events(self, since: float = 0.0) -> list[Event]:
        """What is in the event log now."""
        found = read_events(str(self.path)) if list(self.path.glob("events-*")) else []
        return [event for event in found if event.time >= since]

    def hosts(self) -> dict[str, str]:
        """Where each agent is or was, by name."""
        return {e.agent: e.host for e in self.events() if isinstance(e, AgentStarted)}

    def where(self) -> list[str]:
        """The hosts of those who take part now."""
        hosts, formed = self.hosts(), [e for e in self.events() if isinstance(e, GenerationFormed)]
        return [hosts[agent] for agent in formed[-1].agents] if formed else []

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


def job(head: Host, folder: Path, name: str, agents: int, *steps: int) -> subprocess.Popen[str]:
    """Start a driver (see `benchmarks.silence_job`)."""
    command = (sys.executable, "-m", "benchmarks.silence_job", str(folder), name, str(agents), *map(str, steps))
    with (folder / f"{name}.log").open("a") as log:
        return head.popen(*command, env=VARIABLES, stdout=log, stderr=log)


def used(run: Path) -> list[tuple[object, ...]]:
    """Of a run's ledger, what is to be the same in every run."""
    return [(line.rows, line.digests, line.metrics, line.skipped) for line in read_ledger(str(run)).lines]
