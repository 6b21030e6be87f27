"""How long one of four agents that is killed or stopped holds up the others: from the signal to the next new step."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

from ray.train import RunConfig, ScalingConfig

from benchmarks import peers, small
from benchmarks.journal import Cost, NotRunError
from benchmarks.tables import Bar, Claim, Table, bar, spread
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.events import AgentStarted, Decided, Event, FirstStep, GenerationFormed, Progress
from ray_dnn.testing import read_events

AGENTS, BATCH = 4, 64
TARGET_S = 0.15  # beside the computing that could not be interrupted, and one step
KILL, STOP = "SIGKILL", "SIGSTOP"
LARGE = 3072  # inner width of a model of 10 million parameters
START_S, RECOVER_S = 120.0, 120.0  # that peers are given
PARTS = ("noticed", "told", "left", "connected", "agreed", "step")

# name, peer and timeout of its exchanges, and with what it is struck
PEERS: tuple[tuple[str, str, float, list[str]], ...] = (
    ("Ray Train", "ray_train", peers.TIMEOUT_S, [KILL] * 2),
    (f"TorchFT, {peers.TIMEOUT_S:g} s timeout", "torchft", peers.TIMEOUT_S, [KILL, STOP] * 2),
    ("TorchFT, 1 s timeout", "torchft", 1.0, [KILL, STOP, KILL] * 2),
)


@dataclass(frozen=True)
class Recovery:
    """One of ours, in seconds.

    Attributes:
        noticed: from the signal to the driver's decision.
        told: until a survivor was told of it.
        left: until it had left the old generation: it finishes what cannot be interrupted.
        connected: until it was connected to the others.
        agreed: until all had the same state.
        step: until it had committed the next step.
    """

    noticed: float
    told: float
    left: float
    connected: float
    agreed: float
    step: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def counted(self) -> float:
        """What the target bounds."""
        return self.seconds - self.left - self.step


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    side: str
    what: str
    seconds: list[float]
    lost: str

    def cells(self) -> tuple[str, ...]:
        return self.what, self.side, str(len(self.seconds)), spread(self.seconds, "s", 3), self.lost


def run() -> Table:
    """The table."""
    ours, missing, rows = {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        for width, rounds in ((1024, 6), (LARGE, 6)):
            name = f"{_millions(width)} M parameters"
            with small.cluster():
                ours[name] = _ours(f"{folder}/ours-{width}", width, rounds)
            for signal_name, found in ours[name].items():
                rows.append(Row("ray_dnn", f"{signal_name}, {name}", [r.seconds for r in found], "nothing"))
        for number, (side, peer, timeout_s, signals) in enumerate(PEERS):
            costs, error = _theirs(peer, f"{folder}/peer-{number}", timeout_s, signals)
            if error is not None:
                missing.append(f"{side} was not measured to the end: {error}.")
            for signal_name, found in costs.items():
                what = f"{signal_name}, {_millions(1024)} M parameters"
                rows.append(Row(side, what, [c.seconds for c in found], _lost(found)))
    return Table(
        name="recovery",
        title="How long an agent that is killed or stopped holds up the others",
        header=(f"one of {AGENTS} agents", "side", "times", "signal to next new step", "lost beside the time"),
        rows=tuple(row.cells() for row in rows),
        notes=(*_notes(ours), *missing),
        claims=tuple(_claims(rows)),
        bars=tuple(_bars(rows)),
        unit="s",
        log=True,
    )


def _millions(width: int) -> str:
    return f"{sum(p.numel() for p in small.build_model(width).parameters()) / 1e6:.1f}"


# -- ours --------------------------------------------------------------------------------------------------------------


def _ours(folder: str, width: int, rounds: int) -> dict[str, list[Recovery]]:
    """Recoveries by signal, of a run that is struck whenever it is complete."""
    handle = Trainer(
        TrainSpec(model=partial(small.build_model, width), optimizer=small.build_optimizer, loss=small.loss),
        {"train": small.rows()},
        TrainConfig(batch_size=BATCH, virtual_workers=8, steps=1_000_000),
        scaling_config=ScalingConfig(num_workers=(1, AGENTS)),
        run_config=RunConfig(name="run", storage_path=folder),
    ).start()
    pids: dict[str, int] = {}
    members: list[str] = []
    struck: list[tuple[str, float]] = []
    signals = [KILL, STOP] * rounds
    begun = False  # whether the present generation has committed a step
    for event in handle.events():
        if isinstance(event, AgentStarted):
            pids[event.agent] = event.pid
        elif isinstance(event, GenerationFormed):
            members, begun = event.agents, False
        elif isinstance(event, FirstStep):
            begun = True
        elif isinstance(event, Progress) and begun and len(members) == AGENTS:
            if not signals:
                handle.stop()
                break
            begun = False
            struck.append((signals.pop(0), time.time()))
            os.kill(pids[members[len(struck) % AGENTS]], getattr(signal, struck[-1][0]))
    events = list(read_events(handle.result()))
    found: dict[str, list[Recovery]] = {KILL: [], STOP: []}
    for name, when in struck:
        found[name].append(_recovery(events, when))
    return found


def _recovery(events: Sequence[Event], when: float) -> Recovery:
    decided = next(e.time for e in events if isinstance(e, Decided) and e.kind == "recover" and e.time > when)
    first = next(e for e in events if isinstance(e, FirstStep) and e.called > decided - 0.001)
    times = (when, decided, first.called, first.left, first.formed, first.agreed, first.committed)
    return Recovery(*(b - a for a, b in pairwise(times)))


def _notes(ours: dict[str, dict[str, list[Recovery]]]) -> list[str]:
    """Ours in its parts, against the target."""
    notes = [
        f"{AGENTS} agents train the small job with batches of {BATCH} rows; they are struck one at a time, whenever "
        "all of them train. A step counts when it was committed without the agent that was struck, and nobody had "
        "committed it before."
    ]
    for name, by_signal in ours.items():
        for signal_name, found in by_signal.items():
            parts = ", ".join(f"{part} {median(getattr(r, part) for r in found) * 1e3:.0f}" for part in PARTS)
            counted = [r.counted for r in found]
            met = sum(seconds <= TARGET_S for seconds in counted)
            notes.append(
                f"ray_dnn, {signal_name}, {name}, medians in milliseconds: {parts}. Without the computing that could "
                f"not be interrupted (left) and the step: {spread(counted, 's', 3)}; {met} of {len(found)} times at "
                f"most {TARGET_S} s."
            )
    return notes


# -- peers -------------------------------------------------------------------------------------------------------------


def _theirs(
    peer: str, folder: str, timeout_s: float, signals: Sequence[str]
) -> tuple[dict[str, list[Cost]], NotRunError | None]:
    """Costs by signal, and why there are not more of them."""
    found: dict[str, list[Cost]] = {}
    try:
        with peers.running(peer, folder, AGENTS, BATCH, timeout_s) as journal:
            for turn, name in enumerate(signals):
                journal.wait_for(AGENTS, 20, START_S)
                found.setdefault(name, []).append(journal.strike(name, turn, RECOVER_S))
    except NotRunError as error:
        return found, error
    return found, None


def _lost(costs: Sequence[Cost]) -> str:
    """Medians, in words."""
    redone, dropped, smaller, whole = (
        median(getattr(c, name) for c in costs) for name in ("redone", "dropped", "smaller", "whole_s")
    )
    words = [f"{redone:.0f} steps done again"] if redone else []
    words += [f"{dropped * BATCH // AGENTS:.0f} rows computed and not used"] if dropped else []
    words += [f"{smaller:.0f} steps with a smaller batch, for {whole:.1f} s"] if smaller else []
    return ", ".join(words) or "nothing"


def _claims(rows: Sequence[Row]) -> list[Claim]:
    """Each of ours beside the fastest peer's."""
    claims = []
    for row in (r for r in rows if r.side == "ray_dnn"):
        theirs = [r for r in rows if r.side != "ray_dnn" and r.what == row.what]
        best = min(theirs, key=lambda r: median(r.seconds), default=None)
        ours = f"{median(row.seconds):.2f} s"
        what = f"one of {AGENTS} agents struck by {row.what}: until the next new step"
        if best is None:
            claims.append(Claim(what, ours))
            continue
        ratio = median(row.seconds) / median(best.seconds)
        others = ", ".join(f"{r.side} {median(r.seconds):.2f} s" for r in theirs)
        claims.append(Claim(what, ours, others, f"{ratio:.2f}", ratio > 1))
    return claims


def _bars(rows: Sequence[Row]) -> list[Bar]:
    return [bar(row.what, row.side, row.seconds) for row in rows]
