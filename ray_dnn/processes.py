"""Processes of this machine as Linux shows them below /proc."""

from __future__ import annotations

import contextlib
import os
import signal

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
RUNNABLE, DISK, STOPPED, DEAD = "R", "D", "T", ("Z", "X", "x")  # states in proc(5)


class Stat:
    """What proc(5) calls /proc/pid/stat. The command's name is in parentheses and may hold anything."""

    def __init__(self, line: bytes):
        rest = line.rpartition(b")")[2].split()  # from field 3 on
        self.state = rest[0].decode()
        self.cpu = sum(map(int, rest[11:15]))  # ticks, with those of children that it has waited for
        self.started = int(rest[19])


class Process:
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


def thread_states(process: Process) -> set[str]:
    """The states of a process's threads; once one is found that could run, the others are of no interest."""
    states = set()
    for thread in process.threads():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            states.add(Stat(process.read(f"task/{thread}/stat")).state)
            if RUNNABLE in states:
                break
    return states


def survey_below(process: Process) -> tuple[set[str], int]:
    """The states of the threads of all processes that a process has started, and the ticks of CPU that they used."""
    states, cpu = set(), 0
    for thread in process.threads():
        with contextlib.suppress(OSError):
            for child in process.read(f"task/{thread}/children").split():
                with contextlib.closing(Process(int(child))) as below:
                    more_states, more_cpu = survey_below(below)
                    states |= thread_states(below) | more_states
                    cpu += Stat(below.read("stat")).cpu + more_cpu
    return states, cpu


def own_start() -> int:
    """When this process was started, in ticks since the machine was: with its number, its identity on the machine."""
    with open("/proc/self/stat", "rb") as file:
        return Stat(file.read()).started
