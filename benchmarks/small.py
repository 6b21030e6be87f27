"""The small job that the benchmarks train."""

from typing import Any

import numpy as np
import ray
import torch
from torch import nn
from torch.nn import functional

ROWS, INPUTS = 4096, 64


def rows() -> Any:
    """Random rows of one tensor column, "data"."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, INPUTS)).astype(np.float32)
    return ray.data.from_numpy([x])


def build_model() -> nn.Module:
    """An MLP of 1.2 million parameters."""
    return nn.Sequential(nn.Linear(INPUTS, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, INPUTS))


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the reconstruction."""
    return functional.mse_loss(model(batch["data"]), batch["data"])
