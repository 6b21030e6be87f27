"""Runs jobs with the real engine on this machine, without Ray: agents are processes, membership follows a script.

A script ``{step: replicas}`` says how many replicas take part from a step on. Each named step begins a generation with
a mesh and a plan of its own. Newcomers copy the state from a replica that stays, leavers are gone, and the states of
virtual workers move to whoever holds them under the new plan. Who leaves alternates between oldest and newest, and an
unchanged number replaces the oldest replica, so that state is passed on more than once.

Agents are forked from a process in which torch is loaded under the numerics profile and nothing has run. They serve one
run after another, as an agent of a long run would have a past. Every wait is bounded; an agent's exception is raised
in the caller with the agent's traceback as a note; agents of a run that failed are killed.

`tests.losses` has runs that lose agents and go on.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ray_dnn.comm.introduction import Address
from ray_dnn.comm.line import Line
from ray_dnn.comm.listener import AbandonedError, Listener, PeerLostError
from ray_dnn.comm.mesh import Mesh
from ray_dnn.comm.shared import SharedMemory
from ray_dnn.config import Audit, TrainConfig, TrainSpec
from ray_dnn.engine import codec, numerics
from ray_dnn.engine.audit import ConvictedError
from ray_dnn.engine.batches import NUMBERS, BatchSource
from ray_dnn.engine.contribute import Contributor
from ray_dnn.engine.evaluate import Evaluator
from ray_dnn.engine.follow import CHANNEL, Follower
from ray_dnn.engine.lead import Kind
from ray_dnn.engine.light import postpone_compiler
from ray_dnn.engine.probe import FirstContribution, first_contribution
from ray_dnn.engine.reports import EvaluationReport, Report, StepReport
from ray_dnn.engine.round import Round
from ray_dnn.engine.state import TrainingState
from ray_dnn.engine.step import Engine, Position
from ray_dnn.engine.train import train
from ray_dnn.engine.transfer import agree
from ray_dnn.marks import Marks
from ray_dnn.parallel import ReplicaGroup
from ray_dnn.phases import Phase
from ray_dnn.plan import Plan, lay
from ray_dnn.sampler import Counted, Schedule, even_units, rows_of_job
from ray_dnn.strategies import DataParallel, Strategy

if TYPE_CHECKING:
    from ray_dnn.faults import Fault

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 120.0
_PRELOAD = ("tests.zoo", "pandas")  # which an Arrow array imports in every process


@dataclass(frozen=True)
class Job:
    """A training job as the engine needs it.

    Attributes:
        rows, validation: the datasets.
        preload: modules that are imported before agents are forked.
        device: that agents compute on.
    """

    spec: TrainSpec
    config: TrainConfig
    rows: pa.Table
    validation: pa.Table | None = None
    strategy: Strategy = field(default_factory=DataParallel)
    audit: Audit | None = None
    preload: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def order(self) -> Counted:
        rows = self.rows.num_rows
        return Counted(rows_of_job(self.config, rows, True, self.strategy.local_batches)[0], even_units(rows))

    @property
    def schedule(self) -> Schedule:
        return rows_of_job(self.config, self.rows.num_rows, True, self.strategy.local_batches)[1]


Make = Callable[[], Job]  # can be pickled


def pretended(make: Make) -> Job:
    """A job whose agents compute on a device that is none (see `tests.pretend`)."""
    job = make()
    return replace(job, device="pretend:0", preload=("tests.pretend", *job.preload))


class TableSupply:
    """Rows of tables, which are here from the beginning."""

    def __init__(self, job: Job):
        self._rows, self._validation = job.rows, job.validation
        self._order, self._schedule = job.order, job.schedule
        self.names = ["validation"] if job.validation is not None else []

    def wait(self, step: int, check: Callable[[], None]) -> bool:
        return step < self._schedule.total_steps

    def counts(self, step: int, worker: int) -> tuple[int, ...]:
        return tuple(piece.rows for piece in self._schedule.pieces(step, worker))

    def table(self, step: int, worker: int) -> pa.Table:
        pieces = self._schedule.pieces(step, worker)
        numbers = np.concatenate([self._order.at(piece.epoch, piece.start, piece.stop) for piece in pieces])
        return self._rows.take(pa.array(numbers)).append_column(NUMBERS, pa.array(numbers))

    def prefetch(self, step: int, workers: range) -> None:
        pass

    def rows(self, name: str, start: int, stop: int, check: Callable[[], None]) -> pa.Table:
        return self._validation.slice(start, stop - start)


def contributor(job: Job) -> Contributor:
    """The job, built in this process."""
    assert job.spec.collate is not None
    config, device = job.config, torch.device(job.device)
    sizes = config.microbatch_size, config.min_rows
    source = BatchSource(TableSupply(job), job.spec.collate, config.seed, *sizes, device)
    return Contributor(TrainingState(job.spec, config, device=device), job.strategy, source)


# -- an agent's process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """An agent's place in a generation.

    Attributes:
        names, addresses: of its members, by replica.
        until: the step before which it ends; None: the job's end.
        acknowledged: reports up to this serial have arrived at the caller.
        struck: the faults that strike no more, by index.
        also: a fault that strikes in this generation, whatever struck before.
    """

    plan: Plan
    replica: int
    names: tuple[str, ...]
    addresses: tuple[Address, ...]
    until: int | None = None
    acknowledged: int = 0
    struck: frozenset[int] = frozenset()
    also: Fault | None = None


@dataclass(frozen=True)
class Lost:
    """Why a generation ended early.

    Attributes:
        kind: the exception's name.
        names: the agents that are to blame: at the other end of a connection, or convicted.
        late: see `ConvictedError`.
    """

    kind: str
    text: str
    names: tuple[str, ...] = ()
    late: bool = False


@dataclass(frozen=True)
class Trained:
    """What an agent has after a generation.

    Attributes:
        reports: those that the caller has not acknowledged.
        worker_states: the workers whose states it holds, encoded.
        lost: why its generation ended early, or None.
        copied: how often in its life it took over another agent's state.
        caught_up: how often it committed what others had combined or evaluated.
    """

    reports: list[Report]
    history: list[dict[str, float]]
    weights: str
    state: str
    worker_states: dict[int, bytes]
    finished: bool
    lost: Lost | None
    copied: int
    caught_up: int


@dataclass(frozen=True)
class Struck:
    """What an agent sends before a fault strikes it. ``index``: of the fault."""

    index: int


@dataclass(frozen=True)
class Took:
    """What a newcomer that follows sends when it has taken something.

    Attributes:
        kind: what; "begin" before it takes a state, "over" where it follows no more, "gone" where it died.
        step: how many it has committed then.
    """

    kind: str
    step: int


class TellingFollower(Follower):
    """Tells what it takes, and waits before it takes a state until the caller has it go on."""

    def __init__(self, agent: Agent, engine: Engine, leader: Address, secret: bytes):
        super().__init__(engine, leader, secret)
        self._agent = agent
        self._telling = True

    def reach(self, target: Position) -> bool:
        self._telling = False  # a member now, of which other things are heard
        return super().reach(target)

    def _next(self, line: Line) -> Kind:
        kind = super()._next(line)
        if self._telling:
            self._agent._tell(Took(kind.name, self._engine.state.step))
        return kind

    def _take(self, line: Line, kind: Kind) -> None:
        if kind is Kind.STATE:
            self._agent._tell(Took("begin", 0))
            assert self._agent.going.wait(TIMEOUT_S)
            self._agent.going.clear()
        super()._take(line, kind)


class Held(NamedTuple):
    """What the system holds for a process."""

    descriptors: int
    sockets: int
    threads: int
    memory_bytes: int


def _links() -> list[str]:
    """What the open descriptors refer to."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return links


class Until:
    """Decisions of a driver that wants all agents to stop before one step."""

    def __init__(self, step: int | None):
        self._step = step

    def held(self) -> int:
        return 0

    def save(self, step: int, agreed: int) -> None:
        """Nothing is saved."""

    def due(self, step: int, agreed: int) -> int | None:
        return 1 if step == self._step else None


class CountingEngine(Engine):
    """Counts how often state came from elsewhere. ``copied``, ``caught_up``: see `Trained`."""

    copied = 0
    caught_up = 0

    def load(self, tree: codec.Tree) -> None:
        self.copied += 1
        super().load(tree)

    def commit(self, round_: Round) -> StepReport | None:
        self.caught_up += self.marks.status.phase is Phase.COPYING
        return super().commit(round_)

    def evaluated(self, entry: dict[str, float]) -> EvaluationReport:
        self.caught_up += self.marks.status.phase is Phase.COPYING
        return super().evaluated(entry)


class Agent:
    """What runs in a process; the caller's requests are its methods.

    Attributes:
        going: set when the caller says `go`.
    """

    def __init__(self, tell: Callable[[Any], None] = lambda message: None):
        self._tell = tell
        self._lock = threading.Lock()  # guards the two below
        self.mesh: Mesh | None = None  # of the present generation
        self._over = -1  # generations up to this one are over
        self._secret = b""
        self.going = threading.Event()

    # -- from the caller's other connection, while the main thread is at work ------------------------------------------

    def abandon(self, secret: bytes, generation: int) -> None:
        """Leave this generation and those before. ``secret``: of the run that it belongs to."""
        with self._lock:
            if secret != self._secret:
                return  # it came late
            self._over = max(self._over, generation)
            if self.mesh is not None and self.mesh.generation <= generation:
                self.mesh.abandon()

    def stop_following(self) -> None:
        if self._follower is not None:
            self._follower.stop()

    def go(self) -> None:
        """Go on where a fault makes this agent wait."""
        self.going.set()

    # -- requests ------------------------------------------------------------------------------------------------------

    def open(self, secret: bytes, name: str = "agent-1", faults: Sequence[Fault] = ()) -> Address:
        with self._lock:
            self._secret, self._over = secret, -1
        self.name = name
        self._listener = Listener("127.0.0.1", secret)
        self._holds = False
        self._reports: list[Report] = []
        self._struck: frozenset[int] = frozenset()
        self.marks = Marks()
        self.engine: CountingEngine | None = None
        self._follower: TellingFollower | None = None
        self.going.clear()
        if faults:
            self._arm(faults, self._claim)
        return self._listener.address

    def _arm(self, faults: Sequence[Fault], claim: Callable[[int, str], bool]) -> None:
        from ray_dnn.faults import FaultPlan  # which imports Ray

        FaultPlan(faults, claim).arm(self)

    def _claim(self, index: int, agent: str) -> bool:
        if index in self._struck:
            return False
        self._tell(Struck(index))
        return True

    def build(self, make: Make, twice: bool) -> FirstContribution:
        job = make()
        numerics.enforce(job.config, torch.device(job.device))
        made = contributor(job)
        first = first_contribution(made, twice)
        evaluator = None
        if job.validation is not None:
            evaluator = Evaluator(made.state, TableSupply(job), job.spec.collate)
        # Every third agent is as on another machine: what it exchanges is sent.
        memory = SharedMemory() if int(self.name.rpartition("-")[2]) % 3 else None
        engine = self.engine = CountingEngine(
            made, evaluator, ReplicaGroup(), first.metrics, self.marks, job.audit, memory
        )
        self.engine.states.start()
        self._listener.serve(CHANNEL, lambda connection: engine.leader.accept(connection, lambda: self._reports))
        self._checked = job.audit is not None
        return first

    def follow(self, leader: Address) -> str | None:
        """Follow a member until the caller says `stop_following`. How it went."""
        assert self.engine is not None
        self._follower = TellingFollower(self, self.engine, leader, self._secret)
        self._follower.run()
        return self._follower.outcome.result()

    def train(self, place: Place) -> Trained:
        engine, plan = self.engine, place.plan
        assert engine is not None
        # Until the first step everybody's state is the state as built: founders hold it.
        self._holds = self._holds or plan.number == 0
        self._reports = [r for r in self._reports if r.serial > place.acknowledged]
        self._struck = place.struck
        if place.also:
            self._arm([place.also], lambda index, agent: True)
        with self._lock:
            mesh = self.mesh = Mesh(plan.number, place.replica, plan.replicas, checked=self._checked)
            if plan.number <= self._over:
                mesh.abandon()
        self.marks.join(plan.number, place.replica)
        lost = None
        try:
            self._train(engine, mesh, place)
        except PeerLostError as error:
            lost = Lost(type(error).__name__, str(error), (place.names[error.peer],))
        except AbandonedError as error:
            lost = Lost(type(error).__name__, str(error))
        except ConvictedError as error:
            lost = Lost(type(error).__name__, str(error), tuple(place.names[r] for r in error.ranks), error.late)
        finally:
            with self._lock:
                self.mesh = None
            mesh.close()
        return Trained(
            self._reports,
            list(engine.history),
            codec.weights_digest(engine.state.weights(ReplicaGroup())),
            codec.digest(engine.state.export()),
            engine.states.export(),
            engine.finished,
            lost,
            engine.copied,
            engine.caught_up,
        )

    def _train(self, engine: Engine, mesh: Mesh, place: Place) -> None:
        self.marks.enter(Phase.FORMING, engine.state.step)
        mesh.form(self._listener, self._secret, place.addresses)
        agree(mesh, engine, self._holds, lambda: self._reports, self._reports.append, self._follower)
        self._holds, self._follower = True, None
        engine.states.settle(mesh, place.plan)
        engine.enter(place.plan.number, mesh, place.plan, place.names)
        train(engine, Until(place.until), 0, False, self._reports.append)
        if engine.finished:
            self.marks.enter(Phase.FINISHING, engine.state.step)

    def held(self) -> Held:
        """What the system holds for this process, when the threads that greet connections have ended."""
        for thread in threading.enumerate():
            if "_greet" in thread.name:
                thread.join(TIMEOUT_S)
        links = _links()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Held(
            len(links),
            sum(link.startswith("socket:") for link in links),
            len(os.listdir("/proc/self/task")),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )

    def export(self) -> bytes:
        assert self.engine is not None
        return codec.encode(self.engine.state.export())

    def close(self) -> None:
        self._listener.close()
        self.engine = None
        self.marks = Marks()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _answer(connection: Connection, control: Connection) -> None:
    """Serve requests until the caller closes the connection."""
    agent = Agent(connection.send)
    threading.Thread(target=_listen, args=(agent, control), daemon=True).start()
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((getattr(agent, method)(*args), None))
        except BaseException as error:
            connection.send((None, _portable(error)))


def _listen(agent: Agent, control: Connection) -> None:
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, args = control.recv()
            getattr(agent, method)(*args)


def _portable(error: BaseException) -> tuple[BaseException, BaseException | None, str]:
    """An exception, its cause, and its traceback; a stand-in for what cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps((error, error.__cause__)))
    except Exception:
        return RuntimeError(repr(error)), None, text
    return error, error.__cause__, text


def serve(descriptor: int, preload: Sequence[str]) -> None:
    """The process that agents are forked from: one fork for each descriptor that arrives."""
    for name in preload:
        importlib.import_module(name)
    postpone_compiler()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in an agent would copy all that it shares with the others
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as requests:
        while (received := socket.recv_fds(requests, 1, 2))[0]:
            if os.fork() == 0:
                requests.close()
                connection, control = map(Connection, received[1])
                connection.send(os.getpid())
                _answer(connection, control)
                os._exit(0)
            for theirs in received[1]:
                os.close(theirs)


# -- the caller ------------------------------------------------------------------------------------------------------


class Process:
    """One agent's process, from here.

    Attributes:
        connection: for requests and their answers.
        control: for what its main thread need not be free for.
    """

    def __init__(self, forker: socket.socket):
        (ours, theirs), (our_control, their_control) = socket.socketpair(), socket.socketpair()
        with theirs, their_control:
            socket.send_fds(forker, [b"x"], [theirs.fileno(), their_control.fileno()])
        self.connection, self.control = Connection(ours.detach()), Connection(our_control.detach())
        self.pid = self._receive()

    def _receive(self) -> Any:
        if not self.connection.poll(TIMEOUT_S):
            raise TimeoutError("an agent's process did not start")
        return self.connection.recv()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.connection.close()
        self.control.close()


class _Pool:
    """Idle processes under one numerics profile."""

    def __init__(self, isa: str, preload: tuple[str, ...]):
        config = TrainConfig(batch_size=1, epochs=1, cpu_isa=isa)  # type: ignore[arg-type]
        self._idle: list[Process] = []
        self._forker, theirs = socket.socketpair()
        code = f"from tests.local import serve; serve({theirs.fileno()}, {(*_PRELOAD, *preload)!r})"
        with theirs:
            environment = os.environ | numerics.environment(config)
            environment.pop("RAY_TMPDIR", None)  # which marks processes that belong to a cluster
            self._root = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    @contextlib.contextmanager
    def borrow(self, count: int) -> Iterator[list[Process]]:
        """So many processes; killed where the block raises, else given back: those that are still in the list."""
        taken = [self._idle.pop() if self._idle else Process(self._forker) for _ in range(count)]
        try:
            yield taken
        except BaseException:
            for process in taken:
                process.kill()
            raise
        self._idle += taken

    def close(self) -> None:
        """End all processes; none is at work."""
        for process in self._idle:
            process.kill()
        self._forker.close()
        self._root.kill()
        self._root.wait(TIMEOUT_S)


_pools: dict[tuple[str, tuple[str, ...]], _Pool] = {}


def pool(isa: str, preload: tuple[str, ...]) -> _Pool:
    """The processes of a profile, with these modules loaded."""
    if (isa, preload) not in _pools:
        _pools[isa, preload] = _Pool(isa, preload)
    return _pools[isa, preload]


@atexit.register
def close() -> None:
    """End all processes. Those that are needed again are started anew."""
    while _pools:
        _pools.popitem()[1].close()


def ask(requests: Sequence[tuple[Process, str, tuple[Any, ...]]]) -> list[Any]:
    """Send requests and wait for all answers. A lost peer is the consequence of another failure, which is raised."""
    for process, method, args in requests:
        process.connection.send((method, args))
    waiting = {process.connection: index for index, (process, _, _) in enumerate(requests)}
    answers: list[Any] = [None] * len(requests)
    failures = []
    deadline = time.monotonic() + TIMEOUT_S
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{len(waiting)} of {len(requests)} agents did not answer {requests[0][1]}")
        for connection in ready:
            answers[waiting.pop(connection)], failure = connection.recv()  # type: ignore[call-overload, union-attr]
            failures += [failure] if failure else []
    failures.sort(key=lambda failure: isinstance(failure[0], PeerLostError))
    for error, cause, text in failures:
        error.add_note(f"In an agent:\n{text}")
        raise error from cause
    return answers


def call(job: Job, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in an agent's process of the job's profile."""
    with pool(job.config.isa, job.preload).borrow(1) as (process,):
        return ask([(process, "call", (function, *args))])[0]


@dataclass(frozen=True)
class Run:
    """What a run left behind: everything that must not depend on who took part.

    Attributes:
        steps: of each step metrics, rows, ledger and evaluation, as text that shows every bit.
        weights, state: digests.
        tree: the exported state, encoded.
    """

    steps: tuple[str, ...]
    history: str
    weights: str
    state: str
    worker_states: dict[int, bytes]
    tree: bytes
    reports: tuple[StepReport, ...]
    first: FirstContribution

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers."""
        tree = codec.decode(self.tree)
        return tree["parameters"] | tree["buffers"]


def run(make: Make, sizes: Mapping[int, int]) -> Run:
    """Run a job under a script, checking after each generation that all its members agree."""
    job = make()
    one_by_one = job.strategy.worker_state == "mirrored"  # a worker's two holders must not leave at once
    sizes = {step: min(size, job.config.virtual_workers) for step, size in sizes.items()}
    generations = itinerary(sizes, one_by_one)
    count = 1 + max(max(members) for _, members in generations)
    ends = [step for step, _ in generations[1:]] + [None]
    with pool(job.config.isa, job.preload).borrow(count) as agents:
        secret = secrets.token_bytes(32)
        addresses = ask([(a, "open", (secret, f"agent-{n}")) for n, a in enumerate(agents, start=1)])
        firsts = ask([(a, "build", (make, index == 0)) for index, a in enumerate(agents)])
        assert len({first.digest for first in firsts}) == 1, "agents disagree about the first contribution"
        for number, ((_, members), until) in enumerate(zip(generations, ends, strict=True)):
            plan = lay(number, job.config.virtual_workers, speeds(number, len(members)))
            names, there = ("an agent",) * plan.replicas, tuple(addresses[m] for m in members)
            requests = [(agents[m], "train", (Place(plan, r, names, there, until),)) for r, m in enumerate(members)]
            trained = ask(requests)
            assert not any(t.lost for t in trained), [t.lost for t in trained]
            check_agreement(trained, [agents[m] for m in members])
            if trained[0].finished:
                break
        (tree,) = ask([(agents[members[-1]], "export", ())])
        ask([(a, "close", ()) for a in agents])
    return result(trained, trained[0].reports, tree, firsts[0])


def result(trained: Sequence[Trained], reports: Sequence[Report], tree: bytes, first: FirstContribution) -> Run:
    """What agents that agree have left behind."""
    assert [r.serial for r in reports] == list(range(1, len(reports) + 1))
    states: dict[int, bytes] = {}
    for agent in trained:
        assert all(states.setdefault(w, state) == state for w, state in agent.worker_states.items())
    return Run(
        tuple(map(bits, reports)),
        json.dumps(trained[0].history),
        trained[0].weights,
        trained[0].state,
        dict(sorted(states.items())),
        tree,
        tuple(r for r in reports if isinstance(r, StepReport)),
        first,
    )


def itinerary(sizes: Mapping[int, int], one_by_one: bool) -> list[tuple[int, tuple[int, ...]]]:
    """The generations of a script: from which step on, and the agents by replica."""
    members: list[int] = []
    agents = 0
    generations = []
    for number, (step, size) in enumerate(sorted(sizes.items())):
        leaving = max(0, len(members) - size) or int(len(members) == size > 1)
        while leaving > 1 and one_by_one:
            members = members[1:] if number % 2 else members[:-1]
            generations.append((step, tuple(members)))
            leaving -= 1
        members = members[leaving:] if number % 2 else members[: len(members) - leaving]
        newcomers = range(agents, agents + size - len(members))
        agents += len(newcomers)
        members = [*members, *newcomers]
        generations.append((step, tuple(members)))
    return generations


def speeds(generation: int, replicas: int) -> list[float]:
    """Equal in the first generation, then such that ranges do not align with the tree."""
    return [1.0 + (3 * r + 5 * generation) % 4 * bool(generation) for r in range(replicas)]


def check_agreement(trained: Sequence[Trained], agents: Sequence[Process]) -> None:
    """Fail, naming the first place that differs, where members of a generation do not agree."""
    for other, agent in zip(trained[1:], agents[1:], strict=True):
        assert [bits(r) for r in other.reports] == [bits(r) for r in trained[0].reports]
        assert json.dumps(other.history) == json.dumps(trained[0].history)
        if (other.state, other.weights) != (trained[0].state, trained[0].weights):
            one, two = (codec.decode(raw) for raw in ask([(a, "export", ()) for a in (agents[0], agent)]))
            raise AssertionError(f"agents of one generation differ in {codec.first_difference(one, two)}")


def bits(report: Report) -> str:
    """What of a report must be the same whoever took part. Floats are written with all their digits."""
    names = ("serial", "step", "metrics", "rows", "worker_rows", "worker_digests", "skipped")
    return json.dumps({name: getattr(report, name) for name in names if hasattr(report, name)})


def assert_same(one: Run, other: Run) -> None:
    """Fail, naming the first place that differs, where two runs of a job differ by a bit."""
    for mine, theirs in zip(one.steps, other.steps, strict=True):
        assert mine == theirs
    assert one.history == other.history
    difference = codec.first_difference(codec.decode(one.tree), codec.decode(other.tree))
    assert difference is None, f"the runs differ in {difference}"
    assert (one.weights, one.state) == (other.weights, other.state)
    assert one.worker_states == other.worker_states
