"""The agent: a Ray actor that hosts virtual workers.

Everything that computes runs on one thread of its own, for thread-local settings are part of the numerics. The actor's
other threads only hand over messages. Methods that can fail return an `Outcome`; an exception that leaves a method is
the death of the agent or a bug.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import ray
from torch import nn

from ray_dnn.checkpoint import File, Manifest, Place
from ray_dnn.comm.mesh import AbandonedError, Address, GarbledError, Listener, Mesh, PeerLostError
from ray_dnn.comm.shared import SharedMemory
from ray_dnn.comm.tls import Tls
from ray_dnn.config import Audit, TrainConfig, TrainSpec
from ray_dnn.engine import codec, numerics
from ray_dnn.engine.audit import ConvictedError
from ray_dnn.engine.batches import BatchSource
from ray_dnn.engine.contribute import Contributor, guarded
from ray_dnn.engine.device import of_agent
from ray_dnn.engine.evaluate import Evaluator
from ray_dnn.engine.follow import CHANNEL as FOLLOWERS
from ray_dnn.engine.follow import Follower
from ray_dnn.engine.light import postpone_compiler
from ray_dnn.engine.looking import Watch, WatchedContributor
from ray_dnn.engine.probe import FirstContribution, first_contribution
from ray_dnn.engine.reports import Joined, Report
from ray_dnn.engine.saving import Saver, Taken, load_weights_into, restore
from ray_dnn.engine.state import TrainingState
from ray_dnn.engine.step import Engine
from ray_dnn.engine.train import train
from ray_dnn.engine.transfer import agree
from ray_dnn.feed.collate import default_collate
from ray_dnn.feed.supply import News, Supply
from ray_dnn.identity import Identity, of_state
from ray_dnn.in_host import in_host
from ray_dnn.marks import Marks
from ray_dnn.network import Network
from ray_dnn.parallel import ReplicaGroup, set_current_group
from ray_dnn.phases import Phase
from ray_dnn.plan import Plan
from ray_dnn.portable import portable
from ray_dnn.strategies.base import Strategy
from ray_dnn.watcher import StatusMemory, own_start

T = TypeVar("T")

_GROUP_CHANNEL = 1
_LEASE_S = 600.0  # without a word from the driver for so long, an agent ends itself
_LEASE_TICK_S = 1.0


class Striker(Protocol):
    """A fault plan, as an agent sees it (see `ray_dnn.testing`)."""

    def arm(self, agent: Agent) -> None:
        """Have faults strike at this agent's marks."""


@dataclass(frozen=True)
class Job:
    """Everything that decides what is learned, and how agents find each other.

    Attributes:
        evaluated: the names of the datasets that are evaluated.
        secret: known to this job's agents alone; connections introduce themselves with it.
        replica_size: agents that together hold one replica.
        audit: what is compared to find agents that compute wrongly.
        begun: what it begins with, instead of what it is built with.
        resume: a checkpoint of the same job that it goes on from.
        watch: what the user looks at; the job is run again for it.
    """

    spec: TrainSpec
    config: TrainConfig
    strategy: Strategy
    evaluated: tuple[str, ...]
    secret: bytes
    replica_size: int = 1
    audit: Audit | None = None
    begun: Begun | None = None
    resume: Resume | None = None
    watch: Watch | None = None

    @property
    def first_step(self) -> int:
        """Where it begins."""
        return self.resume.manifest.step if self.resume is not None else 0

    @property
    def first_rows(self) -> int:
        """The step whose rows newcomers prove themselves with: one that there is, even if no more is to be done."""
        return max(0, self.first_step - 1)


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    place: Place
    manifest: Manifest


@dataclass(frozen=True)
class Begun(Resume):
    """A checkpoint of another run to begin with. ``all``: not only with its weights."""

    all: bool

    @property
    def fingerprint(self) -> str:
        """Of its bytes."""
        files = sorted((name, file.sha256) for name, file in self.manifest.files.items())
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Command:
    """A decision of the driver: stop before the first step, from ``at_step`` on, at which every agent holds it.

    Attributes:
        snapshot: take a snapshot there instead of stopping, where the step is a multiple of so many; 0: stop.
    """

    number: int
    at_step: int = 0
    snapshot: int = 0


@dataclass(frozen=True)
class Generation:
    """A stretch of fixed membership, the same for all agents of one rank inside of their replicas.

    Attributes:
        number: of the generation.
        names, addresses: of these agents, who exchange with each other, by replica.
        settled: decisions up to this number are carried out, but for those in ``commands``.
        commands: decisions that are not carried out yet.
        finish: take no further step; evaluate and end the job.
    """

    number: int
    plan: Plan
    names: tuple[str, ...]
    addresses: tuple[Address, ...]
    settled: int = 0
    commands: tuple[Command, ...] = ()
    finish: bool = False


@dataclass(frozen=True)
class Hello:
    """Where an agent is, and how a watcher on its node finds it."""

    address: Address
    host: str
    pid: int
    node_id: str
    started: int
    status_fd: int


@dataclass(frozen=True)
class Built:
    """An agent that has built the job and computed its first contribution."""

    profile: dict[str, object]
    first: FirstContribution
    state_digest: str
    identity: Identity
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """An agent whose generation ended at a step boundary.

    Attributes:
        step: committed steps.
        command: the decision that it stopped for, or None where the job is finished.
        weights_digest, state_digest: when the job is finished.
        seen: what the user's ``look`` returned, by phase, worker and rank.
    """

    step: int
    command: int | None
    weights_digest: str = ""
    state_digest: str = ""
    seen: dict[tuple[int, int, int], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """An agent whose generation ended where it was. It holds committed state and can take part in the next one.

    Attributes:
        peer: the name of the agent whose connection closed or gave other bytes than were sent; None where this agent
            was told to leave.
        garbled: which of the two.
        group: whether the connection was one inside of its own replica.
    """

    peer: str | None = None
    garbled: bool = False
    group: bool = False


@dataclass(frozen=True)
class Convicted:
    """Agents that compute wrongly, found by all agents alike. Otherwise as `Left`.

    Attributes:
        names: of theirs.
        reason: what they did.
        late: whether earlier contributions of theirs may have been wrong without being compared.
    """

    names: tuple[str, ...]
    reason: str
    late: bool


@dataclass(frozen=True)
class Failed:
    """What went wrong on an agent, for good.

    Attributes:
        error: the exception; its cause separately, for pickling an exception loses it.
        seen: see `Stopped`.
        reports: of what was committed before, that the driver may not have yet.
    """

    error: Exception
    cause: Exception | None = None
    seen: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()


Ended = Stopped | Left | Convicted | Failed


class Agent:
    """One agent. Made an actor by `ray_dnn.cluster`."""

    def __init__(self, name: str, faults: Striker | None = None):
        self.name = name
        self.engine: Engine | None = None  # once the job is built
        self.mesh: Mesh | None = None  # of the present generation
        self._thread = ThreadPoolExecutor(1, "ray_dnn-compute")
        self._memory = StatusMemory()
        self.marks = Marks(self._memory.write)
        if faults:
            faults.arm(self)
        self._supply = Supply()
        self._holds = False  # whether it has committed state: founders, and newcomers once they have copied it
        self._settled = 0  # decisions up to this number are carried out, but for those that the generation named
        self._commands: dict[int, Command] = {}  # by number: decisions that are not carried out
        self._reports: deque[Report] = deque()  # what was committed and the driver has not acknowledged
        self._running = False  # whether reports may still come
        self._newest = 0  # the newest generation heard of; older ones are over
        self._queued: Future[Ended] | None = None  # the newest generation, until its turn comes
        self._follower: Follower | None = None  # of a newcomer that was told to follow a member
        self._changed = threading.Condition()  # guards the seven above
        self._heard = True  # whether the driver has said something since the last look
        threading.Thread(target=self._end_when_forgotten, name="ray_dnn-lease", daemon=True).start()

    # -- messages ----------------------------------------------------------------------------------------------------

    def open(self, secret: bytes) -> Hello:
        """Start listening for other agents."""
        self.marks.enter(Phase.STARTING)
        host = ray.util.get_node_ip_address()
        self._secret = secret
        network = Network.of(os.environ)
        self._listener = Listener(host, secret, Tls(network.tls) if network.tls else None, network.ports)
        node_id = ray.get_runtime_context().get_node_id()
        return Hello(self._listener.address, socket.gethostname(), os.getpid(), node_id, own_start(), self._memory.fd)

    def supply(self, news: News) -> None:
        """Take note of where rows are."""
        self._supply.tell(news)

    def live(self) -> None:
        """Never returns: whoever waits for it learns of this agent's death at once."""
        threading.Event().wait()

    def build(self, job: Job, rank: int, group: tuple[Address, ...], twice: bool) -> Built | Failed:
        """Build the job and compute its first contribution; with ``twice``, two times."""
        return self._compute(lambda: self._build(job, rank, group, twice))

    def follow(self, leader: Address) -> str | None:
        """Follow a member. Returns when this agent is close behind it, or why it does not follow it any more."""
        assert self.engine is not None
        with self._changed:
            if self._newest:
                return "it has been told to take part"
            if self._follower is not None:
                self._follower.cut()
            follower = self._follower = Follower(self.engine, leader, self._secret, self._listener.tls)
            self._thread.submit(follower.run)
        return follower.outcome.result()

    def run(self, generation: Generation, replica: int, founding: bool) -> Ended:
        """Leave the generation before and take part in this one until it ends.

        Args:
            replica: of this agent; its rank in the exchange.
            founding: whether the state as built is the state of the run: a member of the first generation.
        """
        called = time.time()
        with self._changed:
            if generation.number <= self._newest:
                return Left()
            self._leave(generation.number - 1)
            self._newest = generation.number
            self._running = True
            call = partial(self._run, generation, replica, founding, called)
            task = self._queued = self._thread.submit(_guard, call)
        try:
            ended: Ended = task.result()
            if isinstance(ended, Failed) and self.engine is not None:
                ended = replace(ended, seen=self._seen(self.engine), reports=tuple(self._pending()))
            return ended
        except CancelledError:
            return Left()
        finally:
            with self._changed:
                self._running = self._running and generation.number != self._newest
                self._changed.notify_all()

    def leave(self, generation: int) -> list[Report]:
        """Leave this generation and those before. Returns, when it has, what was committed and is not acknowledged."""
        with self._changed:
            self._newest = max(self._newest, generation)
            self._leave(generation)
            left = [self._queued] if self._queued is not None and self._newest == generation else []
        wait(left)
        with self._changed:
            return list(self._reports)

    def _leave(self, generation: int) -> None:
        if self._queued is not None:
            self._queued.cancel()  # does nothing to one that has begun
        if self.mesh is not None and self.mesh.generation <= generation:
            self.mesh.abandon()
            self._supply.wake()
            if self._follower is not None:
                self._follower.cut()
        elif self._follower is not None:
            self._follower.stop()

    def command(self, command: Command) -> None:
        """Take a decision of the driver."""
        with self._changed:
            self._commands[command.number] = command

    def reports(self, after: int, wait_s: float) -> list[Report]:
        """What was committed after the report number ``after``, as soon as there is something; [] after ``wait_s``."""
        with self._changed:
            self._trim(after)
            if not self._reports and self._running:
                self._changed.wait(wait_s)
            return list(self._reports)

    def acknowledge(self, serial: int) -> None:
        """The driver is there, and has the reports up to ``serial``."""
        with self._changed:
            self._trim(serial)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def snapshot(self, number: int) -> Failed | None:
        """Take a snapshot while no step is taken. Called on all agents of a replica together."""
        return self._compute(lambda: self._saver.take(number, self._pending()))

    def taken(self, number: int) -> Taken | None:
        """Wait for a snapshot. None: it has been dropped."""
        return self._saver.taken(number)

    def write(self, number: int, writer: int, place: Place) -> dict[str, File] | Failed:
        """Write the parts of a snapshot that are up to a replica."""
        return _guard(lambda: self._saver.write(number, writer, place))

    def hand_over(self, number: int, writer: int) -> dict[str, bytes] | Failed:
        """The parts of a snapshot that are up to a replica, for the driver to write."""
        return _guard(lambda: self._saver.hand_over(number, writer))

    def drop(self, number: int) -> None:
        """Snapshots up to this one are not wanted any more."""
        if self.engine is not None:
            self._saver.drop(number)

    def _trim(self, serial: int) -> None:
        self._heard = True
        while self._reports and self._reports[0].serial <= serial:
            self._reports.popleft()

    def _compute(self, call: Callable[[], T]) -> T | Failed:
        """Run on the compute thread; exceptions become `Failed`."""
        return self._thread.submit(lambda: _guard(call)).result()

    def _end_when_forgotten(self) -> None:
        """End this process when the driver has gone or does not want it any more.

        Counted in ticks: a process that was frozen hears from the driver before it has counted far.
        """
        silent_s = 0.0
        while silent_s < _LEASE_S:
            time.sleep(_LEASE_TICK_S)
            silent_s = 0.0 if self._heard else silent_s + _LEASE_TICK_S
            self._heard = False
        os._exit(1)

    # -- on the compute thread ---------------------------------------------------------------------------------------

    def _build(self, job: Job, rank: int, group: tuple[Address, ...], twice: bool) -> Built:
        self.marks.enter(Phase.BUILDING)
        started = time.perf_counter()
        postpone_compiler()
        device = of_agent(len(ray.get_gpu_ids()))
        profile = numerics.enforce(job.config, device)
        mesh = None
        if len(group) > 1:
            mesh = Mesh(0, rank, len(group), _GROUP_CHANNEL, moved=self.marks.moved)
            mesh.form(self._listener, job.secret, group)
        self._group = ReplicaGroup(mesh, self.marks)
        set_current_group(self._group)
        self._state = state = guarded(
            "build_model or build_optimizer",
            f"agent {self.name}",
            lambda: TrainingState(job.spec, job.config, _beginning(job.begun), device),
        )
        self._founded_on = job.resume or (job.begun if job.begun is not None and job.begun.all else None)
        state.step = job.first_rows
        collate = job.spec.collate or default_collate
        config = job.config
        source = BatchSource(self._supply, collate, config.seed, config.microbatch_size, config.min_rows, device)
        if job.watch is None:
            contributor = Contributor(state, job.strategy, source)
        else:
            contributor = WatchedContributor(state, job.strategy, source, job.watch, rank)
        self._supply.names = job.evaluated
        self.marks.enter(Phase.SUPPLY)
        source.wait(job.first_rows, lambda: None)
        source.waited_s = 0.0
        self.marks.enter(Phase.ADMISSION)
        first = first_contribution(contributor, twice)
        evaluator = Evaluator(state, self._supply, collate) if self._supply.names and job.spec.evaluate else None
        engine = self.engine = Engine(
            contributor, evaluator, self._group, first.metrics, self.marks, job.audit, SharedMemory()
        )
        engine.states.start()
        self._saver = Saver(engine, self._group)
        self._listener.serve(FOLLOWERS, lambda connection: engine.leader.accept(connection, self._pending))
        digest = codec.digest(state.export())
        self._checked = job.audit is not None
        self.marks.enter(Phase.READY)
        identity = of_state(state, profile.as_dict())
        return Built(profile.as_dict(), first, digest, identity, time.perf_counter() - started)

    def _run(self, generation: Generation, replica: int, founding: bool, called: float) -> Stopped:
        engine, plan = self.engine, generation.plan
        assert engine is not None
        left = time.time()
        with self._changed:
            if generation.number != self._newest:
                raise AbandonedError(f"generation {generation.number} is over before it began")
            self._settled = generation.settled
            later = {n: c for n, c in self._commands.items() if n > generation.settled}
            self._commands = {c.number: c for c in generation.commands} | later
            mesh = self.mesh = Mesh(
                generation.number,
                replica,
                plan.replicas,
                checked=self._checked,
                moved=self.marks.moved,
                waits=self.marks.waits,
            )
        self.marks.join(generation.number, replica)
        self.marks.enter(Phase.FORMING, engine.state.step)
        try:
            formed = engine.together(lambda: self._form(engine, mesh, generation, founding))
            engine.joined = Joined(called, left, formed, time.time())
            command = train(engine, self, generation.settled, generation.finish, self._report)
            if command is not None:
                return Stopped(engine.state.step, command)
            self.marks.enter(Phase.FINISHING, engine.state.step)
            weights = codec.weights_digest(self._state.weights(self._group))
            return Stopped(engine.state.step, None, weights, codec.digest(self._state.export()), self._seen(engine))
        except PeerLostError as error:
            inside = error.channel == _GROUP_CHANNEL
            peer = None if inside else generation.names[error.peer]
            raise _LeftError(Left(peer, isinstance(error, GarbledError), inside)) from error
        except ConvictedError as error:
            names = tuple(generation.names[rank] for rank in error.ranks)
            raise _LeftError(Convicted(names, error.reason, error.late)) from error
        except AbandonedError as error:
            raise _LeftError(Left()) from error
        finally:
            with self._changed:
                self.mesh = None
            mesh.close()
            self.marks.enter(Phase.READY)

    def _form(self, engine: Engine, mesh: Mesh, generation: Generation, founding: bool) -> float:
        """Connect to the others and come to the same state. Returns when it was connected."""
        mesh.form(self._listener, self._secret, generation.addresses)
        formed = time.time()
        if founding and not self._holds:
            if self._founded_on is not None:
                self.marks.enter(Phase.RESTORING)
                restore(engine, self._group, self._founded_on.place, self._founded_on.manifest)
                if isinstance(self._founded_on, Begun):
                    engine.begin_anew()
            self._holds = True
        agree(mesh, engine, self._holds, self._pending, self._report, self._follower)
        self._holds = True
        with self._changed:
            self._follower = None
        engine.states.settle(mesh, generation.plan)
        engine.enter(generation.number, mesh, generation.plan, generation.names)
        return formed

    def _seen(self, engine: Engine) -> dict[tuple[int, int, int], Any]:
        """What the user made of contributions, for the driver, which has no GPU."""
        seen: dict[tuple[int, int, int], Any] = in_host(engine.contributor.seen, engine.state.device)
        return seen

    def _pending(self) -> list[Report]:
        with self._changed:
            return list(self._reports)

    def _report(self, report: Report) -> None:
        with self._changed:
            self._reports.append(report)
            self._changed.notify_all()

    def held(self) -> int:
        """See `ray_dnn.engine.train.Decisions`."""
        with self._changed:
            held = self._settled
            while held + 1 in self._commands:
                held += 1
            return held

    def save(self, step: int, agreed: int) -> None:
        """See `ray_dnn.engine.train.Decisions`."""
        with self._changed:
            due = [c for c in self._commands.values() if c.snapshot and c.number <= agreed and step >= c.at_step]
        for command in due:
            if step % command.snapshot == 0 and not self._saver.has(command.number):
                self._saver.take(command.number, self._pending())
        with self._changed:  # what is done is forgotten, or each step would look at all of a long generation
            while (first := self._commands.get(self._settled + 1)) and first.snapshot and self._saver.has(first.number):
                self._settled += 1
                del self._commands[self._settled]

    def due(self, step: int, agreed: int) -> int | None:
        """See `ray_dnn.engine.train.Decisions`. The same answer on every agent."""
        with self._changed:
            stops = [c for c in self._commands.values() if not c.snapshot]
            due = (c.number for c in stops if c.number <= agreed and step >= c.at_step)
            return max(due, default=None)


def _beginning(begun: Begun | None) -> Callable[[nn.Module], None] | None:
    return None if begun is None else lambda model: load_weights_into(model, begun.place, begun.manifest)


class _LeftError(Exception):
    def __init__(self, left: Left | Convicted):
        super().__init__(str(left))
        self.left = left


def _guard(call: Callable[[], T]) -> T | Any:
    try:
        return call()
    except _LeftError as error:
        return error.left
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
        return Failed(portable(error), portable(cause) if cause else None)
