"""The public face: `Trainer`, and the `Handle` of a run under way."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, NoReturn

import pandas as pd  # type: ignore[import-untyped]
import ray
import ray.util.client
from ray.train import Checkpoint, CheckpointConfig, Result, RunConfig, ScalingConfig, TrainingFailedError

from ray_dnn.agent import Begun, Job, Striker
from ray_dnn.checkpoint import Manifest, Place, verify
from ray_dnn.cluster import Places
from ray_dnn.config import Audit, TrainConfig, TrainSpec
from ray_dnn.driver import Driver, Outcome, Past, Size
from ray_dnn.engine.looking import Look
from ray_dnn.errors import ConfigError, UserCodeError
from ray_dnn.events import CheckpointDamaged, Event, EventLog, RunResumed, RunStarted
from ray_dnn.feed.datasets import open_datasets
from ray_dnn.feed.source import Source
from ray_dnn.identity import Identity, of_job
from ray_dnn.limits import Limits, check_audit, check_run, check_scaling
from ray_dnn.liveness import Patience
from ray_dnn.replay import Again, Replay, replay
from ray_dnn.resume import find
from ray_dnn.storage import EVENTS, RunFolder
from ray_dnn.strategies import DataParallel, Strategy

logger = logging.getLogger("ray_dnn")

# Called with a trainer that is told to train. Set by the command line, which runs scripts to do something else.
instead: Callable[[Trainer], NoReturn] | None = None


@dataclass(frozen=True)
class Trainer:
    """Trains a network over an elastic set of agents on a Ray cluster.

    What is learned depends on the spec, the datasets, the config and the strategy; not on how many agents there are.

    Attributes:
        spec: the functions that make up the job.
        datasets: ``{"train": …}`` and any further ones, which are evaluated. Ray Datasets of any size, or map-style
            PyTorch datasets.
        config: the job's numbers.
        strategy: what virtual workers compute and what is done with the result.
        scaling_config: Ray Train's own class. ``num_workers=(least, most)`` agents, or one number; ``use_gpu=True``
            has each compute on a GPU, or on the share of one that ``resources_per_worker`` says.
        run_config: Ray Train's own class: name, storage, environment of the agents.
        replica_size: agents that together hold one replica of the model (see `ray_dnn.parallel`).
        patience: how long agents that hang are waited for.
        audit: what is compared to find agents that compute wrongly; None: nothing.
        start_from: a checkpoint (`ray.train.Checkpoint`, path or URI) to begin a new run with.
        load: what of it: "weights", or "all": the state of optimizers, schedules and ``extra_state`` too.

    Raises:
        ConfigError: something cannot be done as it was asked for. Nothing has been started.
    """

    spec: TrainSpec
    datasets: Mapping[str, Any]
    config: TrainConfig
    strategy: Strategy = field(default_factory=DataParallel)
    scaling_config: ScalingConfig = field(default_factory=ScalingConfig)
    run_config: RunConfig = field(default_factory=RunConfig)
    replica_size: int = 1
    patience: Patience = field(default_factory=Patience)
    audit: Audit | None = None
    start_from: Any = None
    load: str = "weights"

    def __post_init__(self) -> None:
        if "train" not in self.datasets:
            raise ConfigError(f"datasets has {sorted(self.datasets)}; it must have 'train'.")
        if len(self.datasets) > 1 and self.spec.evaluate is None:
            extra = sorted(set(self.datasets) - {"train"})
            raise ConfigError(f"datasets has {extra} to evaluate, but TrainSpec.evaluate is None. Give the function.")
        if len(self.datasets) == 1:
            for name, given in (
                ("TrainSpec.evaluate", self.spec.evaluate),
                ("TrainSpec.stop", self.spec.stop),
                ("TrainConfig.evaluate_every", self.config.evaluate_every),
            ):
                if given is not None:
                    raise ConfigError(f"{name} is given, but datasets has only 'train': there is nothing to evaluate.")
        if not isinstance(self.strategy, Strategy):
            raise ConfigError(f"strategy={self.strategy!r}: must be a ray_dnn.Strategy.")
        if not isinstance(self.patience, Patience):
            raise ConfigError(f"patience={self.patience!r}: must be a ray_dnn.Patience.")
        if not isinstance(self.audit, Audit | None):
            raise ConfigError(f"audit={self.audit!r}: must be a ray_dnn.Audit, or None.")
        if self.load not in ("weights", "all"):
            raise ConfigError(f"Trainer(load={self.load!r}): must be 'weights' or 'all'.")
        check_scaling(self.scaling_config, self.config, self.replica_size, self.strategy)
        if self.audit is not None:
            check_audit(self.scaling_config, self.config, self.replica_size, self.strategy)
        check_run(self.run_config, self.config)

    def fit(self) -> Result:
        """Train to the end.

        Returns:
            ``metrics`` holds the last step's and the last evaluation's metrics, ``weights_digest``, ``steps``,
            ``rows``, ``agents`` and ``same_bits``; ``metrics_dataframe`` the evaluations; ``checkpoint`` the last one,
            ``best_checkpoints`` all that are kept, in the order of their steps.

        Raises:
            ray.train.TrainingFailedError: with the user's exception or a `ray_dnn.errors` one as its cause.
            KeyboardInterrupt: after Ctrl-C, when all agents have ended.
        """
        return self._finish(self.start())

    def start(self) -> Handle:
        """Start training in the background."""
        if instead is not None:
            instead(self)
        return self._start({})

    def replay(self, step: int, look: Look | None = None, activations: Sequence[str] = ()) -> Replay:
        """Run a past step of the run with this storage path and name again, and look at it.

        The steps from the nearest checkpoint on are run by as few agents as can be: usually one. On machines of the
        run's kind they give the same bits, which is compared; on others the same to a relative 1e-3. Nothing of the
        run is changed; what is run again has a folder of its own, ``replay-…`` in the run's.

        Args:
            step: its number, from 0. The one behind the last that is on record may be the one that the run failed in.
            look: called on the agent with what each virtual worker contributes in this step, a `ray_dnn.Seen`:
                rows, batches, gradients, activations, model. What it returns comes back in ``Replay.seen``.
            activations: names of modules whose activations are wanted, as ``nn.Module.named_modules`` gives them;
                ``*`` stands for anything.

        Raises:
            ConfigError: the run has no such step on record, or is another job.
            ray.train.TrainingFailedError: as `fit`.
        """
        return replay(self, step, look, activations)

    def _finish(self, handle: Handle) -> Result:
        with _ending_on_signals(handle):
            return handle.result()

    def _start(self, script: dict[int, int], faults: Striker | None = None) -> Handle:
        return self._run(self._prepare(), script, faults)

    def _prepare(self) -> _Prepared:
        """Look at all that can be known before anything is started."""
        if not ray.is_initialized():
            ray.init()
        if ray.util.client.ray.is_connected():
            raise ConfigError(
                "Ray is connected through a Ray Client address (ray://…), through which Ray Data does not work. Run the"
                " script on the cluster: ray job submit --address http://HEAD:8265 --working-dir . -- python SCRIPT"
            )
        _show_log()
        sources = open_datasets(self.datasets)
        begun = self._begun()
        train = sources["train"]
        identity = of_job(self.config, self.strategy, self.replica_size, len(train.units), train.counts)
        if begun is not None:
            identity["start_from"] = f"{self.load} of {begun.fingerprint}"
        return _Prepared(sources, identity, begun)

    def _run(
        self,
        prepared: _Prepared,
        script: dict[int, int] | None = None,
        faults: Striker | None = None,
        again: Again | None = None,
    ) -> Handle:
        run = self.run_config
        if run.storage_path is None or run.name is None:
            raise ConfigError("RunConfig needs a storage_path and a name.")
        folder = RunFolder(run.storage_path, run.name, run.storage_filesystem)
        failures = run.failure_config.max_failures if run.failure_config else 0
        limits = self._limits()
        size = Size(limits.least, limits.most, failures, script or {})
        return Handle(self, prepared, size, limits.places(run, self.config, faults), folder, again)

    def _begun(self) -> Begun | None:
        """The checkpoint that the run is to begin with, verified."""
        if self.start_from is None:
            return None
        place = Place.of(self.start_from)
        manifest = Manifest.read(place)
        verify(place, manifest)
        if self.load == "all" and manifest.replica_size != self.replica_size:
            raise ConfigError(
                f"start_from: {place.path} was written with replica_size={manifest.replica_size}, so only its weights "
                "can be loaded. Use load='weights'."
            )
        return Begun(place, manifest, self.load == "all")

    def _limits(self) -> Limits:
        return check_scaling(self.scaling_config, self.config, self.replica_size, self.strategy)


@dataclass(frozen=True)
class _Prepared:
    """A job that can be run.

    Attributes:
        identity: what it is, as far as the driver knows.
        begun: the checkpoint that it begins with.
    """

    sources: Mapping[str, Source]
    identity: Identity
    begun: Begun | None


class Handle:
    """A run under way. Reading changes nothing; commands are recorded with the step at which they took effect."""

    def __init__(
        self,
        trainer: Trainer,
        prepared: _Prepared,
        size: Size,
        places: Places,
        folder: RunFolder,
        again: Again | None,
    ):
        self._trainer, self._prepared, self._size = trainer, prepared, size
        self._places, self._folder, self._again = places, folder, again
        self._log = EventLog((_log_event, lambda event: self._file.write(event.to_json())))
        self._driver = self._attempt(size)
        self._outcome: Future[Outcome] = Future()
        self._thread = threading.Thread(target=self._run, name="ray_dnn-driver", daemon=True)
        self._thread.start()

    def _attempt(self, size: Size) -> Driver:
        """Prepare to begin, or to go on from what earlier attempts have left."""
        trainer, folder, prepared, again = self._trainer, self._folder, self._prepared, self._again
        damaged: list[CheckpointDamaged] = []
        if again is None:
            resume, kept = find(folder, prepared.identity, damaged.append)
        else:
            resume, kept, damaged = again.resume, [], list(again.damaged)
        job = Job(
            spec=trainer.spec,
            config=trainer.config,
            strategy=trainer.strategy,
            evaluated=tuple(name for name in prepared.sources if name != "train"),
            secret=secrets.token_bytes(32),
            replica_size=trainer.replica_size,
            audit=trainer.audit,
            begun=prepared.begun,
            resume=resume,
            watch=again.watch if again is not None else None,
        )
        folder.claim()
        self._file = folder.append_file(EVENTS)
        about = trainer.config.as_dict() | {"strategy": repr(trainer.strategy), "rows": prepared.sources["train"].rows}
        self._log.add(RunStarted(str(trainer.run_config.name), folder.path, folder.attempt, about))
        for event in damaged:
            self._log.add(event)
        if resume is not None:
            self._log.add(RunResumed(resume.manifest.step, resume.place.path, resume.manifest.attempt))
        keep = trainer.run_config.checkpoint_config or CheckpointConfig()
        past = Past(prepared.identity, kept, keep, elsewhere=again is not None)
        return Driver(job, prepared.sources, size, self._places, trainer.patience, folder, self._log, past)

    def _run(self) -> None:
        try:
            size = self._size
            while (outcome := self._driver.run()).again is not None:
                size = replace(size, max_failures=outcome.again)
                self._file.close()
                self._driver = self._attempt(size)
            self._outcome.set_result(outcome)
        except BaseException as error:
            self._outcome.set_exception(error)
        finally:
            self._log.close()
            self._file.close()
            self._folder.close()

    @property
    def path(self) -> str:
        """The run's folder, as its storage names it."""
        return self._folder.path

    def events(self) -> Iterator[Event]:
        """All events from the first one on, as they come, until the run has ended. Any number of readers."""
        return self._log.follow()

    def stop(self) -> None:
        """Stop at the next step boundary; evaluate and write the weights as at the end."""
        self._driver.requests.make("stop")

    def checkpoint(self) -> Checkpoint:
        """Write a checkpoint of the next step boundary, and wait for it. Training goes on meanwhile."""
        path = self._driver.requests.make("checkpoint").result()
        return Checkpoint(path, self._folder.filesystem)

    def resize(self, agents: int) -> None:
        """Ask for another number of agents. Newcomers join when they are ready; others leave at the next boundary.

        Raises:
            ConfigError: it is outside of ``ScalingConfig.num_workers``.
        """
        limits, size = self._trainer._limits(), self._trainer.replica_size
        if not limits.least * size <= agents <= limits.most * size or agents % size:
            raise ConfigError(
                f"resize({agents}): must be from {limits.least * size} to {limits.most * size}, as ScalingConfig allows"
                f"{f', and a multiple of replica_size={size}' if size > 1 else ''}."
            )
        self._driver.requests.make("resize", agents // size)

    def result(self) -> Result:
        """Wait for the end. Returns and raises what `Trainer.fit` does."""
        outcome = self._ended()
        if outcome.error is not None:
            raise _failure(outcome) from _cause(outcome)
        folder = self._folder
        assert outcome.checkpoint_path is not None
        checkpoint = Checkpoint(outcome.checkpoint_path, folder.filesystem)
        metrics = outcome.metrics | {"weights_digest": outcome.weights_digest}
        return Result(
            metrics=metrics,
            checkpoint=checkpoint,
            error=None,
            path=folder.path,
            metrics_dataframe=pd.DataFrame(outcome.history) if outcome.history else None,
            best_checkpoints=[
                (checkpoint, metrics)
                if kept.name == Place.of(checkpoint).name
                else (Checkpoint(f"{folder.path}/{kept.name}", folder.filesystem), dict(kept.metrics))
                for kept in outcome.kept
            ],
            _storage_filesystem=folder.filesystem,
        )

    def _ended(self) -> Outcome:
        """Wait for the end."""
        outcome = self._outcome.result()
        self._thread.join()
        return outcome

    def _interrupt(self) -> None:
        """End all agents: after a last checkpoint, or at once when Ctrl-C is pressed again."""
        self._driver.requests.make("interrupt")
        try:
            self._thread.join()
        except (KeyboardInterrupt, SystemExit):
            self._driver.requests.make("interrupt")
            self._thread.join()


def _failure(outcome: Outcome) -> TrainingFailedError:
    error = outcome.error
    return TrainingFailedError(f"Training failed at step {outcome.step}. {type(error).__name__}: {error}")


def _cause(outcome: Outcome) -> Exception:
    """The user's own exception where user code raised, with the agent's traceback as its cause."""
    error = outcome.error
    assert error is not None
    if isinstance(error, UserCodeError) and outcome.cause is not None:
        outcome.cause.__cause__ = error
        return outcome.cause
    return error


@contextlib.contextmanager
def _ending_on_signals(handle: Handle) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run's agents before they end this process."""

    def on_term(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    # Ray replaces handlers that are installed before ray.init(); by now it has been called.
    before = signal.signal(signal.SIGTERM, on_term) if main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        handle._interrupt()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _show_log() -> None:
    """Show the log on the console unless the application has set up logging."""
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(os.environ.get("RAY_DNN_LOG_LEVEL", "INFO"))


def _log_event(event: Event) -> None:
    logger.info(event.text())
