"""What a run does when hosts fall silent: links cut, lossy or long, hosts, Ray or the driver frozen.

Hosts are namespaces of this machine, so this needs root. Patience is what it is by default, and Ray's settings are
those of cluster.yaml.
"""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.journal import NotRunError
from benchmarks.silence_runs import NAMES, WAIT_S, Cluster, Run, job, used
from benchmarks.tables import Claim, Table, spread
from ray_dnn.events import AgentGone, FirstStep, GenerationFormed
from tests.hosts import Host, missing, site, wait_for

ROUNDS = 3
TARGET_S = 5.0  # from a cut to the next step

# -- what is done to hosts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strike:
    """Something that happens to a host for a while.

    Attributes:
        what: it is, in words.
        begin, end: make it so and undo it.
        seconds: how long; None: until the host's agent is given up.
        host: that it happens to.
    """

    what: str
    begin: Callable[[Host], object]
    end: Callable[[Host], object]
    seconds: float | None = None
    host: str = NAMES[-1]


def _stop(word: str) -> Callable[[Host], object]:
    return lambda host: host.signal(signal.SIGSTOP, word)


def _continue(word: str) -> Callable[[Host], object]:
    return lambda host: host.signal(signal.SIGCONT, word)


def _delay(seconds: float) -> Callable[[Host], object]:
    return lambda host: host.delay(seconds)


CUT = Strike("its link is cut", Host.cut, Host.mend)
MUTE = Strike("its link is cut one way: it hears the others", lambda host: host.lose(back=100), Host.mend)
DEAF = Strike("its link is cut one way: the others hear it", lambda host: host.lose(to=100), Host.mend)
FROZEN = Strike("it is frozen for 10 s", Host.freeze, Host.thaw, 10.0)
STRIKES = (
    CUT,
    MUTE,
    DEAF,
    FROZEN,
    Strike("it is frozen for 3 s", Host.freeze, Host.thaw, 3.0),
    Strike("its raylet is stopped", _stop("/raylet"), _continue("/raylet")),
    Strike("30 % of the packets are lost, each way, for 20 s", lambda host: host.lose(30, 30), Host.mend, 20.0),
    Strike(
        "packets take 200 ms there and back, for 20 s", lambda host: host.delay(0.2), lambda host: host.delay(0), 20.0
    ),
    Strike("the driver is stopped for 8 s", _stop("silence_job"), _continue("silence_job"), 8.0, NAMES[0]),
)


@dataclass
class Found:
    """What came of a strike, in seconds since it began; one value a round, as far as it happened.

    Attributes:
        given_up: when its agent was.
        next_step: when the others had committed a step without it.
        rate: steps a second while it lasted.
        joined: when a new agent of that host took part, since Ray was started there again, or since the end of the
            strike where it had not ended.
    """

    given_up: list[float] = field(default_factory=list)
    next_step: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    joined: list[float] = field(default_factory=list)


def strike(cluster: Cluster, run: Run, what: Strike, found: Found) -> None:
    """Strike at a run that has settled, and leave it when it is whole again."""
    host = cluster.site[what.host]
    victims = {agent for agent, where in run.hosts().items() if where == host.name}
    began, before = time.time(), run.steps()
    what.begin(host)
    if what.seconds is None:
        wait_for(f"verdict on {host.name}", lambda: host.name not in run.where(), WAIT_S)
    else:
        time.sleep(what.seconds)
    lasted, done = time.time() - began, run.steps() - before
    what.end(host)
    gone = [e for e in run.events(began) if isinstance(e, AgentGone) and e.agent in victims]
    if gone:
        found.given_up.append(gone[0].time - began)
        wait_for("next step", lambda: bool(_first_steps(run, gone[0].time)), WAIT_S)
        found.next_step.append(_first_steps(run, gone[0].time)[0].committed - began)
        wait_for("end of Ray on a host that it has given up", lambda: not host.pids("/raylet"), WAIT_S)
        again = time.time()
        cluster.start(host.name)
        run.settle()
        joined = next(e for e in run.events(again) if isinstance(e, GenerationFormed) and e.joined)
        found.joined.append(joined.time - again)
    else:
        found.rate.append(done / lasted)
        run.settle()


def _first_steps(run: Run, since: float) -> list[FirstStep]:
    return [e for e in run.events(since) if isinstance(e, FirstStep) and e.called >= since - 0.01]


# -- the table ---------------------------------------------------------------------------------------------------------


def run() -> Table:
    """The table."""
    if lacking := missing():
        raise NotRunError(lacking)
    found = {what: Found() for what in STRIKES}
    lost = Lost()
    outcomes: dict[str, tuple[int, str]] = {}
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as folder, site(Path(folder), *NAMES) as made:
        cluster = Cluster(made)
        cluster.complete()
        for turn in range(ROUNDS):
            for number, what in enumerate(STRIKES):
                name = f"strike-{turn}-{number}"
                struck = Run(cluster, name)
                struck.settle()
                strike(cluster, struck, what, found[what])
                outcomes[name] = struck.finish()
                cluster.complete()
            outcomes[f"lost-{turn}"] = lose_gcs(cluster, f"lost-{turn}", lost)
        wrong = differing(cluster, outcomes)
    if wrong:
        raise AssertionError(f"other bits than an undisturbed run: {', '.join(wrong)}")
    rows = [_row(what.what, found[what]) for what in STRIKES]
    return Table(
        name="silence",
        title="What a run does when hosts fall silent",
        header=(
            "what happens to one of three hosts",
            "given up after",
            "the others' next step after",
            "meanwhile",
            "back",
        ),
        rows=(*rows, lost.row()),
        notes=_NOTES,
        claims=_claims(found[CUT]),
    )


@dataclass
class Lost:
    """How runs ended whose cluster lost its GCS: when driver and everything else had, in seconds since then."""

    driver: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        ends = f"the driver ends after {spread(self.driver, 's')}, all else after {spread(self.all, 's')}"
        return "Ray's GCS is killed", "–", "–", ends, "started again under its name, the run ends as if undisturbed"


def lose_gcs(cluster: Cluster, name: str, lost: Lost) -> tuple[int, str]:
    """Kill the GCS, wait for the end of all, start the cluster and the run again, and bring it to its end."""
    struck = Run(cluster, name)
    struck.settle()
    began = time.time()
    cluster.head.signal(signal.SIGKILL, "gcs_server")
    struck.driver.wait(WAIT_S)
    lost.driver.append(time.time() - began)
    wait_for("end of Ray", lambda: not any(host.pids("ray") for host in cluster.site.hosts.values()), WAIT_S)
    lost.all.append(time.time() - began)
    cluster.complete()
    again = Run(cluster, name)
    again.settle()
    return again.finish()


def differing(cluster: Cluster, outcomes: dict[str, tuple[int, str]]) -> list[str]:
    """The runs that did not learn and use what an undisturbed one does."""
    folder, steps = cluster.site.folder / "runs", [steps for steps, _ in outcomes.values()]
    job(cluster, folder, "alone", 1, *steps).wait(ROUNDS * WAIT_S)
    right = json.loads((folder / "alone.json").read_text())
    return [
        name
        for (name, outcome), expected in zip(outcomes.items(), right, strict=True)
        if list(outcome) != expected or used(folder / name) != used(folder / f"alone-{outcome[0]}")
    ]


_NOTES = (
    "Three hosts with one agent each, made of namespaces of one machine; the driver is on the first one. Ray's "
    "settings are those of cluster.yaml, and patience is what it is by default. After each of these the weights "
    "digest and the ledger were those of an undisturbed run. Times are since the strike began.",
    "Back: from the start of Ray on the host, once it has ended there by itself, to the new agent's part in a "
    "generation. Where nobody was given up, nothing has to come back.",
)


def _row(what: str, found: Found) -> tuple[str, ...]:
    def words(values: Sequence[float]) -> str:
        if not values:
            return "not"
        times = "" if len(values) == ROUNDS else f", {len(values)} of {ROUNDS} times"
        return spread(values, "s") + times

    rate = f"{spread(found.rate, 'steps/s')}" if found.rate else "–"
    return what, words(found.given_up), words(found.next_step), rate, words(found.joined)


def _claims(cut: Found) -> tuple[Claim, ...]:
    met = sum(seconds <= TARGET_S for seconds in cut.next_step)
    what = f"a host's link is cut: until the others' next step, with default patience; {met} of {ROUNDS} times at most"
    return (Claim(f"{what} {TARGET_S:g} s", spread(cut.next_step, "s")),)
