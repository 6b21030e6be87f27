"""One generation, as the driver sees it: from the moment its agents are told of it until it is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from ray_dnn.agent import Command, Convicted, Ended, Failed, Generation, Left, Stopped
from ray_dnn.engine.reports import Report
from ray_dnn.errors import ProtocolError
from ray_dnn.fleet import Fleet, Replica, Stage
from ray_dnn.loop import Loop
from ray_dnn.plan import Plan

_POLL_WAIT_S = 1.0  # an agent answers earlier when it has something to report
_POLL_PAUSE_S = 0.05  # between two polls, so that reports come in bunches; longer and longer in a generation
_POLL_PAUSE_MAX_S = 0.2
_LONGER = 1.5
_SHARED = 64  # agents from which on they fetch from their node's store what all of them are told, with their addresses


class Watch(Protocol):
    """Who is told of what becomes of a generation: the driver."""

    def on_boundary(self, stops: dict[tuple[str, int], Stopped]) -> None:
        """All agents have stopped at the same step, by (replica, rank)."""

    def on_left(self, replica: Replica, left: Left) -> None:
        """An agent lost a connection."""

    def on_convicted(self, convicted: Convicted) -> None:
        """Some agents compute wrongly."""

    def on_failed(self, replica: Replica, failed: Failed) -> None:
        """An agent's call raised."""


class Underway:
    """A generation that is under way, or has stopped at a boundary and not been followed by another yet.

    Attributes:
        number, members, plan: of the generation.
        running: whether its agents take steps.
    """

    def __init__(self, loop: Loop, fleet: Fleet, watch: Watch, number: int, members: list[Replica], plan: Plan):
        self.number, self.members, self.plan = number, list(members), plan
        self.running = True
        self._loop, self._fleet, self._watch = loop, fleet, watch
        self._count = sum(len(replica.agents) for replica in members)
        self._stopped: dict[tuple[str, int], Stopped] = {}  # agents whose run() has returned, by (replica, rank)
        self._over = False  # once true, nothing that its agents say is looked at

    @property
    def agents(self) -> list[Any]:
        return [agent for replica in self.members for agent in replica.agents]

    def begin(self, founders: set[str], settled: int, commands: Sequence[Command], finish: bool) -> None:
        """Tell the agents their places. See `Generation` for what these say."""
        for rank in range(len(self.members[0].agents)):
            same = Generation(
                number=self.number,
                plan=self.plan,
                names=tuple(r.names[rank] for r in self.members),
                addresses=tuple(r.hello(rank).address for r in self.members),
                settled=settled,
                commands=tuple(commands),
                finish=finish,
            )
            told = ray.put(same) if self._count >= _SHARED else same
            for index, replica in enumerate(self.members):
                replica.stage = Stage.MEMBER
                ended = replica.agents[rank].run.remote(told, index, replica.name in founders)
                self._loop.watch(ended, self._ended(replica, rank))

    def command(self, command: Command) -> None:
        """Tell the agents a decision."""
        for agent in self.agents:
            agent.command.remote(command)

    def end(self) -> None:
        """It is over, wherever its agents are."""
        self.running, self._over = False, True

    def leave(self, members: Sequence[Replica], then: Callable[[list[Report]], None]) -> None:
        """Have those who are left leave it and wait. Go on with what they have committed, unless one of them dies."""

        def done(reports: list[list[Report]] | None, error: Exception | None) -> None:
            if isinstance(error, RayActorError):
                return  # of a death the fleet hears too
            if error is not None:
                raise error
            assert reports is not None
            then([report for of_one in reports for report in of_one])

        self._loop.gather([agent.leave.remote(self.number) for r in members for agent in r.agents], done)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Do something after a while, unless it is over then."""
        self._loop.later(seconds, lambda: None if self._over else call())

    def _ended(self, replica: Replica, rank: int) -> Callable[[Ended | None, Exception | None], None]:
        def done(result: Ended | None, error: Exception | None) -> None:
            if self._over or replica.stage is not Stage.MEMBER:
                return
            if error is not None:
                self._fleet.broken(replica, error)
            elif isinstance(result, Stopped):
                self._stopped[replica.name, rank] = result
                self._at_boundary()
            elif isinstance(result, Left):
                self._watch.on_left(replica, result)
            elif isinstance(result, Convicted):
                self._watch.on_convicted(result)
            elif isinstance(result, Failed):
                self._watch.on_failed(replica, result)

        return done

    def _at_boundary(self) -> None:
        if len(self._stopped) < self._count:
            return
        if len({(s.step, s.command, s.weights_digest) for s in self._stopped.values()}) > 1:
            raise ProtocolError(f"agents stopped at different places: {self._stopped}")
        self.running = False
        self._watch.on_boundary(self._stopped)

    def ask(self, references: Sequence[Any], then: Callable[[list[Any]], None]) -> None:
        """Go on with the answers of its agents, unless it is over before they are there."""

        def done(results: list[Any] | None, error: Exception | None) -> None:
            if self._over or isinstance(error, RayActorError):
                return  # of a death the fleet hears too
            if error is not None:
                raise error
            assert results is not None
            failed = next((result for result in results if isinstance(result, Failed)), None)
            if failed is not None:
                self._watch.on_failed(self.members[0], failed)
            else:
                then(results)

        self._loop.gather(references, done)

    def poll(
        self, serial: Callable[[], int], record: Callable[[list[Report]], None], pause_s: float = _POLL_PAUSE_S
    ) -> None:
        """Have ``record`` called with what the agents report, as long as it runs. ``serial``: of the newest known."""
        if not self.running:
            return
        # Everybody keeps reports until they are known, and the newest one to show that it has been compared. The
        # others hear what is known with the driver's heartbeat: each call takes time that they would compute in.
        reporter = self.members[0].agents[0]

        def done(reports: list[Report] | None, error: Exception | None) -> None:
            if error is None and not self._over:
                record(reports or [])
                longer = min(_LONGER * pause_s, _POLL_PAUSE_MAX_S)
                self._loop.later(pause_s, lambda: self.poll(serial, record, longer))

        self._loop.watch(reporter.reports.remote(serial() - 1, _POLL_WAIT_S), done)
