"""The kinds of faults that the soak draws from, and how one is ordered inside of an agent at a named phase."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ray_dnn.phases import Status
from ray_dnn.testing import Corrupt, Fault, Kill, Partition, Slow, Stop

STEP = ("reading", "computing", "exchange-first", "exchange-middle", "exchange-last", "combined", "applying")
CHANGE = ("forming", "copying", "evaluating")  # they come now and then
EARLY = ("starting", "building", "admission")
Draw = Callable[[Random, int], Fault]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        weight: how often it is drawn, compared with the others.
        takes: holders of the state that it costs the run, so that one more must be there.
        least: holders of the state that must be there.
        draw: makes a fault that is ordered, of a random number generator and the number of ranks. None: it strikes
            from outside.
        disrupts: whether the others cannot go on without forming a new generation.
        audit: whether the run must compare what agents compute and send.
    """

    name: str
    weight: float
    takes: int
    least: int
    draw: Draw | None = None
    disrupts: bool = True
    audit: bool = False

    @property
    def deadly(self) -> bool:
        """Whether agents die of it at once."""
        return "kill" in self.name


def _at(kind: Callable[..., Fault], phases: tuple[str, ...], **more: Any) -> Draw:
    return lambda random, ranks: kind(random.choice(phases), rank=random.randrange(ranks), **more)


def _early(random: Random, ranks: int) -> Fault:
    return Kill(random.choice(EARLY))


def _slow(random: Random, ranks: int) -> Fault:
    seconds, busy = random.uniform(0.3, 1.5), random.random() < 0.5
    return Slow(random.choice(STEP), rank=random.randrange(ranks), seconds=seconds, busy=busy)


KILL = Kind("kill", 4, takes=1, least=2)
STOP = Kind("stop", 2, takes=1, least=2)
TWO = Kind("two kills at once", 1, takes=2, least=3)
AGAIN = Kind("kill during a recovery", 1, takes=2, least=3)
NEWCOMER = Kind("kill of a newcomer", 1, takes=0, least=1, disrupts=False)
KINDS = (
    KILL,
    STOP,
    TWO,
    AGAIN,
    NEWCOMER,
    Kind("kill in a phase", 4, takes=1, least=2, draw=_at(Kill, STEP)),
    Kind("kill in a change", 2, takes=1, least=2, draw=_at(Kill, CHANGE)),
    Kind("kill before admission", 1, takes=0, least=1, draw=_early, disrupts=False),
    Kind("stop in a phase", 1.5, takes=1, least=2, draw=_at(Stop, STEP)),
    Kind("slow", 1, takes=0, least=1, draw=_slow, disrupts=False),
    Kind("connections closed", 1.5, takes=0, least=2, draw=_at(Partition, STEP, closed=True)),
    Kind("connections silent", 1, takes=0, least=2, draw=_at(Partition, STEP)),
    Kind("wrong bit on the wire", 2, takes=0, least=2, draw=_at(Corrupt, ("exchange-first",), what="wire"), audit=True),
    Kind("wrong bit in weights", 1, takes=1, least=3, draw=_at(Corrupt, ("computing",), what="weights"), audit=True),
    Kind("wrong bit in gradient", 1, takes=1, least=3, draw=_at(Corrupt, ("computing",), what="gradient"), audit=True),
)


class Claimed(NamedTuple):
    """An order that an agent has taken, at a time in seconds since the epoch."""

    number: int
    agent: str
    time: float
    phase: str
    step: int


@dataclass(frozen=True)
class Orders:
    """Faults that are ordered while a run goes on, each for the first agent of this machine that gets to its moment.

    An order is a file. Whoever renames it has claimed it, and the new name says who, when and where.

    Attributes:
        folder: that orders lie in. Each agent also leaves a file there for the stacks that it writes at SIGUSR1.
    """

    folder: Path

    def arm(self, victim: Any) -> None:
        """Have orders carried out by an agent. Called in its process."""
        stacks = open(self.folder / f"stacks-{victim.name}", "w")  # noqa: SIM115  # open as long as the process lives
        faulthandler.register(signal.SIGUSR1, stacks)
        number = int(victim.name.split("-")[1])

        def entered(status: Status, rank: int) -> None:
            for name in os.listdir(self.folder):
                if name.startswith("order-"):
                    self._look(name, victim, status, rank, number)

        victim.marks.on_enter(entered)

    def _look(self, name: str, victim: Any, status: Status, rank: int, number: int) -> None:
        try:
            fault: Fault = pickle.loads((self.folder / name).read_bytes())
            if not fault.matches(status, rank, number):
                return
            words = (name.partition("-")[2], victim.name, f"{time.time():.6f}", status.phase.value, str(status.step))
            (self.folder / name).rename(self.folder / "@".join(("claimed", *words)))
        except FileNotFoundError:
            return  # somebody else was faster, or it was withdrawn
        fault.strike(victim)

    def give(self, number: int, fault: Fault) -> None:
        """Order a fault."""
        draft = self.folder / f"draft-{number}"
        draft.write_bytes(pickle.dumps(fault))
        draft.rename(self.folder / f"order-{number}")

    def withdraw(self, number: int) -> bool:
        """Take an order back. Returns False where it has been claimed."""
        try:
            (self.folder / f"order-{number}").unlink()
        except FileNotFoundError:
            return False
        return True

    def claimed(self) -> list[Claimed]:
        """Orders that were claimed since the last call."""
        found = []
        for path in self.folder.glob("claimed@*"):
            _, number, agent, when, phase, step = path.name.split("@")
            found.append(Claimed(int(number), agent, float(when), phase, int(step)))
            path.unlink()
        return found

    def clear(self) -> None:
        """Forget everything, for the next run."""
        for path in self.folder.iterdir():
            path.unlink()
