"""From ``fit()`` to the end of the first step, against Ray Train with the same model, data and agents."""

import tempfile
import time
from statistics import median
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from benchmarks import small
from benchmarks.pairs import compare
from benchmarks.tables import Claim, Table, bar, spread
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.events import FirstStep
from ray_dnn.testing import read_events

BATCH = 64
PAIRS = {2: 5, 4: 3}  # by number of agents


def _ours(data: Any, folder: str, agents: int) -> float:
    spec = TrainSpec(model=small.build_model, optimizer=small.build_optimizer, loss=small.loss)
    config = TrainConfig(batch_size=BATCH, virtual_workers=agents, steps=1)
    begun = time.time()
    result = Trainer(
        spec,
        {"train": data},
        config,
        scaling_config=ScalingConfig(num_workers=agents),
        run_config=RunConfig(name=f"ours-{begun}", storage_path=folder),
    ).fit()
    return next(e.time for e in read_events(result.path) if isinstance(e, FirstStep)) - begun


def _one_step(config: dict[str, Any]) -> float:
    torch.set_num_threads(1)
    model = prepare_model(small.build_model())
    optimizer = small.build_optimizer(model)
    shard = ray.train.get_dataset_shard("train")
    for batch in shard.iter_torch_batches(batch_size=config["rows"]):
        small.loss(model, batch).backward()
        optimizer.step()
        break
    return time.time()


def _theirs(data: Any, folder: str, agents: int) -> float:
    begun = time.time()
    result = TorchTrainer(
        _one_step,
        train_loop_config={"rows": BATCH // agents},
        datasets={"train": data},
        scaling_config=ScalingConfig(num_workers=agents),
        run_config=RunConfig(name=f"theirs-{begun}", storage_path=folder),
    ).fit()
    return float(result.return_value) - begun


def run() -> Table:
    """The table."""
    with small.cluster(), tempfile.TemporaryDirectory() as folder:
        data = small.rows().materialize()
        pairs = {
            agents: [(_ours(data, folder, agents), _theirs(data, folder, agents)) for _ in range(count)]
            for agents, count in PAIRS.items()
        }
    rows, claims, bars = [], [], []
    for agents, found in pairs.items():
        ours, theirs = [p[0] for p in found], [p[1] for p in found]
        ratio, what = compare(ours, theirs), f"{agents} agents"
        rows.append(
            (what, str(len(found)), spread(ours, "s"), spread(theirs, "s"), str(ratio), f"{ratio.bound:.2f}"),
        )
        peer = f"Ray Train {median(theirs):.1f} s"
        first = f"from fit() to the first step, {what}"
        claims.append(Claim(first, f"{median(ours):.1f} s", peer, str(ratio), ratio.median > 1))
        bars += [bar(what, "ray_dnn", ours), bar(what, "Ray Train", theirs)]
    return Table(
        name="start",
        title="From fit() to the end of the first step, and Ray Train",
        header=("fit() to first step", "pairs", "ray_dnn", "Ray Train", "ratio (middle half)", "95 % bound"),
        rows=tuple(rows),
        notes=(
            "Interleaved pairs on a Ray cluster that is up: the same model, rows and agents; TorchTrainer, with "
            "DistributedDataParallel and a shard of the same Ray Dataset.",
        ),
        claims=tuple(claims),
        bars=tuple(bars),
        unit="s",
    )
