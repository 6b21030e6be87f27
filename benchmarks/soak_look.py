"""What the soak sees of the processes of a run, from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_dnn.trainer import Handle


@dataclass(frozen=True)
class Size:
    """Of a process: resident memory in MiB, and open descriptors."""

    mib: float
    descriptors: int

    @classmethod
    def of(cls, pid: int | str) -> Size:
        """Raises OSError where it has ended."""
        with open(f"/proc/{pid}/statm") as file:
            pages = int(file.read().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd")))


@dataclass
class Living:
    """An agent that is there, as far as the event log says.

    Attributes:
        process: a descriptor of it, which stays its own.
        holds, doomed: see the module.
        sizes: at its first committed step and at the last look.
    """

    name: str
    pid: int
    process: int
    holds: bool = False
    doomed: float | None = None  # since when
    sizes: tuple[Size, Size] | None = None

    def send(self, number: int) -> bool:
        """Send a signal. Returns False where the process has ended."""
        try:
            signal.pidfd_send_signal(self.process, number)
        except ProcessLookupError:
            return False
        return True


def everything(handle: Handle, agents: Collection[Living], folder: Path) -> Iterator[str]:
    """All that can be said about a run that hangs, line by line. ``folder``: in which agents write their stacks."""
    driver = handle._driver
    for name, value in vars(driver).items():
        yield f"driver {name} = {repr(value)[:400]}"
    for replica in driver._fleet.replicas.values():
        yield f"replica {replica.name}: {replica.stage}, proven {replica.proven}"
    for agent in driver._guard._agents.values():
        yield f"seen: {agent.sight}"
    for living in agents:
        living.send(signal.SIGUSR1)  # see Orders.arm
    time.sleep(1.0)
    for living in agents:
        yield f"--- {living.name}, pid {living.pid}, {'doomed' if living.doomed else 'not struck'}"
        with contextlib.suppress(OSError):
            yield (folder / f"stacks-{living.name}").read_text()
