"""Small jobs that several test modules train, with knobs for what goes wrong in them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.train import Result, RunConfig, ScalingConfig
from torch import nn
from torch.nn import functional

from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.testing import read_ledger

ROWS = 203  # a last batch of 11 rows with batches of 32


def table(rows: int = ROWS) -> pa.Table:
    """Two columns of numbers and a label that depends on both."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((rows, 4)).astype(np.float32)
    columns = {f"x{i}": x[:, i] for i in range(4)}
    return pa.table(columns | {"y": (x.sum(axis=1) > 0).astype(np.int64), "row": np.arange(rows)})


def dataset(rows: int = ROWS, blocks: int = 3) -> Any:
    """The table as a Ray Dataset of several blocks."""
    whole = table(rows)
    size = -(-rows // blocks)
    return ray.data.from_arrow([whole.slice(at, size) for at in range(0, rows, size)])


def features(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([batch[f"x{i}"] for i in range(4)], dim=1)  # (rows, 4)


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 2))


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(features(batch)), batch["y"])


def accuracy(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"accuracy": (model(features(batch)).argmax(dim=1) == batch["y"]).float().mean()}


def slowly(seconds: float) -> Callable[..., torch.Tensor]:
    """The loss, after so long: for tests that need a step to take some time."""

    def slow(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        import time

        time.sleep(seconds)  # busy, it would keep others from starting
        return loss(model, batch)

    return slow


def claim(folder: Path, most: int) -> int:
    """A number that no other process gets: 0 for the first that asks, and so on up to ``most``."""
    for number in range(most):
        try:
            os.close(os.open(folder / f"claim-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return number
    return most


SPEC: dict[str, Any] = {"model": build_model, "optimizer": build_optimizer, "loss": loss}
CONFIG: dict[str, Any] = {"batch_size": 32, "virtual_workers": 5, "epochs": 2, "min_rows": 2}


def trainer(
    path: Path,
    agents: int | tuple[int, int],
    spec: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **more: Any,
) -> Trainer:
    """A trainer of the small job; ``spec`` and ``config`` replace fields of it."""
    datasets = {"train": dataset()}
    if spec and spec.get("evaluate"):
        datasets["validation"] = dataset(70)
    return Trainer(
        TrainSpec(**SPEC | (spec or {})),
        datasets,
        TrainConfig(**CONFIG | (config or {})),
        scaling_config=ScalingConfig(num_workers=agents),
        run_config=RunConfig(name="run", storage_path=str(path)),
        **more,
    )


def digest(result: Result) -> str:
    assert result.metrics is not None
    return str(result.metrics["weights_digest"])


def assert_every_row_once(result: Result | str, epochs: int = 2) -> None:
    """``result``: of a run, or the path of its folder."""
    ledger = read_ledger(result if isinstance(result, str) else result.path)
    for epoch in range(epochs):
        assert ledger.counts(epoch).tolist() == [1] * ROWS


def assert_as_undisturbed(result: Result, path: Path) -> None:
    """The bits and the rows of one agent alone, which runs in ``path``, and no step was computed twice."""
    assert result.metrics is not None
    steps = result.metrics["steps"]
    # Without a place of its own, so anywhere.
    alone = trainer(path, 1, config={"epochs": None, "steps": steps}).fit()
    assert digest(result) == digest(alone)
    assert_every_row_once(result, steps // 7)
    assert [line.step for line in read_ledger(result).lines] == list(range(steps))
