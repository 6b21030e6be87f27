"""Hosts that fall silent, on a Ray cluster of hosts in namespaces, with default patience."""

from collections.abc import Iterator

import pytest
from jobs_for_tests import digest

from benchmarks import small
from benchmarks.silence import CUT, FROZEN, MUTE
from benchmarks.silence_job import trainer
from benchmarks.silence_runs import NAMES, Cluster, Run, used
from ray_dnn.events import AgentGone
from tests.hosts import site, wait_for


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray cluster on hosts with links of their own."""
    with site(tmp_path_factory.mktemp("hosts"), *NAMES) as made:
        started = Cluster(made)
        started.complete()
        yield started


@pytest.mark.timeout(900)  # most of it for a machine that is busy with other things
def test_silent_hosts_are_given_up_and_welcomed_as_new(hosts: Cluster, cluster: None) -> None:
    run, one, two = Run(hosts, "run"), hosts.site["one"], hosts.site["two"]
    run.settle()
    for strike, host in ((CUT, two), (MUTE, one)):
        strike.begin(host)
        wait_for(f"verdict on {host.name}", lambda host=host: host.name not in run.where(), 60)
        run.go_on()
        strike.end(host)
    for host in (one, two):  # Ray, which has taken them for dead, ends there by itself
        wait_for(f"end of Ray on {host.name}", lambda host=host: not host.pids("/raylet"), 60)
        hosts.start(host.name)
    run.settle()

    FROZEN.begin(two)
    wait_for("verdict on two", lambda: "two" not in run.where(), 60)
    run.go_on()
    FROZEN.end(two)
    wait_for("end of Ray on two", lambda: not two.pids("/raylet"), 60)
    run.go_on()

    steps, digested = run.finish()
    assert len([e for e in run.events() if isinstance(e, AgentGone) and "has ended" not in e.reason]) >= 3
    alone = trainer(run.folder, "alone", 1, steps, small.loss).fit()
    assert digested == digest(alone)
    assert used(run.path) == used(run.folder / "alone")
