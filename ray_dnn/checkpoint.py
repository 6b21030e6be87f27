"""Weights on storage: safetensors, and a manifest that is written last.

A checkpoint is what its manifest says, or it is nothing: the manifest names every file with its size and SHA-256, and
is written only when all of them are complete. Nothing in a checkpoint is ever executed by loading it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import pyarrow.fs
import safetensors.torch
import torch

from ray_dnn.errors import CheckpointError

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


def weights_to_bytes(weights: Mapping[str, torch.Tensor]) -> bytes:
    """Weights in the safetensors format. Tied weights are written once for each name."""
    return safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in weights.items()})


def write(
    filesystem: pyarrow.fs.FileSystem, path: str, files: Mapping[str, bytes], about: Mapping[str, object]
) -> None:
    """Write a checkpoint: its files, then its manifest.

    Args:
        about: what the manifest says beside the files: step, weights digest, fingerprint.
    """
    filesystem.create_dir(path, recursive=True)
    for name, data in files.items():
        _write_file(filesystem, f"{path}/{name}", data)
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = json.dumps({"format": 1, **about, "files": listed}, indent=1)
    _write_file(filesystem, f"{path}/{MANIFEST}", manifest.encode())


def _write_file(filesystem: pyarrow.fs.FileSystem, path: str, data: bytes) -> None:
    # A file cut short is possible; a manifest that is cut short is no JSON, and no manifest names a file cut short.
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def read_manifest(filesystem: pyarrow.fs.FileSystem, path: str) -> dict[str, Any]:
    """What a checkpoint's manifest says.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    try:
        with filesystem.open_input_file(f"{path}/{MANIFEST}") as file:
            manifest = json.loads(file.read())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {MANIFEST}: no checkpoint, or one never completed.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}/{MANIFEST} is not JSON: the checkpoint was never completed.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise CheckpointError(f"{path}/{MANIFEST} is not a manifest of this version.")
    return manifest


def load_weights(checkpoint: Any) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as a ``state_dict``, verified against the manifest.

    Args:
        checkpoint: ``result.checkpoint``, or a path or URI of a checkpoint's folder.

    Raises:
        CheckpointError: a file is missing or its bytes are not those that were written.
    """
    filesystem, path = _place(checkpoint)
    manifest = read_manifest(filesystem, path)
    weights: dict[str, torch.Tensor] = {}
    for name, entry in manifest["files"].items():
        if not name.endswith(".safetensors"):
            continue
        try:
            with filesystem.open_input_file(f"{path}/{name}") as file:
                data = file.read()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}/{name} is missing, though the manifest names it.") from error
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(
                f"{path}/{name} has {len(data)} bytes that are not the {entry['bytes']} that were written. "
                "Use an earlier checkpoint."
            )
        weights |= safetensors.torch.load(data)
    return weights


def _place(checkpoint: Any) -> tuple[pyarrow.fs.FileSystem, str]:
    if hasattr(checkpoint, "filesystem") and hasattr(checkpoint, "path"):
        return checkpoint.filesystem, str(checkpoint.path)
    return open_folder(os.fspath(checkpoint))


def open_folder(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it."""
    if "://" in path:
        filesystem, root = pyarrow.fs.FileSystem.from_uri(path)
        return filesystem, root
    return pyarrow.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
