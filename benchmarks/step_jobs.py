"""The jobs whose steps are timed, as both sides train them: a small transformer and a small convolutional net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from torch import nn
from torch.nn import functional

from jobs import language_model as lm

SHAPE = lm.Shape(layers=2, width=128, context=96)
SEED = 0


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned from what.

    Attributes:
        model, optimizer, loss, collate: as in `ray_dnn.TrainSpec`.
        batch: rows in a step, over all agents.
        tensors: all rows, as one batch.
        dataset: the same rows, for Ray Data.
    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    collate: Callable[..., Any] | None
    batch: int
    tensors: torch.Tensor
    dataset: Callable[[], Any]

    def rows(self, step: int, agent: int, agents: int) -> torch.Tensor:
        """An agent's rows of a step, in the order of the dataset: those that ours uses too."""
        each = self.batch // agents
        start = step * self.batch % len(self.tensors) + agent * each
        return self.tensors[start : start + each]


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same weights in every process, whoever calls."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return build()


def _language_model() -> nn.Module:
    return _seeded(lambda: lm.LanguageModel(SHAPE))


class Residual(nn.Module):
    """Two convolutions beside a projection; the first halves height and width (He et al., 2016)."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.side = nn.Conv2d(inside, outside, 1, stride=2, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, outside), nn.GroupNorm(8, outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, inside, height, width) -> (rows, outside, height / 2, width / 2)."""
        y = functional.relu(self.norm1(self.first(x)))
        return functional.relu(self.norm2(self.second(y)) + self.side(x))


def _convnet() -> nn.Module:
    """Group norm instead of batch norm: no statistics of a batch, so that any division of it gives the same maths."""

    def build() -> nn.Module:
        stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        body = [Residual(32, 48), Residual(48, 96), Residual(96, 192)]
        return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))

    return _seeded(build)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def _columns(rows: Any, generator: torch.Generator) -> torch.Tensor:
    """Rows of images as one tensor. Shape: (rows, 3 * 32 * 32 + 1), the label last."""
    return torch.from_numpy(rows["data"].combine_chunks().to_numpy_ndarray().copy())


def _image_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    images = batch[:, :-1].view(-1, 3, 32, 32).float() / 255
    return functional.cross_entropy(model(images), batch[:, -1].long())


def _images(rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images of ten noisy patterns, which can be learned. Shape: (rows, 3 * 32 * 32 + 1), the label last."""
    rng = np.random.default_rng(SEED)
    labels = rng.integers(10, size=rows)
    patterns = rng.integers(256, size=(10, 3 * 32 * 32))
    noisy = (patterns[labels] + rng.integers(256, size=(rows, 3 * 32 * 32))) // 2
    return np.concatenate([noisy, labels[:, None]], axis=1).astype(np.uint8)


def tasks() -> tuple[Task, Task]:
    """Both jobs; reads the text and draws the images."""
    text = lm.Text(lm.list_files([])[:100], SHAPE.context).spread(2048)
    text = text[: len(text) // 32 * 32]  # whole batches
    images = _images(1024)
    return (
        Task(
            "language model",
            _language_model,
            partial(lm.build_optimizer, lr=1e-3),
            lm.loss,
            lm.collate,
            32,
            torch.from_numpy(text.astype(np.int64)),
            partial(lm.dataset, text),
        ),
        Task(
            "convnet",
            _convnet,
            _sgd,
            _image_loss,
            _columns,
            64,
            torch.from_numpy(images),
            partial(ray.data.from_numpy, [images]),
        ),
    )
