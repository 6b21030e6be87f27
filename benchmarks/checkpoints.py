"""Checkpoints: how long training waits for one, how fast they are written and loaded, and what they cost a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from torch.distributed import checkpoint as dcp

from benchmarks import small
from benchmarks.membership import SIZES
from benchmarks.pairs import compare
from benchmarks.step import AGENTS, Ours, Side
from benchmarks.step_jobs import tasks
from benchmarks.tables import Bar, Claim, Table, bar, spread
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.checkpoint import MANIFEST, Manifest, Place
from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine.batches import BatchSource
from ray_dnn.engine.contribute import Contributor
from ray_dnn.engine.probe import first_contribution
from ray_dnn.engine.saving import Saver, restore
from ray_dnn.engine.state import TrainingState
from ray_dnn.engine.step import Engine
from ray_dnn.events import FirstStep, RunStarted
from ray_dnn.feed.collate import default_collate
from ray_dnn.parallel import ReplicaGroup
from ray_dnn.plan import lay
from ray_dnn.sampler import NUMBERS
from ray_dnn.strategies import DataParallel
from ray_dnn.testing import read_events

SIZE = SIZES[-1]  # 100 million parameters, with AdamW
STALLS = 6  # of each side
STARTS = 3
EVERY, BLOCK, PAIRS = 50, 100, 12  # steps between checkpoints, steps of a turn, pairs of turns
ALLOWED_S = 0.010  # that the wait may be longer than a copy of the state in memory

Row = tuple[str, ...]
GIB = 1 << 30


class _Rows:
    """The same few rows for every worker and step."""

    def __init__(self, rows: int):
        column = pa.FixedSizeListArray.from_arrays(pa.array(small.table()[:rows].reshape(-1)), small.INPUTS)
        self._table = pa.table({"data": column, NUMBERS: np.arange(rows)})

    def wait(self, step: int, check: Callable[[], None]) -> bool:
        return True

    def counts(self, step: int, worker: int) -> tuple[int, ...]:
        return (self._table.num_rows,)

    def table(self, step: int, worker: int) -> pa.Table:
        return self._table

    def prefetch(self, step: int, workers: range) -> None:
        pass


def _engine() -> Engine:
    """An agent's engine, alone, after a step."""
    torch.set_num_threads(1)
    config = TrainConfig(SIZE.batch_size, virtual_workers=1, steps=10)
    state = TrainingState(TrainSpec(SIZE.build, small.build_optimizer, small.loss), config)
    source = BatchSource(_Rows(SIZE.batch_size), default_collate, 0, None, 1)
    contributor = Contributor(state, DataParallel(), source)
    engine = Engine(contributor, None, ReplicaGroup(), first_contribution(contributor, False).metrics)
    engine.states.start()
    engine.enter(1, Mesh(1, 0, 1), lay(1, 1, [1.0]), ("agent-1",))
    engine.advance(0)
    return engine


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# -- how long training waits -----------------------------------------------------------------------------------------


class _Sides:
    """Ways to save the same state. Each returns how long training waits for it, and waits for the rest of its work."""

    def __init__(self, engine: Engine, folder: str):
        state = engine.state
        self._engine, self._folder = engine, Path(folder)
        self._saver, self._number = Saver(engine, ReplicaGroup()), 0
        (self._optimizer,) = state.optimizers.values()
        moments = [t for s in self._optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        self._tensors = [*(p.detach() for p in state.parameters.values()), *moments]
        self._copies = [torch.empty_like(tensor) for tensor in self._tensors]
        self.bytes = sum(tensor.nbytes for tensor in self._tensors)
        self.written: list[float] = []  # seconds that ours took to write
        self.loaded: list[float] = []

    def copy(self) -> float:
        """One copy of the state in memory."""

        def copy() -> None:
            for mine, tensor in zip(self._copies, self._tensors, strict=True):
                mine.copy_(tensor)

        return _timed(copy)

    def ours(self) -> float:
        """A snapshot; then it is written, and loaded again."""
        self._number += 1
        number = self._number
        stall = _timed(lambda: self._saver.take(number, []))
        place = Place.of(self._folder / f"ours-{number}")
        place.make()
        os.sync()  # what others have written is not to be waited for
        began = time.perf_counter()
        files = self._saver.write(number, 0, place)
        self.written.append(time.perf_counter() - began)
        self._saver.drop(number)
        manifest = Manifest(1, 1, {}, files)
        place.write(MANIFEST, manifest.to_json())
        for file in files:
            _forget(Path(place.path) / file)
        self.loaded.append(_timed(lambda: restore(self._engine, ReplicaGroup(), place, manifest)))
        shutil.rmtree(place.path)
        return stall

    def _tree(self) -> dict[str, Any]:
        return {"model": self._engine.state.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def torch_save(self) -> float:
        """In the loop, as in PyTorch's tutorials."""
        return _timed(lambda: torch.save(self._tree(), self._folder / "torch.pt"))

    def dcp_async(self) -> float:
        """PyTorch's own checkpoints that are written from the side."""
        began = time.perf_counter()
        writing: Any = dcp.async_save(self._tree(), checkpoint_id=self._folder / "dcp")
        stall = time.perf_counter() - began
        getattr(writing, "upload_completion", writing).result()
        return stall


def _forget(file: Path) -> None:
    """Have a file read from the disk the next time."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _dd(size: int, folder: str) -> tuple[float, float]:
    """Seconds that dd takes to write as much to a new file on the disk, and to read it."""
    file, block = Path(folder, "dd"), 16 << 20
    command = ["dd", "if=/dev/zero", f"of={file}", f"bs={block}", f"count={size // block}", "conv=fsync"]
    os.sync()
    wrote = _timed(lambda: subprocess.run(command, check=True, capture_output=True))
    _forget(file)
    command = ["dd", f"if={file}", "of=/dev/null", f"bs={block}"]
    read = _timed(lambda: subprocess.run(command, check=True, capture_output=True))
    file.unlink()
    return wrote, read


def _alone() -> tuple[list[tuple[Row, Claim]], list[Bar]]:
    """What an agent's checkpoints take, without a run."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        sides = _Sides(_engine(), folder)
        found: dict[str, list[float]] = {"copy": [], "ours": [], "torch_save": [], "dcp_async": []}
        disk: list[tuple[float, float]] = []
        for number in range(STALLS + 1):
            for name, seconds in found.items():
                stall = getattr(sides, name)()
                if number:  # the first ones allocate memory
                    seconds.append(stall)
            disk.append(_dd(sides.bytes, folder))
        dist.destroy_process_group()
    rows = list(_stalls(found))
    written, read = [w for w, _ in disk], [r for _, r in disk]
    rows += [
        _speed("a checkpoint written, with checksums, synced", sides.written, written, sides.bytes),
        _speed("a checkpoint loaded and verified, from the disk", sides.loaded, read, sides.bytes),
    ]
    labels = {"copy": "a copy in memory", "ours": "ray_dnn", "torch_save": "torch.save", "dcp_async": "async_save"}
    return rows, [bar("training waits", labels[name], seconds) for name, seconds in found.items()]


def _stalls(found: dict[str, list[float]]) -> Iterator[tuple[Row, Claim]]:
    mine = found["ours"]
    what = f"training waits for a checkpoint, {SIZE.parameters / 1e6:.0f} M parameters, AdamW"
    for name, label in (
        ("copy", "one copy of the state in memory"),
        ("torch_save", "torch.save in the loop"),
        ("dcp_async", "torch.distributed.checkpoint.async_save"),
    ):
        peer, ratio = found[name], compare(mine, found[name])
        worse = median(mine) > median(peer) + (ALLOWED_S if name == "copy" else 0)
        told = f"{label}: {spread(peer, 's', 3)}"
        yield (
            (what, str(len(mine)), spread(mine, "s", 3), told, str(ratio), f"{ratio.bound:.2f}"),
            Claim(what, f"{median(mine):.2f} s", f"{label}: {median(peer):.2f} s", str(ratio), worse),
        )


def _speed(what: str, mine: Sequence[float], peer: Sequence[float], size: int) -> tuple[Row, Claim]:
    """How many bytes a second, beside dd."""
    ratio = compare(mine, peer)

    def rate(seconds: Sequence[float]) -> str:
        return f"{size / median(seconds) / GIB:.2f} GiB/s"

    return (
        (
            what,
            str(len(mine)),
            f"{spread(mine, 's', 2)}, {rate(mine)}",
            f"dd: {spread(peer, 's', 2)}, {rate(peer)}",
            str(ratio),
            f"{ratio.bound:.2f}",
        ),
        Claim(what, rate(mine), f"dd: {rate(peer)}", str(ratio), ratio.median > 1, brief=False),
    )


# -- what they cost a run --------------------------------------------------------------------------------------------


def _overhead() -> Iterator[tuple[Row, Claim]]:
    """Steps of a run that writes checkpoints, and of one that does not, in turns."""
    task = next(iter(tasks()))
    with tempfile.TemporaryDirectory() as folder, small.cluster(16):
        sides = (Side("with", AGENTS, every=EVERY), Side("without", AGENTS))
        runs = {side: Ours(task, side, folder, side.label) for side in sides}
        for run in runs.values():
            run.turns.wait()
        found: dict[str, list[float]] = {side.label: [] for side in sides}
        for number in range(PAIRS + 1):
            for side in sides if number % 2 else reversed(sides):
                runs[side].turns.release(BLOCK)
                seconds = runs[side].turns.wait()
                if number:
                    found[side.label].append(1e3 * seconds / BLOCK)
        for run in runs.values():
            run.end()
    mine, peer = found["with"], found["without"]
    ratio = compare(mine, peer)
    what = f"a step, {task.name}, {AGENTS} agents, with a checkpoint every {EVERY} steps"
    yield (
        (what, str(PAIRS), spread(mine, "ms"), f"without: {spread(peer, 'ms')}", str(ratio), f"{ratio.bound:.3f}"),
        Claim(what, f"{median(mine):.1f} ms", f"without: {median(peer):.1f} ms", str(ratio), ratio.median > 1.02),
    )


def _starts() -> Iterator[tuple[Row, Claim]]:
    """From fit() to the first step, of a run that goes on and of one that begins."""
    found: dict[str, list[float]] = {"begins": [], "goes on": []}
    with small.cluster(8):
        for number in range(STARTS):
            with tempfile.TemporaryDirectory() as folder:
                for steps, seconds in enumerate(found.values(), 2):
                    result = Trainer(
                        TrainSpec(SIZE.build, small.build_optimizer, small.loss),
                        {"train": small.rows()},
                        TrainConfig(SIZE.batch_size, virtual_workers=AGENTS, steps=steps),
                        scaling_config=ScalingConfig(num_workers=AGENTS),
                        run_config=RunConfig(name=f"run-{number}", storage_path=folder),
                    ).fit()
                    times = {type(e): e.time for e in reversed(read_events(result))}
                    seconds.append(times[FirstStep] - times[RunStarted])
    mine, peer = found["goes on"], found["begins"]
    ratio = compare(mine, peer)
    what = f"from fit() to the first step from a checkpoint, {SIZE.parameters / 1e6:.0f} M parameters, {AGENTS} agents"
    yield (
        (what, str(STARTS), spread(mine, "s"), f"from the beginning: {spread(peer, 's')}", str(ratio), "–"),
        Claim(what, f"{median(mine):.1f} s", f"from the beginning: {median(peer):.1f} s", str(ratio), brief=False),
    )


def run() -> Table:
    """The table."""
    rows, bars = _alone()
    rows += [*_overhead(), *_starts()]
    return Table(
        name="checkpoints",
        title="Checkpoints",
        header=("measured", "pairs", "ray_dnn", "compared with", "ratio of times (middle half)", "95 % bound"),
        rows=tuple(row for row, _ in rows),
        notes=(
            "The wait, writing and loading: one process, one thread, which holds the whole state (weights and two "
            "moments, float32); in turns, on the local disk, after one turn that does not count. A copy in memory goes "
            "to memory that is there already, as ours does from the second checkpoint on. Each side's writing ends "
            "before the next one begins. async_save runs with its defaults, in a group of one process.",
            "dd writes zeros with conv=fsync, and reads them; before either side reads, its files are dropped from "
            "the page cache. Loading ends with all of it in the model and the optimizer.",
            f"The cost of a run: the same job twice in one Ray cluster, in turns of {BLOCK} steps while the other one "
            "waits; what is still to be written when a turn ends goes into the other's turn.",
        ),
        claims=tuple(claim for _, claim in rows),
        bars=tuple(bars),
        unit="s",
    )
