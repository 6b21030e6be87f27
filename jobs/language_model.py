"""Train a byte-level language model on text that is already on the machine, on however many agents there are.

    python jobs/language_model.py                              the sources of Python's standard library, about 2 minutes
    python jobs/language_model.py ~/notes ~/book.txt           your own files and folders
    ray job submit --working-dir . -- python jobs/language_model.py --size small

Text may be of any size: training reads it bit by bit, on this machine. About one file in twenty is held out. At the end
the model's bits per byte of held-out text stand beside those of byte and byte-pair frequencies and of xz, followed by a
sample of what the model writes and by the digest of its weights: the same digest for any number of agents, whatever
happened to them on the way.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import Result, RunConfig, ScalingConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ray_dnn import TrainConfig, Trainer, TrainSpec, load_weights

Bytes = NDArray[np.uint8]

# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Shape:
    """Of a model: number of layers, width of the residual stream, and how many bytes it sees at most."""

    layers: int
    width: int
    context: int


HEAD = 32  # width of an attention head
TAPS = 3  # earlier bytes whose embeddings are mixed into each position


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al., "RoFormer", 2021) and normalised queries and keys."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        angles = torch.outer(torch.arange(shape.context), 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context, HEAD / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, then turn pairs of features by an angle in proportion to their position. Keeps the shape."""
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        a, b = F.rms_norm(x, (HEAD,)).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, time, width) -> (rows, time, width)."""
        rows, time, width = x.shape
        q, k, v = (
            self.qkv(x).view(rows, time, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        )  # (rows, heads, time, HEAD)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        mixed: torch.Tensor = self.out(y.transpose(1, 2).reshape(rows, time, width))
        return mixed


class Block(nn.Module):
    """Attention, then a two-layer perceptron with squared ReLU (So et al., "Primer", 2021), each added to its input."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.attention = Attention(shape)
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, time, width) -> (rows, time, width)."""
        x = x + self.attention(self.norm1(x))
        added: torch.Tensor = self.down(F.relu(self.up(self.norm2(x))).square())
        return x + added


class LanguageModel(nn.Module):
    """A decoder-only transformer over bytes. It starts out giving every byte the same probability."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(256, shape.width)
        self.taps = nn.Parameter(torch.zeros(TAPS, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, 256, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("head.weight", "out.weight", "down.weight")):
                nn.init.zeros_(p)
            elif name.endswith(("qkv.weight", "up.weight")):
                nn.init.normal_(p, std=shape.width**-0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Bytes (rows, time) -> logits of the byte after each (rows, time, 256)."""
        x = self.embedding(ids)
        earlier = F.pad(x, (0, 0, TAPS, 0))  # (rows, TAPS + time, width)
        for back, tap in enumerate(self.taps, 1):  # a look at the bytes just before, cheaper than by attention
            x = x + tap * earlier[:, TAPS - back : -back]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@torch.no_grad()
def sample(model: nn.Module, prompt: bytes, length: int, context: int, seed: int) -> bytes:
    """Let the model write ``length`` bytes after a prompt, at temperature 0.8."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(SEPARATOR + prompt)
    for _ in range(length):
        logits = model(torch.tensor([ids[-context:]]))[0, -1]
        ids.append(int(torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)))
    return bytes(ids[len(SEPARATOR) :])


# ---------------------------------------------------------------------------------------------------------------------
# The data

SEPARATOR = b"\0"  # stands before every file
HELD_OUT = 20  # one file in so many is held out
UNIT_BYTES, UNITS = 1 << 20, 1 << 14  # of text in a unit, unless there would be more units than that
STRIP_BYTES, STRIPS = 1 << 16, 1 << 15  # of text in a strip, unless there would be fewer strips than that
WINDOW_BYTES = 64 << 20  # of text that is shuffled together


class File(NamedTuple):
    """A part of a file that is on this machine: all of it, nearly always.

    Attributes:
        name: relative to the folder it was found in.
        path: absolute.
        start, stop: which of its bytes.
    """

    name: str
    path: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start..stop`` of the part.

        Raises:
            OSError: they are not to be had.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start + start)
            data = file.read(stop - start)
        if len(data) < stop - start:
            raise OSError(f"{self.path} has become shorter since it was listed")
        return data


def list_files(paths: Sequence[str]) -> list[File]:
    """The files named and those in the folders named; without any, the sources of Python's standard library.

    Files that are empty, hidden or not readable are left out, and a file met twice counts once. Nothing is read.

    Raises:
        ValueError: a path does not exist, or there is no text in it.
    """
    found: dict[str, File] = {}
    for path in map(Path, paths or [sysconfig.get_paths()["stdlib"]]):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        root, entries = (path, sorted(path.rglob("*" if paths else "*.py"))) if path.is_dir() else (path.parent, [path])
        files = {file.path: file for entry in entries if (file := list_file(entry, root))}
        if not files:
            raise ValueError(f"{path}: no text in it; name a file or folder that holds some")
        found = files | found
    return list(found.values())


def list_file(entry: Path, root: Path) -> File | None:
    """A file below a root; None where there is nothing to learn from it."""
    name = entry.relative_to(root)
    if any(part.startswith(".") or part in ("__pycache__", "site-packages", "dist-packages") for part in name.parts):
        return None
    try:
        size = entry.stat().st_size if entry.is_file() and os.access(entry, os.R_OK) else 0
    except OSError:
        return None
    return File(name.as_posix(), str(entry.resolve()), 0, size) if size else None


def split(files: Sequence[File]) -> tuple[list[File], list[File]]:
    """Files for training and held-out files, by a hash of each name: the same on every machine.

    Of a single file the last twentieth is held out.
    """
    if len(files) == 1:
        [file] = files
        at = file.stop - max(1, file.size // HELD_OUT)
        return [file._replace(stop=at)], [file._replace(start=at)]
    ranked = sorted(files, key=lambda file: (place(file.name) % HELD_OUT, place(file.name), file))
    chosen = sum(place(file.name) % HELD_OUT == 0 for file in files)
    chosen = min(max(1, chosen), len(files) - 1)
    return sorted(ranked[chosen:]), sorted(ranked[:chosen])


def place(name: str) -> int:
    """A stable hash of a name, 64 bits."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


class Text:
    """Files, one after another, a separator before each, as rows of ``context + 1`` bytes. Read only where asked for.

    A row starts with the byte that ends the row before, so that every byte but the very first is predicted once. Less
    than a row at the end is left out.

    Rows come in units that can be read one by one. Each is a sample of the whole text, strips of some rows at equal
    distances. So rows that are shuffled together come from everywhere, however few of all rows they are. Strips of a
    small text are short, and mix well; those of a large one are long, and quick to read.

    Attributes:
        size: bytes, separators included.
        strip: rows in a strip.
        units: how many there are.

    Raises:
        ValueError: there is less than one row.
    """

    def __init__(self, files: Sequence[File], context: int):
        self.files, self.context = tuple(files), context
        self._ends = np.cumsum([len(SEPARATOR) + file.size for file in files])
        self.size = int(self._ends[-1])
        if not len(self):
            raise ValueError(
                f"{self.size:,} bytes on one side of the split are less than a context and one, {context + 1:,}; "
                "name more text, or give a smaller --context"
            )
        self.strip = max(1, min(STRIP_BYTES // context, len(self) // STRIPS))
        self.units = min(-(-self.size // UNIT_BYTES), UNITS, -(-len(self) // self.strip))

    def __len__(self) -> int:
        """Rows."""
        return (self.size - 1) // self.context

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows ``start..stop``. Shape: (stop - start, context + 1)."""
        joined = np.frombuffer(self._read(start * self.context, stop * self.context + 1), np.uint8)
        return np.lib.stride_tricks.sliding_window_view(joined, self.context + 1)[:: self.context]

    def spread(self, limit: int) -> Bytes:
        """At most so many rows, at equal distances. Shape: (rows, context + 1)."""
        numbers = range(0, len(self), -(-len(self) // max(1, limit)))
        return np.concatenate([self.rows(number, number + 1) for number in numbers])

    def strips(self, unit: int) -> range:
        """The first row of each strip of a unit."""
        return range(unit * self.strip, len(self), self.units * self.strip)

    def unit_rows(self, unit: int) -> int:
        """How many rows a unit has."""
        strips = self.strips(unit)
        return len(strips) * self.strip - max(0, strips[-1] + self.strip - len(self))

    def unit(self, unit: int) -> Iterator[Bytes]:
        """A unit's rows, about a megabyte at a time. Shape of each: (rows, context + 1)."""
        strips = iter(self.strips(unit))
        while some := list(islice(strips, max(1, UNIT_BYTES // (self.strip * self.context)))):
            yield np.concatenate([self.rows(strip, min(strip + self.strip, len(self))) for strip in some])

    def _read(self, start: int, stop: int) -> bytes:
        parts = []
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        for file, end in zip(self.files[first : last + 1], self._ends[first : last + 1], strict=True):
            begin = int(end) - file.size  # where the file's bytes begin; a separator stands before
            if start < begin:
                parts.append(SEPARATOR)
            parts.append(file.read(max(0, start - begin), min(stop, int(end)) - begin))
        return b"".join(parts)


class Stream(Datasource):
    """A text's rows for Ray Data."""

    def __init__(self, text: Text):
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        self.text = text

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """A task for each unit: how many there are depends on the text, not on the cluster."""
        tasks = []
        for unit in range(self.text.units):
            rows = self.text.unit_rows(unit)
            about = BlockMetadata(rows, rows * (self.text.context + 1), None)
            tasks.append(ReadTask(partial(blocks, self.text, unit), about))
        return tasks

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows."""
        return len(self.text) * (self.text.context + 1)


def blocks(text: Text, unit: int) -> Iterator[pa.Table]:
    """A unit's rows as tables."""
    return map(table, text.unit(unit))


def stream(text: Text) -> ray.data.Dataset:
    """All rows of a text as a Ray Dataset that is read bit by bit, on the machine that the files are on: this one."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    read: ray.data.Dataset = ray.data.read_datasource(Stream(text), label_selector=here)
    return read


def dataset(rows: Bytes) -> ray.data.Dataset:
    """Rows in memory as a Ray Dataset."""
    return ray.data.from_arrow(table(rows))


def table(rows: Bytes) -> pa.Table:
    """Rows with one column of fixed-width binary."""
    count, width = rows.shape
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, pa.py_buffer(rows.tobytes())])
    return pa.table({"bytes": column})


def collate(rows: pa.Table, generator: torch.Generator) -> torch.Tensor:
    """Rows of the dataset as one tensor, int64. Shape: (rows, context + 1). Nothing here is random."""
    column = rows["bytes"].combine_chunks()
    width = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    return torch.from_numpy(data.astype(np.int64)).view(len(column), width)


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next byte, in nats. ``batch``: (rows, context + 1)."""
    logits = model(batch[:, :-1])  # (rows, context, 256)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def evaluate(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean bits it takes to write down the next byte."""
    return {"bits_per_byte": loss(model, batch) / math.log(2)}


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; only the matrices of the linear layers decay."""
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def build_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Up in a straight line for a twentieth of the steps, then down to zero along a cosine."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))

    return LambdaLR(optimizer, factor)


# ---------------------------------------------------------------------------------------------------------------------
# What it is compared with: bits per byte of the same held-out text


COUNTED_BYTES, PACKED_BYTES = 64 << 20, 16 << 20  # of more text than that, a sample is counted, and compressed


def count_pairs(text: Text, limit: int) -> NDArray[np.int64]:
    """How often each byte follows each other, in about so many bytes from all over a text. Shape: (256, 256)."""
    counts = np.zeros(65_536, np.int64)
    for unit in range(max(1, text.units * min(limit, text.size) // text.size)):
        for rows in text.unit(unit):
            counts += np.bincount(pairs(rows).ravel(), minlength=65_536)
    return counts.reshape(256, 256)


def pairs(rows: Bytes) -> NDArray[np.int64]:
    """Each byte but the first with the one before it, as one number. Shape: (rows, context)."""
    return 256 * rows[:, :-1].astype(np.int64) + rows[:, 1:]


def unigram(counts: NDArray[np.int64], held_out: Bytes) -> float:
    """By how often each byte occurs in the training rows, plus one. ``counts``: of pairs."""
    singles = counts.sum(axis=0) + 1.0
    bits = -np.log2(singles / singles.sum())
    return float(bits[held_out[:, 1:]].mean())


def bigram(counts: NDArray[np.int64], held_out: Bytes) -> float:
    """By how often each byte follows each other in the training rows, plus one. ``counts``: of pairs."""
    doubles = counts + 1.0
    bits = -np.log2(doubles / doubles.sum(axis=1, keepdims=True))
    return float(bits.ravel()[pairs(held_out)].mean())


def xz(files: Sequence[File], limit: int) -> float:
    """By compressing each file on its own, as hard as xz can; so many bytes of them at most, taken from everywhere."""
    size = packed = 0
    for file in files[:: -(-sum(file.size for file in files) // limit)]:
        if size < limit:
            data = file.read(0, min(file.size, limit - size))
            size, packed = size + len(data), packed + len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return 8 * packed / size


# ---------------------------------------------------------------------------------------------------------------------
# The command


class Size(NamedTuple):
    """What ``--size`` stands for."""

    shape: Shape
    batch: int
    virtual_workers: int
    steps: int
    lr: float


SIZES = {
    "tiny": Size(Shape(layers=2, width=128, context=256), batch=8, virtual_workers=4, steps=1_000, lr=1.2e-2),
    "small": Size(Shape(layers=4, width=128, context=512), batch=8, virtual_workers=8, steps=10_000, lr=8e-3),
    "medium": Size(Shape(layers=8, width=512, context=1024), batch=64, virtual_workers=16, steps=20_000, lr=2e-3),
}


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def span(text: str) -> tuple[int, int]:
    """``MIN:MAX`` or a single number."""
    least, colon, most = text.partition(":")
    try:
        bounds = whole(least), whole(most if colon else least)
    except argparse.ArgumentTypeError:
        bounds = (1, 0)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is neither MIN:MAX, such as 1:4, nor a number of at least 1")
    return bounds


def build_parser() -> argparse.ArgumentParser:
    """The flags. What depends on ``--size`` is None until `parse` fills it in."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [PATH ...]",
        description="Train a byte-level language model and compare it with simpler ones.",
        epilog="sizes: " + "; ".join(f"{name}: {describe(size)}" for name, size in SIZES.items()),
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="files and folders to learn from (default: Python's standard library)")
    add("--agents", type=span, metavar="MIN:MAX", help="how many agents (default: 1 to the cluster's number of CPUs)")
    add("--virtual-workers", type=whole, metavar="N", help="most agents that the job can use; part of what it computes")
    add("--size", choices=SIZES, default="tiny", help="of the model, with all that follows from it (default: tiny)")
    add("--layers", type=whole, metavar="N", help="override the size")
    add("--width", type=whole, metavar="N", help=f"override the size; a multiple of {HEAD}")
    add("--context", type=whole, metavar="BYTES", help="override the size")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole, metavar="N", help="how long to train")
    length.add_argument("--epochs", type=whole, metavar="N", help="how long to train, in passes over the text")
    add("--batch", type=whole, metavar="ROWS", help="rows of one context each in a step, over all agents")
    add("--lr", type=float, help="highest learning rate")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--eval-bytes", type=whole, default=2**18, metavar="N", help="held-out bytes to evaluate on (default: 256 Ki)")
    add("--evaluate-every", type=whole, metavar="STEPS", help="evaluate on the way, too")
    add("--storage", metavar="PATH", help="where the run is kept: a folder or a URI such as s3://bucket/runs")
    add("--name", help="of the run (default: made from the date); a run of that name goes on where it was")
    add("--checkpoint-every", type=whole, metavar="STEPS", help="write checkpoints on the way, too")
    add(
        "--sample", type=int, default=256, metavar="BYTES", help="length of the text to write at the end (default: 256)"
    )
    add("--prompt", help="what that text starts with (default: 'def ' for Python's library, else nothing)")
    return parser


def describe(size: Size) -> str:
    """A size in one line."""
    shape = size.shape
    return (
        f"{shape.layers} layers, width {shape.width}, context {shape.context}, {size.batch} rows a step, "
        f"{size.virtual_workers} virtual workers, {size.steps:,} steps, lr {size.lr:g}"
    )


class Job(NamedTuple):
    """The checked flags and the data they name."""

    flags: argparse.Namespace
    shape: Shape
    train: Text
    held_out: Text
    evaluated: Bytes  # rows of what is held out

    @property
    def steps(self) -> int:
        """Of the whole training."""
        steps: int = self.flags.steps or self.flags.epochs * -(-len(self.train) // self.flags.batch)
        return steps


def parse(arguments: Sequence[str] | None) -> Job:
    """Flags and data, checked; whatever is wrong ends the program with one line that says so."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    size = SIZES[flags.size]
    for name in ("virtual_workers", "batch", "lr"):
        if getattr(flags, name) is None:
            setattr(flags, name, getattr(size, name))
    if flags.epochs is None and flags.steps is None:
        flags.steps = size.steps
    given = {name: getattr(flags, name) for name in ("layers", "width", "context") if getattr(flags, name)}
    shape = replace(size.shape, **given)
    if shape.width % HEAD:
        parser.error(f"argument --width: {shape.width} is not a multiple of {HEAD}")
    if flags.agents and flags.agents[1] > flags.virtual_workers:
        parser.error(
            f"argument --agents: {flags.agents[1]} are more than there are virtual workers, "
            f"{flags.virtual_workers}; give fewer, or a higher --virtual-workers"
        )
    if not 0 < flags.lr < math.inf:
        parser.error(f"argument --lr: {flags.lr} is not a finite number above 0")
    for name in ("seed", "sample"):
        if getattr(flags, name) < 0:
            parser.error(f"argument --{name}: {getattr(flags, name)} is below 0")
    if flags.prompt is None:
        flags.prompt = "" if flags.paths else "def "
    try:
        train, held_out = (Text(files, shape.context) for files in split(list_files(flags.paths)))
        evaluated = held_out.spread(flags.eval_bytes // shape.context)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return Job(flags, shape, train, held_out, evaluated)


def fit(job: Job) -> Result:
    """Train, on the cluster that Ray is or can be connected to."""
    flags = job.flags
    if not ray.is_initialized():
        ray.init()
    cpus = int(ray.cluster_resources().get("CPU", 1))
    agents = flags.agents or (1, max(1, min(cpus, flags.virtual_workers)))
    spec = TrainSpec(
        model=partial(LanguageModel, job.shape),
        optimizer=partial(build_optimizer, lr=flags.lr),
        scheduler=partial(build_scheduler, steps=job.steps),
        loss=loss,
        evaluate=evaluate,
        collate=collate,
    )
    config = TrainConfig(
        batch_size=flags.batch,
        virtual_workers=flags.virtual_workers,
        seed=flags.seed,
        epochs=flags.epochs,
        steps=flags.steps,
        clip_norm=1.0,
        shuffle_window=max(1, WINDOW_BYTES // job.shape.context),
        evaluate_every=flags.evaluate_every,
        checkpoint_every=flags.checkpoint_every,
    )
    return Trainer(
        spec,
        datasets={"train": stream(job.train), "validation": dataset(job.evaluated)},
        config=config,
        scaling_config=ScalingConfig(num_workers=agents),  # type: ignore[arg-type]  # Ray types its older class
        run_config=RunConfig(name=flags.name, storage_path=flags.storage),
    ).fit()


def baselines(job: Job) -> dict[str, float]:
    """What the model is compared with, and the bits that it needs per byte."""
    counts = count_pairs(job.train, COUNTED_BYTES)
    return {
        "byte frequencies": unigram(counts, job.evaluated),
        "byte-pair frequencies": bigram(counts, job.evaluated),
        "xz, each file by itself": xz(job.held_out.files, PACKED_BYTES),
    }


def report(job: Job, compared: dict[str, float], result: Result) -> None:
    """Print how the model compares, what it writes, and the digest of its weights."""
    assert result.metrics
    print("\nBits per byte of held-out text, less is better:")
    for name, bits in (compared | {"this model": result.metrics["validation/bits_per_byte"]}).items():
        print(f"  {name:<24} {bits:6.3f}")
    for what, size, limit in (
        ("Frequencies are those in", job.train.size, COUNTED_BYTES),
        ("xz was given", job.held_out.size, PACKED_BYTES),
    ):
        if size > limit:
            print(f"{what} a sample of {limit >> 20} MiB.")
    if job.flags.sample:
        model = LanguageModel(job.shape)
        model.load_state_dict(load_weights(result.checkpoint))
        prompt = job.flags.prompt.encode("utf-8", "surrogateescape")
        written = sample(model, prompt, job.flags.sample, job.shape.context, job.flags.seed)
        print(f"\nWhat it writes:\n{written.decode(errors='replace')}")
    print(f"\nweights digest {result.metrics['weights_digest']}")


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the job and print its report."""
    job = parse(arguments)
    print(
        f"{job.shape.layers} layers, width {job.shape.width}, context {job.shape.context}; {len(job.train):,} rows of "
        f"{len(job.train.files):,} files to learn from, {len(job.evaluated):,} rows of {len(job.held_out.files):,} "
        f"others to evaluate on; {job.steps:,} steps of {job.flags.batch} rows."
    )
    compared = baselines(job)  # now: who knows whether the files will still be there when training is done
    result = fit(job)
    report(job, compared, result)
    return result


if __name__ == "__main__":
    main()
