"""The agent: a Ray actor that hosts virtual workers.

Everything that computes runs on one thread of its own, for thread-local settings are part of the numerics. The actor's
other threads only hand over messages. Methods that can fail return an `Outcome`; an exception that leaves a method is
the death of the agent or a bug.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import ray.cloudpickle
import ray.util

from ray_dnn.checkpoint import weights_to_bytes
from ray_dnn.comm.mesh import AbandonedError, Address, Listener, Mesh, PeerLostError
from ray_dnn.config import TrainConfig, TrainSpec
from ray_dnn.engine import codec, numerics
from ray_dnn.engine.batches import BatchSource
from ray_dnn.engine.contribute import Contributor, guarded
from ray_dnn.engine.evaluate import Evaluator
from ray_dnn.engine.probe import FirstContribution, first_contribution
from ray_dnn.engine.state import TrainingState
from ray_dnn.engine.step import Engine, StepReport
from ray_dnn.engine.transfer import receive_state, send_state
from ray_dnn.errors import RayDnnError
from ray_dnn.feed import BlockIndex, BlockReader, default_collate
from ray_dnn.parallel import ReplicaGroup, set_current_group
from ray_dnn.plan import Plan
from ray_dnn.sampler import RowOrder, Schedule
from ray_dnn.strategies.base import Strategy

T = TypeVar("T")

_GROUP_CHANNEL = 1


@dataclass(frozen=True)
class Job:
    """Everything that decides what is learned, and how agents find each other.

    Attributes:
        indexes: the datasets.
        secret: known to this job's agents alone; connections introduce themselves with it.
        replica_size: agents that together hold one replica.
    """

    spec: TrainSpec
    config: TrainConfig
    strategy: Strategy
    indexes: dict[str, BlockIndex]
    order: RowOrder
    schedule: Schedule
    secret: bytes
    replica_size: int = 1


@dataclass(frozen=True)
class Command:
    """A decision of the driver: stop before the first step, from ``at_step`` on, at which every agent holds it."""

    number: int
    at_step: int = 0


@dataclass(frozen=True)
class Generation:
    """An agent's place in a stretch of fixed membership.

    Attributes:
        number: of the generation.
        replica: of this agent; its rank in the exchange.
        names, addresses: of the agents that it exchanges with, by replica.
        source: the replica whose state newcomers copy.
        newcomers: replicas that copy it.
        settled: decisions up to this number are carried out, but for those in ``commands``.
        commands: decisions that are not carried out yet.
        worker_states: of virtual workers that this agent becomes a holder of, encoded.
        finish: take no further step; evaluate and end the job.
    """

    number: int
    plan: Plan
    replica: int
    names: tuple[str, ...]
    addresses: tuple[Address, ...]
    source: int
    newcomers: tuple[int, ...]
    settled: int = 0
    commands: tuple[Command, ...] = ()
    worker_states: dict[int, bytes] = field(default_factory=dict)
    finish: bool = False


@dataclass(frozen=True)
class Hello:
    """Where an agent is."""

    address: Address
    host: str
    pid: int
    node_id: str


@dataclass(frozen=True)
class Built:
    """An agent that has built the job and computed its first contribution."""

    profile: dict[str, object]
    first: FirstContribution
    state_digest: str
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """An agent whose generation ended at a step boundary.

    Attributes:
        step: committed steps.
        command: the decision that it stopped for, or None where the job is finished.
        evaluation, weights_digest, state_digest: when the job is finished.
    """

    step: int
    command: int | None
    evaluation: dict[str, float] | None = None
    weights_digest: str = ""
    state_digest: str = ""


@dataclass(frozen=True)
class Exported:
    """The full weights in the safetensors format, and their digest."""

    data: bytes
    digest: str


@dataclass(frozen=True)
class Failed:
    """What went wrong on an agent.

    Attributes:
        error: the exception; its cause separately, for pickling an exception loses it.
        lost_peer: the name of the agent whose connection closed, where that is all this agent knows.
    """

    error: Exception
    cause: Exception | None = None
    lost_peer: str | None = None


class Agent:
    """One agent. Made an actor by `ray_dnn.cluster`."""

    def __init__(self, name: str):
        self._name = name
        self._thread = ThreadPoolExecutor(1, "ray_dnn-compute")
        self._settled = 0  # decisions up to this number are carried out, but for those that the generation named
        self._commands: dict[int, Command] = {}  # by number: decisions that are not carried out
        self._reports: deque[StepReport] = deque()  # committed steps that the driver has not acknowledged
        self._changed = threading.Condition()  # guards the three above
        self._mesh: Mesh | None = None  # of the present generation
        self._running = False  # whether steps may still be reported

    # -- messages ----------------------------------------------------------------------------------------------------

    def open(self, secret: bytes) -> Hello:
        """Start listening for other agents."""
        host = ray.util.get_node_ip_address()
        self._secret = secret
        self._listener = Listener(host, secret)
        node_id = ray.get_runtime_context().get_node_id()
        return Hello(self._listener.address, socket.gethostname(), os.getpid(), node_id)

    def build(self, job: Job, rank: int, group: tuple[Address, ...], twice: bool) -> Built | Failed:
        """Build the job and compute its first contribution; with ``twice``, two times."""
        return self._compute(lambda: self._build(job, rank, group, twice))

    def run(self, generation: Generation) -> Stopped | Failed:
        """Take part in a generation until it ends."""
        self._running = True
        try:
            return self._compute(lambda: self._run(generation))
        finally:
            with self._changed:
                self._running = False
                self._changed.notify_all()

    def command(self, command: Command) -> None:
        """Take a decision of the driver."""
        with self._changed:
            self._commands[command.number] = command

    def reports(self, after: int, wait_s: float) -> list[StepReport]:
        """Committed steps behind ``after``, as soon as there are some; [] after ``wait_s`` or when none will come."""
        with self._changed:
            self._trim(after)
            if not self._reports and self._running:
                self._changed.wait(wait_s)
            return list(self._reports)

    def acknowledge(self, step: int) -> None:
        """The driver has the reports up to ``step``."""
        with self._changed:
            self._trim(step)

    def export_states(self, workers: tuple[int, ...]) -> dict[int, bytes]:
        """The encoded states of virtual workers."""
        held = self._engine.states.export()
        return {w: held[w] for w in workers}

    def export_weights(self) -> Exported | Failed:
        """The full weights. Called on all agents of a replica together."""

        def export() -> Exported:
            weights = self._state.weights(self._group)
            return Exported(weights_to_bytes(weights), codec.weights_digest(weights))

        return self._compute(export)

    def leave(self) -> None:
        """Abandon the present generation."""
        if self._mesh is not None:
            self._mesh.abandon()

    def _trim(self, step: int) -> None:
        while self._reports and self._reports[0].step <= step:
            self._reports.popleft()

    def _compute(self, call: Callable[[], T]) -> T | Failed:
        """Run on the compute thread; exceptions become `Failed`."""
        return self._thread.submit(lambda: _guard(call)).result()

    # -- on the compute thread ---------------------------------------------------------------------------------------

    def _build(self, job: Job, rank: int, group: tuple[Address, ...], twice: bool) -> Built:
        started = time.perf_counter()
        profile = numerics.enforce(job.config)
        mesh = None
        if len(group) > 1:
            mesh = Mesh(0, rank, len(group))
            mesh.form(self._listener, job.secret, group, _GROUP_CHANNEL)
        self._group = ReplicaGroup(mesh)
        set_current_group(self._group)
        self._state = state = guarded(
            f"build_model or build_optimizer, agent {self._name}", lambda: TrainingState(job.spec, job.config)
        )
        collate = job.spec.collate or default_collate
        readers = {name: BlockReader(index) for name, index in job.indexes.items()}
        source = BatchSource(
            readers["train"], job.order, job.schedule, collate, job.config.seed, job.config.microbatch_size
        )
        contributor = Contributor(state, job.strategy, source)
        first = first_contribution(contributor, twice)
        others = {n: (r, job.indexes[n].rows) for n, r in readers.items() if n != "train"}
        evaluator = Evaluator(state, others, collate) if others and job.spec.evaluate else None
        self._engine = Engine(contributor, evaluator, self._group, first.metrics)
        self._engine.states.start()
        digest = codec.digest(state.export())
        return Built(profile.as_dict(), first, digest, time.perf_counter() - started)

    def _run(self, generation: Generation) -> Stopped:
        engine, plan = self._engine, generation.plan
        with self._changed:
            self._settled = generation.settled
            later = {n: c for n, c in self._commands.items() if n > generation.settled}
            self._commands = {c.number: c for c in generation.commands} | later
        mesh = self._mesh = Mesh(generation.number, generation.replica, plan.replicas)
        try:
            mesh.form(self._listener, self._secret, generation.addresses)
            if generation.replica in generation.newcomers:
                receive_state(mesh, engine, generation.source)
            elif generation.replica == generation.source:
                send_state(mesh, engine, generation.newcomers)
            engine.states.take(generation.worker_states)
            engine.enter(generation.number, mesh, plan, generation.names)
            return self._steps(engine, generation)
        except PeerLostError as error:
            raise _LostPeerError(generation.names[error.peer], str(error)) from error
        finally:
            mesh.close()
            self._mesh = None

    def _steps(self, engine: Engine, generation: Generation) -> Stopped:
        """The training loop."""
        # Before the first exchange, only what the generation itself says is known to be held by every agent.
        held = generation.settled
        while not (generation.finish or engine.finished):
            if (command := self._due(engine.state.step, held)) is not None:
                return Stopped(engine.state.step, command)
            report = engine.step(self._held())
            held = report.held
            with self._changed:
                self._reports.append(report)
                self._changed.notify_all()
        evaluation = engine.finish()
        weights = codec.weights_digest(self._state.weights(self._group))
        return Stopped(engine.state.step, None, evaluation, weights, codec.digest(self._state.export()))

    def _held(self) -> int:
        """The newest decision such that this agent has all decisions up to it."""
        with self._changed:
            held = self._settled
            while held + 1 in self._commands:
                held += 1
            return held

    def _due(self, step: int, held: int) -> int | None:
        """The newest decision that every agent holds and whose step has come: the same answer on every agent."""
        with self._changed:
            due = (c.number for c in self._commands.values() if c.number <= held and step >= c.at_step)
            return max(due, default=None)


class _LostPeerError(RayDnnError):
    def __init__(self, peer: str, detail: str):
        super().__init__(detail)
        self.peer = peer


def _guard(call: Callable[[], T]) -> T | Failed:
    try:
        return call()
    except _LostPeerError as error:
        return Failed(AbandonedError(str(error)), lost_peer=error.peer)
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
        return Failed(_portable(error), _portable(cause) if cause else None)


def _portable(error: Exception) -> Exception:
    """The exception, or where it cannot be pickled and read again, one that says the same."""
    try:
        ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
