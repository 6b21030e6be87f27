"""The agents of a run, from asking the cluster for their places to their end."""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RaySystemError, RayTaskError

from ray_dnn.agent import Built, Failed, Hello, Job
from ray_dnn.cluster import Gang, Places, room
from ray_dnn.errors import AgentLostError, ConfigError
from ray_dnn.events import AgentGone, AgentStarted, EventLog, Waiting
from ray_dnn.loop import Loop

GROWTH = "one more agent could join"
_WAITING_S = 2.0  # before a request that has not been met is worth a word; then ever more rarely
_WAITING_MAX_S = 60.0
_KILL_TIMEOUT_S = 10.0


class Stage(enum.Enum):
    """A replica's life: ASKED → STARTING → BUILDING → READY → MEMBER → GONE, and from each stage to GONE."""

    ASKED = "asked"
    STARTING = "starting"
    BUILDING = "building"
    READY = "ready"
    MEMBER = "member"
    GONE = "gone"


@dataclass
class Replica:
    """The agents that together hold one replica: usually one.

    Attributes:
        gang: the places that its agents stand on, perhaps with other replicas.
        names, agents, hellos, built: by rank inside of the replica; None until known.
    """

    name: str
    gang: Gang
    names: list[str]
    first: bool
    stage: Stage = Stage.ASKED
    agents: list[Any] = field(default_factory=list)
    hellos: list[Hello | None] = field(default_factory=list)
    built: list[Built | None] = field(default_factory=list)


class Fleet:
    """Starts replicas and tells the driver when they are ready, failed or lost."""

    def __init__(
        self,
        loop: Loop,
        log: EventLog,
        job: Job,
        places: Places,
        ready: Callable[[Replica], None],
        failed: Callable[[Replica, Failed], None],
        lost: Callable[[Replica, str], None],
        placed: Callable[[], None],
    ):
        self._loop, self._log, self._job, self._places = loop, log, job, places
        self._job_ref = ray.put(job)
        self._ready, self._failed, self._lost, self._placed = ready, failed, lost, placed
        self._numbers = itertools.count(1)
        self._gangs: list[Gang] = []  # not given back yet
        self.replicas: dict[str, Replica] = {}  # those that are not gone, in the order in which they were asked for

    def staged(self, *stages: Stage) -> list[Replica]:
        return [r for r in self.replicas.values() if r.stage in stages]

    # -- starting ----------------------------------------------------------------------------------------------------

    def ask(self, count: int, purpose: str) -> None:
        """Ask for ``count`` replicas, all at once or none."""
        gang = Gang(self._places, count * self._job.replica_size)
        self._gangs.append(gang)
        for _ in range(count):
            number = next(self._numbers)
            size = self._job.replica_size
            names = [f"agent-{number}" if size == 1 else f"agent-{number}.{rank}" for rank in range(size)]
            name = f"agent-{number}" if size == 1 else f"replica-{number}"
            self.replicas[name] = Replica(name, gang, names, first=number == 1)
        self._loop.watch(gang.ready, lambda _, error: self._start(gang, error))
        self._loop.later(_WAITING_S, lambda: self._still_waiting(gang, purpose, _WAITING_S))

    def _still_waiting(self, gang: Gang, purpose: str, after: float) -> None:
        if gang not in self._gangs or not any(r.gang is gang for r in self.staged(Stage.ASKED)):
            return
        needs = ", ".join(f"{amount:g} {key}" for key, amount in self._places.resources.items())
        self._log.add(Waiting(f"{purpose}: {gang.size} times ({needs}), all at once; the cluster has {room()}"))
        if purpose == GROWTH:
            return  # worth a word, not a nuisance
        again = min(after * 2, _WAITING_MAX_S)
        self._loop.later(again, lambda: self._still_waiting(gang, purpose, again))

    def _start(self, gang: Gang, error: Exception | None) -> None:
        waiting = [r for r in self.staged(Stage.ASKED) if r.gang is gang]
        if error is not None:
            for replica in waiting:
                self._end(replica, f"its place could not be had: {error}")
            return
        if not waiting:
            return  # withdrawn meanwhile
        agents = gang.start([name for replica in waiting for name in replica.names])
        size = self._job.replica_size
        for index, replica in enumerate(waiting):
            replica.agents = agents[index * size : (index + 1) * size]
            replica.hellos, replica.built = [None] * size, [None] * size
            replica.stage = Stage.STARTING
            for rank, agent in enumerate(replica.agents):
                self._call(replica, agent.open.remote(self._job.secret), self._opened, rank)
        self._placed()

    def _opened(self, replica: Replica, rank: int, hello: Hello) -> None:
        replica.hellos[rank] = hello
        self._log.add(AgentStarted(replica.names[rank], hello.host, hello.pid))
        if all(replica.hellos):
            replica.stage = Stage.BUILDING
            group = tuple(h.address for h in replica.hellos if h)
            for member, agent in enumerate(replica.agents):
                reference = agent.build.remote(self._job_ref, member, group, replica.first)
                self._call(replica, reference, self._finished_building, member)

    def _finished_building(self, replica: Replica, rank: int, built: Built) -> None:
        replica.built[rank] = built
        if all(replica.built):
            replica.stage = Stage.READY
            self._ready(replica)

    def _call(self, replica: Replica, reference: Any, then: Callable[[Replica, int, Any], None], rank: int) -> None:
        """When an agent's call returns, go on with ``then``, unless the replica is gone or it went wrong."""

        def done(result: Any, error: Exception | None) -> None:
            if replica.stage is Stage.GONE:
                return
            if error is not None:
                self.broken(replica, error)
            elif isinstance(result, Failed):
                self._failed(replica, result)
            else:
                then(replica, rank, result)

        self._loop.watch(reference, done)

    def broken(self, replica: Replica, error: Exception) -> None:
        """A call to an agent raised: the agent died, or it could not even begin (its environment, an import)."""
        if isinstance(error, RayActorError):
            self._end(replica, str(error).strip().splitlines()[0])
        elif isinstance(error, RaySystemError) and "No module named" in str(error):
            missing = re.search(r"No module named [^\n]*", str(error))
            assert missing is not None
            self._failed(
                replica,
                Failed(
                    ConfigError(
                        f"{replica.name} cannot load the job: {missing.group()}. The modules that its functions "
                        "live in must be importable on every node: put them beside the script that you start, or in "
                        "the working_dir of ray.init(runtime_env=…) or of ray job submit."
                    )
                ),
            )
        elif isinstance(error, RayTaskError):
            self._failed(replica, Failed(error.cause if isinstance(error.cause, Exception) else error))
        else:
            self._failed(replica, Failed(error))

    # -- ending ------------------------------------------------------------------------------------------------------

    def _end(self, replica: Replica, reason: str) -> None:
        before = replica.stage
        self.release(replica, reason)
        replica.stage = before  # so that the driver sees what was lost
        self._lost(replica, reason)
        replica.stage = Stage.GONE

    def release(self, replica: Replica, reason: str) -> None:
        """End a replica's agents, and give back its places when nobody else stands on them."""
        if replica.stage is Stage.GONE:
            return
        started = bool(replica.agents)
        replica.stage = Stage.GONE
        self.replicas.pop(replica.name, None)
        for agent in replica.agents:
            ray.kill(agent)
        if not any(r.gang is replica.gang for r in self.replicas.values()):
            self._gangs.remove(replica.gang)
            replica.gang.give_back()
        if started:
            self._log.add(AgentGone(replica.name, reason))

    def close(self, reason: str) -> None:
        """End all agents and wait until Ray has seen them dead."""
        replicas = list(self.replicas.values())
        for replica in replicas:
            self.release(replica, reason)
        last = [agent.acknowledge.remote(-1) for replica in replicas for agent in replica.agents]
        if not last:
            return
        _, late = ray.wait(last, num_returns=len(last), timeout=_KILL_TIMEOUT_S)
        if late:
            raise AgentLostError(f"{len(late)} agents were told to end and are there {_KILL_TIMEOUT_S:g} s later.")


def call_all(references: list[Any], timeout_s: float) -> list[Any]:
    """The results of calls to several agents.

    Raises:
        AgentLostError: one of them died or did not answer in time.
    """
    try:
        return ray.get(references, timeout=timeout_s)
    except (RayActorError, GetTimeoutError) as error:
        raise AgentLostError(f"An agent did not answer: {error}") from error
