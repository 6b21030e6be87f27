"""How much of the training is left when one of four agents dies every minute, for ten minutes.

Goodput is the rate of useful rows while agents die against the same side's rate while none does, before and after.
Useful are rows of steps that nobody had committed before.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ray.train import RunConfig, ScalingConfig

from benchmarks import peers, small
from benchmarks.journal import Attempt, NotRunError
from benchmarks.tables import Claim, Table, bar
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.events import AgentStarted, Event, GenerationFormed, Progress
from ray_dnn.trainer import Handle

AGENTS, BATCH = 4, 64
DEATHS, EVERY_S = 10, 60.0
CALM_S = 60.0  # before the first death, and after the last one's minute
START_S = 120.0
PEERS = (("Ray Train", "ray_train"), ("TorchFT", "torchft"))


class Useful(NamedTuple):
    """So many useful rows had been used at a time, in seconds since the epoch."""

    time: float
    rows: int


class Times(NamedTuple):
    """When what was done, in seconds since the epoch: all agents trained, the first died, calm again, over."""

    whole: float
    struck: float
    calm: float
    end: float


class Goodput(NamedTuple):
    """Of one side. Rates in rows per second: while none died, and while some did."""

    side: str
    calm: float
    struck: float

    @property
    def share(self) -> float:
        return self.struck / self.calm


def run() -> Table:
    """The table."""
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        with small.cluster():
            found = [_ours(f"{folder}/ours")]
        for side, peer in PEERS:
            try:
                found.append(_theirs(side, peer, f"{folder}/{peer}"))
            except NotRunError as error:
                missing.append(f"{side} was not measured to the end: {error}.")
    ours, *theirs = found
    best = max(theirs, key=lambda g: g.share, default=None)
    others = ", ".join(f"{g.side} {g.share:.1%}" for g in theirs) or "–"
    what = f"goodput with one of {AGENTS} agents dying every {EVERY_S:g} s"
    ratio = f"{ours.share / best.share:.2f}" if best else "–"
    worse = best is not None and best.share > ours.share
    return Table(
        name="goodput",
        title=f"What is left of the training when one of {AGENTS} agents dies every {EVERY_S:g} s",
        header=("side", "goodput", "useful rows a second while agents die", "while none does"),
        rows=tuple((g.side, f"{g.share:.1%}", f"{g.struck:,.0f}", f"{g.calm:,.0f}") for g in found),
        notes=(
            f"{DEATHS} times SIGKILL, every {EVERY_S:g} s, to one agent after the other; before and after that "
            f"{CALM_S:g} s without a death. Batches of {BATCH} rows; Ray Train and TorchFT make them smaller while "
            "there are fewer workers. Rows of steps that were committed before and are done again are not useful, nor "
            "are those that were computed and dropped. The process that takes a dead one's place starts on the same "
            "cores that the others train on.",
            *missing,
        ),
        claims=(Claim(what, f"{ours.share:.1%}", others, ratio, worse),),
        bars=tuple(bar("goodput", g.side, [100 * g.share]) for g in found),
        unit="%",
    )


def _strike(members: Callable[[], Sequence[int]], whole: Callable[[], None]) -> Times:
    """Strike once in a while, between times of calm. ``members``: pids of those that train; ``whole``: waits."""
    whole()
    began = time.time()
    time.sleep(CALM_S)
    struck = time.time()
    for turn in range(DEATHS):
        time.sleep(max(0.0, struck + turn * EVERY_S - time.time()))
        pids = members()
        os.kill(pids[turn % len(pids)], signal.SIGKILL)
    time.sleep(max(0.0, struck + DEATHS * EVERY_S - time.time()))
    whole()
    calm = time.time()
    time.sleep(CALM_S)
    return Times(began, struck, calm, time.time())


def goodput(side: str, useful: Sequence[Useful], times: Times) -> Goodput:
    """From what was known when."""

    def rate(*stretches: tuple[float, float]) -> float:
        rows = seconds = 0.0
        for begin, end in stretches:
            first = max((u for u in useful if u.time <= begin), key=lambda u: u.time)
            last = max((u for u in useful if u.time <= end), key=lambda u: u.time)
            rows, seconds = rows + last.rows - first.rows, seconds + last.time - first.time
        return rows / seconds

    calm = rate((times.whole, times.struck), (times.calm, times.end))
    return Goodput(side, calm, rate((times.struck, times.calm)))


# -- ours --------------------------------------------------------------------------------------------------------------


class _Follower:
    """What is known of a run of ours, kept by a thread of its own."""

    def __init__(self, handle: Handle):
        self.useful: list[Useful] = []
        self._pids: dict[str, int] = {}
        self._members: list[str] = []
        self._trained = False  # whether the present generation has
        self._changed = threading.Condition()
        threading.Thread(target=self._follow, args=(handle,), daemon=True).start()

    def _follow(self, handle: Handle) -> None:
        for event in handle.events():
            with self._changed:
                self._take(event)
                self._changed.notify_all()

    def _take(self, event: Event) -> None:
        if isinstance(event, AgentStarted):
            self._pids[event.agent] = event.pid
        elif isinstance(event, GenerationFormed):
            self._members, self._trained = event.agents, False
        elif isinstance(event, Progress):
            self.useful.append(Useful(event.time, event.step * BATCH))
            self._trained = True

    def members(self) -> list[int]:
        with self._changed:
            return [self._pids[name] for name in self._members]

    def whole(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._trained and len(self._members) == AGENTS, START_S):
                raise TimeoutError(f"{AGENTS} agents did not train after {START_S:g} s")


def _ours(folder: str) -> Goodput:
    handle = Trainer(
        TrainSpec(model=small.build_model, optimizer=small.build_optimizer, loss=small.loss),
        {"train": small.rows()},
        TrainConfig(batch_size=BATCH, virtual_workers=8, steps=1_000_000_000),
        scaling_config=ScalingConfig(num_workers=(1, AGENTS)),
        run_config=RunConfig(name="run", storage_path=folder),
    ).start()
    follower = _Follower(handle)
    times = _strike(follower.members, follower.whole)
    handle.stop()
    handle.result()
    return goodput("ray_dnn", follower.useful, times)


# -- peers -------------------------------------------------------------------------------------------------------------


def _theirs(side: str, peer: str, folder: str) -> Goodput:
    with peers.running(peer, folder, AGENTS, BATCH) as journal:
        times = _strike(journal.members, lambda: journal.wait_for(AGENTS, 20, START_S))
        journal.news()
    return goodput(side, useful_of(journal.seen, BATCH // AGENTS), times)


def useful_of(seen: Sequence[Attempt], rows: int) -> list[Useful]:
    """What a journal says, with so many rows in an attempt."""
    by: dict[int, int] = {}  # the group that committed a step first
    found, total = [], 0
    for attempt in seen:
        if attempt.committed and by.setdefault(attempt.step, attempt.group) == attempt.group:
            total += rows
        found.append(Useful(attempt.time, total))
    return found
