"""Rows into training, and Ray Train's: how fast, how soon, from the middle of an epoch, and in how much memory."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import ray
from ray.data.expressions import col

from benchmarks import small
from benchmarks.feed_alone import feed
from benchmarks.feed_epochs import AGENTS, OURS, OURS_SHUFFLED, THEIRS, THEIRS_SHUFFLED, Side, measure
from benchmarks.feed_jobs import FILES, SHAPES, Shape, tensors
from benchmarks.feed_memory import LOOK_S, Peaks, peaks
from benchmarks.pairs import compare
from benchmarks.tables import Bar, Claim, Table, bar, spread
from ray_dnn import TrainConfig

ROUNDS = 5  # of epochs
FIRSTS = 8  # first batches, of each side
RESUMES = 2
SHORTER, LONGER = 10, 60  # epochs to resume in, of so many times the files
CPUS = 3 * AGENTS + 4  # for the agents of all jobs, and for the peer's reading
RESUMED_AT = 0.9  # of an epoch
STORE = 256 << 20
LARGE_ROWS, LARGE_GROUP, LARGE_BATCH, LARGE_WINDOW = 3 << 19, 8 << 10, 4 << 10, 32 << 10  # rows of 1 KiB

Row = tuple[str, ...]
_COMPARED = ((OURS, THEIRS), (OURS_SHUFFLED, THEIRS), (OURS_SHUFFLED, THEIRS_SHUFFLED))


def _numbers(batch: int, window: int = 65_536) -> TrainConfig:
    """One epoch, shuffled as by default."""
    return TrainConfig(batch, virtual_workers=AGENTS, epochs=1, shuffle_window=window)


# -- epochs ----------------------------------------------------------------------------------------------------------


def _rate(shape: Shape, seconds: Sequence[float]) -> str:
    return f"{shape.rows / median(seconds) / 1e3:,.1f} thousand rows/s"


def _speed(shape: Shape, seconds: Sequence[float]) -> str:
    return f"{spread(seconds, 's', 2)}, {_rate(shape, seconds)}"


def _epochs(shape: Shape, found: Mapping[Side, Sequence[float]]) -> Iterator[tuple[Row, Claim]]:
    for ours, theirs in _COMPARED:
        mine, peer = found[ours], found[theirs]
        ratio = compare(mine, peer)
        what = f"an epoch of {shape.name}, {ours.label}; {theirs.label}"
        first = f"an epoch that hardly computes, {AGENTS} agents, {shape.name}, {ours.how}"
        told = f"{theirs.label}: {_rate(shape, peer)}"
        yield (
            (what, str(len(mine)), _speed(shape, mine), _speed(shape, peer), str(ratio), f"{ratio.bound:.2f}"),
            Claim(first, _rate(shape, mine), told, str(ratio), ratio.median > 1, (ours, theirs) == _COMPARED[1]),
        )


# -- the first batch -------------------------------------------------------------------------------------------------


def _ours_first(data: Any, rows: int) -> float:
    began = time.perf_counter()
    with closing(feed(data, _numbers(rows))) as fed:
        next(fed.batches())
        return time.perf_counter() - began


def _first_of(batches: Iterator[Any], began: float) -> float:
    next(batches)
    seconds = time.perf_counter() - began
    for _ in batches:  # what is given up in the middle would go on for a while, and slow down whoever comes next
        pass
    return seconds


def _split(data: Any, rows: int) -> float:
    """As Ray Train feeds an agent."""
    began = time.perf_counter()
    (shard,) = data.streaming_split(1)
    return _first_of(iter(shard.iter_torch_batches(batch_size=rows)), began)


def _unsplit(data: Any, rows: int) -> float:
    """As Ray Data feeds the process that asks it."""
    began = time.perf_counter()
    return _first_of(iter(data.iter_torch_batches(batch_size=rows)), began)


_PEERS: dict[str, Callable[[Any, int], float]] = {
    "Ray Data, streaming_split(1)": _split,
    "Ray Data, iter_torch_batches": _unsplit,
}


def _firsts(shape: Shape, folder: str) -> Iterator[tuple[Row, Claim]]:
    sides = {"ray_dnn": _ours_first} | _PEERS
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(FIRSTS + 1):
        for side, first in sides.items():
            seconds = first(shape.dataset(folder), shape.batch)
            if number:  # the first ones start processes
                found[side].append(seconds)
    mine = found["ray_dnn"]
    for side in _PEERS:
        ratio, peer = compare(mine, found[side]), f"{side}: {spread(found[side], 's', 2)}"
        what = f"from a dataset to its first batch, {shape.name}"
        yield (
            (what, str(FIRSTS), spread(mine, "s", 2), peer, str(ratio), f"{ratio.bound:.2f}"),
            Claim(
                what,
                f"{median(mine):.2f} s",
                f"{side}: {median(found[side]):.2f} s",
                str(ratio),
                ratio.median > 1,
                brief=side == next(iter(_PEERS)),
            ),
        )


# -- from the middle -------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """Reading an epoch, or its rest.

    Attributes:
        seconds: from the dataset to the last batch.
        rows: that tasks read for it.
        counts: rows of the units that were counted.
    """

    seconds: float
    steps: int
    rows: int
    counts: dict[int, int]


def _read(data: Any, batch: int, first_step: int = 0, counts: Mapping[int, int] | None = None) -> Pass:
    began = time.perf_counter()
    with closing(feed(data, _numbers(batch), first_step, counts)) as fed:
        steps = sum(1 for _ in fed.batches())
        return Pass(time.perf_counter() - began, steps, fed.rows_read, fed.counts)


def _multiply(folder: str, times: int) -> None:
    """Have each file there so many times. Their content is on the disk once."""
    for file in list(Path(folder).glob("?.parquet")):
        for copy in range(1, times):
            with suppress(FileExistsError):
                os.link(file, f"{folder}/{copy}-{file.name}")


def _resumes(shape: Shape, folder: str) -> Iterator[tuple[Row, Claim]]:
    """``folder``: with the shape's files, of which it gets more."""
    for times, kind, filtered, counted in (
        (SHORTER, "no filter", False, False),
        (SHORTER, "a filter, rows of units counted before", True, True),
        (SHORTER, "a filter, nothing counted", True, False),
        (LONGER, "no filter", False, False),
    ):
        _multiply(folder, times)
        pairs = []
        for _ in range(RESUMES):
            data = shape.dataset(folder)
            data = data.filter(expr=col("c00") > 0) if filtered else data
            whole = _read(data, shape.batch)
            counts = whole.counts if counted else None
            pairs.append((_read(data, shape.batch, int(RESUMED_AT * whole.steps), counts), whole))
        rest, epoch = [p[0].seconds for p in pairs], [p[1].seconds for p in pairs]
        ratio, share = compare(rest, epoch), pairs[0][0].rows / pairs[0][1].rows
        rows = f"{times * shape.rows / 1e6:.0f} M rows"
        what = f"a feed that begins at {RESUMED_AT:.0%} of an epoch of {rows}, {kind}"
        told = f"{what}; reads {share:.0%} of the rows"
        whole_s = f"its whole epoch: {spread(epoch, 's', 1)}"
        yield (
            (told, str(RESUMES), spread(rest, "s", 1), whole_s, str(ratio), "–"),
            Claim(
                what,
                f"{median(rest):.1f} s",
                f"its whole epoch: {median(epoch):.1f} s",
                str(ratio),
                brief=times == LONGER,
            ),
        )


# -- memory ----------------------------------------------------------------------------------------------------------


def _write_large(folder: str) -> None:
    """Write rows of 1 KiB. All files have the same content, which is on the disk once."""
    first = f"{folder}/0.parquet"
    table = tensors(np.random.default_rng(0), LARGE_ROWS // FILES)
    pq.write_table(table, first, row_group_size=LARGE_GROUP, compression="none", use_dictionary=False)
    for file in range(1, FILES):
        os.link(first, f"{folder}/{file}.parquet")


def _stream_ours(data: Any) -> Iterable[Any]:
    with closing(feed(data, _numbers(LARGE_BATCH, LARGE_WINDOW))) as fed:
        yield from fed.batches()


def _stream_theirs(data: Any) -> Iterable[Any]:
    yield from data.iter_torch_batches(batch_size=LARGE_BATCH)


def _streamed(stream: Callable[[Any], Iterable[Any]], folder: str) -> Peaks:
    with peaks() as found:
        for _ in stream(ray.data.read_parquet(folder)):
            pass
    return found


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _memory() -> Iterator[tuple[Row, Claim]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_large(folder)
        for stream in (_stream_ours, _stream_theirs):
            with small.cluster(4, STORE):
                found[stream] = _streamed(stream, folder)
    mine, peer = found[_stream_ours], found[_stream_theirs]
    what = f"{LARGE_ROWS >> 10:,} MiB of rows streamed through an object store of {_mib(STORE)}: "
    for name, ours, theirs in (
        ("its highest use", mine.store, peer.store),
        ("spilled to disk", mine.spilled, peer.spilled),
        ("highest private memory of the process that takes them", mine.private, peer.private),
    ):
        told = f"Ray Data, iter_torch_batches: {_mib(theirs)}"
        yield (
            (what + name, "1", _mib(ours), told, "–", "–"),
            Claim(what + name, _mib(ours), told, worse=ours > theirs, brief=name == "spilled to disk"),
        )


def alone(folder: str) -> Iterator[tuple[Row, Claim]]:
    """What is measured without agents, in a cluster with this machine's CPUs. ``folder``: of the first shape."""
    with small.cluster(len(os.sched_getaffinity(0))):
        yield from _firsts(SHAPES[0], folder)
        yield from _resumes(SHAPES[0], folder)


# -- all -------------------------------------------------------------------------------------------------------------


def run() -> Table:
    """The table."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the peer tells its progress in this process
    found: list[tuple[Row, Claim]] = []
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        with small.cluster(CPUS):
            for number, shape in enumerate(SHAPES):
                files = Path(folder, str(number))
                files.mkdir()
                shape.write(str(files))
                epochs = measure(shape, str(files), ROUNDS)
                found += _epochs(shape, epochs)
                bars += [bar(shape.name, side.label, seconds) for side, seconds in epochs.items()]
        found += alone(f"{folder}/0")
    found += _memory()
    return Table(
        name="feed",
        title="Rows into training, and Ray Train's",
        header=("measured", "pairs", "ray_dnn", "compared with", "ratio of times (middle half)", "95 % bound"),
        rows=tuple(row for row, _ in found),
        notes=_notes(),
        claims=tuple(claim for _, claim in found),
        bars=tuple(bars),
        unit="s an epoch",
    )


def _notes() -> tuple[str, ...]:
    window = TrainConfig(1, steps=1).shuffle_window
    return (
        f"Epochs: {AGENTS} agents, one thread each, the same Parquet files, map_batches and rows of each agent in a "
        "step on both sides, all columns made tensors; the model is one layer that sees a few numbers. The jobs live "
        "in one Ray cluster and take turns of two epochs in random order, of which the second counts. Ratios are of "
        "times, so below 1 more rows come in a second. The peer is TorchTrainer with get_dataset_shard and "
        "iter_torch_batches.",
        f"The windowed shuffle takes rows from {window:,} at a time. For the peer that shuffles, "
        f"local_shuffle_buffer_size is {window // AGENTS:,} in each of the {AGENTS} agents.",
        "The first batch, and the middle of an epoch: without agents, in a process that takes all rows, in a Ray "
        "cluster that has as many CPUs as the machine, and has done the same before. Ray Train feeds an agent by "
        "streaming_split; iter_torch_batches reads for the process that calls it. Windowed shuffle on our side, none "
        "on the peer's.",
        "In the middle of an epoch a feed finds its place by the rows of the units before, from the footers of the "
        "files or, where rows are filtered, from an earlier count. Where nobody has counted them, it reads them to do "
        "so. The time is from the dataset to the last batch.",
        f"Memory: {FILES} files, shuffled in windows of {LARGE_WINDOW >> 10} MiB on our side only, each in "
        f"a Ray cluster of its own, looked at every {1e3 * LOOK_S:.0f} ms. Of the object store it is what it has ever "
        "taken from the machine; it spills when four fifths of it are full.",
    )
