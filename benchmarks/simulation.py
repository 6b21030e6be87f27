"""A driver that leads thousands of agents which train nothing, in one thread and in a time of its own.

The driver is the real one, with its fleet, guard, recorder, setbacks, followings, loop and event log. What is made up
is what Ray would do for it: places, the agents' and watchers' side of every call, and the time, which jumps to
whatever is due next. Rows, checkpoints and sockets there are none.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import queue
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from ray.exceptions import RayActorError

from ray_dnn.agent import Built, Command, Generation, Hello, Job, Left, Stopped
from ray_dnn.cluster import Places
from ray_dnn.config import TrainConfig
from ray_dnn.driver import Driver, Outcome, Past, Size
from ray_dnn.engine.probe import FirstContribution
from ray_dnn.engine.reports import Joined, StepReport
from ray_dnn.events import Event, EventLog, GenerationFormed
from ray_dnn.feed.supply import News
from ray_dnn.guard import Guard
from ray_dnn.liveness import Patience, Sight
from ray_dnn.loop import Loop
from ray_dnn.phases import Phase, Status
from ray_dnn.placement import Wish
from ray_dnn.storage import LineFile, RunFolder
from ray_dnn.strategies import DataParallel

NODE_AGENTS = 8  # on a node
PLACE_S, START_S, BUILD_S, FOLLOW_S, FORM_S, STEP_S = 0.05, 1.5, 1.0, 0.2, 0.1, 0.5
DEATH_S, BREAK_S = 0.012, (0.005, 0.02)  # until Ray tells of a death, and until peers see their connections close
COLLECT_S = 10.0
_BUILT = Built({"torch": "2"}, FirstContribution("", {}, {}), "", {}, BUILD_S)
_STATUS = Status(Phase.COMPUTING, 1, 1, 1, 1)
_CLOCKED = ("loop", "driver", "recorder", "fleet", "following")  # modules of ray_dnn that look at the time


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The present time."""
        return self.now

    time = monotonic


class Promise:
    """Stands in for a Ray reference, and for the future that one is made to."""

    def __init__(self) -> None:
        self._calls: list[Callable[[Promise], None]] = []
        self.done = False
        self._value: Any = None
        self._error: Exception | None = None

    def future(self) -> Promise:
        """See `ray.ObjectRef`."""
        return self

    def add_done_callback(self, call: Callable[[Promise], None]) -> None:
        """See `concurrent.futures.Future`."""
        if self.done:
            call(self)
        else:
            self._calls.append(call)

    def exception(self) -> Exception | None:
        """See `concurrent.futures.Future`."""
        return self._error

    def result(self) -> Any:
        """See `concurrent.futures.Future`."""
        return self._value

    def settle(self, value: Any = None, error: Exception | None = None) -> None:
        """It resolves. Only the first time counts."""
        if not self.done:
            self.done, self._value, self._error = True, value, error
            calls, self._calls = self._calls, []
            for call in calls:
                call(self)


_NOTHING = Promise()
_NOTHING.settle()


@dataclass(frozen=True)
class Cost:
    """Of a turn of the driver's loop in which it formed a generation.

    Attributes:
        seconds: of CPU, without those in which the cluster was made up.
        calls: to agents and watchers.
        agents, joined, lost: how many take part, have joined, were lost.
    """

    seconds: float
    calls: int
    agents: int
    joined: int
    lost: int


class Timeless(Loop):
    """A loop whose time jumps to what is due next, and that measures each turn."""

    def __init__(self, world: World):
        super().__init__()
        self._world = world

    def run(self) -> None:
        """See `Loop`."""
        while not self._ended:
            try:
                call = self._queue.get_nowait()
            except queue.Empty:
                at, _, call = heapq.heappop(self._timers)
                self._world.clock.now = max(self._world.clock.now, at)
            self._world.measure(call)


class Handle:
    """An agent or a watcher, as the driver sees it."""

    __slots__ = ("dead", "name", "node", "owed", "world")

    def __init__(self, world: World, name: str, node: str):
        self.world, self.name, self.node = world, name, node
        self.dead = False
        self.owed: dict[str, Promise] = {}  # answers, by method

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._call, method))

    def _call(self, method: str, *arguments: Any) -> Promise:
        world = self.world
        began = time.thread_time()
        world.calls += 1
        try:
            if self.dead:
                promise = Promise()
                promise.settle(error=RayActorError())
                return promise
            answer: Promise = getattr(world, f"on_{method}")(self, *arguments)
            return answer
        finally:
            world.own_s += time.thread_time() - began

    def owe(self, method: str) -> Promise:
        """An answer that will come, unless it dies before."""
        promise = self.owed[method] = Promise()
        return promise


class Gang:
    """See `ray_dnn.cluster.Gang`."""

    def __init__(self, world: World, places: Places, slots: Sequence[int], wish: Wish, minimum: bool = False):
        self.size, self.wish, self.minimum, self._world = len(slots), wish, minimum, world
        self._nodes = [f"{next(world.places) // NODE_AGENTS:056x}" for _ in slots]
        self.ready = world.after(PLACE_S)

    def start(self, names: dict[int, str]) -> list[Handle]:
        """See `ray_dnn.cluster.Gang`."""
        agents = [Handle(self._world, name, self._nodes[index]) for index, name in names.items()]
        self._world.agents |= {agent.name: agent for agent in agents}
        return agents

    def nodes(self) -> dict[int, str]:
        """See `ray_dnn.cluster.Gang`."""
        return dict(enumerate(self._nodes))

    def give_back(self) -> None:
        """See `ray_dnn.cluster.Gang`."""


@dataclass
class Together:
    """The agents of a generation."""

    number: int
    names: tuple[str, ...]
    agents: list[Handle] = field(default_factory=list)  # that have been told of it
    told: Counter[int] = field(default_factory=Counter)  # how many hold each decision
    joined: Joined | None = None  # until its first step
    over: bool = False


class World:
    """The cluster, and the time.

    Attributes:
        agents: those that are alive, by name.
        calls: so far, to agents and watchers.
        own_s: seconds of CPU in which it was made up what they do.
        costs: of turns in which a generation was formed.
        turns_s, longest_s: of all turns together, and of the longest one, as of a `Cost`.
        collect_s: seconds of CPU that each collection of Python's garbage took; there is none in a turn.
        deaths: so far.
    """

    def __init__(self, workers: int, seed: int = 0):
        self.clock, self.random = Clock(), Random(seed)
        self.loop = Timeless(self)
        self.places = iter(range(10**9))
        self.agents: dict[str, Handle] = {}
        self.calls, self.own_s, self.deaths = 0, 0.0, 0
        self.costs: list[Cost] = []
        self.turns_s = self.longest_s = 0.0
        self.collect_s: list[float] = []
        self.formed: GenerationFormed | None = None
        self._together = Together(0, ())
        self._step = 0
        self._reports: deque[StepReport] = deque(maxlen=64)
        self._watched: dict[str, set[str]] = {}  # agents, by node
        self._worker_rows, self._worker_digests = (1,) * workers, tuple(range(2**62, 2**62 + workers))

    def measure(self, call: Callable[[], None]) -> None:
        """Have a turn of the loop done."""
        own_s, calls, self.formed = self.own_s, self.calls, None
        began = time.thread_time()
        call()
        seconds = time.thread_time() - began - (self.own_s - own_s)
        self.turns_s += seconds
        self.longest_s = max(self.longest_s, seconds)
        if (formed := self.formed) is not None:
            agents, joined, lost = len(formed.agents), len(formed.joined), len(formed.lost)
            self.costs.append(Cost(seconds, self.calls - calls, agents, joined, lost))

    def collect(self) -> None:
        """Collect garbage, and again after a while."""
        began = time.thread_time()
        gc.collect()
        self.collect_s.append(time.thread_time() - began)
        self.own_s += self.collect_s[-1]
        self.loop.later(COLLECT_S, self.collect)

    def after(self, seconds: float, value: Any = None) -> Promise:
        """An answer that comes by itself."""
        promise = Promise()
        self.later(seconds, lambda: promise.settle(value))
        return promise

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Have something happen in the cluster."""

        def timed() -> None:
            began = time.thread_time()
            call()
            self.own_s += time.thread_time() - began

        self.loop.later(seconds, timed)

    def _answer(self, agent: Handle, method: str, seconds: float, value: Any) -> Promise:
        promise = agent.owe(method)
        self.later(seconds, lambda: None if agent.dead else promise.settle(value))
        return promise

    # -- what agents do ------------------------------------------------------------------------------------------------

    def on_live(self, agent: Handle) -> Promise:
        """See `ray_dnn.agent.Agent`, as for all below."""
        return agent.owe("live")

    def on_open(self, agent: Handle, secret: bytes) -> Promise:
        number = int(agent.name.split("-")[1])
        host = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        hello = Hello((host, 10_000 + number % 50_000), f"host-{agent.node[-6:]}", number, agent.node, 0, 3)
        return self._answer(agent, "open", START_S * self.random.uniform(0.8, 1.2), hello)

    def on_build(self, agent: Handle, *_: Any) -> Promise:
        return self._answer(agent, "build", BUILD_S * self.random.uniform(0.8, 1.2), _BUILT)

    def on_follow(self, agent: Handle, *_: Any) -> Promise:
        return self._answer(agent, "follow", FOLLOW_S, None)

    def on_supply(self, *_: Any) -> Promise:
        return _NOTHING

    on_acknowledge = on_supply

    def on_reports(self, agent: Handle, after: int, wait_s: float) -> Promise:
        return self._answer(agent, "reports", 0.001, [r for r in self._reports if r.serial > after])

    def on_leave(self, agent: Handle, number: int) -> Promise:
        self._leave(agent)
        return self._answer(agent, "leave", 0.001, list(self._reports))

    def _leave(self, agent: Handle) -> None:
        if (before := agent.owed.pop("run", None)) is not None:
            before.settle(Left())

    def on_run(self, agent: Handle, generation: Generation, *_: Any) -> Promise:
        self._leave(agent)
        together = self._together
        if together.number != generation.number:
            together.over = True
            together = self._together = Together(generation.number, generation.names)
        together.agents.append(agent)
        if len(together.agents) == len(together.names):
            self.later(FORM_S, lambda: self._begin(together))
        return agent.owe("run")

    def on_command(self, agent: Handle, command: Command) -> Promise:
        self._together.told[command.number] += 1
        return _NOTHING

    def _begin(self, together: Together) -> None:
        now = self.clock.now
        together.joined = Joined(now - FORM_S, now - FORM_S, now, now)
        self._next(together)

    def _next(self, together: Together) -> None:
        """A step boundary."""
        if together.over:
            return
        due = [number for number, told in together.told.items() if told == len(together.agents)]
        if due:
            together.over = True
            for agent in together.agents:
                agent.owed.pop("run").settle(Stopped(self._step, max(due)))
        else:
            self.later(STEP_S, lambda: self._commit(together))

    def _commit(self, together: Together) -> None:
        if together.over:
            return
        rows = len(self._worker_rows)
        now = self.clock.now
        self._reports.append(
            StepReport(
                serial=self._step + 1,
                step=self._step,
                generation=together.number,
                members=together.names,
                metrics={"loss": 1.0},
                rows=rows,
                worker_rows=self._worker_rows,
                worker_digests=self._worker_digests,
                skipped=None,
                held=0,
                compute_s=STEP_S,
                exchange_s=0.0,
                wait_s=0.0,
                speeds=tuple(self.random.uniform(0.97, 1.03) for _ in together.names),
                began=now - STEP_S,
                joined=together.joined,
                time=now,
            )
        )
        self._step += 1
        together.joined = None
        self._next(together)

    # -- deaths --------------------------------------------------------------------------------------------------------

    def kill(self, handle: Handle, told_s: float = DEATH_S) -> None:
        """An agent or a watcher dies."""
        handle.dead = True
        self.agents.pop(handle.name, None)
        owed, handle.owed = list(handle.owed.values()), {}

        def told() -> None:
            for promise in owed:
                promise.settle(error=RayActorError())

        self.later(told_s, told)

    def strike(self) -> None:
        """Some agent dies, and its peers lose their connections to it."""
        if not self.agents:
            return
        victim = self.agents[self.random.choice(list(self.agents))]
        self.deaths += 1
        together = self._together
        member = victim in together.agents and not together.over
        self.kill(victim)
        if member:
            together.over = True
            peers = [(a, a.owed["run"]) for a in together.agents if "run" in a.owed]
            self.later(self.random.uniform(*BREAK_S), lambda: self._lost(victim, peers))

    def _lost(self, victim: Handle, peers: Sequence[tuple[Handle, Promise]]) -> None:
        for agent, promise in peers:
            promise.settle(Left(victim.name))
            if agent.owed.get("run") is promise:
                del agent.owed["run"]

    # -- watchers ------------------------------------------------------------------------------------------------------

    def on_watch(self, watcher: Handle, name: str, *_: Any) -> Promise:
        """See `ray_dnn.watcher.Watcher`, as for all below."""
        self._watched.setdefault(watcher.node, set()).add(name)
        return self._answer(watcher, "watch", 0.001, True)

    def on_forget(self, watcher: Handle, name: str, *_: Any) -> Promise:
        self._watched[watcher.node].discard(name)
        return _NOTHING

    def on_kill(self, watcher: Handle, name: str) -> Promise:
        if name in self.agents:
            self.kill(self.agents[name])
        return _NOTHING

    def on_hurry(self, *_: Any) -> Promise:
        return _NOTHING

    def on_look(self, watcher: Handle, seconds: float) -> Promise:
        sights = tuple(Sight(n, True, False, 0.0, 0.0, 0.0, _STATUS) for n in self._watched.get(watcher.node, ()))
        return self._answer(watcher, "look", seconds, sights)

    # -- what Ray does -------------------------------------------------------------------------------------------------

    def ray(self) -> Any:
        """Stands in for the module `ray`."""

        def remote(_: type) -> Any:
            return SimpleNamespace(options=options)

        def options(scheduling_strategy: Any, **_: Any) -> Any:
            return SimpleNamespace(remote=lambda *_: Handle(self, "watcher", scheduling_strategy.node_id))

        context = SimpleNamespace(get_node_id=lambda: "driver")
        return SimpleNamespace(
            put=lambda value: value,
            kill=self.kill,
            wait=lambda references, **_: (references, []),
            remote=remote,
            get_runtime_context=lambda: context,
        )


class NoRows:
    """Stands in for `ray_dnn.feed.feed.Feed`."""

    def __init__(self, sources: Any, order: Any, schedule: Any, *_: Any):
        self.schedule = schedule

    def start(self) -> None:
        """See `Feed`, as for all below."""

    def news(self) -> News:
        return News()

    def committed(self, steps: int) -> None:
        pass

    def close(self) -> None:
        pass


class Scale(LineFile):
    """Counts what would be written.

    Attributes:
        bytes: so far.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, line: str) -> None:
        self.bytes += len(line) + 1

    def close(self) -> None:
        pass


class WeighingFolder(RunFolder):
    """Writes nothing.

    Attributes:
        files: that would be there, by kind.
    """

    def __init__(self, path: str):
        super().__init__(path, "run")
        self.files: dict[str, Scale] = {}

    def append_file(self, kind: str) -> LineFile:
        return self.files.setdefault(kind, Scale())


class Simulation:
    """A run of a job with ``agents`` agents in a simulated cluster.

    Args:
        workers: virtual ones.
        every_s: an agent dies so often, once all are there; 0: never.
        look: called after each simulated second.

    Attributes:
        world: the cluster.
        log: the run's event log.
        folder: what the run would have written.
        driver: of the run.
    """

    def __init__(
        self,
        agents: int,
        workers: int,
        every_s: float,
        look: Callable[[Simulation], None] = lambda _: None,
        seed: int = 0,
        least: int | None = None,
    ):
        self.world = World(workers, seed)
        self._agents, self._workers, self._every_s, self._look = agents, workers, every_s, look
        self._least = agents * 9 // 10 if least is None else least
        self.whole_at: float | None = None  # when all were there for the first time

    def run(self, seconds: float) -> Outcome:
        """Run for so long after all agents are there, in the cluster's time."""
        with tempfile.TemporaryDirectory() as path, self._made_up():
            self.folder = WeighingFolder(path)
            file = self.folder.append_file("events")
            self.log = EventLog((self._on_event, lambda event: file.write(event.to_json())))
            self._seconds = seconds
            self.driver = Driver(
                Job(None, _config(self._workers), DataParallel(), (), b""),  # type: ignore[arg-type]
                {"train": _rows(self._workers)},
                Size(self._least, self._agents, -1),
                Places({"CPU": 1.0}, "PACK", {}, {}),
                Patience(),
                self.folder,
                self.log,
                Past(),
            )
            outcome = self.driver.run()
            self.log.close()
            self.folder.close()
        return outcome

    def _on_event(self, event: Event) -> None:
        if isinstance(event, GenerationFormed):
            self.world.formed = event
            if self.whole_at is None and len(event.agents) == self._agents:
                self.whole_at = self.world.clock.now
                self.world.later(self._seconds, self.world.loop.end)
                self.world.later(1.0, self._second)
                if self._every_s:
                    self.world.later(self._every_s, self._strike)

    def _strike(self) -> None:
        self.world.strike()
        self.world.later(self._every_s, self._strike)

    def _second(self) -> None:
        self._look(self)
        self.world.later(1.0, self._second)

    @contextlib.contextmanager
    def _made_up(self) -> Iterator[None]:
        collects = gc.isenabled()
        gc.disable()
        world, ray = self.world, self.world.ray()
        instead: Mapping[str, Any] = {
            **{f"{module}.time": world.clock for module in _CLOCKED},
            **{f"{module}.ray": ray for module in ("driver", "fleet", "guard", "underway")},
            "driver.Loop": lambda: world.loop,
            "driver.Guard": partial(Guard, clock=world.clock.monotonic),
            "driver.Feed": NoRows,
            "driver.Checkpoints.watch_fence": lambda _: None,
            "draining.draining_nodes": dict,
            "sharing.waiting_minimums": dict,
            "sharing.free": dict,
            "fleet.Gang": partial(Gang, world),
            "fleet.alive_nodes": set,
            "fleet.nodes_with_room": lambda *_: set(),
            "fleet.room": str,
        }
        with contextlib.ExitStack() as stack:
            for name, value in instead.items():
                stack.enter_context(patch(f"ray_dnn.{name}", value))
            try:
                world.loop.later(COLLECT_S, world.collect)
                yield
            finally:
                if collects:
                    gc.enable()


def _config(workers: int) -> TrainConfig:
    return TrainConfig(batch_size=workers, virtual_workers=workers, steps=10**9)


def _rows(workers: int) -> Any:
    """Stands in for a `Source`."""
    counts = np.array([10 * workers])
    return SimpleNamespace(rows=10 * workers, held=False, units=[None], counts=counts)
