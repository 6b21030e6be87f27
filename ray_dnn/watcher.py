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
import signal
import threading
import time
from collections.abc import Callable

from ray_dnn.liveness import Patience, Sight
from ray_dnn.phases import STATUS_BYTES, Patient, Status

PERIOD_S = 0.1  # between two samples
_GAP_S = 0.5  # most that one sample counts
_WINDOW_S = 1.0  # over which CPU use is measured
_BURNING = 0.05  # of a core; the threads of an idle Ray worker use up to 0.02
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STOPPED, _DEAD, _ALIVE = ("T",), ("Z", "X", "x"), ("R", "D")


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


def own_start() -> int:
    """When this process was started, in ticks since the machine was: with its number, its identity on the machine."""
    with open("/proc/self/stat", "rb") as file:
        return _Stat(file.read()).started


class _Stat:
    """What proc(5) calls /proc/pid/stat. The command's name is in parentheses and may hold anything."""

    def __init__(self, line: bytes):
        rest = line.rpartition(b")")[2].split()  # from field 3 on
        self.state = rest[0].decode()
        self.cpu = sum(map(int, rest[11:15]))  # ticks, with those of children that it has waited for
        self.started = int(rest[19])


class _Process:
    """A process that stays the same one, whoever gets its number later."""

    def __init__(self, pid: int):
        self._folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)

    def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        return os.open(path, flags, dir_fd=self._folder)

    def read(self, path: str) -> bytes:
        fd = self.open(path)
        try:
            return os.read(fd, 65536)
        finally:
            os.close(fd)

    def threads(self) -> list[str]:
        fd = self.open("task", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._folder, signal.SIGKILL)

    def close(self) -> None:
        os.close(self._folder)


def _at_work(process: _Process) -> bool:
    """Whether a thread of the process, or of a process that it started, is runnable or waits for a disk."""
    for thread in process.threads():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if _Stat(process.read(f"task/{thread}/stat")).state in _ALIVE:
                return True
            for child in process.read(f"task/{thread}/children").split():
                with contextlib.closing(_Process(int(child))) as below:
                    if _at_work(below):
                        return True
    return False


class _Watched:
    """One agent, and what was counted about it."""

    def __init__(self, name: str, process: _Process, memory: int):
        self._name, self._process, self._memory = name, process, memory
        self.there = True
        self.stopped = False  # once true, it stays so: the agent is to die
        self._stopped_s = -PERIOD_S  # it has been seen stopped in each sample for so long
        self._up_s = self._still_s = self._idle_s = 0.0
        self._window_s, self._window_cpu = 0.0, 0  # since when CPU use is measured, and the process's CPU then
        self._status = self._read()

    def _read(self) -> Status:
        return Status.read(os.pread(self._memory, STATUS_BYTES, 0))

    @property
    def sight(self) -> Sight:
        return Sight(self._name, self.there, self.stopped, self._up_s, self._still_s, self._idle_s, self._status)

    def sample(self, passed_s: float, patience: Patience) -> bool:
        """Look at it, ``passed_s`` of good time after the last time. Returns whether it is newly dead or stopped."""
        if not self.there:
            return False
        status, before = self._read(), self._status
        self._status = status
        try:
            stat = _Stat(self._process.read("stat"))
        except OSError:
            stat = None
        if stat is None or stat.state in _DEAD:
            self.there = False
            return True
        self._up_s += passed_s
        self._still_s = self._still_s + passed_s if status == before else 0.0
        if status != before or status.phase.patient is Patient.WAITING:
            self._measure_anew(stat.cpu)
            self._idle_s = 0.0
        else:
            self._measure(passed_s, stat.cpu)
        return self._notice_stop(stat.state, passed_s, patience)

    def _measure(self, passed_s: float, cpu: int) -> None:
        """At the end of a window, see whether it was at work in it."""
        self._window_s += passed_s
        if self._window_s < _WINDOW_S:
            return
        burned_s = (cpu - self._window_cpu) / _TICKS_PER_S
        if burned_s > _BURNING * self._window_s or self._can_run():
            self._idle_s = 0.0
        else:
            self._idle_s += self._window_s
        self._measure_anew(cpu)

    def _measure_anew(self, cpu: int) -> None:
        self._window_s, self._window_cpu = 0.0, cpu

    def _can_run(self) -> bool:
        try:
            return _at_work(self._process)
        except OSError:
            return True  # it is dying, which the next sample sees

    def _notice_stop(self, state: str, passed_s: float, patience: Patience) -> bool:
        """Count how long it is stopped. What stopped this process too does not count at all."""
        if state not in _STOPPED:
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

    def forget(self, name: str) -> None:
        with self._lock:
            watched = self._watched.pop(name, None)
            if watched is not None:
                if watched.stopped:
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
        process = _Process(pid)
        undo.callback(process.close)
        if _Stat(process.read("stat")).started != started:
            return None
        memory = process.open(f"fd/{status_fd}")
        undo.callback(os.close, memory)
        watched = _Watched(name, process, memory)
        undo.pop_all()
        return watched
