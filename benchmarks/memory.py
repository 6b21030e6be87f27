"""Memory of an agent beyond what its process had before the model was built, against Ray Train's DDP."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn
from torch.nn import functional

from benchmarks import small
from benchmarks.tables import Claim, Table, bar
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.engine.numerics import environment

AGENTS, RUNS, STEPS = 2, 2, 8
WORKERS = (AGENTS, 4 * AGENTS, 8 * AGENTS)
ROWS, INPUTS, WIDTH, DEPTH = 16 * AGENTS, 256, 2048, 5  # rows in a step
PEERS = {"Ray Train, DDP": False, "Ray Train, DDP, gradient_as_bucket_view": True}
_LOOK_S = 0.005


class Peak:
    """The most memory that this process has had since the constructor was called."""

    def __init__(self) -> None:
        self._before = self._most = kib("status", "RssAnon")
        self._shared = kib("smaps_rollup", "Pss_Shmem")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, kib("status", "RssAnon"))
            time.sleep(_LOOK_S)

    def write(self, folder: str) -> None:
        """Write down how many bytes it is by now."""
        shared = kib("smaps_rollup", "Pss_Shmem") - self._shared  # too slow to be looked at all the time
        text = json.dumps(1024 * (self._most - self._before + shared))
        (Path(folder) / f"{os.getpid()}.json").write_text(text)


def kib(file: str, name: str) -> int:
    """A number of this process's files below /proc."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/self/{file}").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


_peaks: list[Peak] = []  # of this process


def _build() -> nn.Module:
    """The model, in an agent."""
    if not _peaks:
        _peaks.append(Peak())
    return _model()


def _model() -> nn.Module:
    """An MLP of 22 million parameters."""
    widths = [INPUTS, *[WIDTH] * (DEPTH + 1), INPUTS]
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.mse_loss(model(batch["data"]), batch["data"])


def _write(folder: str, model: nn.Module, extra: dict[str, Any], step: int) -> None:
    _peaks[0].write(folder)


def _numbers(workers: int) -> TrainConfig:
    return TrainConfig(ROWS, virtual_workers=workers, steps=STEPS)


def _ours(workers: int, folder: str) -> None:
    rows = np.random.default_rng(0).standard_normal((8 * ROWS, INPUTS)).astype(np.float32)
    Trainer(
        TrainSpec(_build, _sgd, _loss, after_update=partial(_write, folder)),
        {"train": ray.data.from_numpy([rows])},
        _numbers(workers),
        scaling_config=ScalingConfig(num_workers=AGENTS),
        run_config=RunConfig(name="run", storage_path=folder),
    ).fit()


def _loop(given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model = prepare_model(_build(), parallel_strategy_kwargs={"gradient_as_bucket_view": given["view"]})
    optimizer = _sgd(model)
    for _ in range(STEPS):
        _loss(model, {"data": torch.randn(ROWS // AGENTS, INPUTS)}).backward()
        optimizer.step()
        optimizer.zero_grad()
        _peaks[0].write(given["folder"])


def _theirs(view: bool, folder: str) -> None:
    variables = environment(_numbers(AGENTS))
    TorchTrainer(
        _loop,
        train_loop_config={"folder": folder, "view": view},
        scaling_config=ScalingConfig(num_workers=AGENTS),
        run_config=RunConfig(name="run", storage_path=folder, worker_runtime_env={"env_vars": variables}),
    ).fit()


def _copies(train: Any, what: Any) -> Iterator[float]:
    """Peaks of the agents of some runs, in copies of the gradient."""
    gradient = 4 * sum(p.numel() for p in _model().parameters())
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            train(what, folder)
            peaks = [json.loads(path.read_text()) / gradient for path in Path(folder).glob("*.json")]
        assert len(peaks) == AGENTS
        yield from peaks


def run() -> Table:
    """The table."""
    with small.cluster():
        peers = {name: list(_copies(_theirs, view)) for name, view in PEERS.items()}
        ours = {workers: list(_copies(_ours, workers)) for workers in WORKERS}
    (peer, least), *_ = peers.items()
    values = peers | {f"ray_dnn, V = {workers}": copies for workers, copies in ours.items()}
    allowed = {f"ray_dnn, V = {w}": f"{math.log2(w / AGENTS) + 2:.0f}" for w in WORKERS}
    rows = [
        (
            name,
            str(len(copies)),
            f"{median(copies):.1f} ({min(copies):.1f} to {max(copies):.1f})",
            f"{max(copies) - max(least):+.1f}",
            allowed.get(name, "–"),
        )
        for name, copies in values.items()
    ]
    parameters = sum(p.numel() for p in _model().parameters())
    return Table(
        name="memory",
        title="Memory of an agent, and Ray Train's DDP",
        header=(
            "side",
            "agents looked at",
            "copies of the gradient",
            f"highest, beyond that of {peer}",
            "intended at most",
        ),
        rows=tuple(rows),
        notes=(
            f"Peak of an agent while it trains {STEPS} steps, beyond what its process had before the model was built: "
            f"weights, gradients and whatever else is kept. {parameters / 1e6:.0f} M parameters, float32, plain SGD, "
            f"{AGENTS} agents, in copies of the gradient of {parameters * 4 / 2**20:.0f} MiB. The peak "
            f"of RssAnon, looked at every {1e3 * _LOOK_S:.0f} ms, and Pss_Shmem after each step, so that memory which "
            "agents share counts once. What writing the weights takes at the end is not in it.",
            "Intended: not more than log2(V / agents) + 2 copies above the peer, for V virtual workers.",
        ),
        claims=tuple(
            Claim(
                f"highest memory of an agent in copies of the gradient, V = {workers} on {AGENTS} agents",
                f"{max(copies):.1f}",
                f"{peer}: {max(least):.1f}",
                f"{max(copies) - max(least):+.1f} copies",
                max(copies) > max(least),
                workers in (WORKERS[0], WORKERS[-1]),
            )
            for workers, copies in ours.items()
        ),
        bars=tuple(bar("peak of an agent", name, copies) for name, copies in values.items()),
        unit="copies of the gradient",
    )
