"""Train a small convolutional network on Fashion-MNIST, on however many agents there are.

    python jobs/image_classifier.py                            92.6 %, 11 minutes of CPU: between two cores, 6 minutes
    python jobs/image_classifier.py --size medium              93.4 %, a deeper network, 2 to 3 times as long
    python jobs/image_classifier.py --data ~/fashion           your own copy of the four gzipped files

The images (Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017) are those of Debian's package dataset-fashion-mnist, or the
official download where that is not installed. They are turned into Parquet files once; Ray Data reads these anew in
every epoch and shifts, mirrors and partly erases the images, differently each time. At the end the model's accuracy on
the 10,000 test images stands beside that of two classifiers without a network, followed by the digest of its weights:
the same digest for any number of agents, whatever happened to them on the way.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from ray.train import Result, RunConfig, ScalingConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ray_dnn import TrainConfig, Trainer, TrainSpec

Bytes = NDArray[np.uint8]

SIDE = 28  # of an image, in pixels
CLASSES = 10  # T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot

# ---------------------------------------------------------------------------------------------------------------------
# The model


class Convolution(nn.Module):
    """3 × 3 convolution, batch normalisation, ReLU."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.filters = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, before, side, side) -> (rows, after, side, side)."""
        return F.relu(self.norm(self.filters(x)))


class Residual(nn.Module):
    """Two convolutions, added to their input (He et al., "Deep Residual Learning", 2016)."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(Convolution(width, width), Convolution(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, width, side, side) -> the same shape."""
        added: torch.Tensor = self.inner(x)
        return x + added


class Classifier(nn.Module):
    """A convolution at full size, then one and a residual block at each half of the size before."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = [Convolution(1, widths[0])]
        for before, after in pairwise(widths):
            layers += [nn.MaxPool2d(2), Convolution(before, after), Residual(after)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (rows, 28, 28, 1) -> logits (rows, 10)."""
        x = images.permute(0, 3, 1, 2)  # a view; with channels innermost convolutions take a third less time on CPUs
        logits: torch.Tensor = self.head(self.body(x).amax(dim=(2, 3)))
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# The files: found or downloaded, then turned into Parquet once

FILES = {  # name -> SHA-256 of what is in it; the gzip headers of Debian's and the official files differ
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
OFFICIAL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
WAY_OUT = "install Debian's package dataset-fashion-mnist, or name a folder with the four files: --data FOLDER"

SHARD_ROWS = 5_000  # rows of one Parquet file
GROUP_ROWS = 1_000  # rows that are read and augmented at a time
MANIFEST = "manifest.json"  # SHA-256 of each Parquet file of the folder


class Images(NamedTuple):
    """Images, (rows, 28, 28), and the class of each, (rows,)."""

    pixels: Bytes
    labels: Bytes


def find_files(data: str | None, cache: Path) -> dict[str, bytes]:
    """The four gzipped files: of the folder named, else of Debian's package, else of the official download.

    Raises:
        ValueError: they are not there, or are not what they should be.
    """
    if data:
        return {name: read_file(Path(data) / name) for name in FILES}
    files = {}
    for name in FILES:
        places = [folder / name for folder in (DEBIAN, cache / "download") if (folder / name).exists()]
        files[name] = read_file(places[0]) if places else download(name, cache / "download")
        check(name, files[name])
    return files


def read_file(file: Path) -> bytes:
    """What is in a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; --data must name a folder with {', '.join(FILES)}") from None


def download(name: str, folder: Path) -> bytes:
    """One of the official files; it is kept in the folder if it is whole.

    Raises:
        ValueError: it cannot be had, or is another file.
    """
    print(f"Downloading {OFFICIAL}{name}")
    try:
        with urllib.request.urlopen(OFFICIAL + name, timeout=30) as response:
            packed: bytes = response.read()
    except OSError as error:
        raise ValueError(f"Fashion-MNIST is not on this machine and {OFFICIAL} gives: {error}; {WAY_OUT}") from None
    check(name, packed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        (file := Path(unfinished) / name).write_bytes(packed)
        file.replace(folder / name)
    return packed


def check(name: str, packed: bytes) -> None:
    """That a file holds what the official one of its name does.

    Raises:
        ValueError: it does not.
    """
    found = hashlib.sha256(unpack(name, packed)).hexdigest()
    if found != FILES[name]:
        raise ValueError(f"{name}: it holds other data than the official file, SHA-256 {found}; {WAY_OUT}")


def unpack(name: str, packed: bytes) -> bytes:
    """What was gzipped.

    Raises:
        ValueError: it is no gzip file, or not a whole one.
    """
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: it is not a whole gzip file ({error}); get it again") from None


def read_idx(name: str, packed: bytes, dimensions: int) -> Bytes:
    """The array in a gzipped IDX file of bytes: two zeros, 8, the number of dimensions, each of them, the bytes.

    Raises:
        ValueError: the file is no such file, or ends too early or too late.
    """
    data = unpack(name, packed)
    begin = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if data[:4] != magic or len(data) < begin:
        raise ValueError(f"{name}: it starts with {data[:4].hex()}, but an IDX file of this kind with {magic.hex()}")
    shape = np.frombuffer(data, ">i4", dimensions, 4).tolist()
    if len(data) - begin != math.prod(shape):
        raise ValueError(
            f"{name}: it holds {len(data) - begin:,} bytes of data, but says {math.prod(shape):,}; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)


def read_images(files: Mapping[str, bytes], part: str) -> Images:
    """The images and labels of ``"train"`` or ``"t10k"``.

    Raises:
        ValueError: they do not go together.
    """
    image_file, label_file = (name for name in FILES if name.startswith(part))
    pixels, labels = read_idx(image_file, files[image_file], 3), read_idx(label_file, files[label_file], 1)
    if pixels.shape != (len(labels), SIDE, SIDE) or not len(labels):
        raise ValueError(f"{image_file}: its shape is {pixels.shape}, not {(max(1, len(labels)), SIDE, SIDE)}")
    if labels.max() >= CLASSES:
        raise ValueError(f"{label_file}: it has the label {labels.max()}; the largest must be {CLASSES - 1}")
    return Images(pixels, labels)


def prepare(files: Mapping[str, bytes], cache: Path) -> Path:
    """The folder with the files as Parquet, ``train`` and ``test``; made unless the cache has it.

    Its name is a hash of the files, and it appears under that name only when it is whole.

    Raises:
        ValueError: the files are not what they should be, or the folder cannot be written.
    """
    digest = hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in FILES)).hexdigest()
    folder = cache / f"parquet-{digest[:16]}"
    if is_whole(folder):
        return folder
    parts = {"train": read_images(files, "train"), "test": read_images(files, "t10k")}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as unfinished:
            made = Path(unfinished) / "made"
            for name, part in parts.items():
                write_shards(part, made / name)
            (made / MANIFEST).write_text(json.dumps(digests(made)))
            if not is_whole(folder):  # else another process has made it meanwhile
                if folder.exists():  # damaged
                    folder.replace(Path(unfinished) / "damaged")
                made.replace(folder)
    except OSError as error:
        raise ValueError(f"{cache}: {error.strerror}; name a folder that can be written: --cache FOLDER") from None
    return folder


def write_shards(images: Images, folder: Path) -> None:
    """Write images as Parquet files, each with several row groups."""
    folder.mkdir(parents=True)
    table = as_table(images)
    for at in range(0, len(table), SHARD_ROWS):
        shard = table.slice(at, SHARD_ROWS)
        pq.write_table(shard, folder / f"{at:06}.parquet", row_group_size=GROUP_ROWS, use_dictionary=False)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each Parquet file below a folder."""
    files = sorted(folder.rglob("*.parquet"))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def is_whole(folder: Path) -> bool:
    """Whether all Parquet files that were written are there and unchanged."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(expected == digests(folder))


# ---------------------------------------------------------------------------------------------------------------------
# The data

SHIFT = 2  # pixels that an image is moved at most, each way
ERASED = 8  # longest side of what is erased of every second image
MEAN, DEVIATION = 0.286, 0.353  # of the training pixels, where white is 1


def as_table(images: Images) -> pa.Table:
    """Images as rows: ``image``, 784 bytes of fixed width, and ``label``."""
    kind, data = pa.binary(SIDE * SIDE), pa.py_buffer(np.ascontiguousarray(images.pixels))
    column = pa.FixedSizeBinaryArray.from_buffers(kind, len(images.labels), [None, data])
    return pa.table({"image": column, "label": pa.array(images.labels)})


def as_images(rows: pa.Table) -> Images:
    """Rows as images, without a copy where the table is of one piece. They can only be read."""
    column, width = rows["image"], SIDE * SIDE
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies even one
    pixels = np.frombuffer(whole.buffers()[1], np.uint8, len(whole) * width, whole.offset * width)
    return Images(pixels.reshape(len(whole), SIDE, SIDE), rows["label"].to_numpy())


def augment(rows: pa.Table) -> pa.Table:
    """Shift and mirror images, and erase a rectangle of every second (Zhong et al., "Random Erasing", 2017).

    What is random comes from NumPy's global generator alone, which ray_dnn seeds for each epoch and row group.
    """
    pixels, labels = as_images(rows)
    count = len(labels)
    padded = np.pad(pixels, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    # windows: (rows, places down, places across, 28, 28)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
    down, across = np.random.randint(0, 2 * SHIFT + 1, (2, count))
    moved = windows[np.arange(count), down, across]  # a copy
    mirrored = np.random.random(count) < 0.5
    moved[mirrored] = moved[mirrored, :, ::-1]
    moved[rectangles(count)] = 0
    return as_table(Images(moved, labels))


def rectangles(count: int) -> NDArray[np.bool_]:
    """Random rectangles, at most ERASED long and wide, for one image in two on average. (rows, 28, 28)."""
    size = np.random.randint(2, ERASED + 1, (2, count))
    size *= np.random.random(count) < 0.5  # of length 0 for the others
    begin = np.random.randint(0, SIDE, (2, count)) - size // 2
    at = np.arange(SIDE)
    # inside: (2, rows, 28), whether a line and a column belong to the rectangle
    inside = (at >= begin[..., None]) & (at < (begin + size)[..., None])
    both: NDArray[np.bool_] = inside[0][:, :, None] & inside[1][:, None, :]
    return both


def datasets(folder: Path) -> dict[str, ray.data.Dataset]:
    """The training images, changed at random anew whenever they are read, and the test images as they are."""
    train = ray.data.read_parquet(str(folder / "train"))
    return {
        "train": train.map_batches(augment, batch_format="pyarrow", batch_size=GROUP_ROWS),
        "test": ray.data.read_parquet(str(folder / "test")),
    }


def collate(rows: pa.Table, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, float32 (rows, 28, 28, 1) of mean 0 and variance 1 over the training data, and labels, int64 (rows,)."""
    pixels, labels = as_images(rows)
    images = torch.from_numpy(pixels[..., None].astype(np.float32))
    return images.sub_(255 * MEAN).div_(255 * DEVIATION), torch.from_numpy(labels.astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy; a tenth of each target is spread over all classes (Szegedy et al., 2016, section 7)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, label_smoothing=0.1)


def evaluate(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The share of images whose class is found."""
    images, labels = batch
    return {"accuracy": (model(images).argmax(dim=1) == labels).float().mean()}


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum; only filters and the head's matrix decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def build_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Up in a straight line for a fifth of the steps, then down to zero along a cosine."""
    warmup = max(1, steps // 5)

    def factor(step: int) -> float:
        done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))

    return LambdaLR(optimizer, factor)


# ---------------------------------------------------------------------------------------------------------------------
# What it is compared with: accuracy on the same test images


def nearest_mean(train: Images, test: Images) -> float:
    """By which class's mean image is nearest."""
    sums = one_hot(train.labels).T @ flat(train.pixels)
    means = sums / np.maximum(1, np.bincount(train.labels, minlength=CLASSES))[:, None]  # (classes, pixels)
    distances = (means**2).sum(axis=1) - 2 * flat(test.pixels) @ means.T  # (rows, classes), but for a constant a row
    distances[:, np.setdiff1d(np.arange(CLASSES), train.labels)] = np.inf
    return float((distances.argmin(axis=1) == test.labels).mean())


def linear(train: Images, test: Images) -> float:
    """By least squares from the pixels to ten indicators, with a little ridge."""
    pixels = flat(train.pixels)
    products = pixels.T @ pixels
    products[np.diag_indices_from(products)] += 1e-3 * products.trace() / len(products)
    weights = np.linalg.solve(products, pixels.T @ one_hot(train.labels))  # (pixels and one, classes)
    return float(((flat(test.pixels) @ weights).argmax(axis=1) == test.labels).mean())


def flat(pixels: Bytes) -> NDArray[np.float32]:
    """Images as rows of numbers from 0 to 1, and a 1 at the end. (rows, 785)."""
    rows = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=1)


def one_hot(labels: Bytes) -> NDArray[np.float32]:
    """1 at the class of each row, else 0. (rows, classes)."""
    return np.eye(CLASSES, dtype=np.float32)[labels]


# ---------------------------------------------------------------------------------------------------------------------
# The command


class Size(NamedTuple):
    """What ``--size`` stands for."""

    widths: tuple[int, ...]
    batch: int
    virtual_workers: int
    epochs: int
    lr: float


SIZES = {
    "tiny": Size((8, 16, 32), batch=256, virtual_workers=4, epochs=2, lr=0.2),
    "small": Size((16, 32, 64), batch=256, virtual_workers=4, epochs=10, lr=0.2),
    "medium": Size((16, 32, 64, 128), batch=256, virtual_workers=4, epochs=16, lr=0.2),
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
        description="Train a convolutional network on Fashion-MNIST and compare it with simpler classifiers.",
        epilog="sizes: " + "; ".join(f"{name}: {describe(size)}" for name, size in SIZES.items()),
    )
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="with the four gzipped files (default: Debian's package, else a download)")
    add("--cache", metavar="FOLDER", help="for the Parquet files; all machines must see it (default: in ~/.cache)")
    add("--agents", type=span, metavar="MIN:MAX", help="how many agents (default: 1 to the cluster's number of CPUs)")
    add("--virtual-workers", type=whole, metavar="N", help="most agents that the job can use; part of what it computes")
    add("--size", choices=SIZES, default="small", help="of the model, with all that follows from it (default: small)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole, metavar="N", help="how long to train")
    length.add_argument("--epochs", type=whole, metavar="N", help="how long to train, in passes over the images")
    add("--batch", type=whole, metavar="ROWS", help="images in a step, over all agents")
    add("--lr", type=float, help="highest learning rate")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--evaluate-every", type=whole, metavar="STEPS", help="evaluate on the way, too")
    add("--storage", metavar="PATH", help="where the run is kept: a folder or a URI such as s3://bucket/runs")
    add("--name", help="of the run (default: made from the date); a run of that name goes on where it was")
    add("--checkpoint-every", type=whole, metavar="STEPS", help="write checkpoints on the way, too")
    return parser


def describe(size: Size) -> str:
    """A size in one line."""
    return (
        f"{', '.join(map(str, size.widths))} filters, {size.batch} rows a step, "
        f"{size.virtual_workers} virtual workers, {size.epochs} epochs, lr {size.lr:g}"
    )


class Job(NamedTuple):
    """The checked flags and the data they name."""

    flags: argparse.Namespace
    widths: tuple[int, ...]
    folder: Path
    train: Images
    test: Images

    @property
    def steps(self) -> int:
        """Of the whole training."""
        steps: int = self.flags.steps or self.flags.epochs * -(-len(self.train.labels) // self.flags.batch)
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
        flags.epochs = size.epochs
    if flags.agents and flags.agents[1] > flags.virtual_workers:
        parser.error(
            f"argument --agents: {flags.agents[1]} are more than there are virtual workers, "
            f"{flags.virtual_workers}; give fewer, or a higher --virtual-workers"
        )
    if flags.batch < 2:
        parser.error(f"argument --batch: {flags.batch} is below 2, which batch normalisation needs")
    if not 0 < flags.lr < math.inf:
        parser.error(f"argument --lr: {flags.lr} is not a finite number above 0")
    if flags.seed < 0:
        parser.error(f"argument --seed: {flags.seed} is below 0")
    cache = Path(flags.cache) if flags.cache else default_cache()
    try:
        folder = prepare(find_files(flags.data, cache), cache)
    except ValueError as error:
        parser.error(str(error))
    train, test = (as_images(pq.read_table(folder / part)) for part in ("train", "test"))
    return Job(flags, size.widths, folder.resolve(), train, test)


def default_cache() -> Path:
    """Where programs of this user keep what they can make again, as the XDG Base Directory Specification says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_dnn" / "fashion-mnist"


def fit(job: Job) -> Result:
    """Train, on the cluster that Ray is or can be connected to."""
    flags = job.flags
    if not ray.is_initialized():
        ray.init()
    cpus = int(ray.cluster_resources().get("CPU", 1))
    agents = flags.agents or (1, max(1, min(cpus, flags.virtual_workers)))
    spec = TrainSpec(
        model=partial(Classifier, job.widths),
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
        min_rows=2,  # batch normalisation takes no single row
        evaluate_every=flags.evaluate_every,
        checkpoint_every=flags.checkpoint_every,
    )
    return Trainer(
        spec,
        datasets=datasets(job.folder),
        config=config,
        scaling_config=ScalingConfig(num_workers=agents),  # type: ignore[arg-type]  # Ray types its older class
        run_config=RunConfig(name=flags.name, storage_path=flags.storage),
    ).fit()


def report(job: Job, result: Result, seconds: float) -> None:
    """Print how the model compares, how fast it learned, and the digest of its weights."""
    assert result.metrics
    print(f"\nPercent of the {len(job.test.labels):,} test images whose class is found, more is better:")
    for name, accuracy in (
        ("nearest mean image", nearest_mean(job.train, job.test)),
        ("least squares on pixels", linear(job.train, job.test)),
        ("this model", result.metrics["test/accuracy"]),
    ):
        print(f"  {name:<24} {100 * accuracy:6.2f}")
    rows = result.metrics["rows"]
    print(f"\n{rows:,} rows in {seconds:,.0f} s with start and end, {rows / seconds:,.0f} rows/s")
    print(f"weights digest {result.metrics['weights_digest']}")


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the job and print its report."""
    job = parse(arguments)
    print(
        f"{', '.join(map(str, job.widths))} filters; {len(job.train.labels):,} images to learn from, "
        f"{len(job.test.labels):,} others to evaluate on; {job.steps:,} steps of {job.flags.batch} rows."
    )
    started = time.perf_counter()
    result = fit(job)
    report(job, result, time.perf_counter() - started)
    return result


if __name__ == "__main__":
    main()
