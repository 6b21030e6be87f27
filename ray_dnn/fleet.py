"""The agents of a run, from asking the cluster for their places to their end."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RaySystemError, RayTaskError

from ray_dnn.agent import Built, Failed, Hello, Job
from ray_dnn.cluster import Gang, Places, alive_nodes, nodes_with_room, room
from ray_dnn.comm.listener import NoPortError
from ray_dnn.errors import AgentLostError, ConfigError
from ray_dnn.events import AgentGone, AgentStarted, EventLog, Waiting
from ray_dnn.guard import Guard
from ray_dnn.liveness import Patience
from ray_dnn.loop import Loop
from ray_dnn.placement import Wish, free_slots, wish

_ELSEWHERE_S = 2.0  # before a place on nodes that are only preferred is given up for one on any
_WAITING_S = 2.0  # before a request that has not been met is worth a word; then ever more rarely
_WAITING_MAX_S = 60.0
_SLOW_START_S = 30.0
_KILL_TIMEOUT_S = 10.0


class Stage(enum.Enum):
    """A replica's life: ASKED → STARTING → BUILDING → READY → MEMBER → GONE, and from each stage to GONE."""

    ASKED = "asked"
    STARTING = "starting"
    BUILDING = "building"
    READY = "ready"
    MEMBER = "member"
    GONE = "gone"


@dataclass(frozen=True)
class Seats:
    """Places of one replica in a gang, by index.

    Attributes:
        slot: of the replica, see `Places.selector`.
        nodes: that they are on, or were when somebody was started there.
    """

    gang: Gang
    indexes: tuple[int, ...]
    slot: int = 0
    nodes: frozenset[str] = frozenset()


@dataclass(eq=False)
class Replica:
    """The agents that together hold one replica: usually one.

    Attributes:
        seats: where its agents are.
        names, agents, hellos, built: by rank inside of the replica; None until known.
        first: whether its first contribution is the one that others are compared with.
        proven: whether it has committed a step.
    """

    name: str
    seats: Seats
    names: list[str]
    stage: Stage = Stage.ASKED
    agents: list[Any] = field(default_factory=list)
    hellos: list[Hello | None] = field(default_factory=list)
    built: list[Built | None] = field(default_factory=list)
    first: bool = False
    proven: bool = False

    @property
    def nodes(self) -> set[str]:
        """Where its agents are."""
        return {hello.node_id for hello in self.hellos if hello is not None} or set(self.seats.nodes)

    def hello(self, rank: int) -> Hello:
        """Where an agent of a replica that has started is."""
        hello = self.hellos[rank]
        assert hello is not None
        return hello


class Owner(Protocol):
    """Who is told of what happens to replicas: the driver."""

    def on_placed(self) -> None:
        """Replicas got their places, or gave them up."""

    def on_opened(self, replica: Replica) -> None:
        """Its agents are there, and will be told to build the job."""

    def on_ready(self, replica: Replica) -> None: ...
    def on_failed(self, replica: Replica, failed: Failed) -> None: ...
    def on_lost(self, replica: Replica, reason: str) -> None:
        """It is of no use any more. It still must be released."""


class Fleet:
    """Starts replicas and tells the driver when they are ready, failed or lost.

    Attributes:
        replicas: those that are not gone, in the order in which they were asked for.
        referenced: whether there is a first contribution that others are compared with.
    """

    def __init__(
        self, loop: Loop, log: EventLog, job: Job, places: Places, patience: Patience, guard: Guard, owner: Owner
    ):
        self._loop, self._log, self._job, self._places = loop, log, job, places
        self._patience, self._guard, self._owner = patience, guard, owner
        self._job_ref = ray.put(job)
        self._numbers = itertools.count(1)
        self._gangs: dict[Gang, int] = {}  # those not given back yet, and how many replicas are there or asked for
        self._vacant: list[Seats] = []  # in these gangs: left by replicas that were lost
        self._avoided: dict[str, float] = {}  # nodes where nobody should be started, and until when (`time.monotonic`)
        self._hinting = False  # whether a word about requests that are not met is due
        self._hinted = 0  # of how many the last one was
        self._owners: dict[str, Replica] = {}  # by agent's name
        self.replicas: dict[str, Replica] = {}
        self.referenced = False

    def staged(self, *stages: Stage) -> list[Replica]:
        return [r for r in self.replicas.values() if r.stage in stages]

    @property
    def starting(self) -> list[Replica]:
        """Replicas that were asked for and are not ready, those that are closest to it first."""
        return [r for stage in (Stage.BUILDING, Stage.STARTING, Stage.ASKED) for r in self.staged(stage)]

    def replica_of(self, agent: str) -> Replica | None:
        """The replica that an agent belongs to; None where it is gone."""
        return self._owners.get(agent)

    # -- starting ----------------------------------------------------------------------------------------------------

    def ask(self, count: int, purpose: str) -> None:
        """Ask for ``count`` replicas, all at once or none."""
        slots = self._free_slots(count)
        self._request(slots, self._wish(slots), purpose)

    def grow(self, count: int) -> None:
        """Start up to ``count`` replicas in places that lost ones have left; ask for others beyond these.

        Each is asked for by itself, so that an autoscaler starts nodes for all of them at once, and none for what
        cannot be had; but where they are to be spread, one when it is known where the one before is. Nothing is
        asked for while the first ones wait: places that they need together must not be taken one by one.
        """
        if any(r.seats.gang.minimum for r in self.staged(Stage.ASKED)):
            return
        usable = self._usable(count)
        self._vacant = [seats for seats in self._vacant if seats not in usable]
        self._start([self._add(seats) for seats in usable])
        count -= len(usable)
        if self._places.strategy in ("SPREAD", "STRICT_SPREAD"):
            count = 0 if self.staged(Stage.ASKED) else min(count, 1)
        slots = self._free_slots(count)
        wishes = {slot: self._wish([slot]) for slot in set(slots)}
        for slot in slots:
            self._request([slot], wishes[slot])
        if count and not self._hinting:
            self._hinting = True
            self._loop.later(_WAITING_S, self._hint)

    def _wish(self, slots: Sequence[int], anywhere: bool = False) -> Wish:
        """The nodes for replicas in these slots. ``anywhere``: not only those that would be preferred."""
        agents = self._agents_by_node()
        room = nodes_with_room(self._places, self._ranks(slots)) if agents and not anywhere else ()
        return wish(self._places.strategy, agents, room, self._bad())

    def _ranks(self, slots: Sequence[int]) -> list[int]:
        """The slots of their agents."""
        size = self._job.replica_size
        return [slot * size + rank for slot in slots for rank in range(size)]

    def _request(self, slots: Sequence[int], where: Wish, purpose: str = "") -> None:
        """Ask for a replica in each slot, all at once or none. ``purpose``: if the run cannot start without them."""
        size = self._job.replica_size
        gang = Gang(self._places, self._ranks(slots), where, minimum=bool(purpose))
        self._gangs[gang] = 0
        replicas = [
            self._add(Seats(gang, tuple(range(i * size, (i + 1) * size)), slot)) for i, slot in enumerate(slots)
        ]
        self._loop.watch(gang.ready, lambda _, error: self._placed(replicas, error))
        if purpose:
            self._loop.later(_WAITING_S, lambda: self._still_waiting(gang, purpose, _WAITING_S))
        if where.only is not None and not where.must:
            self._loop.later(_ELSEWHERE_S, lambda: self._ask_elsewhere(replicas, purpose))

    def _ask_elsewhere(self, replicas: list[Replica], purpose: str) -> None:
        """There was room where places were asked for; by now others may have taken it."""
        waiting = [replica for replica in replicas if replica.stage is Stage.ASKED]
        for replica in waiting:
            self.release(replica, "asked for elsewhere")
        if waiting:
            slots = [replica.seats.slot for replica in waiting]
            self._request(slots, self._wish(slots, anywhere=True), purpose)

    def _usable(self, count: int) -> list[Seats]:
        """Up to ``count`` of the places that lost ones have left, where somebody can be started."""
        bad = self._bad()
        usable = [seats for seats in self._vacant if not seats.nodes & bad]
        if self._places.slots:
            taken = {replica.seats.slot for replica in self.replicas.values()}
            one_each = {seats.slot: seats for seats in reversed(usable) if seats.slot not in taken}
            usable = [seats for seats in usable if one_each.get(seats.slot) is seats]
        # Of places on a node that has ended, Ray makes others, on the nodes that the gang was meant for.
        if any(seats.gang.wish.only for seats in usable):
            alive = alive_nodes()
            usable = [s for s in usable if s.gang.wish.only is None or s.gang.wish.only & alive]
        return self._apart(usable)[:count]

    def _apart(self, places: Sequence[Seats]) -> list[Seats]:
        """Those that are not where they must not be, for other agents are there: of several gangs, Ray knows only that
        each is spread by itself."""
        if self._places.strategy != "STRICT_SPREAD" or not (agents := self._agents_by_node()):
            return list(places)
        where = {gang: gang.nodes() for gang in {seats.gang for seats in places}}
        nodes = [{where[seats.gang].get(index) for index in seats.indexes} for seats in places]
        return [s for s, there in zip(places, nodes, strict=True) if None not in there and there.isdisjoint(agents)]

    def _agents_by_node(self) -> Counter[str]:
        """How many agents there are. Those of replicas that are only asked for are nowhere."""
        return Counter(node for replica in self.replicas.values() for node in replica.nodes)

    def _free_slots(self, count: int) -> list[int]:
        slots = self._places.slots // self._job.replica_size
        if not slots:
            return [0] * count
        return free_slots(count, slots, [replica.seats.slot for replica in self.replicas.values()])

    def avoid(self, nodes: Iterable[str], seconds: float = math.inf) -> None:
        """Start nobody on these nodes for so long."""
        until = time.monotonic() + seconds
        self._avoided |= {node: max(until, self._avoided.get(node, until)) for node in nodes}
        if seconds < math.inf:  # of nodes that end Ray knows itself
            self._ask_anew()
            self._loop.later(seconds, self._ask_anew)

    def _ask_anew(self) -> None:
        """Nodes are to be avoided that were not when places were asked for, or the other way round."""
        avoided = self._bad()
        for replica in self.staged(Stage.ASKED):
            if replica.seats.gang.wish.bad != avoided:
                self.release(replica, "asked for elsewhere")
        self._owner.on_placed()

    def _bad(self) -> set[str]:
        """Ask Ray which of the nodes that are to be avoided now are there."""
        self._avoided = {node: until for node, until in self._avoided.items() if time.monotonic() < until}
        return self._avoided.keys() & alive_nodes() if self._avoided else set()

    def _add(self, seats: Seats) -> Replica:
        number, size = next(self._numbers), self._job.replica_size
        names = [f"agent-{number}" if size == 1 else f"agent-{number}.{rank}" for rank in range(size)]
        name = f"agent-{number}" if size == 1 else f"replica-{number}"
        replica = self.replicas[name] = Replica(name, seats, names)
        self._owners |= dict.fromkeys(names, replica)
        self._gangs[seats.gang] += 1
        return replica

    def _still_waiting(self, gang: Gang, purpose: str, after: float) -> None:
        if not any(r.seats.gang is gang for r in self.staged(Stage.ASKED)):
            return
        self._log.add(Waiting(f"{purpose}: {gang.size} times ({self._needs}), all at once; the cluster has {room()}"))
        again = min(after * 2, _WAITING_MAX_S)
        self._loop.later(again, lambda: self._still_waiting(gang, purpose, again))

    def _hint(self) -> None:
        """Say how many could join if there was room: worth a word, not a nuisance."""
        self._hinting = False
        count, size = len(self.staged(Stage.ASKED)), self._job.replica_size
        if count not in (0, self._hinted):
            more = f"{count * size} more agent{'s' if count * size > 1 else ''} could join"
            self._log.add(Waiting(f"{more}, each with ({self._needs}); the cluster has {room()}"))
        self._hinted = count

    @property
    def _needs(self) -> str:
        """What one agent needs, in words."""
        return ", ".join(f"{amount:g} {key}" for key, amount in self._places.resources.items())

    def _placed(self, replicas: list[Replica], error: Exception | None) -> None:
        waiting = [r for r in replicas if r.stage is Stage.ASKED]  # the others were withdrawn meanwhile
        if error is not None:
            for replica in waiting:
                self._owner.on_lost(replica, f"its place could not be had: {error}")
        elif waiting:
            apart = set(self._apart([replica.seats for replica in waiting]))
            for replica in waiting:
                if replica.seats not in apart:
                    self.release(replica, "asked for elsewhere")
            self._start([replica for replica in waiting if replica.seats in apart])
            self._owner.on_placed()

    def _start(self, replicas: list[Replica]) -> None:
        where = {gang: gang.nodes() for gang in {r.seats.gang for r in replicas}}
        for replica in replicas:
            if not self.referenced and not any(r.first for r in self.replicas.values()):
                replica.first = True
            size = len(replica.names)
            seats, there = replica.seats, where[replica.seats.gang]
            nodes = frozenset(there[index] for index in seats.indexes if index in there)
            replica.seats = dataclasses.replace(seats, nodes=nodes)
            replica.agents = replica.seats.gang.start(dict(zip(replica.seats.indexes, replica.names, strict=True)))
            replica.hellos, replica.built = [None] * size, [None] * size
            replica.stage = Stage.STARTING
            for rank, agent in enumerate(replica.agents):
                self._call(replica, agent.live.remote(), lambda *_: None, rank)
                self._call(replica, agent.open.remote(self._job.secret), self._opened, rank)
            self._limit_start(replica)

    def _limit_start(self, replica: Replica) -> None:
        """A place may be on a machine that is gone. Once the agent has said hello, the guard counts."""

        def slow() -> None:
            if replica.stage is Stage.STARTING:
                self._log.add(
                    Waiting(f"{replica.name} has its place, but its process is not up; the cluster has {room()}")
                )

        def late() -> None:
            if replica.stage is Stage.STARTING:
                self.release(replica, f"its process was not up after {self._patience.start_s:g} s")
                self._owner.on_placed()

        self._loop.later(_SLOW_START_S, slow)
        self._loop.later(self._patience.start_s, late)

    def _opened(self, replica: Replica, rank: int, hello: Hello) -> None:
        replica.hellos[rank] = hello
        name = replica.names[rank]
        self._log.add(AgentStarted(name, hello.host, hello.pid, hello.node_id))
        self._guard.watch(name, hello.node_id, hello.pid, hello.started, hello.status_fd)
        if all(replica.hellos):
            replica.stage = Stage.BUILDING
            self._owner.on_opened(replica)
            group = tuple(h.address for h in replica.hellos if h)
            for member, agent in enumerate(replica.agents):
                reference = agent.build.remote(self._job_ref, member, group, replica.first)
                self._call(replica, reference, self._finished_building, member)

    def _finished_building(self, replica: Replica, rank: int, built: Built) -> None:
        replica.built[rank] = built
        if all(replica.built):
            replica.stage = Stage.READY
            self._owner.on_ready(replica)

    def _call(self, replica: Replica, reference: Any, then: Callable[[Replica, int, Any], None], rank: int) -> None:
        """When an agent's call returns, go on with ``then``, unless the replica is gone or it went wrong."""

        def done(result: Any, error: Exception | None) -> None:
            if replica.stage is Stage.GONE:
                return
            if error is not None:
                self.broken(replica, error)
            elif isinstance(result, Failed):
                self._owner.on_failed(replica, result)
            else:
                then(replica, rank, result)

        self._loop.watch(reference, done)

    def broken(self, replica: Replica, error: Exception) -> None:
        """A call to an agent raised: the agent died, or it could not even begin (its environment, an import)."""
        if isinstance(error, RayActorError):
            self._owner.on_lost(replica, self._how_it_died(replica, error))
        elif isinstance(error, RaySystemError) and "No module named" in str(error):
            missing = re.search(r"No module named [^\n]*", str(error))
            assert missing is not None
            self._owner.on_failed(
                replica,
                Failed(
                    ConfigError(
                        f"{replica.name} cannot load the job: {missing.group()}. The modules that its functions "
                        "live in must be importable on every node: put them beside the script that you start, or in "
                        "the working_dir of ray.init(runtime_env=…) or of ray job submit."
                    )
                ),
            )
        elif isinstance(error, RayTaskError) and isinstance(error.cause, NoPortError):
            self._owner.on_lost(replica, str(error.cause))
        elif isinstance(error, RayTaskError):
            self._owner.on_failed(replica, Failed(error.cause if isinstance(error.cause, Exception) else error))
        else:
            self._owner.on_failed(replica, Failed(error))

    # -- ending ------------------------------------------------------------------------------------------------------

    def _how_it_died(self, replica: Replica, error: RayActorError) -> str:
        words = [w for name in replica.names if (w := self._guard.last_words(name))]
        last = f", last seen in {' and '.join(words)}" if words else ""
        detail = re.search(r"Worker exit detail: ([^.]*\.)", str(error))
        return f"died{last}: {detail.group(1) if detail else str(error).strip().splitlines()[0]}"

    def release(self, replica: Replica, reason: str, wanted: bool = False) -> None:
        """End a replica's agents. Its places are kept for another where one is ``wanted``."""
        if replica.stage is Stage.GONE:
            return
        started = bool(replica.agents)
        replica.stage = Stage.GONE
        del self.replicas[replica.name]
        self._gangs[replica.seats.gang] -= 1
        for name in replica.names:
            del self._owners[name]
            self._guard.forget(name)
        for agent in replica.agents:
            ray.kill(agent)
        self._vacant.append(replica.seats)
        if started:
            self._log.add(AgentGone(replica.name, reason))
        if not wanted:
            self.tidy()

    def tidy(self) -> None:
        """Give back the places of gangs in which nobody is left."""
        for gang in [gang for gang, replicas in self._gangs.items() if not replicas]:
            del self._gangs[gang]
            self._vacant = [seats for seats in self._vacant if seats.gang is not gang]
            gang.give_back()

    def close(self, reason: str) -> None:
        """End all agents and wait until Ray has seen them dead."""
        replicas = list(self.replicas.values())
        for replica in replicas:
            self.release(replica, reason, wanted=True)
        self.tidy()
        last = [agent.acknowledge.remote(-1) for replica in replicas for agent in replica.agents]
        if not last:
            return
        _, late = ray.wait(last, num_returns=len(last), timeout=_KILL_TIMEOUT_S)
        if late:
            raise AgentLostError(f"{len(late)} agents were told to end and are there {_KILL_TIMEOUT_S:g} s later.")
