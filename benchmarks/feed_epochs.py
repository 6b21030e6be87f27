"""Epochs of training that hardly compute, so that rows are what is waited for: ours, and Ray Train's.

The jobs are alive in one Ray cluster and take turns (see `benchmarks.turns`). A turn is two epochs. Only the second one
counts: whatever was read ahead while others had their turns is used up in the first. The peer's two sides are one job.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

from benchmarks import turns
from benchmarks.feed_jobs import Shape, loss, sgd
from benchmarks.turns import FOR_EVER, Turns
from ray_dnn import Patience, TrainConfig, Trainer, TrainSpec
from ray_dnn.engine.numerics import environment

AGENTS = 2


@dataclass(frozen=True)
class Side:
    """One way to feed.

    Attributes:
        label: in the table.
        ours: whether it is.
        shuffle: ours: as in TrainConfig; theirs: whether rows are shuffled in a local buffer.
    """

    label: str
    ours: bool
    shuffle: str = "none"

    @property
    def how(self) -> str:
        """The label without whose it is."""
        return self.label.partition(", ")[2]


OURS, THEIRS = Side("ray_dnn, not shuffled", True), Side("Ray Train, not shuffled", False)
OURS_SHUFFLED = Side("ray_dnn, windowed shuffle", True, "windowed")
THEIRS_SHUFFLED = Side("Ray Train, local shuffle", False, "local")
SIDES = (OURS, THEIRS, OURS_SHUFFLED, THEIRS_SHUFFLED)


def numbers(shape: Shape, shuffle: Any = "none") -> TrainConfig:
    """Ours. The peer has the same batches, one thread an agent too, and as large a buffer to shuffle in."""
    return TrainConfig(shape.batch, virtual_workers=AGENTS, steps=FOR_EVER, shuffle=shuffle)


def measure(shape: Shape, data: str, rounds: int) -> dict[Side, list[float]]:
    """Seconds of an epoch, by side and round. ``data``: the folder with the shape's files."""
    found: dict[Side, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        peer = _Theirs(shape, data, folder)
        runs = {side: _Ours(shape, side, data, folder) if side.ours else peer for side in SIDES}
        for run in set(runs.values()):
            run.turns.wait()
        random = Random(0)
        for _ in range(rounds):
            for side in random.sample(SIDES, len(SIDES)):
                runs[side].shuffle(side)
                found[side].append(_turn(runs[side].turns, shape.steps))
        for run in set(runs.values()):
            run.end()
    return found


def _turn(given: Turns, steps: int) -> float:
    given.release(steps)
    given.wait()
    given.release(steps)
    return given.wait()


# -- ours ------------------------------------------------------------------------------------------------------------


def _pass(folder: str, job: str, steps: int, model: nn.Module, extra: dict[str, Any], step: int) -> None:
    turns.gate(folder, job, steps).step()


class _Ours:
    """A run of ours that waits for its turns."""

    def __init__(self, shape: Shape, side: Side, data: str, folder: str):
        job = f"ours-{side.shuffle}"
        self.turns = Turns(folder, job, AGENTS)
        self._handle = Trainer(
            TrainSpec(shape.model, sgd, loss, after_update=partial(_pass, folder, job, shape.steps)),
            {"train": shape.dataset(data)},
            numbers(shape, side.shuffle),
            scaling_config=ScalingConfig(num_workers=AGENTS),
            run_config=RunConfig(name=job, storage_path=folder),
            patience=Patience(idle_s=1e4, stalled_s=1e4),  # an agent whose turn it is not looks as if it hung
        ).start()

    def shuffle(self, side: Side) -> None:
        """It does what it was made for."""

    def end(self) -> None:
        """End it."""
        self._handle.stop()
        self.turns.release(FOR_EVER)
        self._handle.result()


# -- theirs ----------------------------------------------------------------------------------------------------------


class _Theirs:
    """A run of the peer that waits for its turns."""

    def __init__(self, shape: Shape, data: str, folder: str):
        self.turns = Turns(folder, "theirs", AGENTS)
        self._local = Path(folder, "shuffle-locally")  # while it exists
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"shape": shape, "folder": folder, "local": self._local},
            datasets={"train": shape.dataset(data)},
            scaling_config=ScalingConfig(num_workers=AGENTS),
            run_config=RunConfig(
                name="theirs", storage_path=folder, worker_runtime_env={"env_vars": environment(numbers(shape))}
            ),
        )
        self._result = ThreadPoolExecutor(1).submit(trainer.fit)

    def shuffle(self, side: Side) -> None:
        """Have it shuffle its next epochs, or not."""
        if side.shuffle == "local":
            self._local.touch()
        else:
            self._local.unlink(missing_ok=True)

    def end(self) -> None:
        """End it."""
        self.turns.release(0)
        self._result.result()


def _loop(given: dict[str, Any]) -> None:
    """What an agent of Ray Train does."""
    torch.set_num_threads(1)
    shape: Shape = given["shape"]
    model = prepare_model(shape.model())
    optimizer = sgd(model)
    gate = turns.gate(given["folder"], "theirs", shape.steps)
    shard = ray.train.get_dataset_shard("train")
    rows = shape.batch // AGENTS
    buffer = max(rows, numbers(shape).shuffle_window // AGENTS)  # of each agent
    more = True
    while more:
        local = {"local_shuffle_buffer_size": buffer} if given["local"].exists() else {}
        steps = 0
        for batch in shard.iter_torch_batches(batch_size=rows, **local):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            more, steps = gate.step(), steps + 1
        if steps != shape.steps:
            raise AssertionError(f"an epoch of {steps} steps, not of {shape.steps}")
