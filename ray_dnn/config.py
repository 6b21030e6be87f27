"""What the user says about a job: frozen, checked once, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from ray_dnn.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow
    import torch
    from torch import nn

    Optimizers = torch.optim.Optimizer | dict[str, torch.optim.Optimizer]
    LossFunction = Callable[[nn.Module, Any], "torch.Tensor | Loss"]

PRECISIONS = ("fp32", "bf16", "fp16")
SHUFFLES = ("auto", "none", "windowed", "global")
NONFINITE = ("stop", "skip")
CPU_ISAS = ("auto", "avx2", "native")


@dataclass(frozen=True)
class Loss:
    """A loss whose mean is not over rows, for example over tokens.

    Attributes:
        total: sum of the losses, a scalar tensor that carries gradient. Shape ().
        weight: how many things were summed (tokens, say); a number or a scalar tensor, finite and >= 0.
        metrics: further numbers, each a row mean (scalar) or a pair ``(total, weight)``.

    The step's loss is ``sum(total) / sum(weight)`` over all virtual workers, which equals the mean that one process
    would have computed over the whole batch.
    """

    total: torch.Tensor
    weight: torch.Tensor | float
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "loss" in self.metrics:
            raise ConfigError("Loss.metrics has the name 'loss', which is that of the loss itself. Use another one.")


@dataclass(frozen=True)
class TrainSpec:
    """The functions that make up a job. They run in the agents; none may keep state outside of the model.

    Attributes:
        model: ``() -> nn.Module``. Called on every agent under the job's seed, in host memory; then moved to the
            agent's GPU, if it has one.
        optimizer: ``(nn.Module) -> Optimizer``, or to a dict of them, updated in order with one combine each (GANs).
        loss: ``(nn.Module, batch) -> Tensor``, the mean over the rows, or ``-> Loss``. A dict with the optimizers' keys
            where there are several optimizers.
        scheduler: ``(Optimizer) -> LRScheduler``, stepped once after every step.
        evaluate: ``(nn.Module, batch) -> dict[str, Tensor]``: row means, or ``(total, weight)`` pairs. Runs in eval
            mode without gradients.
        collate: ``(rows: pyarrow.Table, torch.Generator) -> batch``, any pytree of tensors. By default a dict of one
            tensor a column. Works in host memory; the batch is moved to the agent's GPU, if it has one.
        after_update: ``(nn.Module, extra_state, step) -> None``: EMA, target networks.
        extra_state: ``(nn.Module) -> dict[str, Stateful]``: saved, moved and digested with the rest.
        stop: ``(evaluation history) -> bool``, pure: early stopping. The history is a list of dicts of numbers, each
            with a ``"step"``.
    """

    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizers]
    loss: LossFunction | dict[str, LossFunction]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    evaluate: Callable[[nn.Module, Any], Mapping[str, Any]] | None = None
    collate: Callable[[pyarrow.Table, torch.Generator], Any] | None = None
    after_update: Callable[[nn.Module, dict[str, Any], int], None] | None = None
    extra_state: Callable[[nn.Module], dict[str, Any]] | None = None
    stop: Callable[[list[dict[str, float]]], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("model", "optimizer"):
            if not callable(getattr(self, name)):
                raise ConfigError(f"TrainSpec({name}={getattr(self, name)!r}): must be a function, see its docstring.")
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        if not losses or not all(callable(loss) for loss in losses):
            raise ConfigError(f"TrainSpec(loss={self.loss!r}): must be a function or a non-empty dict of functions.")
        for name in ("scheduler", "evaluate", "collate", "after_update", "extra_state", "stop"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"TrainSpec({name}={value!r}): must be a function or None.")


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of a job. With the spec, the data and the strategy they decide every bit of what it learns.

    Attributes:
        batch_size: rows in one step, over all virtual workers (in one local step, for strategies that take several).
        virtual_workers: the fixed unit of parallelism. It is part of the job: another number gives other bits.
            The job can use at most this many agents.
        seed: of everything that is random.
        epochs / steps: how long; exactly one of them. ``steps`` may cover several epochs and end inside one.
        microbatch_size: rows of a virtual worker that are computed at a time; None: all.
        min_rows: no computation sees fewer rows than this; a smaller remainder joins its neighbour. 2 for BatchNorm.
        clip_norm: largest 2-norm of the combined gradient of one optimizer's parameters.
        precision: "fp32", or autocast to "bf16", or to "fp16" with dynamic loss scaling.
        shuffle: "none". "windowed": units of the dataset (row groups, small files) in random order, and rows in random
            order inside of windows. "global": one permutation of all rows, which must fit the object store. "auto":
            "global" for a dataset that is in memory already, else "windowed".
        shuffle_window: rows in a window.
        nonfinite: a NaN or infinite contribution stops the run ("stop") or leaves the step without an update ("skip").
        evaluate_every: steps between two evaluations; None: only at the end.
        checkpoint_every: steps between two checkpoints, or time (a ``datetime.timedelta``); None: only at the end. If
            the storage is slower, some are left out.
        num_threads: CPU threads that an agent computes with. Part of the job: another number gives other bits.
        cpu_isa: the widest vector instructions that are used. "avx2" gives the same bits on nearly every x86 machine
            at no cost in fp32; "native" whatever the machine has; "auto" is "avx2", or "native" for bf16, which AVX2
            computes about 50 times slower.
        deterministic: False admits agents whose arithmetic differs, and operations that have no deterministic kernel on
            a GPU. Membership, batch and ledger still hold, bits do not, and the result says so.
    """

    batch_size: int
    virtual_workers: int = 8
    seed: int = 0
    epochs: int | None = None
    steps: int | None = None
    microbatch_size: int | None = None
    min_rows: int = 1
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    shuffle: Literal["auto", "none", "windowed", "global"] = "auto"
    shuffle_window: int = 16_384
    nonfinite: Literal["stop", "skip"] = "stop"
    evaluate_every: int | None = None
    checkpoint_every: int | timedelta | None = None
    num_threads: int = 1
    cpu_isa: Literal["auto", "avx2", "native"] = "auto"
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "virtual_workers", "min_rows", "shuffle_window", "num_threads"):
            self._whole(name, getattr(self, name), least=1)
        every = self.checkpoint_every
        if isinstance(every, timedelta):
            if every <= timedelta(0):
                raise self._wrong("checkpoint_every", "must be longer than nothing.")
        elif every is not None:
            self._whole("checkpoint_every", every, least=1)
        for name in ("epochs", "steps", "microbatch_size", "evaluate_every"):
            if getattr(self, name) is not None:
                self._whole(name, getattr(self, name), least=1)
        self._whole("seed", self.seed, least=0)
        for name, allowed in (
            ("precision", PRECISIONS),
            ("shuffle", SHUFFLES),
            ("nonfinite", NONFINITE),
            ("cpu_isa", CPU_ISAS),
        ):
            if getattr(self, name) not in allowed:
                raise self._wrong(name, f"must be one of {', '.join(map(repr, allowed))}.")
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError(
                f"TrainConfig(epochs={self.epochs}, steps={self.steps}): give exactly one of them, "
                "it says how long the job is."
            )
        if self.clip_norm is not None and not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise self._wrong("clip_norm", "must be a finite number above 0, or None.")
        if self.min_rows > self.batch_size:
            raise self._wrong("min_rows", f"must not be larger than batch_size={self.batch_size}.")
        if self.microbatch_size is not None and self.min_rows > self.microbatch_size:
            raise self._wrong("min_rows", f"must not be larger than microbatch_size={self.microbatch_size}.")

    def _wrong(self, name: str, text: str) -> ConfigError:
        return ConfigError(f"TrainConfig({name}={getattr(self, name)!r}): {text}")

    def _whole(self, name: str, value: object, least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(name, f"must be a whole number of at least {least}.")

    @property
    def isa(self) -> str:
        """The instruction set that "auto" stands for."""
        if self.cpu_isa != "auto":
            return self.cpu_isa
        return "native" if self.precision == "bf16" else "avx2"

    def as_dict(self) -> dict[str, object]:
        """All fields by name, as JSON has them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: str(value) if isinstance(value, timedelta) else value for name, value in values.items()}


@dataclass(frozen=True)
class Audit:
    """What is compared to find agents that compute wrongly. Needs at least two replicas, three to say who is wrong.

    Attributes:
        workers: virtual workers of each step that a second agent computes too, each worker in its turn. An agent that
            always computes wrongly is found within ``virtual_workers / workers`` steps; as many as the job has: at
            once, at twice the computing.
        states: steps from one comparison of all replicas' states to the next; 0: never.

    Checksums travel with all bytes that agents exchange.
    """

    workers: int = 1
    states: int = 1

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("states", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"Audit({name}={value!r}): must be a whole number of at least {least}.")
