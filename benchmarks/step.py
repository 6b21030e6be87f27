"""The healthy step against Ray Train's DistributedDataParallel, with the same model, weights, rows and optimizer.

All jobs are alive in one Ray cluster and take turns (see `benchmarks.turns`). The peer reads its rows from tensors in
memory, the cheapest loader there is; ours come through its normal feed from a Ray Dataset.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

from benchmarks import small, turns
from benchmarks.pairs import compare
from benchmarks.step_jobs import Task, tasks
from benchmarks.tables import Bar, Claim, Table, bar, spread
from benchmarks.turns import FOR_EVER, Turns
from ray_dnn import Patience, TrainConfig, Trainer, TrainSpec
from ray_dnn.engine.numerics import environment
from ray_dnn.testing import read_ledger

AGENTS = 2
PAIRS, MORE_PAIRS = 20, 10  # of the two sides that the claim is about, alone; of all of them together
WARM_UP = 5  # steps
BLOCK_S = 1.5
COMPARED = 10  # steps whose losses are compared; later on rounding grows without bound
SAME = 1e-3  # relative difference of losses that rounding makes in so many steps, at most


def numbers(task: Task, workers: int) -> TrainConfig:
    """Ours. The peer runs under the same numerics: one thread an agent, the same instruction set."""
    return TrainConfig(task.batch, virtual_workers=workers, steps=FOR_EVER, shuffle="none")


@dataclass(frozen=True)
class Side:
    """One way to train a task.

    Attributes:
        label: in the table.
        workers: virtual workers; None: this is the peer.
        pieces: in which the peer computes an agent's rows, accumulating gradients.
        view: the peer's ``gradient_as_bucket_view``.
        every: steps between our checkpoints; None: there is one at the end.
    """

    label: str
    workers: int | None = None
    pieces: int = 1
    view: bool = False
    every: int | None = None


PEER = Side("Ray Train, DDP")
SIDES = (
    Side(f"ray_dnn, V = {AGENTS}", AGENTS),
    Side(f"ray_dnn, V = {4 * AGENTS}", 4 * AGENTS),
    Side(f"ray_dnn, V = {8 * AGENTS}", 8 * AGENTS),
    PEER,
    Side("DDP, gradient_as_bucket_view", view=True),
    Side("DDP, 8 pieces accumulated", pieces=8),
)


# -- ours ------------------------------------------------------------------------------------------------------------


def _pass(folder: str, job: str, model: nn.Module, extra: dict[str, Any], step: int) -> None:
    turns.gate(folder, job, WARM_UP).step()


class Ours:
    """A run of ours that waits for its turns."""

    def __init__(self, task: Task, side: Side, folder: str, job: str):
        assert side.workers is not None
        self.turns = Turns(folder, job, AGENTS)
        waits = partial(_pass, folder, job)
        self._handle = Trainer(
            TrainSpec(task.model, task.optimizer, task.loss, collate=task.collate, after_update=waits),
            {"train": task.dataset()},
            replace(numbers(task, side.workers), checkpoint_every=side.every),
            scaling_config=ScalingConfig(num_workers=AGENTS),
            run_config=RunConfig(name=job, storage_path=folder),
            patience=Patience(idle_s=1e4, stalled_s=1e4),  # an agent whose turn it is not looks as if it hung
        ).start()

    def end(self) -> list[float]:
        """End it. Returns the losses of its steps."""
        self._handle.stop()
        self.turns.release(FOR_EVER)
        return [line.metrics["loss"] for line in read_ledger(self._handle.result()).lines]


# -- theirs ----------------------------------------------------------------------------------------------------------


class Theirs:
    """A run of the peer that waits for its turns."""

    def __init__(self, task: Task, side: Side, folder: str, job: str):
        self.turns = Turns(folder, job, AGENTS)
        variables = environment(numbers(task, AGENTS))
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"task": task, "side": side, "folder": folder, "job": job},
            scaling_config=ScalingConfig(num_workers=AGENTS),
            run_config=RunConfig(name=job, storage_path=folder, worker_runtime_env={"env_vars": variables}),
        )
        self._result = ThreadPoolExecutor(1).submit(trainer.fit)

    def end(self) -> list[float]:
        """End it. Returns the losses of its steps."""
        self.turns.release(0)
        losses: list[float] = self._result.result().return_value
        return losses


def _loop(given: dict[str, Any]) -> list[float]:
    """What an agent of Ray Train does. Returns the mean losses of the steps."""
    task, side = given["task"], given["side"]
    torch.set_num_threads(1)
    model = prepare_model(task.model(), parallel_strategy_kwargs={"gradient_as_bucket_view": side.view})
    optimizer = task.optimizer(model.module)
    gate, losses = turns.gate(given["folder"], given["job"], WARM_UP), []
    for step in range(FOR_EVER):
        rows = task.rows(step, get_context().get_world_rank(), AGENTS)
        total = 0.0
        for piece, part in enumerate(rows.chunk(side.pieces)):
            with model.no_sync() if piece + 1 < side.pieces else nullcontext():
                loss = task.loss(model, part) / side.pieces
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if not gate.step():
            break
    means = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(means)
    return [float(x) / AGENTS for x in means]


# -- turns -----------------------------------------------------------------------------------------------------------


def measure(task: Task, sides: Sequence[Side], rounds: int) -> dict[Side, list[float]]:
    """Milliseconds of a step, by side and round; the peer is among the sides.

    Raises:
        AssertionError: the sides did not learn the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _measure(task, sides, rounds, folder)


def _measure(task: Task, sides: Sequence[Side], rounds: int, folder: str) -> dict[Side, list[float]]:
    runs: dict[Side, Ours | Theirs] = {}
    for number, side in enumerate(sides):
        kind = Theirs if side.workers is None else Ours
        runs[side] = kind(task, side, folder, f"{task.name.replace(' ', '-')}-{number}")
    for run in runs.values():
        run.turns.wait()
    runs[PEER].turns.release(WARM_UP)
    steps = max(1, round(BLOCK_S * WARM_UP / runs[PEER].turns.wait()))
    found: dict[Side, list[float]] = {side: [] for side in sides}
    random = Random(0)
    for _ in range(rounds):
        for side in random.sample(sides, len(sides)):
            runs[side].turns.release(steps)
            found[side].append(1e3 * runs[side].turns.wait() / steps)
            time.sleep(0.1)  # reports that are still on their way to a driver are not the next one's
    losses = {side: run.end() for side, run in runs.items()}
    for side in sides:
        _check(task, side, losses[side][:COMPARED], losses[PEER][:COMPARED])
    return found


def _check(task: Task, side: Side, ours: Sequence[float], theirs: Sequence[float]) -> None:
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"{task.name}, {side.label}: losses of {len(ours)} steps, to {ours[-1]:.4f}, differ by at most {worst:.1e}")
    if worst > SAME:
        raise AssertionError(f"{task.name}: {side.label} and {PEER.label} do not learn the same: {ours} and {theirs}")


def _row(what: str, mine: Sequence[float], peer: Sequence[float]) -> tuple[str, ...]:
    ratio = compare(mine, peer)
    return what, str(len(mine)), spread(mine, "ms"), spread(peer, "ms"), str(ratio), f"{ratio.bound:.3f}"


def _claim(task: Task, side: Side, found: Mapping[Side, Sequence[float]]) -> Claim:
    ratio = compare(found[side], found[PEER])
    what = f"a step without faults, {task.name}, {AGENTS} agents, {side.label[side.label.index('V') :]}"
    peer = f"{PEER.label}: {median(found[PEER]):.1f} ms"
    brief = side is not SIDES[1]
    return Claim(what, f"{median(found[side]):.1f} ms", peer, str(ratio), ratio.median > 1, brief)


def run() -> Table:
    """The table."""
    rows: list[tuple[str, ...]] = []
    claims: list[Claim] = []
    bars: list[Bar] = []
    with small.cluster(32):
        for task in tasks():
            alone = measure(task, (SIDES[0], PEER), PAIRS)
            crowd = measure(task, SIDES, MORE_PAIRS)
            bars += [bar(task.name, side.label, alone[side]) for side in alone]
            bars += [bar(task.name, side.label, crowd[side]) for side in SIDES if side not in alone]
            rows.append(_row(f"{task.name}, {SIDES[0].label}, these two alone", alone[SIDES[0]], alone[PEER]))
            rows += [_row(f"{task.name}, {s.label}", crowd[s], crowd[PEER]) for s in SIDES if s is not PEER]
            claims.append(_claim(task, SIDES[0], alone))
            claims += [_claim(task, side, crowd) for side in SIDES[1:] if side.workers]
    return Table(
        name="step",
        title=f"A step without faults, and {PEER.label}",
        header=("job, side", "pairs", "its step", f"{PEER.label}: its step", "ratio (middle half)", "95 % bound"),
        rows=tuple(rows),
        notes=(
            f"{AGENTS} agents on one machine, one thread each, float32 and AVX2 on both sides; the same initial "
            "weights, rows of each agent and step, and optimizer. The jobs live in one Ray cluster and take turns: "
            f"blocks of as many steps as the peer does in {BLOCK_S} s, in random order, while the others wait. A block "
            "counts from the first agent's release to the last agent's end.",
            "First two jobs alone, then all six in another round: twelve processes that wait on two cores are not "
            "without effect on the two that compute, as DDP against itself with another setting shows too.",
            "V is the number of virtual workers. With more of them than agents, an agent computes its rows in smaller "
            "pieces, which costs something in any framework; DDP is also shown when it does the same.",
            "The peer takes its rows from tensors in memory, ours come through the feed from a Ray Dataset. Losses of "
            f"the first steps are compared in every run and must agree to {SAME:g}.",
            "DDP runs with its defaults, and so broadcasts the language model's buffers, some KiB, in each step.",
            "The driver and the watchers of ours are there during the peer's blocks too, as is the peer's controller "
            "during ours.",
        ),
        claims=tuple(claims),
        bars=tuple(bars),
        unit="ms",
    )
