"""What the workers of a peer write down while they train, and strikes at them that are measured by it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

_POLL_S = 0.02


class Attempt(NamedTuple):
    """A worker came to the end of a step.

    Attributes:
        time: in seconds since the epoch.
        pid: of the worker.
        group: another one whenever the workers that train together have changed.
        step: its number, from 0.
        committed: whether the optimizer took it.
        workers: that took part.
    """

    time: float
    pid: int
    group: int
    step: int
    committed: bool
    workers: int


@dataclass(frozen=True)
class Cost:
    """What a strike at one of the workers cost.

    Attributes:
        seconds: from the signal to the first step committed without that worker that nobody had committed before.
        whole_s: from the signal to the first such step of as many workers as before.
        redone: steps that were committed again.
        dropped: batches of single workers that were computed and not used.
        smaller: steps that were committed with fewer workers than before.
    """

    seconds: float
    whole_s: float
    redone: int
    dropped: int
    smaller: int


class NotRunError(Exception):
    """A peer did not train, or did not go on, in the time that it was given."""


class Journal:
    """Attempts, in one file per worker below a folder. Usable from any process of this machine."""

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._out: TextIO | None = None
        self._read: dict[Path, int] = {}  # characters of each file that `news` has returned
        self.seen: list[Attempt] = []  # all that `news` has returned

    def write(self, group: int, step: int, committed: bool, workers: int) -> None:
        """An attempt of this process."""
        if self._out is None:
            self._out = (self._folder / f"{os.getpid()}.txt").open("a", buffering=1)
        self._out.write(f"{time.time()!r} {os.getpid()} {group} {step} {int(committed)} {workers}\n")

    def stop(self) -> None:
        """Have the workers end."""
        (self._folder / "stop").touch()

    @property
    def stopped(self) -> bool:
        """Whether the workers should end."""
        return (self._folder / "stop").exists()

    def news(self) -> list[Attempt]:
        """What was written since the last call."""
        found = []
        for path in self._folder.glob("*.txt"):
            known = self._read.get(path, 0)
            text = path.read_text()[known:]
            text = text[: text.rfind("\n") + 1]
            self._read[path] = known + len(text)
            for line in text.splitlines():
                when, *numbers = line.split()
                pid, group, step, committed, workers = map(int, numbers)
                found.append(Attempt(float(when), pid, group, step, bool(committed), workers))
        self.seen = sorted(self.seen + found)
        return found

    def wait_for(self, workers: int, steps: int, limit_s: float) -> None:
        """Wait until so many have committed so many steps one after another."""
        until = time.monotonic() + limit_s
        enough = workers * steps
        while True:
            self.news()
            last = self.seen[-enough:]
            if len(last) == enough and all(a.committed and a.workers == workers for a in last):
                return
            if time.monotonic() > until:
                raise NotRunError(f"{workers} workers did not come to {steps} steps in {limit_s:g} s")
            time.sleep(_POLL_S)

    def members(self) -> list[int]:
        """The pids of those that train together now."""
        self.news()
        newest = self.seen[-1]
        return sorted({a.pid for a in self.seen[-3 * newest.workers :] if a.group == newest.group})

    def strike(self, name: str, turn: int, limit_s: float) -> Cost:
        """Send a signal to one of the workers that train now, and wait until there are as many as before.

        A stopped worker is killed once the others have gone on: else nobody would ever replace it.
        """
        pids = self.members()
        newest = self.seen[-1]
        victim, when = pids[turn % len(pids)], time.time()
        os.kill(victim, getattr(signal, name))
        stopped, until = name == "SIGSTOP", time.monotonic() + limit_s
        try:
            while True:
                time.sleep(_POLL_S)
                self.news()
                new, whole = _afterwards(self.seen, when, newest)
                if new is not None and stopped:
                    stopped = False
                    os.kill(victim, signal.SIGKILL)
                if new is not None and whole is not None:
                    return _cost(self.seen, when, newest, new, whole)
                if time.monotonic() > until:
                    raise NotRunError(f"it had not recovered {limit_s:g} s after {name}")
        finally:
            if stopped:
                os.kill(victim, signal.SIGKILL)


def _afterwards(seen: Sequence[Attempt], when: float, last: Attempt) -> tuple[Attempt | None, Attempt | None]:
    """The first new step that another group committed, and the first one of a group of the same size."""
    known = max(a.step for a in seen if a.committed and a.group == last.group)
    new = [a for a in seen if a.time > when and a.committed and a.group != last.group and a.step > known]
    return next(iter(new), None), next((a for a in new if a.workers == last.workers), None)


def _cost(seen: Sequence[Attempt], when: float, last: Attempt, new: Attempt, whole: Attempt) -> Cost:
    known = max(a.step for a in seen if a.committed and a.group == last.group)
    between = [a for a in seen if when < a.time < whole.time]
    return Cost(
        seconds=new.time - when,
        whole_s=whole.time - when,
        redone=len({a.step for a in between if a.committed and a.group != last.group and a.step <= known}),
        dropped=sum(not a.committed for a in between),
        smaller=len({a.step for a in between if a.committed and a.workers < last.workers}),
    )
