"""The driver's side of checkpoints, with agents that do as the test says: when they are taken, and who writes them."""

import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
from ray.exceptions import ActorDiedError
from ray.train import CheckpointConfig

from ray_dnn.agent import Failed
from ray_dnn.checkpoint import MANIFEST, File, Manifest, Place, verify
from ray_dnn.checkpoints import Checkpoints
from ray_dnn.engine.saving import Taken
from ray_dnn.events import CheckpointFailed, CheckpointsLate, CheckpointStays, CheckpointWritten, EventLog
from ray_dnn.storage import RunFolder

Done = Callable[[Any, Exception | None], None]


class Agent:
    """Answers when the test says so. ``dead``: it answers as Ray does for it then."""

    def __init__(self) -> None:
        self.dead = False
        self.dropped = 0
        self.waiting: dict[str, list[tuple[Future[Any], tuple[Any, ...]]]] = {"taken": [], "write": []}
        for name in ("taken", "write", "drop", "hand_over"):
            setattr(self, name, SimpleNamespace(remote=lambda *given, name=name: self._call(name, *given)))

    def _call(self, name: str, *given: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        if name == "drop":
            self.dropped = max(self.dropped, given[0])
        elif self.dead:
            answer.set_exception(ActorDiedError())
        elif name == "hand_over":
            answer.set_result({f"part-{given[1]}": b"data"})
        else:
            self.waiting[name].append((answer, given))
        return answer

    def die(self) -> None:
        self.dead = True
        for calls in self.waiting.values():
            while calls:
                calls.pop()[0].set_exception(ActorDiedError())

    def take(self, taken: Taken) -> None:
        self.waiting["taken"].pop()[0].set_result(taken)

    def write_all(self) -> None:
        """Write the one file that is up to each replica, for whom it was asked to."""
        while self.waiting["write"]:
            answer, (_, writer, place) = self.waiting["write"].pop()
            answer.set_result({f"part-{writer}": place.write(f"part-{writer}", b"data")})


class Loop:
    """Runs what it is given at once, and what is to be done later when it is told to."""

    def __init__(self) -> None:
        self.coming: list[Callable[[], None]] = []

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.coming.append(call)

    def post(self, call: Callable[[], None]) -> None:
        call()

    def watch(self, reference: Future[Any], done: Done) -> None:
        reference.add_done_callback(
            lambda answer: done(None, answer.exception()) if answer.exception() else done(answer.result(), None)
        )

    def gather(self, references: list[Future[Any]], done: Done) -> None:
        def one(_: Any, error: Exception | None) -> None:
            if error is not None:
                done(None, error)
            elif all(reference.done() for reference in references):
                done([reference.result() for reference in references], None)

        for reference in references:
            self.watch(reference, one)

    def go_on(self) -> None:
        coming, self.coming = self.coming, []
        for call in coming:
            call()


class Run:
    """Checkpoints, and a driver for them: whose agents run, have stopped, or are being replaced."""

    def __init__(self, path: Path, every: int | timedelta | None, agents: int = 3, keep: int | None = None):
        self.folder = RunFolder(str(path), "run", pyarrow.fs.LocalFileSystem())
        self.folder.claim()
        self.folder.do = self._do  # type: ignore[method-assign]
        self.told: list[Any] = []
        self.loop, self.log = Loop(), EventLog((self.told.append,))
        self.agents = [Agent() for _ in range(agents)]
        self.ordered: list[tuple[int, int, int]] = []  # number, every, at_step
        self.pauses = 0
        self.running = True
        self.lost: list[Exception] = []
        self.refuses = False
        self.recorder: Any = SimpleNamespace(
            steps=0,
            units={},
            skipped_before=lambda step: 0,
            flush=lambda: None,
            failing_since=None,
            unwritten=lambda: ("ledger-0001.000001.jsonl", b"lines"),
        )
        job: Any = SimpleNamespace(replica_size=1)
        self.checkpoints = Checkpoints(
            self.loop,
            self.log,
            self.folder,
            job,
            self.recorder,
            every,
            CheckpointConfig(keep),
            self,  # type: ignore[arg-type]
        )

    def _do(self, call: Callable[[], Any]) -> Future[Any]:
        answer: Future[Any] = Future()
        try:
            if self.refuses:
                raise OSError("the disk is full")
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)
        return answer

    def order_snapshot(self, every: int, at_step: int, reason: str) -> Any:
        if not self.running:
            return None
        self.ordered.append((len(self.ordered) + 1, every, at_step))
        return len(self.ordered), [SimpleNamespace(agents=[agent]) for agent in self.agents]

    def order_pause(self) -> None:
        self.pauses += 1

    def on_reports(self, reports: Any) -> None:
        pass

    def on_storage_lost(self, error: Exception) -> None:
        self.lost.append(error)

    def step(self, steps: int) -> None:
        self.recorder.steps = steps
        self.checkpoints.stepped()

    def take(self, step: int) -> None:
        """All agents take the snapshot that they were asked for, before a step."""
        for rank, agent in enumerate(self.agents):
            agent.take(Taken(step, [], len(self.agents), rank, {}, []))

    def write(self) -> None:
        for agent in self.agents:
            agent.write_all()

    def events(self, kind: type) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]


def test_the_next_one_is_asked_for_when_the_last_one_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    run.checkpoints.look()
    assert run.ordered == [(1, 5, 1)]
    run.take(5)
    run.step(4)  # the steps before are not on record yet
    run.write()
    assert not run.events(CheckpointWritten)
    run.step(6)
    (event,) = run.events(CheckpointWritten)
    manifest = Manifest.read(Place.of(event.path))
    assert (manifest.step, sorted(manifest.files)) == (5, ["part-0", "part-1", "part-2"])
    assert run.ordered == [(1, 5, 1), (2, 5, 6)]
    assert [agent.dropped for agent in run.agents] == [1, 1, 1]


def test_a_storage_that_is_slower_than_the_schedule_leaves_some_out_and_says_so_once(tmp_path: Path) -> None:
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    for step in (5, 20, 35):
        run.take(step)
        run.step(step + 7)
        run.write()
    assert [(e.step, e.now) for e in run.events(CheckpointsLate)] == [(5, 12)]
    assert [e.step for e in run.events(CheckpointWritten)] == [5, 20, 35]


def test_what_is_wanted_now_does_not_wait_for_what_is_due_later(tmp_path: Path) -> None:
    run, told = Run(tmp_path, every=1000), list[str]()
    run.checkpoints.look()
    run.checkpoints.want(told.append)
    assert run.ordered == [(1, 1000, 1), (2, 1, 0)]
    run.take(3)
    run.step(3)
    run.write()
    assert told == [run.events(CheckpointWritten)[0].path]


def test_time_may_be_the_schedule(tmp_path: Path) -> None:
    run = Run(tmp_path, every=timedelta(minutes=5))
    run.checkpoints.look()
    assert not run.ordered
    run.loop.go_on()
    assert run.ordered == [(1, 1, 0)]


def test_the_parts_of_one_that_dies_are_written_by_its_neighbour(tmp_path: Path) -> None:
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    run.take(5)
    run.step(5)
    run.agents[2].die()
    run.write()
    assert [e.step for e in run.events(CheckpointWritten)] == [5]


def test_what_dies_with_two_neighbours_is_begun_again(tmp_path: Path) -> None:
    run, told = Run(tmp_path, every=None), list[str]()
    run.checkpoints.want(told.append)
    run.take(5)
    run.step(5)
    run.agents[0].die()
    run.agents[1].die()
    run.write()
    assert not told
    run.agents = [Agent(), Agent()]
    run.loop.go_on()
    run.take(9)
    run.step(9)
    run.write()
    assert told == [run.events(CheckpointWritten)[0].path]


def test_when_none_is_completed_again_and_again_the_agents_stop_for_one(tmp_path: Path) -> None:
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    for step in (5, 10, 15):
        assert not run.pauses
        run.take(step)
        for agent in run.agents:
            agent.die()
        run.agents = [Agent() for _ in range(3)]
        run.loop.go_on()
    assert run.pauses == 1
    run.checkpoints.look()  # they run meanwhile, and try
    run.take(20)
    run.step(20)
    run.write()
    assert [e.step for e in run.events(CheckpointWritten)] == [20]


def test_what_was_never_completed_is_cleared_away_when_one_is(tmp_path: Path) -> None:
    older = RunFolder(str(tmp_path), "run")
    older.claim()
    for step, manifest in ((5, True), (10, False)):
        place = older.place.below(f"checkpoint-0001-{step:09d}")
        place.make()
        place.write(MANIFEST if manifest else "part-0", b"data")
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    run.take(15)
    run.step(15)
    assert [name[-2:] for name in run.folder.checkpoints()] == ["05", "10", "15"]
    run.write()
    assert [name[-2:] for name in run.folder.checkpoints()] == ["05", "15"]


def test_what_cannot_be_deleted_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, every=5, keep=1)
    run.checkpoints.look()
    monkeypatch.setattr(run.checkpoints, "_delete", lambda place: (_ for _ in ()).throw(OSError("denied")))
    for step in (5, 10, 15):
        if step == 15:
            monkeypatch.undo()
        run.take(step)
        run.step(step)
        run.write()
    assert [e.checkpoint[-2:] for e in run.events(CheckpointStays)] == ["05"]
    assert [name[-2:] for name in run.folder.checkpoints()] == ["15"]
    assert [kept.step for kept in run.checkpoints.kept] == [15]


def test_what_the_storage_refuses_is_tried_again(tmp_path: Path) -> None:
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    run.refuses = True
    run.take(5)
    assert [e.reason for e in run.events(CheckpointFailed)] == ["OSError: the disk is full"]
    run.checkpoints.look()
    assert len(run.ordered) == 1
    run.refuses = False
    run.loop.go_on()
    run.take(8)
    run.step(8)
    run.agents[0].waiting["write"].pop()[0].set_result(Failed(OSError("quota exceeded")))
    assert len(run.events(CheckpointFailed)) == 2
    run.loop.go_on()
    for agent in run.agents:
        agent.waiting["write"].clear()
    run.take(9)
    run.step(9)
    run.write()
    assert [e.step for e in run.events(CheckpointWritten)] == [9]
    assert not run.lost


@pytest.mark.parametrize("dead", [(), (1,), (0, 1)], ids=["all alive", "one dead", "two neighbours dead"])
def test_a_storage_that_stays_away_ends_the_run_with_its_state_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: tuple[int, ...]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    run = Run(tmp_path / "runs", every=5)
    run.checkpoints.look()
    run.refuses = True
    run.take(5)
    assert not run.lost
    monkeypatch.setattr("ray_dnn.checkpoints._GIVE_UP_S", 0.0)
    run.loop.go_on()
    for rank in dead:
        run.agents[rank].dead = True
        run.agents[rank].waiting["taken"][0][0].set_result(Taken(7, [], 3, rank, {}, []))
    for rank in {0, 1, 2} - {*dead}:
        run.agents[rank].take(Taken(7, [], 3, rank, {}, []))
    (error,) = run.lost
    if len(dead) == 2:
        assert "The state was lost" in str(error)
        return
    said = re.search(r"The state after step 7 is in (\S+) on \S+: move all", str(error))
    assert said is not None
    rescued = Path(said[1])
    assert (rescued / "ledger-0001.000001.jsonl").read_bytes() == b"lines"
    (checkpoint,) = rescued.glob("checkpoint-*")
    manifest = Manifest.read(Place.of(checkpoint))
    verify(Place.of(checkpoint), manifest)
    assert (manifest.step, sorted(manifest.files)) == (7, ["part-0", "part-1", "part-2"])


def test_what_is_gone_already_counts_as_deleted(tmp_path: Path) -> None:
    run = Run(tmp_path, every=5, keep=1)
    run.checkpoints.look()
    for step in (5, 10):
        if step == 10:
            (folder,) = run.folder.checkpoints()
            shutil.rmtree(f"{run.folder.path}/{folder}")
        run.take(step)
        run.step(step)
        run.write()
    assert not run.events(CheckpointStays)
    assert [kept.step for kept in run.checkpoints.kept] == [10]


def test_a_full_disk_ends_the_run_once_and_says_so_if_there_is_no_other_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    run.take(5)
    monkeypatch.setattr("ray_dnn.checkpoints._GIVE_UP_S", -1.0)
    monkeypatch.setattr("ray_dnn.checkpoints.mkdtemp", lambda prefix: str(tmp_path / "run" / "attempt-0001"))
    (tmp_path / "run" / "attempt-0001").write_text("a file")
    for agent in run.agents:
        agent.waiting["write"].pop()[0].set_result(Failed(OSError("no space left")))
    (error,) = run.lost
    assert "could not be written" in str(error)
    assert "no space left" in str(error)


def test_files_that_only_agents_can_see_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, every=5, agents=1)
    run.checkpoints.look()
    run.take(5)
    run.step(5)
    run.agents[0].waiting["write"].pop()[0].set_result({"elsewhere": File(3, "")})
    (error,) = run.lost
    assert "elsewhere was written by an agent, and is not there for the driver" in str(error)


@pytest.mark.parametrize("moment", ["asked for", "being written"])
def test_a_newer_attempt_fences_the_older_one_out(tmp_path: Path, moment: str) -> None:
    run = Run(tmp_path, every=5)
    run.checkpoints.look()
    newer = RunFolder(str(tmp_path), "run")
    if moment == "asked for":
        newer.claim()
        run.checkpoints.watch_fence()
    else:
        run.take(5)
        run.step(5)
        newer.claim()
        run.write()
    (error,) = run.lost
    assert "there is an attempt 2" in str(error)
    assert not run.events(CheckpointWritten)
