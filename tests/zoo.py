"""Small jobs, one for each thing that could make a result depend on who computed what.

A job is a function; its name says what is special about it. Rows come from fixed seeds. Batch sizes, numbers of rows
and of virtual workers do not divide one another.
"""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils import checkpoint

from ray_dnn.config import Loss, TrainConfig, TrainSpec
from ray_dnn.engine.loss import add_pairs
from ray_dnn.engine.state import TrainingState
from ray_dnn.strategies import Batch, Combined, Contribution, Strategy
from tests.local import Job, Make

Rows = dict[str, torch.Tensor]


def table(rows: int, seed: int = 0, **more: np.ndarray) -> pa.Table:
    """Rows with six normal inputs x and a target y that depends on them, and further columns."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    y = np.sin(x @ rng.normal(size=6)).astype(np.float32) + x[:, 0]
    columns = {"x": x, "y": y, **more}
    return pa.table({name: _array(values) for name, values in columns.items()})


def _array(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values[0].size)


def tensors(rows: pa.Table, rng: torch.Generator) -> Rows:
    """One tensor a column. Lists of a fixed size become the second dimension."""
    batch = {}
    for name in rows.column_names:
        column = rows[name].combine_chunks()
        values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
        batch[name] = torch.tensor(values.to_numpy(zero_copy_only=False)).reshape(len(rows), -1).squeeze(1)
    return batch


def squared(model: nn.Module, batch: Rows) -> torch.Tensor:
    return (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean()


def errors(model: nn.Module, batch: Rows) -> dict[str, Any]:
    error = (model(batch["x"]).squeeze(-1) - batch["y"]).abs()
    return {"mae": error.mean(), "large": ((error > 1).sum(), len(error))}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 5), nn.ReLU(), nn.Linear(5, 1))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


SPEC = TrainSpec(model=mlp, optimizer=adamw, loss=squared, collate=tensors)
CONFIG = TrainConfig(batch_size=16, virtual_workers=8, steps=8)


def job(rows: int = 60, config: dict[str, Any] | None = None, **spec: Any) -> Job:
    """The MLP with what differs."""
    return Job(replace(SPEC, **spec), replace(CONFIG, **(config or {})), table(rows))


# -- optimizers, schedules -------------------------------------------------------------------------------------------


def adamw_mlp() -> Job:
    """Two epochs whose last batch has fewer rows than there are virtual workers; evaluated on the way."""
    config = replace(CONFIG, steps=None, epochs=2, evaluate_every=3)
    return Job(replace(SPEC, evaluate=errors), config, table(100), validation=table(23, seed=1))


def sgd_momentum() -> Job:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)

    return job(64, {"virtual_workers": 5, "batch_size": 12}, optimizer=optimizer)


def parameter_groups() -> Job:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "lr": 0.002, "weight_decay": 0.1}]
        return torch.optim.AdamW(groups, lr=0.01)

    return job(47, {"virtual_workers": 6}, optimizer=optimizer)


def groups_made_of_sets() -> Job:
    """Layers of one shape, in an order that is another in every process."""

    def model() -> nn.Module:
        return nn.Sequential(*[nn.Linear(6, 6) for _ in range(7)], nn.Linear(6, 1))

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        random.SystemRandom().shuffle(parameters)  # what a set does, by addresses in memory
        return torch.optim.AdamW(parameters, lr=0.01)

    return job(50, {"virtual_workers": 5}, model=model, optimizer=optimizer)


def with_scheduler(workers: int, scheduler: Callable[[torch.optim.Optimizer], Any], optimizer: Any = sgd) -> Job:
    return job(50, {"virtual_workers": workers, "batch_size": 10}, optimizer=optimizer, scheduler=scheduler)


class Decay:
    """A stateful lr_lambda, which a scheduler saves by its attributes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.9**step / self.calls


def _warm_then_cosine(optimizer: torch.optim.Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 5)], [3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "stateful_lambda": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.93),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "sequential": _warm_then_cosine,
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.3, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.7),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


class Counted(torch.optim.SGD):
    """Keeps something that belongs to no parameter."""

    def __init__(self, params: Any):
        super().__init__(params, lr=0.05)

    def step(self, closure: Any = None) -> None:
        updates = self.state.setdefault("updates", 0)  # type: ignore[arg-type]
        self.state["updates"] = updates + 1  # type: ignore[index]
        for group in self.param_groups:
            group["scale"] = np.float32(1 / 3) * group.get("scale", np.float32(1))
            for p in group["params"]:
                p.data.sub_(p.grad * float(group["lr"] * group["scale"] / (1 + updates)))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam_amsgrad": partial(torch.optim.Adam, amsgrad=True, foreach=True),
    "adam_fused": partial(torch.optim.Adam, fused=True),
    "adam_tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamax": torch.optim.Adamax,
    "asgd": partial(torch.optim.ASGD, t0=2),
    "global_state": Counted,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "rprop": torch.optim.Rprop,
    "sgd_fused": partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, fused=True),
}


def scheduled(name: str) -> Job:
    return with_scheduler({"one_cycle": 7, "sequential": 2}.get(name, 3), SCHEDULERS[name])


def optimized(name: str) -> Job:
    """The optimizer under a schedule."""
    return with_scheduler(
        3, lambda o: lr_scheduler.ExponentialLR(o, 0.9), lambda model: OPTIMIZERS[name](model.parameters())
    )


def channels_last_fused(name: str) -> Job:
    """Kernels that walk over parameter, gradient and state as if all had one order of elements in memory."""
    optimizers = {
        "adam": partial(torch.optim.Adam, fused=True),
        "sgd": partial(torch.optim.SGD, lr=0.02, momentum=0.9, fused=True),
        "adagrad": partial(torch.optim.Adagrad, lr=0.02, fused=True),
    }
    spec = replace(channels_last().spec, optimizer=lambda model: optimizers[name](model.parameters()))
    return replace(channels_last(), spec=spec)


def muon() -> Job:
    def optimizer(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {
            "matrices": torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02),
            "vectors": torch.optim.SGD([p for p in model.parameters() if p.ndim == 1], lr=0.02),
        }

    losses = {"matrices": squared, "vectors": squared}
    return job(40, {"virtual_workers": 3}, optimizer=optimizer, loss=losses)


def clipping() -> Job:
    return job(70, {"virtual_workers": 12, "batch_size": 17, "clip_norm": 0.3}, optimizer=sgd)


# -- rows ------------------------------------------------------------------------------------------------------------


def last_batch_of_one_row() -> Job:
    return job(33, {"virtual_workers": 3, "batch_size": 8, "steps": 10})


def many_epochs() -> Job:
    return job(10, {"virtual_workers": 2, "batch_size": 4, "steps": None, "epochs": 4, "shuffle": "global"})


def small_windows() -> Job:
    config = {"virtual_workers": 5, "batch_size": 9, "steps": None, "epochs": 2, "shuffle_window": 7}
    return job(41, config)


def microbatches() -> Job:
    return job(50, {"virtual_workers": 3, "batch_size": 22, "microbatch_size": 3, "min_rows": 2})


def single_worker() -> Job:
    return job(30, {"virtual_workers": 1, "batch_size": 7})


def global_randomness() -> Job:
    """Random numbers from every global generator, in collate and in the loss."""

    def collate(rows: pa.Table, rng: torch.Generator) -> Rows:
        batch = tensors(rows, rng)
        batch["x"] += 0.1 * torch.randn(batch["x"].shape, generator=rng)
        batch["x"] *= random.uniform(0.9, 1.1) * float(np.random.uniform(0.9, 1.1)) * (1 + 0.1 * torch.rand(()))
        return batch

    def loss(model: nn.Module, batch: Rows) -> torch.Tensor:
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return squared(model, batch) * (1 + 0.1 * noise)

    return job(40, {"virtual_workers": 5}, collate=collate, loss=loss)


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


def unaligned_batches() -> Job:
    """Tensors at odd addresses, in containers of every kind, under instructions that care."""

    def collate(rows: pa.Table, rng: torch.Generator) -> collections.UserDict[str, Any]:
        batch = tensors(rows, rng)
        room = torch.empty(batch["x"].numel() + 64)
        at = 1 + random.randrange(15)
        x = room[at : at + batch["x"].numel()].view_as(batch["x"]).copy_(batch["x"])
        return collections.UserDict(sample=Sample(x, batch["y"]), nothing=None)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        assert batch["sample"].x.data_ptr() % 64 == 0
        return squared(model, vars(batch["sample"]))

    return job(40, {"virtual_workers": 5, "cpu_isa": "native"}, collate=collate, loss=loss)


def nan_row_is_skipped() -> Job:
    made = job(40, {"virtual_workers": 8, "batch_size": 10, "nonfinite": "skip"})
    x = made.rows["x"].combine_chunks().flatten().to_numpy().reshape(-1, 6).copy()
    x[17, 2] = np.nan
    return replace(made, rows=made.rows.set_column(0, "x", _array(x)))


# -- modules ---------------------------------------------------------------------------------------------------------


def dropout() -> Job:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))

    return job(70, {"virtual_workers": 16, "batch_size": 33}, model=model)


class Convolutions(nn.Module):
    """x: (rows, 36) -> (rows,)."""

    def __init__(self, momentum: float | None = 0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=False),
            nn.BatchNorm2d(6, momentum=momentum),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.view(-1, 1, 6, 6).contiguous(memory_format=self.format()))

    def format(self) -> torch.memory_format:
        last = self.layers[3].weight.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format


def images(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 36)).astype(np.float32)
    return pa.table({"x": _array(x), "y": _array(x.mean(1) * 3)})


def batch_norm(workers: int = 3) -> Job:
    spec = replace(SPEC, model=Convolutions, evaluate=errors)
    config = TrainConfig(batch_size=12, virtual_workers=workers, epochs=3, min_rows=2)
    return Job(spec, config, images(37), validation=images(17, seed=1))


def batch_norm_cumulative() -> Job:
    spec = replace(SPEC, model=partial(Convolutions, momentum=None), optimizer=sgd)
    return Job(spec, TrainConfig(batch_size=13, virtual_workers=5, steps=8, min_rows=2), images(41))


def channels_last() -> Job:
    """Parameters, gradients and optimizer state whose memory is not in row-major order."""
    spec = replace(SPEC, model=lambda: Convolutions().to(memory_format=torch.channels_last))
    return Job(spec, TrainConfig(batch_size=13, virtual_workers=5, steps=8, min_rows=2), images(41))


def transposed_parameters() -> Job:
    """Large enough that vector instructions and the remainder behind them are both used."""

    def model() -> nn.Module:
        layers = nn.Sequential(nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 19), nn.Tanh(), nn.Linear(19, 1))
        for layer in (layers[0], layers[2]):
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        return layers

    return job(50, {"virtual_workers": 5}, model=model)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 7, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(14, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x.view(-1, 3, 2))[0][:, -1])


def lstm() -> Job:
    return job(45, {"virtual_workers": 6, "clip_norm": 1.0}, model=Recurrent)


class Tied(nn.Module):
    """A table of embeddings that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(tokens).mean(1))


def tokens(rows: int, length: int = 5, vocabulary: int = 11) -> pa.Table:
    rng = np.random.default_rng(2)
    return table(rows, tokens=rng.integers(1, vocabulary, size=(rows, length)), y=rng.integers(0, vocabulary, rows))


def classify(model: nn.Module, batch: Rows) -> torch.Tensor:
    return functional.cross_entropy(model(batch["tokens"]), batch["y"].long())


def tied_weights() -> Job:
    config = TrainConfig(batch_size=15, virtual_workers=7, steps=8)
    return Job(replace(SPEC, model=Tied, loss=classify), config, tokens(50))


def embedding_bag() -> Job:
    def model() -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(11, 6, mode="mean", padding_idx=0), nn.LayerNorm(6), nn.Linear(6, 11))

    config = TrainConfig(batch_size=15, virtual_workers=5, steps=8)
    return Job(replace(SPEC, model=model, loss=classify), config, tokens(50))


class Encoder(nn.Module):
    """Attention, which takes another path through the kernels in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=tokens > 8)
        return self.out(hidden.nan_to_num().mean(1))


def attention() -> Job:
    def evaluate(model: nn.Module, batch: Rows) -> Mapping[str, Any]:
        return {"loss": classify(model, batch)}

    spec = replace(SPEC, model=Encoder, loss=classify, evaluate=evaluate)
    config = TrainConfig(batch_size=15, virtual_workers=5, steps=7, evaluate_every=3)
    return Job(spec, config, tokens(50), validation=tokens(14))


def parametrizations() -> Job:
    """Weight and spectral normalisation, the latter with buffers that every forward pass in training moves."""

    def model() -> nn.Module:
        layers = mlp()
        nn.utils.parametrizations.weight_norm(layers[0])
        nn.utils.parametrizations.spectral_norm(layers[2])
        return layers

    return job(50, {"virtual_workers": 6}, model=model)


def frozen_parameters() -> Job:
    def model() -> nn.Module:
        layers = mlp()
        layers[0].requires_grad_(False)
        return layers

    return job(50, {"virtual_workers": 5}, model=model, optimizer=adamw)


class Experts(nn.Module):
    """Only the experts that some row asks for are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 1) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(len(x))
        for number in kind.unique().tolist():
            chosen = (kind == number).nonzero()[:, 0]
            out = out.index_add(0, chosen, self.experts[number](x[chosen])[:, 0])
        return out * self.scale


def sometimes_unused_parameters() -> Job:
    """Expert 2 is touched by a few workers of one batch, expert 3 by nobody ever."""

    def loss(model: nn.Module, batch: Rows) -> torch.Tensor:
        return (model(batch["x"], batch["kind"]) - batch["y"]).square().mean()

    kind = np.arange(60) % 2
    kind[20:23] = 2
    config = replace(CONFIG, shuffle="none", steps=7)
    return Job(replace(SPEC, model=Experts, loss=loss), config, table(60, kind=kind))


class Counting(nn.Module):
    """Buffers of many kinds, changed in place and replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.register_buffer("short", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("expanded", torch.ones(1).expand(6))
        self.register_buffer("twice", torch.zeros(2, dtype=torch.int32))
        self.layers[0].register_buffer("twice", self.twice)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes = self.passes + 1
            self.seen[int(x.sum().abs()) % 5] = True
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.layers[0].twice += len(x)
            self.short += x.detach().mean().to(torch.bfloat16)
        return self.layers(x - self.mean)


def counting_buffers() -> Job:
    return job(50, {"virtual_workers": 6, "microbatch_size": 2}, model=Counting)


class Masked(nn.Module):
    """Constants that no mean would leave as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan, 1e38, 0.1, -0.0]))
        self.register_buffer("partly", torch.tensor([-torch.inf, torch.nan, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.partly[2] += 1.0
        return self.layers(x + self.mask[0])


def constant_buffers() -> Job:
    return job(50, {"virtual_workers": 5}, model=Masked)


# -- precisions ------------------------------------------------------------------------------------------------------


def bf16_autocast() -> Job:
    return job(50, {"virtual_workers": 3, "precision": "bf16", "microbatch_size": 4})


def fp16_overflows() -> Job:
    """The loss is so large that its gradient overflows until the scale has been lowered."""

    def loss(model: nn.Module, batch: Rows) -> torch.Tensor:
        return squared(model, batch) * 2

    return job(50, {"virtual_workers": 6, "precision": "fp16"}, loss=loss)


def _convert(dtype: torch.dtype, collate: Any, rows: pa.Table, rng: torch.Generator) -> Any:
    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in collate(rows, rng).items()}


def of_dtype(dtype: torch.dtype, make: Make) -> Job:
    """A job with parameters, buffers and data in another precision."""
    made = make()
    assert made.spec.collate is not None
    spec = replace(
        made.spec,
        model=lambda: made.spec.model().to(dtype),
        collate=partial(_convert, dtype, made.spec.collate),
    )
    return replace(made, spec=spec)


def with_workers(workers: int, make: Make) -> Job:
    """A job with another number of virtual workers, which computes whole batches."""
    made = make()
    return replace(made, config=replace(made.config, virtual_workers=workers, microbatch_size=None))


def bf16_attention() -> Job:
    made = attention()
    return replace(made, config=replace(made.config, precision="bf16"))


def float64() -> Job:
    return of_dtype(torch.float64, partial(job, 50, {"virtual_workers": 7, "clip_norm": 0.5}))


def bf16_parameters() -> Job:
    return of_dtype(torch.bfloat16, partial(job, 50, {"virtual_workers": 5}))


# -- losses and extra state ------------------------------------------------------------------------------------------


class Average:
    """An exponential moving average of the weights."""

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model)
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def moving_average() -> Job:
    def after_update(model: nn.Module, extra: dict[str, Any], step: int) -> None:
        extra["average"].update(model)
        if step % 3 == 2:  # the average takes the place of the weights, now and then
            model.load_state_dict(extra["average"].model.state_dict())

    return job(
        50,
        {"virtual_workers": 12},
        extra_state=lambda model: {"average": Average(model)},
        after_update=after_update,
        optimizer=sgd,
    )


def early_stopping() -> Job:
    made = job(50, {"virtual_workers": 5, "evaluate_every": 2}, evaluate=errors, stop=lambda history: len(history) == 3)
    return replace(made, validation=table(11, seed=1))


def rows_without_weight() -> Job:
    """Some workers have no row that counts, and in one batch nobody has."""

    def loss(model: nn.Module, batch: Rows) -> Loss:
        each = (model(batch["x"]).squeeze(-1) - batch["y"]).square() * batch["counts"]
        return Loss(each.sum(), batch["counts"].sum())

    counts = (np.random.default_rng(5).random(60) < 0.3).astype(np.float32)
    counts[16:32] = 0
    config = replace(CONFIG, shuffle="none", virtual_workers=6)
    return Job(replace(SPEC, loss=loss), config, table(60, counts=counts))


def gradient_penalty() -> Job:
    """A loss that holds a gradient, and activations that are computed anew in the backward pass."""

    def loss(model: Any, batch: Rows) -> torch.Tensor:
        x = batch["x"].requires_grad_()
        hidden = checkpoint.checkpoint(model[:3], x, use_reentrant=False)
        out = model[3:](hidden).squeeze(-1)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return ((out - batch["y"]).square() + 0.1 * gradient.square().sum(1)).mean()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Dropout(0.0), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1))

    return job(50, {"virtual_workers": 6}, model=model, loss=loss)


def checkpointed_dropout() -> Job:
    def loss(model: Any, batch: Rows) -> torch.Tensor:
        hidden = checkpoint.checkpoint(model[:3], batch["x"], use_reentrant=False)
        return (model[3:](hidden).squeeze(-1) - batch["y"]).square().mean()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))

    return job(50, {"virtual_workers": 3, "min_rows": 2}, model=model, loss=loss)


class Recomputed(torch.autograd.Function):
    """Computes a module a second time in backward, by a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        out: torch.Tensor = module(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), grads[0])
        return x.grad, None


def recomputed_layers() -> Job:
    """A layer that is recomputed twice: its gradient comes in two parts."""

    def loss(model: Any, batch: Rows) -> torch.Tensor:
        hidden = model[0](batch["x"])
        for _ in range(2):
            hidden = Recomputed.apply(hidden, model[1:3])  # type: ignore[no-untyped-call]
        return (model[3](hidden).squeeze(-1) - batch["y"]).square().mean()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    return job(50, {"virtual_workers": 3}, model=model, loss=loss)


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 6))
        self.critic = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1))


def gan() -> Job:
    def critic(model: Any, batch: Rows) -> torch.Tensor:
        real, fake = model.critic(batch["x"]), model.critic(model.generator(batch["x"][:, :3]))
        return functional.softplus(-real).mean() + functional.softplus(fake).mean()

    def generator(model: Any, batch: Rows) -> torch.Tensor:
        return functional.softplus(-model.critic(model.generator(batch["x"][:, :3]))).mean()

    def optimizer(model: Any) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": torch.optim.Adam(model.critic.parameters(), lr=0.01),
            "generator": torch.optim.RMSprop(model.generator.parameters(), lr=0.003),
        }

    losses = {"critic": critic, "generator": generator}
    return job(50, {"virtual_workers": 6}, model=Adversaries, optimizer=optimizer, loss=losses)


class Graphs(nn.Module):
    """Messages along the edges of many small graphs at once."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.out = nn.Linear(4, 8), nn.Linear(12, 8), nn.Linear(8, 1)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor, graph: torch.Tensor, graphs: int) -> torch.Tensor:
        # nodes: (nodes, 2); edges: (2, edges); graph: (nodes,), the graph that each node belongs to
        messages = self.message(torch.cat([nodes[edges[0]], nodes[edges[1]]], 1)).relu()
        arrived = messages.new_zeros(len(nodes), 8).index_add(0, edges[1], messages)
        hidden = self.update(torch.cat([nodes, nodes, arrived], 1)).relu()
        return self.out(hidden.new_zeros(graphs, 8).index_add(0, graph, hidden))[:, 0]


def graph_network() -> Job:
    """Each row is a graph of three nodes and some edges; a batch is one large graph."""

    def collate(rows: pa.Table, rng: torch.Generator) -> dict[str, Any]:
        batch = tensors(rows, rng)
        ends = batch["ends"].view(-1, 4, 2)  # (graphs, edges, 2)
        edges = ends + 3 * torch.arange(len(ends))[:, None, None]
        nodes = batch["x"].reshape(-1, 2)
        graph = torch.arange(len(ends)).repeat_interleave(3)
        return {"nodes": nodes, "edges": edges.reshape(-1, 2).t(), "graph": graph, "y": batch["y"]}

    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        out = model(batch["nodes"], batch["edges"], batch["graph"], len(batch["y"]))
        return (out - batch["y"]).square().mean()

    ends = np.random.default_rng(3).integers(0, 3, size=(50, 8))
    config = TrainConfig(batch_size=15, virtual_workers=7, steps=8)
    return Job(replace(SPEC, model=Graphs, collate=collate, loss=loss), config, table(50, ends=ends))


def _bert(dropout: float) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForMaskedLM(BertConfig(vocab_size=23, **sizes, **rates))


def _gpt2(dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, bos_token_id=None, eos_token_id=None, **sizes, **rates))


def _llama(dropout: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 16, "attention_dropout": dropout}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, **sizes, **more))


LANGUAGE_MODELS = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}


def token_mean(model: nn.Module, batch: Rows) -> Loss:
    """Cross-entropy of the next token, summed over those that are not padding."""
    logits = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits
    labels = batch["tokens"].masked_fill(batch["mask"] == 0, -100)[:, 1:]
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
    count = (labels != -100).sum()
    right = ((logits[:, :-1].argmax(-1) == labels) & (labels != -100)).sum()
    return Loss(total, count, {"accuracy": (right, count)})


def language_model(name: str, dropout: float = 0.1) -> Job:
    """Rows of unequal length, padded to the longest of their computation."""

    def collate(rows: pa.Table, rng: torch.Generator) -> Rows:
        texts = [torch.tensor(text) for text in rows["tokens"].to_pylist()]
        padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        return {"tokens": padded, "mask": mask}

    rng = np.random.default_rng(4)
    rows = pa.table({"tokens": [rng.integers(1, 23, size=rng.integers(2, 12)).tolist() for _ in range(40)]})
    config = TrainConfig(
        batch_size=13, virtual_workers={"bert": 3, "gpt2": 5, "llama": 6}[name], steps=6, clip_norm=1.0
    )
    spec = TrainSpec(
        model=partial(LANGUAGE_MODELS[name], dropout),
        optimizer=adamw,
        loss=token_mean,
        collate=collate,
        scheduler=lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=4),
    )
    return Job(spec, config, rows, preload=tuple(f"transformers.models.{n}.modeling_{n}" for n in LANGUAGE_MODELS))


# -- strategies with state of virtual workers ------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalSteps(Strategy):
    """Two local steps with a momentum that each virtual worker keeps; the mean of what they moved is applied."""

    lr: float = 0.05
    local_batches: ClassVar[int] = 2  # type: ignore[misc]

    def init_worker(self, state: TrainingState, worker: int) -> Any:
        return {"momentum": {name: torch.zeros_like(p) for name, p in state.trainable().items()}, "steps": [worker, 0]}

    def contribute(
        self, state: TrainingState, worker_state: Any, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Contribution, Any]:
        parameters = state.trainable()
        start = {name: p.detach().clone() for name, p in parameters.items()}
        momentum = {name: m.clone() for name, m in worker_state["momentum"].items()}
        metrics: dict[str, tuple[float, float]] = {}
        rows = 0.0
        for batch in batches:
            if not batch.rows:
                continue
            given = state.gradients(parameters, batch)
            rows += given.weight
            add_pairs(metrics, given.metrics)
            with torch.no_grad():
                for name, p in parameters.items():
                    gradient = given.sums[name]
                    assert gradient is not None
                    momentum[name].mul_(0.9).add_(gradient / given.weight)
                    p -= self.lr * momentum[name]
        with torch.no_grad():
            sums = {name: (start[name] - p) * rows for name, p in parameters.items()}
            for name, p in parameters.items():
                p.copy_(start[name])
        first, steps = worker_state["steps"]
        return Contribution(sums, rows, metrics), {"momentum": momentum, "steps": [first, steps + len(batches)]}

    def apply(self, state: TrainingState, combined: Combined) -> None:
        with torch.no_grad():
            for name, p in state.trainable().items():
                p -= combined.means[name]


@dataclass(frozen=True)
class CombinedSteps(LocalSteps):
    worker_state: ClassVar[Any] = "combined"


@dataclass(frozen=True)
class MirroredSteps(LocalSteps):
    worker_state: ClassVar[Any] = "mirrored"


def combined_worker_states() -> Job:
    return replace(job(50, {"virtual_workers": 6, "batch_size": 7}), strategy=CombinedSteps())


def mirrored_worker_states() -> Job:
    return replace(job(50, {"virtual_workers": 7, "batch_size": 9}), strategy=MirroredSteps())


# -- all of them -----------------------------------------------------------------------------------------------------

_PLAIN = (
    adamw_mlp,
    sgd_momentum,
    parameter_groups,
    muon,
    groups_made_of_sets,
    clipping,
    last_batch_of_one_row,
    many_epochs,
    small_windows,
    microbatches,
    single_worker,
    global_randomness,
    unaligned_batches,
    nan_row_is_skipped,
    dropout,
    batch_norm,
    batch_norm_cumulative,
    channels_last,
    transposed_parameters,
    lstm,
    tied_weights,
    embedding_bag,
    attention,
    parametrizations,
    frozen_parameters,
    sometimes_unused_parameters,
    counting_buffers,
    constant_buffers,
    bf16_autocast,
    bf16_attention,
    fp16_overflows,
    float64,
    bf16_parameters,
    moving_average,
    early_stopping,
    rows_without_weight,
    gradient_penalty,
    checkpointed_dropout,
    recomputed_layers,
    gan,
    graph_network,
    combined_worker_states,
    mirrored_worker_states,
)
JOBS: dict[str, Make] = {
    **{make.__name__: make for make in _PLAIN},
    **{f"channels_last_fused_{name}": partial(channels_last_fused, name) for name in ("adam", "sgd", "adagrad")},
    **{f"schedule_{name}": partial(scheduled, name) for name in SCHEDULERS},
    **{f"optimizer_{name}": partial(optimized, name) for name in OPTIMIZERS},
    **{f"language_model_{name}": partial(language_model, name) for name in LANGUAGE_MODELS},
}
