"""Runs that lose agents and go on: what the driver does about losses, without Ray, over the agents of `tests.local`.

A generation is over when an agent's process ends, or when an agent says that it lost a connection. All others are told
to leave it, and the next one is formed of those who are left, with a plan of other ranges. Agents that were convicted
are killed; agents that were stopped count as lost, and may be woken later.

Faults strike once in a run. Each must name the agent or the rank that it strikes, so that no two can claim it at once.

``python -m tests.losses 1000`` has three agents recover so many times and prints what it took.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any

from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine.contribute import Given, Leaf
from ray_dnn.engine.reports import Report
from ray_dnn.faults import Fault, Partition, Stop, _flip
from ray_dnn.phases import Status
from ray_dnn.plan import lay
from tests import local, zoo
from tests.local import TIMEOUT_S, Held, Make, Place, Process, Run, Struck, Trained, ask, bits, check_agreement, speeds

# -- faults that only tests need -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tell(Fault):
    """Nothing happens; the caller learns that the agent is there."""

    def strike(self, victim: Any) -> None:
        pass


@dataclass(frozen=True)
class Hold(Fault):
    """The agent waits there until the caller has it go on."""

    def strike(self, victim: Any) -> None:
        assert victim.going.wait(TIMEOUT_S)
        victim.going.clear()


@dataclass(frozen=True)
class Second(Fault):
    """A fault that strikes the second time that the agent gets there: in the second phase of a step, say."""

    fault: Fault | None = None
    seen: list[int] = field(default_factory=list, compare=False)

    def matches(self, status: Status, rank: int, agent: int) -> bool:
        if super().matches(status, rank, agent):
            self.seen.append(status.moves)
            return len(self.seen) == 2
        return False

    def strike(self, victim: Any) -> None:
        assert self.fault is not None
        self.fault.strike(victim)


def second(fault: Fault) -> Second:
    """The fault, the second time that the agent gets there."""
    return Second(fault.at, fault.step, fault.rank, fault.agent, fault)


@dataclass(frozen=True)
class Deaf(Fault):
    """From now on nothing that this agent sends arrives at rank ``peer`` (None: at any), but for some bytes.

    The agent does not notice: as when a cable is cut while everything is in the kernel's buffers.
    """

    peer: int | None = None
    but: int = 0

    def strike(self, victim: Any) -> None:
        mesh: Mesh = victim.mesh
        for peer in mesh.peers:
            if self.peer in (None, peer):
                mesh._peers[peer] = _OneWay(mesh._peers[peer], self.but)  # type: ignore[assignment]


class _OneWay:
    """A connection on which only so many more bytes are sent, and all others are said to be."""

    def __init__(self, good: socket.socket, left: int):
        self._good, self._left = good, left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._good, name)

    def send(self, data: memoryview) -> int:
        if not self._left:
            return len(data)
        sent = self._good.send(data[: self._left])
        self._left -= sent
        return sent


@dataclass(frozen=True)
class StopWithLies(Stop):
    """The process is stopped; what it sends when it wakes up is wrong."""

    def strike(self, victim: Any) -> None:
        for lane in victim.engine.spare(victim.engine.state.phase):
            lane.add_(1)
        super().strike(victim)


@dataclass(frozen=True)
class ComputesWrongly(Fault):
    """From now on every contribution of this agent has a wrong bit; the same one, each time."""

    def strike(self, victim: Any) -> None:
        contributor = victim.engine.contributor
        right = contributor.contribute

        def wrong(worker: int, worker_state: Any, leaf: Leaf, agent: str = "", ready: Any = None) -> Given:
            given: Given = right(worker, worker_state, leaf, agent)
            if given.rows:
                _flip(leaf.vector[0])
            return given

        contributor.contribute = wrong


# -- the driver ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """A generation that is over.

    Attributes:
        members: by replica.
        answers: of those that answered.
    """

    members: tuple[str, ...]
    answers: dict[str, Trained]

    @property
    def lost(self) -> dict[str, str]:
        """How it ended for those who lost it: the exception's name."""
        return {name: answer.lost.kind for name, answer in self.answers.items() if answer.lost}


@dataclass(frozen=True)
class Disturbed:
    """A run that lost agents.

    Attributes:
        run: what it left behind.
        generations: all of them.
        last: what the agents have that are left, by name.
    """

    run: Run
    generations: tuple[Generation, ...]
    last: dict[str, Trained]


OnStruck = Callable[["Driver", int], None]


class Driver:
    """Decides who takes part.

    ``struck(driver, index)`` is called when a fault is about to strike. Reports of agents in ``unheard`` do not arrive.
    """

    def __init__(
        self,
        make: Make,
        processes: list[Process],
        faults: Sequence[Fault] = (),
        struck: OnStruck = lambda driver, index: None,
        unheard: Collection[str] = (),
    ):
        assert all(fault.rank is not None or fault.agent is not None for fault in faults)
        job = make()
        self._workers = job.config.virtual_workers
        self._faults, self._on_struck, self._unheard = faults, struck, unheard
        self._processes = processes  # of agents that are not dead
        self._secret = secrets.token_bytes(32)
        self.agents = {f"agent-{n}": process for n, process in enumerate(processes, start=1)}
        opened = ask([(p, "open", (self._secret, name, faults)) for name, p in self.agents.items()])
        self._addresses = dict(zip(self.agents, opened, strict=True))
        firsts = ask([(p, "build", (make, index == 0)) for index, p in enumerate(self.agents.values())])
        assert len({first.digest for first in firsts}) == 1
        self._first = firsts[0]
        self.places: dict[str, Place] = {}  # everybody's in its newest generation
        self._waiting: dict[str, Process] = {}  # members that have not answered
        self._answers: dict[str, Trained] = {}
        self._over = False  # whether the present generation is
        self.reports: dict[int, Report] = {}  # by serial
        self.struck: dict[int, str] = {}
        self.generations: list[Generation] = []

    def generation(self, members: Iterable[str], until: int | None = None, also: Fault | None = None) -> Generation:
        """Form a generation of these and wait for its end. ``also``: a fault that strikes in it."""
        number, names = len(self.generations), tuple(members)
        plan = lay(number, self._workers, speeds(number, len(names)))
        there = tuple(self._addresses[name] for name in names)
        known = next(n for n in range(len(self.reports) + 1) if n + 1 not in self.reports)
        self._over, self._answers = False, {}
        self._waiting = {name: self.agents[name] for name in names}
        self.places |= {
            name: Place(plan, replica, names, there, until, known, frozenset(self.struck), also)
            for replica, name in enumerate(names)
        }
        for name, process in self._waiting.items():
            process.connection.send(("train", (self.places[name],)))
        deadline = time.monotonic() + TIMEOUT_S
        while self._waiting:
            self._hear(deadline)
        self.generations.append(Generation(names, self._answers))
        return self.generations[-1]

    def _hear(self, deadline: float) -> None:
        ready = wait([p.connection for p in self._waiting.values()], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{list(self._waiting)} did not answer")
        for name, process in list(self._waiting.items()):
            if process.connection in ready and name in self._waiting:
                self._receive(name, process)

    def _receive(self, name: str, process: Process) -> None:
        try:
            message = process.connection.recv()
        except (EOFError, ConnectionError):
            self._gone(name)
            self.abandon()
            return
        if isinstance(message, Struck):
            self.struck[message.index] = name
            self._on_struck(self, message.index)
            if isinstance(self._faults[message.index], Stop):
                self._waiting.pop(name, None)
                self.abandon()
            return
        self._waiting.pop(name)
        self._answers[name] = answer = self._answer(message)
        for report in () if name in self._unheard else answer.reports:
            assert bits(self.reports.setdefault(report.serial, report)) == bits(report)
        if answer.lost:
            self.abandon()

    @staticmethod
    def _answer(message: Any) -> Trained:
        answer, failure = message
        if failure:
            error, cause, text = failure
            error.add_note(f"In an agent:\n{text}")
            raise error from cause
        assert isinstance(answer, Trained)
        return answer

    def _gone(self, name: str) -> None:
        self._waiting.pop(name, None)
        process = self.agents.pop(name)
        process.kill()
        self._processes.remove(process)

    def abandon(self) -> None:
        """Tell all who are in the present generation to leave it."""
        if not self._over:
            self._over = True
            for process in self._waiting.values():
                self.tell(process, "abandon", self._secret, len(self.generations))

    @staticmethod
    def tell(process: Process, method: str, *args: Any) -> None:
        """Call one of the methods for which an agent's main thread need not be free."""
        with contextlib.suppress(ConnectionError):  # it may have died
            process.control.send((method, args))

    def kill(self, name: str) -> None:
        """End an agent's process."""
        os.kill(self.agents[name].pid, signal.SIGKILL)

    def go(self, name: str) -> None:
        """Have an agent go on where a `Hold` struck it."""
        self.tell(self.agents[name], "go")

    def wake(self, name: str) -> Trained:
        """Have a stopped agent run again, in the generation that it was stopped in. How that ended for it."""
        os.kill(self.agents[name].pid, signal.SIGCONT)
        return self.hear(name)

    def again(self, name: str) -> Trained:
        """Have an agent that is not a member any more take the place again that it had."""
        process = self.agents[name]
        process.connection.send(("train", (self.places[name],)))
        return self.hear(name)

    def hear(self, name: str) -> Trained:
        """The answer of an agent that is no member. Its reports are not taken."""
        connection = self.agents[name].connection
        assert connection.poll(TIMEOUT_S)
        return self._answer(connection.recv())

    def train(self, first: int, joins: Mapping[int, int], until: Mapping[int, int]) -> Disturbed:
        """Train to the end of the job."""
        names = list(self.agents)
        members, spare = names[:first], names[first:]
        while True:
            number = len(self.generations)
            over = self.generation(members, until.get(number))
            self._evict(over)
            members = [name for name in over.members if name in over.answers and name in self.agents]
            assert members, "nobody is left"
            if all(over.answers[name].finished and not over.answers[name].lost for name in members):
                break
            spare = [name for name in spare if name in self.agents]
            joining, spare = spare[: joins.get(number + 1, 0)], spare[joins.get(number + 1, 0) :]
            members += joining
        return self._end({name: over.answers[name] for name in members})

    def _evict(self, over: Generation) -> None:
        convicted = {name for answer in over.answers.values() if answer.lost for name in self._convicted(answer)}
        for name in convicted & self.agents.keys():
            self._gone(name)

    @staticmethod
    def _convicted(answer: Trained) -> tuple[str, ...]:
        return answer.lost.names if answer.lost and answer.lost.kind == "ConvictedError" else ()

    def _end(self, last: dict[str, Trained]) -> Disturbed:
        answers, processes = list(last.values()), [self.agents[name] for name in last]
        # Which reports the caller has had from whom depends on who was behind; that they agree is checked as they come.
        check_agreement([replace(answer, reports=[]) for answer in answers], processes)
        (tree,) = ask([(processes[-1], "export", ())])
        for name in [name for name in self.agents if name not in last]:
            self._gone(name)
        ask([(process, "close", ()) for process in processes])
        reports = [self.reports[serial] for serial in sorted(self.reports)]
        missing = [fault for index, fault in enumerate(self._faults) if index not in self.struck]
        assert not missing, f"these faults never struck: {missing}"
        return Disturbed(local.result(answers, reports, tree, self._first), tuple(self.generations), last)


def disturb(
    make: Make,
    *faults: Fault,
    agents: int = 3,
    joins: Mapping[int, int] | None = None,
    until: Mapping[int, int] | None = None,
    struck: OnStruck = lambda driver, index: None,
    unheard: Collection[str] = (),
) -> Disturbed:
    """Run a job in which these faults strike.

    Args:
        agents: of the first generation.
        joins: newcomers by generation.
        until: by generation the step before which it ends without a loss.
        struck: called with the driver and the fault's index before it strikes.
        unheard: agents whose reports do not arrive.
    """
    job = make()
    joins, until = joins or {}, until or {}
    preload = (*job.preload, "tests.losses")
    with local.pool(job.config.isa, preload).borrow(agents + sum(joins.values())) as processes:
        return Driver(make, processes, faults, struck, unheard).train(agents, joins, until)


# -- many recoveries -------------------------------------------------------------------------------------------------

_CUTS = ("computing", "exchange-first", "exchange-middle", "exchange-last", "combined", "applying")


@dataclass(frozen=True)
class Recovered:
    """What many recoveries took.

    Attributes:
        seconds: for one, on average, from the beginning of a generation to its end.
        early, late: what each agent held after the first few, and at the end.
        generations: that there were.
    """

    seconds: float
    early: list[Held]
    late: list[Held]
    generations: int
    run: Run


def enduring(recoveries: int) -> Make:
    """A job that is not finished by then."""
    return partial(zoo.job, 60, {"steps": recoveries + 5, "virtual_workers": 5, "batch_size": 11})


def recover(recoveries: int, warm: int = 30) -> Recovered:
    """Have the connections of an agent break in each generation, at another phase each time, then train to the end."""
    with local.pool("avx2", ("tests.losses",)).borrow(3) as processes:
        driver = Driver(enduring(recoveries), processes)
        for number in range(recoveries):
            if number == warm:
                early = ask([(process, "held", ()) for process in processes])
                began = time.perf_counter()
            cut = Partition(_CUTS[number % len(_CUTS)], rank=number // len(_CUTS) % 3, closed=True)
            over = driver.generation(driver.agents, also=cut)
            assert over.lost.keys() == driver.agents.keys()
        seconds = (time.perf_counter() - began) / (recoveries - warm)
        late = ask([(process, "held", ()) for process in processes])
        disturbed = driver.train(3, {}, {})
    return Recovered(seconds, early, late, len(disturbed.generations), disturbed.run)


if __name__ == "__main__":
    recovered = recover(int(sys.argv[1]))
    local.assert_same(disturb(enduring(int(sys.argv[1])), agents=1).run, recovered.run)
    print(
        f"{recovered.generations} generations, {1000 * recovered.seconds:.1f} ms each; after the first 30 and at last:"
    )
    for early, late in zip(recovered.early, recovered.late, strict=True):
        print(early, late, sep="\n")
    local.close()
