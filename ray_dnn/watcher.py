"""Seeing from outside of a process whether it is at work: one watcher per node, for all agents of a run on it.

Linux only. An agent is opened once, as a directory below /proc: what is read from and sent to that descriptor
afterwards concerns this very process, also when it has died and its number is another's. What an agent says about
itself lies in a memfd of its own, which the watcher opens too and can read when the agent is stopped or dead.

A watcher runs at the same low priority as the agents (Ray's nice 15) and can be starved, and whoever freezes a machine
or a container freezes both. So time is counted in samples that came when they were due; what passed between two samples
that lie far apart counts as one short while.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable

from ray_dnn.liveness import Patience, Sight
from ray_dnn.phases import STATUS_BYTES, UNTIL_READY, Status
from ray_dnn.processes import (
    DEAD,
    DISK,
    RUNNABLE,
    STOPPED,
    TICKS_PER_S,
    Process,
    Stat,
    own_start,
    survey_below,
    thread_states,
)

__all__ = ["StatusMemory", "Watcher", "own_start"]

PERIOD_S = 0.1  # between two samples
_GAP_S = 0.5  # most that one sample counts
_WINDOW_S = 1.0  # over which an agent is measured that does not move
_BURNING = 0.05  # of a core; the threads of an idle Ray worker use up to 0.02
_FULL = 0.9  # of a core; who uses it has not waited for it
# For each second in which it could have run and did not, an agent that used next to no CPU has this much of its idle
# time forgiven. On a busy machine Ray's own threads in a deadlocked worker wait for a core in up to half of all looks
# (measured: 12 busy loops on 2 cores), those of one that computes in all of them.
_FORGIVEN = 0.5


class StatusMemory:
    """The agent's side: the few bytes in which it tells where it is, readable from outside of its process.

    Attributes:
        fd: the number of its descriptor in this process, for `Watcher.watch`.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("ray_dnn-status")
        os.ftruncate(self.fd, STATUS_BYTES)
        self._memory = memoryview(mmap.mmap(self.fd, STATUS_BYTES))
        self.write(Status())

    def write(self, status: Status) -> None:
        status.write(self._memory)


class _Watched:
    """One agent, and what was counted about it."""

    def __init__(self, name: str, process: Process, memory: int):
        self._name, self._process, self._memory = name, process, memory
        self.there = True
        self.stopped = False  # once true, it stays so: the agent is to die
        self._stopped_s = -PERIOD_S  # it has been seen stopped in each sample for so long
        self._starting_s = self._still_s = self._idle_s = 0.0
        self._window_s, self._window_cpu = 0.0, 0  # how old the present window is, and the process's CPU at its start
        self._below_cpu = 0  # of the processes that it started, when they were last looked at
        self._status = self._read()

    def _read(self) -> Status:
        return Status.read(os.pread(self._memory, STATUS_BYTES, 0))

    @property
    def sight(self) -> Sight:
        return Sight(self._name, self.there, self.stopped, self._starting_s, self._still_s, self._idle_s, self._status)

    def sample(self, passed_s: float, patience: Patience) -> bool:
        """Look at it, ``passed_s`` of good time after the last time. Returns whether it is newly dead or stopped."""
        if not self.there:
            return False
        status, before = self._read(), self._status
        self._status = status
        try:
            stat = Stat(self._process.read("stat"))
        except OSError:
            stat = None
        if stat is None or stat.state in DEAD:
            self.there = False
            return True
        if status != before:
            self._still_s = self._idle_s = self._window_s = 0.0
            self._window_cpu = stat.cpu
        self._window_s += passed_s
        if self._window_s >= _WINDOW_S:
            self._measure(stat.cpu)
        return self._notice_stop(stat.state, passed_s, patience)

    def _measure(self, cpu: int) -> None:
        """At the end of a window in which it has not moved, count what it did in it, and begin the next one."""
        window_s = self._window_s
        burned, states = cpu - self._window_cpu, {RUNNABLE}
        self._window_s, self._window_cpu = 0.0, cpu
        if burned / TICKS_PER_S < _FULL * window_s:
            states, below = self._survey()
            burned += below
        burned_s = min(burned / TICKS_PER_S, window_s)
        if burned_s > _BURNING * window_s or (DISK in states and RUNNABLE not in states):
            self._idle_s = 0.0
        elif RUNNABLE in states:
            self._idle_s = max(0.0, self._idle_s - _FORGIVEN * window_s)
        else:
            self._idle_s += window_s
        counted_s = burned_s if RUNNABLE in states else window_s
        self._still_s += counted_s
        if self._status.phase in UNTIL_READY:
            self._starting_s += counted_s

    def _survey(self) -> tuple[set[str], int]:
        """The states of its threads; if none could run, with those of the processes below it and their fresh CPU."""
        try:
            states = thread_states(self._process)
            if RUNNABLE in states:
                return states, 0
            more_states, cpu = survey_below(self._process)
        except OSError:
            return set(), 0  # it is dying, which the next sample sees
        fresh, self._below_cpu = max(0, cpu - self._below_cpu), cpu
        return states | more_states, fresh

    def _notice_stop(self, state: str, passed_s: float, patience: Patience) -> bool:
        """Count how long it is stopped. What stopped this process too does not count at all."""
        if state != STOPPED:
            self._stopped_s = -PERIOD_S  # the first sample that sees it stopped says nothing about the time before
            return False
        self._stopped_s += min(passed_s, PERIOD_S)
        if self.stopped or self._stopped_s < patience.stopped_s:
            return False
        self.stopped = True
        return True

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        os.close(self._memory)
        self._process.close()


class Watcher:
    """Watches agents on the node that it runs on. Its methods may be called from several threads."""

    def __init__(self, patience: Patience, clock: Callable[[], float] = time.monotonic):
        self._patience, self._clock = patience, clock
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()  # held for every use of what is watched, never while waiting
        self._last = clock()  # when the last sample was taken

    def watch(self, name: str, pid: int, started: int, status_fd: int) -> bool:
        """Begin to watch an agent.

        Args:
            pid, started: of its process, from ``os.getpid()`` and `own_start` in it.
            status_fd: of its `StatusMemory`.

        Returns:
            Whether it can be seen: not when it has ended, or lives in a container that hides its processes.
        """
        try:
            watched = _open(name, pid, started, status_fd)
        except OSError:
            return False
        if watched is None:
            return False
        self.forget(name)
        with self._lock:
            self._watched[name] = watched
        return True

    def hurry(self) -> None:
        """Raise this process's priority to that of ordinary ones, where that is permitted.

        Ray runs it at nice 15. Where others keep all cores busy, its answers are then late by many seconds, although
        it needs no more than a hundredth of a core.
        """
        with contextlib.suppress(OSError):
            for thread in os.listdir("/proc/self/task"):
                os.setpriority(os.PRIO_PROCESS, int(thread), 0)

    def forget(self, name: str, kill: bool = False) -> None:
        """Stop watching an agent; ``kill`` it where a call that asks for that may come too late."""
        with self._lock:
            watched = self._watched.pop(name, None)
            if watched is not None:
                if watched.stopped or kill:
                    watched.kill()
                watched.close()

    def kill(self, name: str) -> None:
        """End an agent's process at once, stopped or not."""
        with self._lock:
            if name in self._watched:
                self._watched[name].kill()

    def look(self, wait_s: float) -> tuple[Sight, ...]:
        """What is seen of all agents after ``wait_s``, or as soon as one is newly dead or found stopped.

        Who is found stopped is killed when its time is told, which is at the next call: else the news of its death
        would arrive before the reason.
        """
        with self._lock:
            for watched in self._watched.values():
                if watched.stopped and watched.there:
                    watched.kill()
        until = self._clock() + wait_s
        while True:
            with self._lock:
                news = self._sample()
                if news or self._clock() >= until:
                    return tuple(watched.sight for watched in self._watched.values())
            time.sleep(max(0.0, min(PERIOD_S, until - self._clock())))

    def _sample(self) -> bool:
        now = self._clock()
        passed_s = min(now - self._last, _GAP_S)
        self._last = now
        news = [watched.sample(passed_s, self._patience) for watched in self._watched.values()]
        return any(news)


def _open(name: str, pid: int, started: int, status_fd: int) -> _Watched | None:
    """An agent, opened; None where the process of this number is another one."""
    with contextlib.ExitStack() as undo:
        process = Process(pid)
        undo.callback(process.close)
        if Stat(process.read("stat")).started != started:
            return None
        memory = process.open(f"fd/{status_fd}")
        undo.callback(os.close, memory)
        watched = _Watched(name, process, memory)
        undo.pop_all()
        return watched
