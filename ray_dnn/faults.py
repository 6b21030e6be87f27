"""Faults on purpose, at named phases of named steps: what `ray_dnn.testing` gives to tests of jobs and of clusters.

A fault waits on every agent for its moment. The agent that gets there first claims it, so that each fault strikes once
in a run, and then does to itself what the fault says. Nothing of this is in the way of a run without faults.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
import torch

from ray_dnn.engine.contribute import Given, Leaf
from ray_dnn.engine.outlet import Ready
from ray_dnn.errors import ConfigError
from ray_dnn.phases import Phase, Status

if TYPE_CHECKING:
    from ray_dnn.comm.mesh import Mesh
    from ray_dnn.engine.step import Engine
    from ray_dnn.marks import Marks

EARLY = (Phase.STARTING, Phase.BUILDING, Phase.ADMISSION)
_PLACES = [p.value for p in Phase if p not in (Phase.READY, Phase.GATHERING)]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on one agent, once.

    Attributes:
        at: the phase, by name: "starting", "building", "admission", "following", "forming", "copying", "reading",
            "computing", "exchange-first", "exchange-middle", "exchange-last", "combined", "applying", "evaluating",
            "finishing".
        step: number of committed steps, from 0. None: whenever the phase is reached first.
        rank: of the agent's replica in its generation. None: of any.
        agent: its number, in the order in which agents are asked for, from 1. None: any.
    """

    at: str
    step: int | None = None
    rank: int | None = None
    agent: int | None = None

    def __post_init__(self) -> None:
        if self.at not in _PLACES:
            raise ConfigError(f"{type(self).__name__}(at={self.at!r}): must be one of {', '.join(_PLACES)}.")
        for name, least in (("step", 0), ("rank", 0), ("agent", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{type(self).__name__}({name}={value!r}): must be a whole number from {least} on.")
        if Phase(self.at) in EARLY and (self.step is not None or self.rank is not None):
            raise ConfigError(
                f"{type(self).__name__}(at={self.at!r}): an agent has no step and no rank then. Name it by agent=."
            )

    def matches(self, status: Status, rank: int, agent: int) -> bool:
        """Whether this is the fault's moment."""
        return (
            status.phase.value == self.at
            and self.step in (None, status.step)
            and self.rank in (None, rank)
            and self.agent in (None, agent)
        )

    def strike(self, victim: Victim) -> None:
        """Do it. Called on the agent's compute thread."""
        raise NotImplementedError


@dataclass(frozen=True)
class Kill(Fault):
    """The process dies at once (SIGKILL)."""

    def strike(self, victim: Victim) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Stop(Fault):
    """The process is stopped (SIGSTOP), and continued after ``seconds`` where nobody has killed it before."""

    seconds: float = math.inf

    def strike(self, victim: Victim) -> None:
        pid = os.getpid()
        if self.seconds < math.inf:
            code = f"import os, time; time.sleep({self.seconds}); os.kill({pid}, 18)"
            subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
        os.kill(pid, signal.SIGSTOP)


@dataclass(frozen=True)
class Slow(Fault):
    """The agent does nothing for ``seconds``, or with ``busy`` burns CPU for nothing. Without ``seconds``: for ever."""

    seconds: float = math.inf
    busy: bool = False

    def strike(self, victim: Victim) -> None:
        end = time.monotonic() + self.seconds
        if not self.busy:
            threading.Event().wait(None if self.seconds == math.inf else self.seconds)
        while time.monotonic() < end:
            pass


def _only_from(fault: Fault, early: tuple[Phase, ...]) -> None:
    if Phase(fault.at) in early:
        raise ConfigError(f"{fault!r}: there is nothing to strike at {fault.at!r} yet. Use a later phase.")


@dataclass(frozen=True)
class Partition(Fault):
    """From now on nothing moves between this agent and those of rank ``peer`` (None: all others) in this generation.

    With ``closed`` the connections are closed, as by a firewall that refuses; else they fall silent, as by a cut cable.
    """

    peer: int | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _only_from(self, (*EARLY, Phase.FORMING))

    def strike(self, victim: Victim) -> None:
        mesh = victim.mesh
        for peer in mesh.peers if mesh else ():
            if mesh is not None and self.peer in (None, peer):
                _cut(mesh, peer, self.closed)


@dataclass(frozen=True)
class Corrupt(Fault):
    """One bit is flipped.

    Attributes:
        what: "weights": in the model, from now on; "gradient": in this agent's next contribution; "wire": in what it
            sends next to another agent.
    """

    what: str = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("weights", "gradient", "wire"):
            raise ConfigError(f"Corrupt(what={self.what!r}): must be 'weights', 'gradient' or 'wire'.")
        _only_from(self, (*EARLY, Phase.FORMING) if self.what == "wire" else EARLY)

    def strike(self, victim: Victim) -> None:
        assert victim.engine is not None
        if self.what == "weights":
            _flip(next(iter(victim.engine.state.parameters.values())))
        elif self.what == "gradient":
            _corrupt_contribution(victim.engine)
        elif victim.mesh is not None:
            _corrupt_wire(victim.mesh)


class Victim:
    """What faults strike: an agent."""

    name: str
    marks: Marks
    engine: Engine | None
    mesh: Mesh | None


class Claims:
    """Who has claimed which fault. Made a Ray actor, for all agents of a run."""

    def __init__(self) -> None:
        self._struck: dict[int, str] = {}

    def claim(self, index: int, agent: str) -> bool:
        """Whether the agent is the first to claim the fault. An agent asks once; later attempts have the same names."""
        first = index not in self._struck
        self._struck.setdefault(index, agent)
        return first

    def struck(self) -> dict[int, str]:
        """The agents that faults struck, by the fault's index."""
        return dict(self._struck)


@dataclass(frozen=True)
class FaultPlan:
    """The faults of one run."""

    faults: Sequence[Fault]
    claim: Callable[[int, str], bool] = field(repr=False)

    def arm(self, victim: Any) -> None:
        """Have faults strike at an agent's marks."""
        number = int(victim.name.split("-")[1].split(".")[0])
        left = dict(enumerate(self.faults))

        def entered(status: Status, rank: int) -> None:
            for index, fault in list(left.items()):
                if fault.matches(status, rank, number):
                    del left[index]
                    if self.claim(index, victim.name):
                        fault.strike(victim)

        victim.marks.on_enter(entered)


def claims_of(actor: Any) -> Callable[[int, str], bool]:
    """Claims, from an agent."""
    return lambda index, agent: bool(ray.get(actor.claim.remote(index, agent)))


def _flip(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the exponent of the first element."""
    with torch.no_grad():
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        bit = {torch.float32: 23, torch.float64: 52, torch.float16: 10, torch.bfloat16: 7}[tensor.dtype]
        tensor.detach().reshape(-1).view(words)[0] ^= 1 << bit


def _corrupt_contribution(engine: Engine) -> None:
    contributor = engine.contributor
    right = contributor.contribute

    def wrong(worker: int, worker_state: Any, leaf: Leaf, agent: str = "", ready: Ready | None = None) -> Given:
        names: list[str] = []
        given = right(worker, worker_state, leaf, agent, names.append)
        if given.rows:
            _flip(next(lane for lane in leaf.vector if len(lane)))
            contributor.contribute = right  # type: ignore[method-assign]
        if ready is not None:
            for name in names:
                ready(name)
        return given

    contributor.contribute = wrong  # type: ignore[method-assign]


class _BadWire:
    """A connection that flips a bit in the last byte of the next large piece that it sends."""

    def __init__(self, mesh: Mesh, peer: int):
        self._mesh, self._peer, self._good = mesh, peer, mesh._peers[peer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._good, name)

    def send(self, data: memoryview) -> int:
        if len(data) < 64:
            return self._good.send(data)
        bad = bytearray(data)
        bad[-1] ^= 1
        self._mesh._peers[self._peer] = self._good
        sent = self._good.send(bad)
        if sent < len(bad):  # the wrong byte did not fit: the next one
            self._mesh._peers[self._peer] = self  # type: ignore[assignment]
        return sent


def _corrupt_wire(mesh: Mesh) -> None:
    for peer in mesh.peers[:1]:
        mesh._peers[peer] = _BadWire(mesh, peer)  # type: ignore[assignment]


_silent: list[socket.socket] = []  # connections that fell silent, and their stand-ins; kept open


def _cut(mesh: Mesh, peer: int, closed: bool) -> None:
    if closed:
        with contextlib.suppress(OSError):  # it is down already
            mesh._peers[peer].shutdown(socket.SHUT_RDWR)
        return
    mine, other = socket.socketpair()
    mine.setblocking(False)
    _silent.extend((mesh._peers[peer], other))
    mesh._peers[peer] = mine
