"""Jobs that are alive at the same time and take turns: each runs a block of steps while the others wait at their gates.

All agents of a job pass its gate at the end of every step. Where their block has ended they say so through a socket,
and sleep until they are released into the next one. A block's time is from the first agent's release to the last
agent's end, on the clock that all processes of a machine share.
"""

from __future__ import annotations

import json
import socket
import time
from typing import TextIO

_START_S = 240.0  # until all agents are at their gates for the first time
_BLOCK_S = 240.0
FOR_EVER = 10**9


class Gate:
    """Of one agent of a job."""

    def __init__(self, folder: str, job: str, warm_up: int):
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(_address(folder, job))
            self._line = line.makefile("rw")  # which keeps it open
        self._left = warm_up
        self._released = time.monotonic()

    def step(self) -> bool:
        """A step has ended. Returns whether to take another."""
        self._left -= 1
        if self._left:
            return True
        _say(self._line, [self._released, time.monotonic()])
        steps = self._line.readline()
        self._released, self._left = time.monotonic(), int(steps or 0)
        if not self._left:
            self._line.close()
        return self._left > 0


_gates: dict[tuple[str, str], Gate] = {}


def gate(folder: str, job: str, warm_up: int) -> Gate:
    """This process's gate of a job, which it keeps. ``warm_up``: steps of its first block, for which it is open."""
    if (folder, job) not in _gates:
        _gates[folder, job] = Gate(folder, job, warm_up)
    return _gates[folder, job]


class Turns:
    """Gives one job its turns."""

    def __init__(self, folder: str, job: str, agents: int):
        self._agents = agents
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(_address(folder, job))
        self._server.listen(agents)
        self._server.settimeout(_START_S)
        self._lines: list[TextIO] = []  # one from each agent that has come to its gate

    def release(self, steps: int) -> None:
        """Let the job run its next block of so many steps; 0: it ends."""
        for line in self._lines:
            _say(line, steps)
            if not steps:
                line.close()

    def wait(self) -> float:
        """Wait for the end of the present block. Returns the seconds it took."""
        while len(self._lines) < self._agents:
            line, _ = self._server.accept()
            with line:
                line.settimeout(_BLOCK_S)
                self._lines.append(line.makefile("rw"))
        self._server.close()
        times = [json.loads(line.readline()) for line in self._lines]
        return float(max(end for _, end in times) - min(begin for begin, _ in times))


def _address(folder: str, job: str) -> str:
    return f"{folder}/{job}.gate"


def _say(line: TextIO, what: object) -> None:
    line.write(json.dumps(what) + "\n")
    line.flush()
