"""The jobs that the soak trains: a language model on Python's library, a convnet with BatchNorm on images, and a small
network for many agents."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from torch import nn
from torch.nn import functional

from jobs import language_model
from ray_dnn import Patience, TrainConfig, Trainer, TrainSpec
from ray_dnn.config import Audit

SHAPE = language_model.Shape(layers=2, width=64, context=128)
FASHION = Path("/usr/share/datasets/fashion-mnist")  # from Debian's package dataset-fashion-mnist
SIDE = 28
BATCH, WORKERS = 16, 8
ROWS = 40 * BATCH - 5  # an epoch of 40 steps, the last one short
HELD_OUT_ROWS = 64
EVALUATE_EVERY = 25
PATIENCE = Patience(idle_s=8.0, stalled_s=2.0)  # nothing in these jobs computes for long
MANY = 64  # rows of a batch and virtual workers, where there are many agents
MANY_PATIENCE = Patience(idle_s=60.0, stalled_s=20.0)  # for they share few cores


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        datasets: rows to learn from and held-out ones, in memory.
        min_rows, batch, workers: see `TrainConfig`.
    """

    name: str
    spec: TrainSpec
    datasets: dict[str, Any]
    min_rows: int = 1
    batch: int = BATCH
    workers: int = WORKERS
    patience: Patience = PATIENCE

    def trainer(self, steps: int, agents: tuple[int, int], audit: bool, folder: str, name: str) -> Trainer:
        """A trainer of this job. Whatever else it is given, it learns the same."""
        return Trainer(
            self.spec,
            self.datasets,
            TrainConfig(
                batch_size=self.batch,
                virtual_workers=self.workers,
                min_rows=self.min_rows,
                steps=steps,
                clip_norm=1.0,
                shuffle="global",
                evaluate_every=EVALUATE_EVERY,
            ),
            scaling_config=ScalingConfig(num_workers=agents),
            run_config=RunConfig(name=name, storage_path=folder, failure_config=FailureConfig(max_failures=-1)),
            patience=self.patience,
            audit=Audit(workers=self.workers) if audit else None,
        )


def language(steps: int) -> Job:
    """A transformer over bytes."""
    sides = language_model.split(language_model.list_files([]))
    train, held_out = (language_model.Text(files, SHAPE.context) for files in sides)
    rows = {"train": train.spread(ROWS)[:ROWS], "validation": held_out.spread(HELD_OUT_ROWS)}
    spec = TrainSpec(
        model=partial(language_model.LanguageModel, SHAPE),
        optimizer=partial(language_model.build_optimizer, lr=8e-3),
        scheduler=partial(language_model.build_scheduler, steps=steps),
        loss=language_model.loss,
        evaluate=language_model.evaluate,
        collate=language_model.collate,
    )
    return Job("language", spec, {name: language_model.dataset(part) for name, part in rows.items()})


def convnet(steps: int) -> Job:
    """A convolutional network with buffers that are combined and noise that is drawn."""
    return _on_images("convnet", build_convnet, min_rows=2)


def many(steps: int) -> Job:
    """A network so small that many agents can train it on few cores; one or two virtual workers for each of them."""
    return _on_images("many", build_many, batch=MANY, workers=MANY, patience=MANY_PATIENCE)


def _on_images(name: str, model: Callable[[], nn.Module], **more: Any) -> Job:
    spec = TrainSpec(
        model=model,
        optimizer=build_convnet_optimizer,
        loss=convnet_loss,
        evaluate=convnet_evaluate,
        collate=convnet_collate,
    )
    datasets = {"train": images("train", ROWS), "validation": images("t10k", HELD_OUT_ROWS)}
    return Job(name, spec, datasets, **more)


JOBS: dict[str, Callable[[int], Job]] = {"language": language, "convnet": convnet, "many": many}


# ---------------------------------------------------------------------------------------------------------------------
# The networks on images


def build_many() -> nn.Module:
    """One hidden layer; (rows, 1, 28, 28) -> (rows, 10)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 16), nn.ReLU(), nn.Linear(16, 10))


def build_convnet() -> nn.Module:
    """Three convolutions, each followed by BatchNorm; (rows, 1, 28, 28) -> (rows, 10)."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * 4 * 4, 10))


def build_convnet_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def convnet_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy."""
    pixels, labels = batch
    return functional.cross_entropy(model(pixels), labels)


def convnet_evaluate(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Accuracy."""
    pixels, labels = batch
    return {"accuracy": (model(pixels).argmax(dim=1) == labels).float().mean()}


def convnet_collate(rows: pa.Table, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, float32 (rows, 1, 28, 28) in 0 to 1, with a little noise; and labels, int64 (rows,)."""
    column = rows["pixels"].combine_chunks()
    data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * SIDE**2, column.offset * SIDE**2)
    pixels = torch.from_numpy(data.astype(np.float32) / 255).view(-1, 1, SIDE, SIDE)
    return pixels + 0.05 * torch.rand(pixels.shape, generator=generator), torch.from_numpy(rows["label"].to_numpy())


def images(part: str, count: int) -> Any:
    """The first images of Fashion-MNIST where it is on this machine, else made-up ones. ``part``: "train" or "t10k"."""
    pixels, labels = _fashion(part, count) if FASHION.exists() else _made_up(part, count)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(SIDE**2), count, [None, pa.py_buffer(pixels.tobytes())])
    return ray.data.from_arrow(pa.table({"pixels": column, "label": labels}))


def _fashion(part: str, count: int) -> tuple[Any, Any]:
    pixels = gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    first = np.frombuffer(pixels, np.uint8, count * SIDE**2, offset=16)  # behind the headers of the IDX format
    return first, np.frombuffer(labels, np.uint8, count, offset=8).astype(np.int64)


def _made_up(part: str, count: int) -> tuple[Any, Any]:
    """Ten patterns under noise."""
    patterns = np.random.default_rng(0).random((10, SIDE**2))
    rng = np.random.default_rng(len(part))
    labels = rng.integers(0, 10, count)
    return (127 * (patterns[labels] + rng.random((count, SIDE**2)))).astype(np.uint8), labels
