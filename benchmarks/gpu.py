"""A step on a GPU: plain PyTorch, ray_dnn with one agent, and with two agents on half a GPU each.

    python -m benchmarks.gpu                 needs a machine with a GPU, and says so where there is none
    python -m benchmarks.gpu --workers 1     in as few pieces as PyTorch

All train the same transformer on the same rows in the same order, one after another, under the same numerics. PyTorch
has its rows in memory. What is compared is the median time of a step, from one to the next.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.tables import lines, spread

WARM_UP = 10  # steps that are not counted


@dataclass(frozen=True)
class Shape:
    """What is trained, by the names of the flags."""

    layers: int
    width: int
    context: int
    batch: int
    workers: int
    steps: int
    precision: str

    @property
    def rows(self) -> Any:
        """Random bytes. Shape: (batch * steps, context + 1)."""
        import numpy as np

        shape = (self.batch * self.steps, self.context + 1)
        return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)

    def model(self) -> Any:
        from jobs import language_model as lm

        return lm.LanguageModel(lm.Shape(self.layers, self.width, self.context))


@dataclass(frozen=True)
class Side:
    """What came of one way to train it.

    Attributes:
        seconds: of each step, after the first few.
        loss: of the last step.
    """

    seconds: list[float]
    loss: float
    digest: str = "–"


def _optimizer(model: Any) -> Any:
    from jobs import language_model as lm

    return lm.build_optimizer(model, lr=1e-3)


def config(shape: Shape) -> Any:
    """The job's numbers."""
    from ray_dnn import TrainConfig

    return TrainConfig(
        shape.batch,
        virtual_workers=shape.workers,
        steps=shape.steps,
        precision=shape.precision,  # type: ignore[arg-type]
        shuffle="none",
    )


# -- theirs ------------------------------------------------------------------------------------------------------------


def plain(shape: Shape, pieces: int) -> Side:
    """PyTorch by itself, which computes a batch in so many pieces."""
    import torch

    from jobs import language_model as lm
    from ray_dnn.engine import device, numerics
    from ray_dnn.engine.rng import seed_everything

    gpu = device.of_agent(1)
    numerics.enforce(config(shape), gpu)
    seed_everything("model", 0)
    model = shape.model().to(gpu)
    optimizer = _optimizer(model)
    rows = torch.from_numpy(shape.rows.astype("int64"))
    dtype = {"fp32": None, "bf16": torch.bfloat16}[shape.precision]
    ends = []
    for batch in rows.split(shape.batch):
        optimizer.zero_grad()
        total = 0.0
        for piece in batch.chunk(pieces):
            with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = lm.loss(model, piece.to(gpu))
            part = loss * (len(piece) / len(batch))
            part.backward()
            total += float(part.detach())
        optimizer.step()
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return Side(_between(ends), total)


# -- ours --------------------------------------------------------------------------------------------------------------


def _note(folder: str, model: Any, extra: Any, step: int) -> None:
    """A step has ended on this agent."""
    with open(Path(folder) / f"{os.getpid()}.ends", "a") as file:
        file.write(f"{time.perf_counter()!r}\n")


def ours(shape: Shape, agents: int) -> Side:
    """So many agents of ray_dnn that share one GPU."""
    from ray.train import RunConfig, ScalingConfig

    from jobs import language_model as lm
    from ray_dnn import Trainer, TrainSpec

    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(
            TrainSpec(shape.model, _optimizer, lm.loss, collate=lm.collate, after_update=partial(_note, folder)),
            {"train": lm.dataset(shape.rows)},
            config(shape),
            scaling_config=ScalingConfig(
                num_workers=agents, use_gpu=True, resources_per_worker={"CPU": 1, "GPU": 1 / agents}
            ),
            run_config=RunConfig(name="run", storage_path=folder),
        ).fit()
        ends = next(iter(Path(folder).glob("*.ends"))).read_text().split()
    assert result.metrics is not None
    return Side(_between(list(map(float, ends))), result.metrics["loss"], result.metrics["weights_digest"])


def _between(ends: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(ends)][WARM_UP:]


# -- both --------------------------------------------------------------------------------------------------------------


def measure(shape: Shape) -> None:
    """Run them all and print what came of it."""
    import ray

    from ray_dnn.engine.numerics import environment

    alone = ray.remote(plain).options(num_gpus=1, runtime_env={"env_vars": environment(config(shape))})
    sides = {"PyTorch, the whole batch at once": ray.get(alone.remote(shape, 1))}
    if shape.workers > 1:
        sides[f"PyTorch, {shape.workers} pieces"] = ray.get(alone.remote(shape, shape.workers))
    sides["ray_dnn, 1 agent"] = ours(shape, 1)
    if shape.workers > 1:
        sides["ray_dnn, 2 agents on half a GPU each"] = ours(shape, 2)
    base = median(next(iter(sides.values())).seconds)
    rows = [
        (
            name,
            spread([1e3 * s for s in side.seconds], "ms"),
            f"{median(side.seconds) / base:.2f}",
            f"{side.loss:.6f}",
            side.digest[:16],
        )
        for name, side in sides.items()
    ]
    print("\n".join(lines(("", "a step", "to the first", "loss of the last step", "weights_digest"), rows)))
    digests = {side.digest for side in sides.values()} - {"–"}
    print("\nThe digests are equal." if len(digests) == 1 else "\nTHE DIGESTS DIFFER.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"layers": 12, "width": 768, "context": 512, "batch": 32, "workers": 4, "steps": 40}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default bf16")
    shape = Shape(**vars(parser.parse_args()))
    if shape.steps <= WARM_UP + 1:
        parser.error(f"--steps {shape.steps}: the first {WARM_UP} are not counted; take more than {WARM_UP + 1}")
    import torch

    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        print(f"There is no GPU here that torch {torch.__version__} ({built}) can use: nothing was measured.")
        return
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Short, for Ray puts Unix sockets below it. Ray reads its environment when it is imported, below.
        os.environ |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        import ray

        from benchmarks import results

        host = results.machine().replace(", no accelerator", "")
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {host}\n{shape}\n", flush=True)
        logging.getLogger("ray_dnn").addHandler(logging.NullHandler())  # so that runs do not tell their progress
        ray.init(address="local", num_gpus=1, include_dashboard=False, log_to_driver=False)
        try:
            measure(shape)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
