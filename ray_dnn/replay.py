"""Running a past step of a run again, from the nearest checkpoint, to look at what happened there."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray.train import Checkpoint, Result, TrainingFailedError

from ray_dnn.agent import Resume
from ray_dnn.checkpoint import Manifest, Place, load_weights
from ray_dnn.engine.looking import Look, Seen, Watch
from ray_dnn.errors import ConfigError, NonFiniteError, UserCodeError
from ray_dnn.events import CheckpointDamaged
from ray_dnn.identity import differences, of_agents
from ray_dnn.ledger import Ledger, LedgerLine
from ray_dnn.resume import check_same, complete, newest
from ray_dnn.storage import LEDGER, RunFolder, attempts, read_lines, run_place

if TYPE_CHECKING:
    from ray_dnn.driver import Outcome
    from ray_dnn.trainer import Handle, Trainer

TOLERANCE = 1e-3  # on machines of another kind: of a metric, and of the norm of each weight


@dataclass(frozen=True)
class Again:
    """How a step is run again.

    Attributes:
        resume: where it begins; None: as the job is built.
        damaged: checkpoints that were to be used instead.
    """

    watch: Watch
    resume: Resume | None
    damaged: Sequence[CheckpointDamaged]


@dataclass(frozen=True)
class Summary:
    """One virtual worker's contribution in numbers. What a replay keeps where nothing else is asked for.

    Attributes:
        rank: see `Seen`.
        norm: 2-norm of the gradient, over all parameters.
        largest: the parameter whose gradient has the largest norm.
    """

    worker: int
    phase: str
    rank: int
    row_ids: list[int]
    metrics: dict[str, float]
    norm: float
    largest: str


def summarize(seen: Seen) -> Summary:
    """A contribution in numbers."""
    norms = {name: float(gradient.double().norm()) for name, gradient in seen.gradients.items()}
    largest = max(norms, key=lambda name: norms[name], default="")
    return Summary(
        seen.worker,
        seen.phase,
        seen.rank,
        seen.row_ids.tolist(),
        dict(seen.metrics),
        math.hypot(*norms.values()),
        largest,
    )


@dataclass(frozen=True)
class Replay:
    """A step that was run again.

    Attributes:
        step: its number, from 0.
        began: the step of the checkpoint that it was run again from; 0: as the job is built.
        metrics: of the step; "loss" among them. Empty where it failed.
        error: what it failed with, now as then; None: it did not.
        seen: what ``look`` returned for each virtual worker that had rows, in their order; `Summary` by default.
        same_bits: whether rows, metrics, and weights as far as they were kept, of all steps that were run again are
            those on record, bit for bit.
        differences: what is not the same, in words; on machines of another kind, by more than the tolerance.
        elsewhere: how these machines differ from those of the run, in words.
        checkpoint: of the state after the step; None where it failed.
    """

    step: int
    began: int
    metrics: dict[str, float]
    error: str | None
    seen: list[Any]
    same_bits: bool
    differences: list[str]
    elsewhere: list[str]
    checkpoint: Checkpoint | None

    def text(self) -> str:
        """What came of it, in a line or some."""
        since = f"from the checkpoint of step {self.began}" if self.began else "from the beginning"
        lines = [f"step {self.step}, run again {since}: {self._verdict()}"]
        lines += [f"  another machine: {what}" for what in self.elsewhere]
        lines += [f"  {what}" for what in self.differences]
        lines += [f"  it failed: {self.error}"] if self.error is not None else []
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.same_bits:
            return "the same bits as on record"
        if self.differences:
            return "it differs from what is on record"
        return f"the same to a relative {TOLERANCE:g}, on another kind of machine"


def replay(trainer: Trainer, step: int, look: Look | None, activations: Sequence[str]) -> Replay:
    """See `ray_dnn.Trainer.replay`."""
    run: Any = trainer.run_config
    if run.storage_path is None or run.name is None:
        raise ConfigError("RunConfig needs the storage_path and the name of the run that is to be looked at.")
    place = run_place(run.storage_path, run.name, run.storage_filesystem)
    texts = [read_lines(place, LEDGER, number) for number in attempts(place, LEDGER)]
    record = Ledger(texts).lines
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= len(record) or not texts:
        has = f"the steps 0 to {len(record) - 1}" if record else "no step"
        raise ConfigError(f"replay({step!r}): {place.path} has {has} on record. Name one of them, or the next one.")
    only = _only(trainer, step, place)
    prepared = only._prepare()
    damaged: list[CheckpointDamaged] = []
    whole = complete(RunFolder(run.storage_path, run.name, run.storage_filesystem), damaged.append)
    for _, manifest in whole:
        check_same(place.path, manifest, prepared.identity)
    resume = newest(((at, m) for at, m in whole if m.step <= step), damaged.append)
    began = resume.manifest.step if resume is not None else 0
    handle = only._run(prepared, again=Again(Watch(look or summarize, step, tuple(activations)), resume, damaged))
    outcome, result = _finished(only, handle, step)
    texts.append(read_lines(Place(place.filesystem, handle.path), LEDGER))
    repeated = Ledger(texts).lines  # a later attempt takes back what an earlier one did from where it begins
    exact, elsewhere = list(_lines(record, repeated, began, 0.0)), list[str]()
    found = exact
    if result is not None:
        mine = Place.of(result.checkpoint)
        elsewhere = _elsewhere(whole, Manifest.read(mine))
        kept = next(((at, m) for at, m in whole if m.step == step + 1), None)
        found = exact = [*exact, *(_files(*kept, mine) if kept else ())]
        if exact and (elsewhere or not trainer.config.deterministic):
            found = [*_lines(record, repeated, began, TOLERANCE), *(_weights(kept[0], mine) if kept else ())]
    if outcome.error is not None and step < len(record):
        found = [*found, f"step {step}: it did not fail then"]
    return Replay(
        step=step,
        began=began,
        metrics=dict(repeated[step].metrics) if result is not None else {},
        error=None if outcome.error is None else f"{type(outcome.error).__name__}: {outcome.error}",
        seen=outcome.seen,
        same_bits=not exact and not found,
        differences=found,
        elsewhere=elsewhere,
        checkpoint=result.checkpoint if result is not None else None,
    )


def _finished(only: Trainer, handle: Handle, step: int) -> tuple[Outcome, Result | None]:
    """Wait for the end. There is no result where the step failed by itself, and not by what looked at it."""
    try:
        result = only._finish(handle)
    except TrainingFailedError:
        outcome = handle._ended()
        own = isinstance(outcome.error, NonFiniteError | UserCodeError)
        looked = isinstance(outcome.error, UserCodeError) and outcome.error.function == "look"
        if not own or looked or outcome.step != step:
            raise
        return outcome, None
    return handle._ended(), result


def _only(trainer: Trainer, step: int, place: Place) -> Trainer:
    """The same job until after a step, of as few agents as can be, in a folder of its own."""
    least = 2 if trainer.strategy.worker_state == "mirrored" else 1
    return replace(
        trainer,
        spec=replace(trainer.spec, evaluate=None, stop=None),
        datasets={"train": trainer.datasets["train"]},
        config=replace(trainer.config, epochs=None, steps=step + 1, evaluate_every=None, checkpoint_every=None),
        scaling_config=replace(trainer.scaling_config, num_workers=least * trainer.replica_size),
        run_config=replace(
            trainer.run_config,
            name=f"replay-{step:09d}-{secrets.token_hex(4)}",
            storage_path=place.path,
            storage_filesystem=place.filesystem,
            checkpoint_config=None,
        ),
        audit=None,
    )


# -- what is not the same ----------------------------------------------------------------------------------------------


def _elsewhere(whole: Sequence[tuple[Place, Manifest]], now: Manifest) -> list[str]:
    """How the agents' machines differ."""
    return differences(of_agents(whole[0][1].job), of_agents(now.job)) if whole else []


def _lines(record: Sequence[LedgerLine], repeated: Sequence[LedgerLine], began: int, tolerance: float) -> Iterator[str]:
    """Where steps on record and run again are not the same."""
    for one, other in zip(record[began:], repeated[began:], strict=False):
        for what, then, now in (("rows", one.rows, other.rows), ("the numbers of rows", one.digests, other.digests)):
            if then != now:
                yield f"step {one.step}, {what}: {list(then)} then, {list(now)} now, by virtual worker"
        for name in sorted({*one.metrics, *other.metrics}):
            then_, now_ = one.metrics.get(name, math.nan), other.metrics.get(name, math.nan)
            same = repr(then_) == repr(now_)  # which NaN is equal to itself in
            if not same and not math.isclose(then_, now_, rel_tol=tolerance):
                yield f"step {one.step}, {name}: {then_!r} then, {now_!r} now"
        if one.skipped != other.skipped:
            yield f"step {one.step}, skipped: {one.skipped!r} then, {other.skipped!r} now"


def _files(place: Place, kept: Manifest, mine: Place) -> Iterator[str]:
    """Where the state after the step is not the one that was kept: weights, and all large tensors of the rest."""
    now = Manifest.read(mine).files
    for name, file in kept.files.items():
        if name.endswith(".safetensors") and now.get(name) != file:
            yield f"the state after the step: {name} is another than in {place.path}"


def _weights(place: Place, mine: Place) -> Iterator[str]:
    """Where the weights after the step are too far from those that were kept."""
    now = load_weights(mine)
    for name, then in load_weights(place).items():
        norm = float(then.double().norm())
        distance = float((now[name].double() - then.double()).norm())
        if not distance <= TOLERANCE * norm:
            yield f"the weights after the step: {name} is {distance:.3g} away from one of norm {norm:.3g}"
