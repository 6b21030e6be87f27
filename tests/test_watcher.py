"""Hung agents, seen from outside: real processes and real signals, on one machine and on a Ray cluster.

The time in which a stand-in does nothing or burns CPU is a watcher's good time, which is counted, never slept.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from ray_dnn import guard as guards
from ray_dnn.guard import Guard
from ray_dnn.liveness import Patience, Sight
from ray_dnn.loop import Loop
from ray_dnn.phases import Phase, Status
from ray_dnn.watcher import StatusMemory, Watcher, own_start

STAND_IN = """
import ctypes, os, subprocess, sys, threading
from ray_dnn.phases import Phase, Status
from ray_dnn.watcher import StatusMemory, own_start

memory = StatusMemory()
memory.write(Status(Phase[sys.argv[1]], 2, 12, 5, 0))
print(os.getpid(), own_start(), memory.fd, flush=True)
lock = threading.Lock()
{what}
"""
BURNS_WITH_THE_GIL = "pow(3, 10**9)"
IDLE_WITH_THE_GIL = "ctypes.PyDLL(None).sleep(600)"
DEADLOCKED = "lock.acquire(); lock.acquire()"
MOVES = """
for step in range(10**9):
    memory.write(Status(Phase.COMPUTING, 2, step, step, 0))
    threading.Event().wait(0.2)
"""
CHILD_BURNS = "subprocess.run([sys.executable, '-c', 'while True: pass'])"


@contextlib.contextmanager
def stand_in(what: str, phase: Phase = Phase.COMPUTING) -> Iterator[tuple[int, int, int]]:
    """A process that looks like an agent in one phase. Yields what a watcher must be told of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAND_IN.format(what=what), phase.name],
        stdout=subprocess.PIPE,
        process_group=0,
        text=True,
        preexec_fn=lambda: os.nice(15),
    )
    assert process.stdout is not None
    try:
        pid, started, fd = map(int, process.stdout.readline().split())
        yield pid, started, fd
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def look_until(watcher: Watcher, right: Callable[[Sight], bool], seconds: float = 120.0) -> Sight:
    """What the watcher sees of its only agent as soon as that is right."""
    deadline = time.monotonic() + seconds
    while True:
        (sight,) = watcher.look(0.5)
        if right(sight):
            return sight
        assert time.monotonic() < deadline, f"after {seconds} s: {sight}"


def state_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def wait_for(done: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- one process -----------------------------------------------------------------------------------------------------


def test_a_stopped_process_is_found_and_killed_and_its_last_words_stay() -> None:
    watcher = Watcher(Patience())
    with stand_in(DEADLOCKED) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        watcher.look(0.0)
        os.kill(pid, signal.SIGSTOP)
        before = time.monotonic()
        told = look_until(watcher, lambda s: s.stopped)
        assert time.monotonic() - before < 2  # 0.4 on a machine that has time
        assert told.there  # it is told of before it is killed
        killed = look_until(watcher, lambda s: not s.there)
        assert killed.stopped
        assert killed.status == Status(Phase.COMPUTING, 2, 12, 5, 0)
    assert watcher.look(0.0) == (killed,)


def test_a_process_that_is_stopped_for_an_instant_only_is_left_alone() -> None:
    watcher = Watcher(Patience(stopped_s=0.5))
    with stand_in(DEADLOCKED) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        for _ in range(5):
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: state_of(pid) == "T")
            watcher.look(0.1)
            os.kill(pid, signal.SIGCONT)
            wait_for(lambda: state_of(pid) != "T")
            assert not watcher.look(0.1)[0].stopped


def test_a_stopped_process_that_is_forgotten_before_it_was_killed_is_killed_all_the_same() -> None:
    watcher = Watcher(Patience())
    with stand_in(DEADLOCKED) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        os.kill(pid, signal.SIGSTOP)
        look_until(watcher, lambda s: s.stopped)
        watcher.forget("a")
        wait_for(lambda: state_of(pid) == "Z")


def test_an_agent_can_be_killed_by_name() -> None:
    watcher = Watcher(Patience())
    with stand_in(MOVES) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        watcher.kill("nobody")
        watcher.kill("a")
        assert not look_until(watcher, lambda s: not s.there).stopped


@pytest.mark.parametrize("what", [BURNS_WITH_THE_GIL, CHILD_BURNS])
def test_a_process_that_burns_is_not_idle(what: str) -> None:
    watcher = Watcher(Patience())
    with stand_in(what) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        sight = look_until(watcher, lambda s: s.still_s > 2.5)
        assert sight.idle_s <= 1.5  # a child that is still being started


@pytest.mark.parametrize("what", [IDLE_WITH_THE_GIL, DEADLOCKED])
def test_a_process_that_neither_runs_nor_could_is_idle(what: str) -> None:
    watcher = Watcher(Patience())
    with stand_in(what) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        sight = look_until(watcher, lambda s: s.idle_s > 3)
        assert sight.idle_s <= sight.still_s
        assert sight.starting_s == 0


def test_an_agent_that_moves_is_not_idle_however_little_it_computes() -> None:
    watcher = Watcher(Patience())
    with stand_in(MOVES) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        steps = set()
        for _ in range(6):
            (sight,) = watcher.look(0.5)
            assert sight.idle_s <= sight.still_s < 1
            steps.add(sight.status.step)
        assert len(steps) > 2


def test_the_time_for_which_an_agent_waits_for_a_core_is_not_held_against_it() -> None:
    """Held to one core among others of higher priority, it gets next to nothing."""
    watcher, core = Watcher(Patience()), str(min(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as others, stand_in("while True: pass", Phase.BUILDING) as (pid, started, fd):
        os.sched_setaffinity(pid, {int(core)})
        assert watcher.watch("a", pid, started, fd)
        for _ in range(6):
            other = others.enter_context(
                subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", "while True: pass"])
            )
            others.callback(other.kill)
        watcher.look(1.5)
        (before,) = watcher.look(0.0)
        (after,) = watcher.look(5.0)
        others.close()
    assert after.idle_s == 0
    assert after.still_s - before.still_s < 2
    assert after.starting_s - before.starting_s < 2


def test_another_process_of_the_same_number_is_not_watched() -> None:
    watcher = Watcher(Patience())
    with stand_in(DEADLOCKED) as (pid, started, fd):
        assert not watcher.watch("a", pid, started - 1, fd)
        assert not watcher.watch("a", pid, started, 999)
        assert not watcher.watch("a", 2**22 + 1, started, fd)  # above the highest pid that Linux gives
        assert watcher.look(0.0) == ()


def test_descriptors_stay_bounded() -> None:
    watcher, memory = Watcher(Patience()), StatusMemory()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(2000):
        name = f"agent-{number % 7}"  # some are replaced without having been forgotten
        assert watcher.watch(name, os.getpid(), own_start(), memory.fd)
        assert not watcher.watch("a", os.getpid(), 1, memory.fd)
        assert not watcher.watch("a", os.getpid(), own_start(), 99999)
        if number % 2:
            watcher.forget(name)
        if number % 100 == 0:
            watcher.look(0.0)
    for number in range(7):
        watcher.forget(f"agent-{number}")
    assert len(os.listdir("/proc/self/fd")) == before


# -- good time -------------------------------------------------------------------------------------------------------


def test_time_in_which_the_watcher_did_not_run_does_not_count() -> None:
    now = 100.0
    watcher = Watcher(Patience(), clock=lambda: now)
    with stand_in(DEADLOCKED) as (pid, started, fd):
        assert watcher.watch("a", pid, started, fd)
        wait_for(lambda: state_of(pid) == "S")
        for _ in range(10):
            now += 3600
            (sight,) = watcher.look(0.0)
        assert 3 < sight.still_s <= 5
        assert sight.idle_s <= 5


WATCHING = """
import sys
from ray_dnn.liveness import Patience
from ray_dnn.watcher import Watcher

watcher = Watcher(Patience())
assert watcher.watch("a", *map(int, sys.argv[1:]))
while True:
    (sight,) = watcher.look(0.1)
    print(sight.stopped, flush=True)
"""


def test_a_watcher_frozen_along_with_an_agent_holds_nothing_against_it() -> None:
    with stand_in(DEADLOCKED) as (pid, started, fd):
        arguments = [sys.executable, "-c", WATCHING, str(pid), str(started), str(fd)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            try:
                lines = iter(watching.stdout.readline, "")
                assert next(lines) == "False\n"
                for _ in range(3):  # the watcher first and last: it sees the agent stopped both times, if it is quick
                    os.kill(pid, signal.SIGSTOP)
                    os.kill(watching.pid, signal.SIGSTOP)
                    wait_for(lambda: state_of(pid) == state_of(watching.pid) == "T")
                    frozen = time.monotonic()
                    wait_for(lambda: time.monotonic() - frozen > 1.5)  # noqa: B023 - it is called in this round
                    os.kill(watching.pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGCONT)
                    assert {next(lines) for _ in range(6)} == {"False\n"}
            finally:
                watching.kill()


def test_a_watcher_needs_neither_torch_nor_ray() -> None:
    code = "import sys, ray_dnn.watcher; sys.exit(bool({'torch', 'ray', 'numpy', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    code = """
import sys, ray_dnn
assert set(ray_dnn.__all__) <= set(dir(ray_dnn))
assert not {"torch", "ray"} & set(sys.modules)
for name in ray_dnn.__all__:
    assert getattr(ray_dnn, name).__name__ == name
from ray_dnn import *
assert Trainer is ray_dnn.Trainer
assert not hasattr(ray_dnn, "nothing")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- on a cluster ----------------------------------------------------------------------------------------------------


class StandIn:
    """An actor whose process looks like an agent."""

    def __init__(self, phase: Phase):
        self._memory = StatusMemory()
        self.write(Status(phase, 2, 12, 5, 0))

    def write(self, status: Status) -> None:
        self._memory.write(status)

    def run(self) -> None:
        """Never returns."""
        threading.Event().wait()

    def identity(self) -> tuple[str, int, int, int]:
        node = ray.get_runtime_context().get_node_id()
        return node, os.getpid(), own_start(), self._memory.fd


class Run:
    """A driver's loop with a guard in it, and what the guard told."""

    def __init__(self, patience: Patience, clock: Callable[[], float] = time.monotonic):
        self.loop = Loop()
        self.verdicts: list[tuple[str, str]] = []
        self.stalls: list[str] = []
        self.guard = Guard(
            self.loop,
            patience,
            lambda verdict: self.verdicts.append((str(verdict.name), verdict.reason)),
            lambda verdict: self.stalls.append(verdict.reason),
            clock,
        )
        self.actors: list[Any] = []
        self.pids: dict[str, int] = {}

    def add(self, name: str, phase: Phase) -> Any:
        actor = ray.remote(StandIn).options(num_cpus=0).remote(phase)
        node, pid, started, fd = ray.get(actor.identity.remote())
        self.guard.watch(name, node, pid, started, fd)
        self.actors.append(actor)
        self.pids[name] = pid
        return actor

    def until(self, done: Callable[[], bool], seconds: float = 60.0) -> None:
        """Run the loop until something is so."""
        deadline = time.monotonic() + seconds

        def check() -> None:
            if done() or time.monotonic() > deadline:
                self.loop.end()
            else:
                self.loop.later(0.02, check)

        self.loop._ended = False
        check()
        self.loop.run()
        assert done(), (self.verdicts, self.stalls)

    def seen(self, name: str) -> None:
        self.until(lambda: self.guard.last_words(name) is not None)

    def watcher_pids(self) -> list[int]:
        """Of the watchers' processes, found by what Ray calls them."""
        return [pid for pid, command in our_processes().items() if command.startswith("ray::Watcher")]


def our_processes() -> dict[int, str]:
    import conftest

    return conftest.our_processes()


@pytest.fixture
def run(cluster: None) -> Iterator[Callable[..., Run]]:
    """Makes runs. Nothing that one starts outlives the test."""
    made: list[Run] = []

    def make(*arguments: Any, **named: Any) -> Run:
        made.append(Run(*arguments, **named))
        return made[-1]

    yield make
    for one in made:
        one.guard.close()
        for actor in one.actors:
            ray.kill(actor)
        wait_for(lambda: not one.watcher_pids())  # noqa: B023 - it is called in this round
        wait_for(lambda: all(state_of(pid) == "gone" for pid in one.pids.values()))  # noqa: B023


def test_a_stopped_agent_is_named_before_ray_tells_of_its_death(run: Callable[..., Run]) -> None:
    one = run(Patience())
    stopped, healthy = one.add("a", Phase.COMPUTING), one.add("b", Phase.EXCHANGE_FIRST)
    one.seen("a")
    one.seen("b")
    dead: list[bool] = []
    one.loop.watch(stopped.run.remote(), lambda *_: dead.append(bool(one.verdicts)))
    os.kill(one.pids["a"], signal.SIGSTOP)
    one.until(lambda: bool(dead))
    assert one.verdicts == [("a", "has been stopped in computing, step 12")]
    assert dead == [True]
    ray.get(healthy.identity.remote())


def test_an_idle_agent_is_named_once_and_who_waits_for_it_is_not(run: Callable[..., Run]) -> None:
    one = run(Patience(idle_s=2, stalled_s=1))
    for name, phase in (("a", Phase.COMPUTING), ("b", Phase.EXCHANGE_FIRST)):
        one.add(name, phase)
    one.guard.in_generation(["a", "b"])
    one.until(lambda: bool(one.verdicts))
    ((name, reason),) = one.verdicts
    assert name == "a"
    assert "in computing, step 12" in reason
    looks = count_looks(one)
    one.until(lambda: looks() > 3)
    assert len(one.verdicts) == 1
    assert one.stalls == []


def count_looks(one: Run) -> Callable[[], int]:
    """How many answers have been worked on from now on."""
    count = 0
    original = one.guard._seen

    def counted(sights: tuple[Sight, ...]) -> None:
        nonlocal count
        count += 1
        original(sights)

    one.guard._seen = counted  # type: ignore[method-assign]
    return lambda: count


def test_a_stall_is_told_and_who_stays_deaf_is_named(run: Callable[..., Run]) -> None:
    one = run(Patience(stalled_s=1))
    moving, _ = one.add("a", Phase.EXCHANGE_FIRST), one.add("b", Phase.EXCHANGE_LAST)
    one.guard.in_generation(["a", "b"])
    one.until(lambda: bool(one.stalls))
    assert one.verdicts == []
    ray.get(moving.write.remote(Status(Phase.FORMING, 3, 12, 6, 0)))
    one.until(lambda: bool(one.verdicts))
    assert [name for name, _ in one.verdicts] == ["b"]
    assert len(one.stalls) == 1


def test_a_node_from_which_nothing_is_heard_is_silent(run: Callable[..., Run]) -> None:
    one = run(Patience(silent_s=1))
    one.add("a", Phase.EXCHANGE_FIRST)
    one.add("b", Phase.COMPUTING)
    one.seen("b")
    for pid in [*one.watcher_pids(), *one.pids.values()]:  # the watcher first: it has no time to see the others
        os.kill(pid, signal.SIGSTOP)
    one.until(lambda: len(one.verdicts) == 2)
    assert [name for name, _ in one.verdicts] == ["a", "b"]
    assert all("nothing was heard from node" in reason for _, reason in one.verdicts)
    for name in ("a", "b"):
        one.guard.forget(name)
    one.add("c", Phase.COMPUTING)  # on the same node, which gets another watcher
    one.seen("c")
    assert len(one.verdicts) == 2


def test_a_driver_that_was_frozen_calls_nobody_silent(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        return time.monotonic() + now

    one = run(Patience(silent_s=2), clock=clock)
    one.add("a", Phase.COMPUTING)
    one.seen("a")
    looks = count_looks(one)
    for _ in range(10):
        now += 60  # the loop stood still for a minute: each time a tick comes late, and then the answer
        before = looks()
        one.until(lambda: looks() > before)  # noqa: B023 - it is called in this round
    assert one.verdicts == []


def test_a_watcher_that_died_is_followed_by_another(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guards, "_AGAIN_S", 0.1)
    one = run(Patience())
    one.add("a", Phase.COMPUTING)
    one.seen("a")
    (first,) = one.watcher_pids()
    with open(f"/proc/{first}/maps") as file:
        assert "torch" not in file.read()  # it would cost memory on each node, and seconds at the start
    os.kill(first, signal.SIGKILL)
    one.until(lambda: "is gone, a new one starts" in caplog.text)
    looks = count_looks(one)
    one.until(lambda: looks() > 0)
    os.kill(one.pids["a"], signal.SIGSTOP)
    one.until(lambda: bool(one.verdicts))
    assert one.verdicts[0][0] == "a"


def test_an_agent_that_cannot_be_seen_is_worth_one_warning(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guards, "_UNSEEN_S", 0.1)
    one = run(Patience(stalled_s=0.5))
    one.add("a", Phase.EXCHANGE_FIRST)
    one.guard.watch("b", ray.get_runtime_context().get_node_id(), os.getpid(), 1, 0)
    one.guard.in_generation(["a", "b"])
    one.until(lambda: "b (pid" in caplog.text)
    looks = count_looks(one)
    one.until(lambda: looks() > 3)
    assert caplog.text.count("cannot be watched") == 1
    assert one.guard.last_words("b") is None
    assert one.verdicts == []
    assert one.stalls == []


def test_an_agent_is_killed_through_its_watcher(run: Callable[..., Run]) -> None:
    one = run(Patience())
    actor = one.add("a", Phase.READING)
    one.seen("a")
    assert one.guard.last_words("a") == "reading, step 12"
    one.guard.kill("a")
    gone: list[Exception | None] = []
    one.loop.watch(actor.run.remote(), lambda _, error: gone.append(error))
    one.until(lambda: bool(gone))
    assert isinstance(gone[0], ray.exceptions.RayActorError)
    assert one.guard.last_words("a") == "reading, step 12"
    one.guard.forget("a")
    assert one.guard.last_words("a") is None


def test_an_agent_that_is_killed_and_forgotten_at_once_is_dead(run: Callable[..., Run]) -> None:
    one = run(Patience())
    one.add("a", Phase.READING)
    one.seen("a")
    os.kill(one.pids["a"], signal.SIGSTOP)
    one.guard.kill("a")
    one.guard.forget("a")
    wait_for(lambda: state_of(one.pids["a"]) == "gone")
