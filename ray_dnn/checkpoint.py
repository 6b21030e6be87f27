"""Checkpoints on storage: what files they are made of, and how they are read back.

A checkpoint is what its manifest says, or it is nothing: the manifest names every file with its size and SHA-256, and
is written only when all of them are complete. Nothing in a checkpoint is ever executed by loading it.

``model.safetensors``
    The weights, as Hugging Face lays them out. Large ones are divided over ``model-00001-of-00003.safetensors`` and so
    on, with a ``model.safetensors.index.json``.
``state-00001-of-00005.safetensors``, ``state.head``
    The rest of the state: its large tensors, and everything else as `ray_dnn.engine.codec` encodes it.
``worker-00000.bin``
    The states of virtual workers, where the strategy has any.
``manifest.json``
    The step, the job, and all other files.

How tensors are divided over files depends on the job alone, not on how many agents write or read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.fs
import torch

from ray_dnn import tensorfile
from ray_dnn.errors import CheckpointError

MANIFEST = "manifest.json"
WEIGHTS = "model"
PART_BYTES = 128 << 20  # of tensors in one file, unless a single one is larger
_SUFFIX = ".safetensors"
_AT_ONCE = 4  # files that are read
_VERSION = 1


@dataclass(frozen=True)
class Place:
    """A folder on a filesystem."""

    filesystem: pyarrow.fs.FileSystem
    path: str

    @property
    def name(self) -> str:
        """Of the folder alone."""
        return self.path.rsplit("/", 1)[-1]

    def sizes(self, missing: bool = False) -> dict[str, int]:
        """The names of what is in it, with the sizes of files. ``missing``: the folder may not be there."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=missing)
        return {info.base_name: info.size for info in self.filesystem.get_file_info(selector)}

    def make(self) -> None:
        """Make the folder, unless it is there."""
        self.filesystem.create_dir(self.path, recursive=True)

    def below(self, name: str) -> Place:
        """A folder in it."""
        return Place(self.filesystem, f"{self.path}/{name}")

    @classmethod
    def of(cls, given: Any) -> Place:
        """The folder that a `ray.train.Checkpoint`, a path or a URI names."""
        if hasattr(given, "filesystem") and hasattr(given, "path"):
            return cls(given.filesystem, str(given.path))
        path = os.fspath(given)
        if "://" in path:
            return cls(*pyarrow.fs.FileSystem.from_uri(path))
        return cls(pyarrow.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path)))

    def write(self, name: str, *chunks: bytes | memoryview) -> File:
        """Write a file whole or not at all, as far as the storage can."""
        with ThreadPoolExecutor(1, "ray_dnn-checksum") as pool:
            checksum = pool.submit(_sha256, chunks)
            self._write(f"{self.path}/{name}", chunks)
            return File(sum(map(len, chunks)), checksum.result())

    def _write(self, target: str, chunks: Iterable[bytes | memoryview]) -> None:
        if self.filesystem.type_name == "local":
            partly = f"{target}.{secrets.token_hex(4)}.partly"
            with open(partly, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partly, target)
        else:  # an object is there when it is complete
            with self.filesystem.open_output_stream(target) as stream:
                for chunk in chunks:
                    stream.write(chunk)

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            data: bytes = file.read()
        return data

    def read_into(self, name: str, memory: memoryview) -> int:
        """Read a file's bytes, as far as there is memory for them. Returns how many they are."""
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            at = 0
            while at < len(memory) and (read := file.readinto(memory[at:])):
                at += read
            return at + len(file.read(1))


@dataclass(frozen=True)
class File:
    """What a file's bytes are."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        step: committed steps.
        attempt: of the run, that wrote it.
        job: what decides what is learned, in words, by name (see `ray_dnn.identity`).
        files: by name.
        history: evaluations so far.
        skipped: how many steps changed nothing.
        units: rows of those units of the training set that were counted.
        replica_size: agents that hold one replica.
        weights_digest: of the weights; "": not computed.
    """

    step: int
    attempt: int
    job: dict[str, str]
    files: dict[str, File]
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0
    units: dict[int, int] = field(default_factory=dict)
    replica_size: int = 1
    weights_digest: str = ""

    def to_json(self) -> bytes:
        said = json.dumps({"format": _VERSION, **asdict(self)}, indent=1)
        return f'{{"manifest": {said},\n"sha256": "{_sha256([said.encode()])}"}}\n'.encode()

    @classmethod
    def read(cls, place: Place) -> Manifest:
        """The manifest of the checkpoint in a folder.

        Raises:
            CheckpointError: there is none, or it is not one.
        """
        where = f"{place.path}/{MANIFEST}"
        try:
            whole = json.loads(place.read(MANIFEST))
            said = whole["manifest"]
            intact = whole["sha256"] == _sha256([json.dumps(said, indent=1).encode()])
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{place.path} has no {MANIFEST}: it is no checkpoint, or never was completed."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where} is not what was written: {error!r}.") from error
        if not intact:
            raise CheckpointError(f"{where} is not what was written: its checksum is another.")
        if said.pop("format") != _VERSION:
            raise CheckpointError(f"{where} is of another version of ray_dnn.")
        said["files"] = {name: File(**entry) for name, entry in said["files"].items()}
        said["units"] = {int(unit): rows for unit, rows in said["units"].items()}
        return cls(**said)


def _sha256(chunks: Iterable[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


# -- dividing ----------------------------------------------------------------------------------------------------------


def divide(stem: str, sizes: Mapping[str, int], most: int = PART_BYTES) -> dict[str, list[str]]:
    """Divide tensors over files. Returns the tensors of each file, in order.

    Args:
        stem: of the files' names.
        sizes: of the tensors, in bytes.
        most: bytes in one file; a tensor that is larger has one of its own.
    """
    parts: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not parts or filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    if len(parts) == 1:
        return {f"{stem}{_SUFFIX}": parts[0]}
    return {f"{stem}-{i:05}-of-{len(parts):05}{_SUFFIX}": names for i, names in enumerate(parts, 1)}


def index_of(sizes: Mapping[str, int], parts: Mapping[str, list[str]]) -> dict[str, bytes]:
    """The index that Hugging Face wants beside weights in several files, by its name; nothing where there is one."""
    if len(parts) < 2:
        return {}
    homes = {tensor: file for file, tensors in parts.items() for tensor in tensors}
    text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": homes}, indent=1)
    return {f"{WEIGHTS}{_SUFFIX}.index.json": text.encode()}


# -- reading -----------------------------------------------------------------------------------------------------------


def read_file(place: Place, manifest: Manifest, name: str) -> torch.Tensor:
    """The bytes of a file of a checkpoint: uint8, shape (bytes,).

    Raises:
        CheckpointError: it is missing or its bytes are not those that were written.
    """
    file = manifest.files[name]
    whole = torch.empty(file.bytes, dtype=torch.uint8)
    memory = whole.numpy().data
    try:
        count = place.read_into(name, memory)
    except FileNotFoundError as error:
        raise CheckpointError(f"{place.path}/{name} is missing, though the manifest names it.") from error
    if count != file.bytes or _sha256([memory]) != file.sha256:
        has = f"more than {file.bytes}" if count > file.bytes else str(count)
        raise CheckpointError(
            f"{place.path}/{name} has {has} bytes that are not the {file.bytes} that were written. Use an earlier "
            "checkpoint."
        )
    return whole


def read_tensors(place: Place, manifest: Manifest, stem: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the files with a stem, by name. Some files are read ahead.

    Raises:
        CheckpointError: as `read_file`.
    """
    names = [n for n in sorted(manifest.files) if re.fullmatch(rf"{stem}(-\d+-of-\d+)?{_SUFFIX}", n)]
    for data in _read_ahead(place, manifest, names):
        yield from tensorfile.tensors(data).items()


def _read_ahead(place: Place, manifest: Manifest, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """The bytes of files, in order, some of them read while others are looked at."""
    coming: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name in names:
            coming.append(pool.submit(read_file, place, manifest, name))
            if len(coming) == _AT_ONCE:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def verify(place: Place, manifest: Manifest) -> None:
    """Read all files of a checkpoint.

    Raises:
        CheckpointError: as `read_file`.
    """
    for _ in _read_ahead(place, manifest, manifest.files):
        pass


def load_weights(checkpoint: Any) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as a ``state_dict``, verified against the manifest.

    Args:
        checkpoint: ``result.checkpoint``, or a path or URI of a checkpoint's folder.

    Raises:
        CheckpointError: a file is missing or its bytes are not those that were written.
    """
    place = Place.of(checkpoint)
    # Each in memory of its own: as read, those of a file lie in one piece, which torch.save, for one, does not take.
    return {name: tensor.clone() for name, tensor in read_tensors(place, Manifest.read(place), WEIGHTS)}
