"""The committed state of a job: model, optimizers, schedules, extra state, and how far it is."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ray_dnn.config import TrainConfig, TrainSpec
from ray_dnn.engine import codec, unmoved
from ray_dnn.engine.buffers import Buffers
from ray_dnn.engine.device import CPU, all_in_host, like, move, to_device
from ray_dnn.engine.gradients import Accumulator, Handing
from ray_dnn.engine.loss import GradientSums, Pairs, add_pairs, as_pairs, as_sum, number
from ray_dnn.engine.outlet import Outlet
from ray_dnn.engine.rng import seed_everything
from ray_dnn.errors import ConfigError
from ray_dnn.parallel import ReplicaGroup, full
from ray_dnn.strategies.base import Batch

ONLY = "optimizer"  # the phase of a job with one optimizer

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., "Mixed Precision Training", 2018, section 3.2).

    The scale is a power of two, so unscaling is exact.
    """

    def __init__(self) -> None:
        self.scale = 65_536.0
        self.good_steps = 0  # since the scale last changed

    def update(self, overflow: bool) -> None:
        """Halve on overflow; double after 2,000 steps without one."""
        if overflow:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
        elif self.good_steps + 1 == 2_000:
            self.scale, self.good_steps = min(2.0**24, self.scale * 2), 0
        else:
            self.good_steps += 1


class TrainingState:
    """What every agent holds, equal to the bit between steps.

    Attributes:
        model: the user's.
        optimizers, schedulers: by phase; one phase named "optimizer" where the user gave a single optimizer.
        extra: the user's extra state.
        step: committed steps.
        phase: whose turn it is inside a step.
        config, spec: of the job.
        device: where the model is.
    """

    def __init__(
        self,
        spec: TrainSpec,
        config: TrainConfig,
        begin: Callable[[nn.Module], None] | None = None,
        device: torch.device = CPU,
    ):
        """``begin``: sets the model's weights, where it does not begin with those that it is built with."""
        self.spec = spec
        self.config = config
        self.device = device
        self.step = 0
        seed_everything("model", config.seed)
        self.model = spec.model()
        _check_model(self.model)
        _align(self.model)
        if begin is not None:
            begin(self.model)
        move(self.model, device)
        self.parameters = dict(self.model.named_parameters())
        self.buffers = Buffers(self.model)
        made = spec.optimizer(self.model)
        self.optimizers: dict[str, torch.optim.Optimizer] = made if isinstance(made, dict) else {ONLY: made}
        self.losses = spec.loss if isinstance(spec.loss, dict) else {ONLY: spec.loss}
        if list(self.optimizers) != list(self.losses):
            raise ConfigError(
                f"TrainSpec.optimizer gives {list(self.optimizers)} and TrainSpec.loss {list(self.losses)}; "
                "the keys must be the same, in the same order."
            )
        self.phase = self.phases[0]
        self._trainable = {key: self._owned(key, opt) for key, opt in self.optimizers.items()}
        self.schedulers = {k: spec.scheduler(o) for k, o in self.optimizers.items()} if spec.scheduler else {}
        for key, scheduler in self.schedulers.items():
            _check_scheduler(key, scheduler)
        self.extra = dict(spec.extra_state(self.model)) if spec.extra_state else {}
        _check_extra(self.extra)
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self.model.train()
        # User code may have left gradients behind; a contribution must start from none.
        self.model.zero_grad(set_to_none=True)
        self._fixed = unmoved.of_updates(self.parameters, self.optimizers)
        self._handing = Handing(self.parameters)

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(self.optimizers)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose turn it is."""
        return self.optimizers[self.phase]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that this phase's optimizer updates, by name, in the model's order."""
        return self._trainable[self.phase]

    def _owned(self, key: str, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
        _check_optimizer(key, optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strange = held - {id(p) for p in self.parameters.values()}
        if strange:
            raise ConfigError(f"{key} holds {len(strange)} parameters that are not parameters of the model.")
        return {name: p for name, p in self.parameters.items() if id(p) in held and p.requires_grad}

    # -- computing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The job's precision."""
        dtype = _AUTOCAST.get(self.config.precision)
        with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield

    @contextlib.contextmanager
    def handing_over(self, outlet: Outlet | None) -> Iterator[None]:
        """Have `gradients` hand what is ``final`` over to this outlet as soon as it is there."""
        self._handing.outlet = outlet
        try:
            yield
        finally:
            self._handing.outlet = None

    def gradients(self, parameters: Mapping[str, nn.Parameter], batch: Batch, final: bool = False) -> GradientSums:
        """The gradient of the summed loss of this phase over a batch, accumulated in at least float32.

        Leaves no gradient in the model. ``final``: the sums are the contribution as it is (`Strategy.hands_over`);
        those that were handed over meanwhile are replaced by an empty tensor.
        """
        loss_function = self.losses[self.phase]
        name = f"loss[{self.phase!r}]" if len(self.losses) > 1 else "loss"
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        weight = 0.0
        metrics: Pairs = {}
        sums = Accumulator(parameters, 1.0 / scale)
        inputs = list(parameters.values())
        versions = self._versions()
        for index, micro in enumerate(batch.microbatches):
            with self.autocast():
                loss = as_sum(loss_function(self.model, micro.data), micro.rows, name)
            if loss.total.requires_grad and inputs:
                last = final and index == len(batch.microbatches) - 1
                with self._handing.during(self.phase, sums) if last else contextlib.nullcontext():
                    torch.autograd.backward([loss.total * scale], inputs=inputs)
            sums.microbatch_done()
            weight += number(loss.weight)
            add_pairs(metrics, {"loss": (number(loss.total), number(loss.weight))})
            add_pairs(metrics, as_pairs(loss.metrics, micro.rows, f"{name}: Loss.metrics"))
        if (now := self._versions()) != versions:
            changed = [key for key, old, new in zip(self.parameters, versions, now, strict=True) if old != new]
            raise ConfigError(
                f"{name} changed the parameters {', '.join(changed[:3])} while it computed, which only the agent that "
                "computed it would know of. (Embedding(max_norm=…) does that.) Change them in after_update."
            )
        return GradientSums(sums.take_all(), weight, metrics)

    def _versions(self) -> list[int]:
        """How often each parameter was changed in place."""
        return [p._version for p in self.parameters.values()]

    def check(self) -> None:
        """Refuse what updates changed and nobody would move.

        Raises:
            ConfigError: names it.
        """
        unmoved.refuse_changes(self._fixed, unmoved.of_updates(self.parameters, self.optimizers), "an update")

    # -- moving ------------------------------------------------------------------------------------------------------

    def export(self) -> codec.Tree:
        """Everything that is committed, as a tree."""
        return {
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "buffers": self.buffers.all_committed(),
            "optimizers": {key: _export_optimizer(opt, self.parameters) for key, opt in self.optimizers.items()},
            "schedulers": {key: scheduler.state_dict() for key, scheduler in self.schedulers.items()},
            "extra": {key: item.state_dict() for key, item in self.extra.items()},
            "loss_scale": vars(self.loss_scale) if self.loss_scale else None,
        }

    def counters(self) -> dict[str, dict[str, list[str]]]:
        """What of the optimizers' state is in host memory wherever parameters are, by optimizer and parameter."""
        return {
            key: {
                name: [k for k, value in optimizer.state[p].items() if all_in_host(value)]
                for name, p in self.parameters.items()
                if p in optimizer.state
            }
            for key, optimizer in self.optimizers.items()
        }

    @torch.no_grad()
    def load(self, tree: codec.Tree, counters: Mapping[str, Mapping[str, list[str]]] | None = None) -> None:
        """Take over what another agent exported. What is not in this state's own memory yet is copied there.

        ``counters``: of that agent; None: its CPU computes.
        """
        self.step = tree["step"]
        for name, parameter in self.parameters.items():
            _take(parameter, tree["parameters"][name])
        for name in self.buffers.floats + self.buffers.others:
            _take(self.buffers.committed(name), tree["buffers"][name])
        self.buffers.restore()
        for key, optimizer in self.optimizers.items():
            there = counters[key] if counters is not None else None
            _load_optimizer(key, optimizer, self.parameters, tree["optimizers"][key], there)
        for key, scheduler in self.schedulers.items():
            scheduler.load_state_dict(tree["schedulers"][key])
        for key, item in self.extra.items():
            theirs = tree["extra"][key]
            item.load_state_dict(theirs if self.device == CPU else like(theirs, item.state_dict()))
        if self.loss_scale:
            vars(self.loss_scale).update(tree["loss_scale"])

    def weights(self, group: ReplicaGroup) -> dict[str, torch.Tensor]:
        """All full parameters and persistent buffers, by name."""
        tensors = {name: full(p, group) for name, p in self.parameters.items()}
        persistent = self.model.state_dict(keep_vars=True)
        return tensors | {
            name: self.buffers.committed(name)
            for name in self.buffers.floats + self.buffers.others
            if name in persistent
        }


def _take(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    if mine.device != theirs.device or mine.data_ptr() != theirs.data_ptr():
        mine.copy_(theirs)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"TrainSpec.model returned {type(model).__name__}; it must return a torch.nn.Module.")
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise ConfigError(
                f"The module {name or 'model'} is compiled by torch.compile, which is not proved to give equal bits on "
                "every agent. Pass the module itself."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ConfigError(f"The module {name} has sparse gradients, which cannot be combined. Use sparse=False.")
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(f"The module {name} is SyncBatchNorm, which needs a process group. Use BatchNorm.")
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise ConfigError(f"The module {name or 'model'} is {type(module).__name__}. Pass the module inside it.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(f"The parameter {name} is lazy. Give the layer its input size.")
        if not parameter.is_floating_point() or parameter.layout != torch.strided:
            raise ConfigError(f"The parameter {name} is {parameter.dtype}, {parameter.layout}: not supported.")


@torch.no_grad()
def _align(model: nn.Module) -> None:
    """Kernels choose their path by address: memory that is not aligned to 64 bytes could give other bits."""
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    moved: dict[int, torch.Tensor] = {}  # by identity: a buffer may belong to several modules
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            overlapping = 0 in buffer.stride() and buffer.numel() > 1  # an expanded one cannot be written to
            if overlapping or buffer.data_ptr() % 64:
                module._buffers[key] = moved.setdefault(id(buffer), buffer.clone())


def _check_optimizer(key: str, optimizer: object) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{key} is {type(optimizer).__name__}; TrainSpec.optimizer must return torch Optimizers.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (closure and closure.default is inspect.Parameter.empty):
        raise ConfigError(f"{key} is {type(optimizer).__name__}, which needs a closure: not supported.")
    unknown = set(optimizer.state_dict()) - {"state", "param_groups"}
    if unknown:
        raise ConfigError(f"{key} keeps {sorted(unknown)} beside state and param_groups, which would not be moved.")


def _check_scheduler(key: str, scheduler: object) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(f"The scheduler of {key} is ReduceLROnPlateau, which needs a metric: not supported.")
    for method in ("step", "state_dict", "load_state_dict"):
        if not hasattr(scheduler, method):
            raise ConfigError(f"The scheduler of {key} has no {method}(); it must be a torch LRScheduler.")
    codec.check(scheduler.state_dict(), f"the scheduler of {key}")  # type: ignore[attr-defined]


def _export_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> codec.Tree:
    """By name: the order of a group is another in every process where it was made of a set."""
    return {
        "state": {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state},
        "shared": {k: v for k, v in optimizer.state.items() if not isinstance(k, torch.Tensor)},
        "groups": [
            {k: v for k, v in group.items() if k not in ("params", "param_names")} for group in optimizer.param_groups
        ],
        "names": _group_names(optimizer, parameters),
    }


def _load_optimizer(
    key: str,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tree: codec.Tree,
    counters: Mapping[str, list[str]] | None,
) -> None:
    """Set the state as it is. ``Optimizer.load_state_dict`` would cast it to the parameters' dtypes.

    It goes to where the parameter is, but for ``counters``, by parameter.
    """
    if tree["names"] != _group_names(optimizer, parameters):
        raise ConfigError(f"The parameters in the groups of {key} are others than on the agent that sent its state.")
    if counters is None:
        counters = _counters_of(optimizer, parameters)
    optimizer.state.clear()
    for group, values in zip(optimizer.param_groups, tree["groups"], strict=True):
        group.update(like(values, group))
    for name, entries in tree["state"].items():
        parameter = parameters[name]
        stay = counters[name]
        optimizer.state[parameter] = {k: v if k in stay else to_device(v, parameter.device) for k, v in entries.items()}
    optimizer.state.update(tree["shared"])


def _counters_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """What torch's optimizers keep in host memory, by parameter, as ``Optimizer.load_state_dict`` has it."""
    names = {id(p): name for name, p in parameters.items()}
    return {
        names[id(p)]: [] if group.get("fused") or group.get("capturable") else ["step"]
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _group_names(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names of each group's parameters, in the model's order."""
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    return [[name for name, p in parameters.items() if id(p) in group] for group in groups]


def _check_extra(extra: dict[str, Any]) -> None:
    """Refuse extra state that cannot be moved, by name."""
    for key, item in extra.items():
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(item, method, None)):
                raise ConfigError(f"extra_state[{key!r}] has no {method}(); each value must have both methods.")
        codec.check(item.state_dict(), f"extra_state[{key!r}]")
