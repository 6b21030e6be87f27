"""The small job that the benchmarks train."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

ROWS, INPUTS = 4096, 64


@contextlib.contextmanager
def cluster(cpus: int = 8, store: int | None = None) -> Iterator[None]:
    """A Ray cluster of one node, quiet, and gone afterwards. More logical CPUs than there are cores are no harm.

    ``store``: bytes of its object store; None: as many as Ray takes by itself.
    """
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=store,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()


def table() -> NDArray[np.float32]:
    """Random rows."""
    return np.random.default_rng(0).standard_normal((ROWS, INPUTS)).astype(np.float32)


def rows() -> Any:
    """The same as a dataset of one tensor column, "data"."""
    return ray.data.from_numpy([table()])


def build_model(width: int = 1024) -> nn.Module:
    """An MLP of 1.2 million parameters, or of another inner width."""
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, INPUTS)
    )


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the reconstruction."""
    return functional.mse_loss(model(batch["data"]), batch["data"])
