"""The driver's side of checkpoints: when one is taken, who writes it, and when it counts.

Theory of operation
-------------------
1. **Ask.** The driver's decision to take a snapshot travels like any other: all agents take it before the same step,
   and go on. Each has copied its parts (see `ray_dnn.engine.saving`). Where a generation ends before all have told that
   they have it, it is asked for anew in the next one.
2. **Write.** Each agent writes its parts. If one dies, the other agent that has them writes them.
3. **Commit.** When all files are there, as this process sees them, and all steps before are on record, the manifest is
   written, unless a newer attempt of the run has been started meanwhile.

Only one is under way at a time: if writing is slower than the schedule, checkpoints are left out, and that is said.
Where agents die so often that none is completed, the driver has the others stop for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from socket import gethostname
from tempfile import mkdtemp
from typing import Any, Protocol

from ray.exceptions import RayActorError
from ray.train import CheckpointConfig

from ray_dnn.agent import Failed, Job
from ray_dnn.checkpoint import MANIFEST, File, Manifest, Place
from ray_dnn.engine.reports import Report
from ray_dnn.engine.saving import Taken
from ray_dnn.errors import CheckpointError, FencedError, ProtocolError
from ray_dnn.events import CheckpointFailed, CheckpointsLate, CheckpointStays, CheckpointWritten, EventLog
from ray_dnn.fleet import Replica
from ray_dnn.identity import Identity
from ray_dnn.loop import Loop
from ray_dnn.recorder import Recorder
from ray_dnn.storage import CHECKPOINT, RunFolder

_MOST_LOST = 3  # checkpoints in a row that were not completed for agents died, before the others stop for one
_AGAIN_S, _AGAIN_MAX_S = 2.0, 60.0  # until one that the storage refused is tried again
_SOON_S = 0.5  # until one that died with its agents is begun again
_GIVE_UP_S = 600.0  # of a storage that refuses

Then = Callable[[str], None]


class Owner(Protocol):
    """Who takes the decisions: the driver."""

    def order_snapshot(self, every: int, at_step: int, reason: str) -> tuple[int, list[Replica]] | None:
        """Have the agents take a snapshot. Returns its number and who takes it; None: there is nobody just now.

        It is taken before the first step from ``at_step`` on that is a multiple of ``every``, or where they have
        stopped.
        """

    def order_pause(self) -> None:
        """Have the agents stop until one is completed."""

    def on_reports(self, reports: list[Report]) -> None:
        """Agents have committed this, of which the driver may not have heard."""

    def on_storage_lost(self, error: Exception) -> None:
        """The storage does not take what the run has to keep."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint that counts."""

    name: str
    step: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, place: Place, step: int, history: Sequence[dict[str, float]]) -> Kept:
        """One in a folder. ``history``: evaluations until then, of which the last one tells how good it is."""
        return cls(place.name, step, dict(history[-1]) if history else {})


@dataclass
class _Attempt:
    """A checkpoint under way.

    Attributes:
        number: of its snapshot.
        members: who has it.
        then: who wants to know where it is.
        taken: what it is of, once all have it.
        place: where it is written.
        index, files: see `Taken` and `Manifest`.
        writing: calls to agents that have not been answered.
        committing: whether the manifest is being written.
    """

    number: int
    members: list[Replica]
    then: list[Then]
    began: float = field(default_factory=time.perf_counter)
    taken: Taken | None = None
    place: Place | None = None
    index: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    writing: int = 0  # agents
    committing: bool = False


class Checkpoints:
    """The checkpoints of an attempt of a run.

    Attributes:
        kept: those that count, of earlier attempts too, in the order of their steps.
    """

    def __init__(
        self,
        loop: Loop,
        log: EventLog,
        folder: RunFolder,
        job: Job,
        recorder: Recorder,
        every: int | timedelta | None,
        keep: CheckpointConfig,
        owner: Owner,
    ):
        self._loop, self._log, self._folder, self._job = loop, log, folder, job
        self._recorder, self._every, self._keep, self._owner = recorder, every, keep, owner
        self._identity: Identity = {}
        self._attempt: _Attempt | None = None
        self._wanted: list[Then] = []  # by whom, besides the schedule
        self._due = False  # whether the schedule wants one, if that goes by time
        self._digest = ""  # of the weights that the run ends with, once it has ended
        self._lost = 0  # in a row
        self._paused_for = 0  # so many lost ones the agents have stopped already
        self._litter = True  # whether there may be folders of checkpoints that were never completed
        self._late = False  # whether it has been said that some are left out
        self._failing: float | None = None  # since when the storage refuses
        self._again_s = _AGAIN_S
        self._resting = False  # until it is tried again
        self._closed = False
        self.kept: list[Kept] = []
        if isinstance(every, timedelta):
            self._loop.later(every.total_seconds(), self._on_time)

    def identify(self, identity: Identity) -> None:
        """What the job is."""
        self._identity = identity

    @property
    def newest_step(self) -> int | None:
        """Of the last one that counts."""
        return self.kept[-1].step if self.kept else None

    # -- when ----------------------------------------------------------------------------------------------------------

    def want(self, then: Then) -> None:
        """Take one as soon as possible. ``then`` is told where it is."""
        self.interrupted()  # what is only due later
        self._wanted.append(then)
        self.look()

    def take_last(self, digest: str, then: Then) -> None:
        """Take one of agents that have stopped. ``digest``: of the weights that the run ends with."""
        self._digest = digest
        present = self._attempt
        if present is not None and present.taken is not None and present.taken.step == self._recorder.steps:
            present.then.append(then)
        else:
            self.want(then)

    def _on_time(self) -> None:
        assert isinstance(self._every, timedelta)
        if not self._closed:
            self._due = True
            self._loop.later(self._every.total_seconds(), self._on_time)
            self.look()

    def look(self) -> None:
        """Ask for the next one, unless one is under way. Called whenever agents have begun to run."""
        if self._attempt is not None or self._closed or self._resting:
            return
        at_once = bool(self._wanted or self._due)
        if not at_once and not isinstance(self._every, int):
            return
        if self._lost >= _MOST_LOST and self._paused_for != self._lost:
            self._paused_for = self._lost
            self._owner.order_pause()
            return
        if at_once or not isinstance(self._every, int):
            every, at_step, reason = 1, 0, "wanted now"
        else:
            last = self.newest_step or 0
            every, at_step, reason = self._every, last + 1, f"every {self._every} steps"
        ordered = self._owner.order_snapshot(every, at_step, reason)
        if ordered is not None:
            number, members = ordered
            attempt = self._attempt = _Attempt(number, members, self._wanted)
            self._wanted, self._due = [], False
            asked = [agent.taken.remote(number) for r in members for agent in r.agents]
            self._loop.gather(asked, lambda taken, error: self._on_taken(attempt, taken, error))

    def interrupted(self) -> None:
        """What not all have told that they have is not waited for: a generation is over, or it can be had sooner."""
        if self._attempt is not None and self._attempt.taken is None:
            self._abandon()

    def _abandon(self) -> None:
        """Forget about the one under way; who wanted it still does."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._litter = True
            self._wanted = attempt.then + self._wanted
            self._drop(attempt)

    def _drop(self, attempt: _Attempt) -> None:
        for replica in attempt.members:
            for agent in replica.agents:
                agent.drop.remote(attempt.number)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _on_taken(self, attempt: _Attempt, taken: list[Taken] | None, error: Exception | None) -> None:
        if attempt is not self._attempt:
            return
        if error is not None:
            if not isinstance(error, RayActorError):
                raise error
            self._on_incomplete()
            return
        assert taken is not None
        if len({(t.step, t.replicas) for t in taken}) > 1:
            raise ProtocolError(f"a snapshot was taken at different places: {taken}")
        self._owner.on_reports(taken[0].reports)
        attempt.taken, attempt.index = taken[0], {n: d for t in taken for n, d in t.index.items()}
        place = attempt.place = self._folder.place.below(self._name(taken[0].step))
        if self.kept and self.kept[-1].name == place.name:
            self._on_counts(attempt, place.path)
            return
        self._follow(
            self._folder.do(place.make),
            lambda error: self._write(attempt) if error is None else self._on_refused(attempt, error),
        )

    def _name(self, step: int) -> str:
        return f"{CHECKPOINT}-{self._folder.attempt:04d}-{step:09d}"

    def _write(self, attempt: _Attempt) -> None:
        if attempt is self._attempt:
            attempt.writing = sum(len(replica.agents) for replica in attempt.members)
            for writer, replica in enumerate(attempt.members):
                for rank in range(len(replica.agents)):
                    self._have_written(attempt, rank, writer, writer)

    def _have_written(self, attempt: _Attempt, rank: int, writer: int, by: int) -> None:
        """Have what is up to one replica written ``by`` one that has it."""
        agent = attempt.members[by].agents[rank]

        def done(files: dict[str, File] | Failed | None, error: Exception | None) -> None:
            if attempt is not self._attempt:
                return
            if isinstance(error, RayActorError):
                second = (writer + 1) % len(attempt.members)
                if by == second:
                    self._on_incomplete()
                else:
                    self._have_written(attempt, rank, writer, second)
            elif isinstance(files, Failed):
                self._on_refused(attempt, files.error)
            elif error is not None:
                raise error
            else:
                assert files is not None
                attempt.files |= files
                attempt.writing -= 1
                self.stepped()

        self._loop.watch(agent.write.remote(attempt.number, writer, attempt.place), done)

    def _on_incomplete(self) -> None:
        """Agents have died that were needed. The others form a generation first, if it was one of theirs."""
        self._lost += 1
        self._abandon()
        self._loop.later(_SOON_S, self.look)

    # -- counting ------------------------------------------------------------------------------------------------------

    def stepped(self) -> None:
        """A file has been written, or a step recorded."""
        attempt = self._attempt
        if attempt is None or attempt.taken is None or attempt.place is None or attempt.writing or attempt.committing:
            return
        if not attempt.files or self._recorder.steps < attempt.taken.step:
            return
        attempt.committing = True
        manifest = self._manifest(attempt.taken, attempt.files)
        self._recorder.flush()
        place, index = attempt.place, attempt.index
        committed = self._folder.do(lambda: self._commit(place, manifest, index))
        self._follow(committed, lambda error: self._on_committed(attempt, error))

    def _commit(self, place: Place, manifest: Manifest, index: dict[str, bytes]) -> None:
        """On the thread that writes."""
        missing = _not_there(place, manifest.files)
        if missing:
            raise CheckpointError(
                f"{place.path}/{missing} was written by an agent, and is not there for the driver. storage_path must "
                "be the same storage on every node: a shared folder, or an object store."
            )
        files = {name: place.write(name, data) for name, data in index.items()}
        self._check_fence()
        if self._recorder.failing_since is not None:  # its lines of the steps before come first
            raise OSError("the ledger cannot be written")
        place.write(MANIFEST, replace(manifest, files=manifest.files | files).to_json())

    def _check_fence(self) -> None:
        newer = self._folder.newer()
        if newer is not None:
            raise FencedError(
                f"The run in {self._folder.path} was started again meanwhile: this is attempt {self._folder.attempt}, "
                f"there is an attempt {newer}. This one ends, and changes nothing any more."
            )

    def watch_fence(self) -> None:
        """End this attempt soon after another one has been started."""
        if not self._closed:
            self._follow(self._folder.do(self._check_fence), self._on_fence)

    def _on_fence(self, error: Exception | None) -> None:
        if isinstance(error, FencedError):
            self._owner.on_storage_lost(error)

    def _follow(self, done: Future[None], then: Callable[[Exception | None], None]) -> None:
        """Go on in the driver's thread when the other one has done something."""

        def finished(future: Future[None]) -> None:
            error = future.exception()
            known = error if error is None or isinstance(error, Exception) else RuntimeError(repr(error))
            self._loop.post(lambda: then(known))

        done.add_done_callback(finished)

    def _on_committed(self, attempt: _Attempt, error: Exception | None) -> None:
        assert attempt.taken is not None
        assert attempt.place is not None
        if attempt is not self._attempt:
            return
        if error is not None:
            self._on_refused(attempt, error)
            return
        step, path = attempt.taken.step, attempt.place.path
        self.kept.append(Kept.of(attempt.place, step, attempt.taken.history))
        self._log.add(CheckpointWritten(step, path, time.perf_counter() - attempt.began))
        self._retain()
        if self._litter:
            self._litter = False
            self._follow(self._folder.do(partial(self._clear, step)), self._on_cleared)
        late = self._every is not None and isinstance(self._every, int) and self._recorder.steps >= step + self._every
        if late and not self._late:
            self._log.add(CheckpointsLate(step, self._recorder.steps))
        self._late = late
        self._on_counts(attempt, path)

    def _on_counts(self, attempt: _Attempt, path: str) -> None:
        """There is a checkpoint of what was to be written."""
        self._attempt = None
        self._lost, self._paused_for, self._failing, self._again_s = 0, 0, None, _AGAIN_S
        self._drop(attempt)
        for then in attempt.then:
            then(path)
        self.look()

    def _on_refused(self, attempt: _Attempt, error: Exception) -> None:
        """The storage does not take it."""
        if attempt is not self._attempt:
            return
        step = attempt.taken.step if attempt.taken else self._recorder.steps
        if not isinstance(error, OSError):
            self._owner.on_storage_lost(error)
            return
        now = time.monotonic()
        self._failing = self._failing or now
        if now - self._failing > _GIVE_UP_S:
            self._rescue(attempt, error)
            return
        self._log.add(CheckpointFailed(step, f"{type(error).__name__}: {error}", self._again_s))
        self._abandon()
        self._resting = True
        self._loop.later(self._again_s, self._on_rested)
        self._again_s = min(2 * self._again_s, _AGAIN_MAX_S)

    def _on_rested(self) -> None:
        self._resting = False
        self._due = True
        self.look()

    def _rescue(self, attempt: _Attempt, error: Exception) -> None:
        """The storage stays away: write what there is where this process is, and end the run."""
        assert attempt.taken is not None
        self._attempt, self._closed = None, True  # whatever else is answered
        taken = attempt.taken
        rescued = dict(attempt.index)
        why = f"The storage of {self._folder.path} has refused for {_GIVE_UP_S / 60:.0f} minutes: {error}."
        coming = {(writer, rank) for writer, r in enumerate(attempt.members) for rank in range(len(r.agents))}

        def ask(writer: int, rank: int, by: int) -> None:
            self._loop.watch(
                attempt.members[by].agents[rank].hand_over.remote(attempt.number, writer),
                lambda parts, failed: handed(writer, rank, by, parts, failed),
            )

        def handed(writer: int, rank: int, by: int, parts: Any, failed: Exception | None) -> None:
            second = (writer + 1) % len(attempt.members)
            if isinstance(parts, dict):
                rescued.update(parts)
                coming.remove((writer, rank))
                if not coming:
                    self._owner.on_storage_lost(CheckpointError(f"{why} {self._tell_rescued(taken, rescued)}"))
            elif by != second:
                ask(writer, rank, second)
            else:
                self._owner.on_storage_lost(CheckpointError(f"{why} The state was lost: {failed or parts}"))

        for writer, rank in list(coming):
            ask(writer, rank, writer)

    def _tell_rescued(self, taken: Taken, parts: dict[str, bytes]) -> str:
        try:
            return self._write_here(taken, parts)
        except OSError as error:
            return f"The state could not be written on {gethostname()} either: {error}."

    def _write_here(self, taken: Taken, parts: dict[str, bytes]) -> str:
        """Write a checkpoint, and what the ledger lacks, to this process's machine. Returns what to say of it."""
        folder = Place.of(Path(mkdtemp(prefix=f"ray_dnn-{self._folder.place.name}-")))
        place = folder.below(self._name(taken.step))
        place.make()
        files = {name: place.write(name, data) for name, data in parts.items()}
        place.write(MANIFEST, self._manifest(taken, files).to_json())
        folder.write(*self._recorder.unwritten())
        return (
            f"The state after step {taken.step} is in {folder.path} on {gethostname()}: move all that is there into "
            "the run's folder and start the run again."
        )

    def _manifest(self, taken: Taken, files: dict[str, File]) -> Manifest:
        return Manifest(
            step=taken.step,
            attempt=self._folder.attempt,
            job=self._identity,
            files=files,
            history=taken.history,
            skipped=self._recorder.skipped_before(taken.step),
            units=self._recorder.units,
            replica_size=self._job.replica_size,
            weights_digest=self._digest,
        )

    # -- letting go ----------------------------------------------------------------------------------------------------

    def _retain(self) -> None:
        """Delete what is not to be kept."""
        spare = retire(self.kept, self._keep)
        self.kept = [kept for kept in self.kept if kept not in spare]
        for kept in spare:
            deleted = self._folder.do(partial(self._delete, self._folder.place.below(kept.name)))
            self._follow(deleted, partial(self._on_deleted, kept))

    def _delete(self, place: Place) -> None:
        """On the thread that writes. The manifest goes first: what is left of a checkpoint is none."""
        if self._folder.newer() is None:
            there = place.sizes(missing=True)
            if MANIFEST in there:
                place.filesystem.delete_file(f"{place.path}/{MANIFEST}")
            if there:
                place.filesystem.delete_dir(place.path)

    def _on_deleted(self, kept: Kept, error: Exception | None) -> None:
        if error is not None:
            self._log.add(CheckpointStays(kept.name, f"{type(error).__name__}: {error}"))
            self.kept = sorted([*self.kept, kept], key=lambda k: k.step)  # to be tried again with the next one

    def _clear(self, step: int) -> None:
        """On the thread that writes: delete what was never completed, before a checkpoint that is."""
        for name in self._folder.checkpoints():
            place = self._folder.place.below(name)
            if name < self._name(step) and MANIFEST not in place.sizes():
                place.filesystem.delete_dir(place.path)

    def _on_cleared(self, error: Exception | None) -> None:
        self._litter = self._litter or error is not None

    def close(self) -> None:
        """Nothing more is written, but what has been begun."""
        self._closed = True
        self._attempt = None


def retire(kept: Sequence[Kept], keep: CheckpointConfig) -> list[Kept]:
    """Which checkpoints are not to be kept. Never the newest one."""
    most, by = keep.num_to_keep, keep.checkpoint_score_attribute
    if most is None or len(kept) <= most:
        return []
    best = sorted(kept, key=lambda k: k.step, reverse=True)
    newest = best[0]
    if by is not None:
        sign = 1.0 if keep.checkpoint_score_order == "max" else -1.0
        worst = float("-inf")
        best.sort(key=lambda k: sign * k.metrics[by] if by in k.metrics else worst, reverse=True)
    stay = [newest, *(k for k in best if k is not newest)][:most]
    return [k for k in kept if k not in stay]


def _not_there(place: Place, files: dict[str, File]) -> str | None:
    """A file that cannot be seen from here, or has another size."""
    there = place.sizes(missing=True)
    return next((name for name, file in files.items() if there.get(name) != file.bytes), None)
