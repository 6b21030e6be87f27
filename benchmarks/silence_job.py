"""The driver of a job whose network is struck at.

python -m benchmarks.silence_job FOLDER NAME AGENTS         up to so many agents, until FOLDER/NAME.stop is there
python -m benchmarks.silence_job FOLDER NAME 1 STEPS ...    one agent, once for each number of steps

Writes FOLDER/NAME.json: [[steps, weights digest], ...]. It connects to the Ray cluster of the host that it runs on.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from torch import nn

from benchmarks import small
from ray_dnn import Handle, TrainConfig, Trainer, TrainSpec

BATCH, WORKERS, WIDTH = 60, 6, 64
STEP_S = 0.02  # that each contribution takes longer, so that a run is not over before it was struck
ENDLESS = 1_000_000
LOOK_S = 0.05


def main(folder: Path, name: str, agents: int, steps: list[int]) -> None:
    """Train, and write what came of it."""
    ray.init(address="auto", log_to_driver=False)
    if steps:
        results = [trainer(folder, f"{name}-{count}", agents, count, small.loss).fit() for count in steps]
    else:
        handle = trainer(folder, name, agents, ENDLESS, partial(slowly, STEP_S)).start()
        threading.Thread(target=stop_when_told, args=(handle, folder / f"{name}.stop"), daemon=True).start()
        results = [handle.result()]
    (folder / f"{name}.json").write_text(json.dumps([outcome(result) for result in results]))


def stop_when_told(handle: Handle, told: Path) -> None:
    """Stop the run when there is a file."""
    while not told.exists():
        time.sleep(LOOK_S)
    handle.stop()


def trainer(folder: Path, name: str, agents: int, steps: int, loss: Callable[..., torch.Tensor]) -> Trainer:
    """A trainer of the small job, with the patience that it has by default."""
    return Trainer(
        TrainSpec(model=partial(small.build_model, WIDTH), optimizer=small.build_optimizer, loss=loss),
        {"train": small.rows()},
        TrainConfig(batch_size=BATCH, virtual_workers=WORKERS, steps=steps, checkpoint_every=100),
        scaling_config=ScalingConfig(num_workers=(1, agents)),
        run_config=RunConfig(name=name, storage_path=str(folder), failure_config=FailureConfig()),
    )


def slowly(seconds: float, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss, a little later."""
    time.sleep(seconds)
    return small.loss(model, batch)


def outcome(result: Result) -> tuple[Any, Any]:
    """Steps and digest."""
    assert result.metrics is not None
    return result.metrics["steps"], result.metrics["weights_digest"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), [int(word) for word in sys.argv[4:]])
