"""How long the others pause when agents join or leave: from the last step before to the first step after."""

import tempfile
from statistics import median

import ray
from ray.train import RunConfig, ScalingConfig

from benchmarks import small
from benchmarks.tables import Claim, Table, bar, spread
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.events import FirstStep, GenerationFormed, Progress
from ray_dnn.testing import read_events

CHANGES = 6  # resizes up and as many down


def run() -> Table:
    """The table."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder:
            events = _resized(folder)
    finally:
        ray.shutdown()
    formed = {e.generation: e for e in events if isinstance(e, GenerationFormed)}
    gaps: dict[str, list[float]] = {"join": [], "leave": []}
    for event in events:
        if isinstance(event, FirstStep) and event.generation > 1:
            gaps["join" if formed[event.generation].joined else "leave"].append(event.gap_s)
    parameters = sum(p.numel() for p in small.build_model().parameters())
    job = f"{parameters / 1e6:.1f} M parameters, AdamW"
    return Table(
        name="membership",
        title="How long the others pause when agents join or leave",
        header=("change of membership", "times", "pause of the others, one step included"),
        rows=tuple((name, str(len(seconds)), spread(seconds, "s", 3)) for name, seconds in gaps.items()),
        notes=(f"From the last step before to the first step after; {job}, between 1 and 2 agents.",),
        claims=tuple(
            Claim(f"pause of the others when an agent {name}s, {job}", f"{median(seconds):.3f} s")
            for name, seconds in gaps.items()
        ),
        bars=tuple(bar(name, "ray_dnn", seconds) for name, seconds in gaps.items()),
        unit="s",
    )


def _resized(folder: str) -> list[object]:
    spec = TrainSpec(model=small.build_model, optimizer=small.build_optimizer, loss=small.loss)
    handle = Trainer(
        spec,
        {"train": small.rows()},
        TrainConfig(batch_size=64, virtual_workers=2, steps=1_000_000),
        scaling_config=ScalingConfig(num_workers=(1, 2)),
        run_config=RunConfig(name="run", storage_path=folder),
    ).start()
    changes, settled = 0, False
    for event in handle.events():
        if isinstance(event, GenerationFormed):
            settled = False
        elif isinstance(event, FirstStep):
            settled = True
        if settled and isinstance(event, Progress):
            if changes == 2 * CHANGES:
                handle.stop()
                settled = False
                continue
            handle.resize(1 if event.agents == 2 else 2)
            changes, settled = changes + 1, False
    return list(read_events(handle.result().path))
