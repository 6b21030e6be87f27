"""A run's folder: the event log, the ledger and the checkpoints, on any filesystem that pyarrow knows."""

from __future__ import annotations

import re
import time

import pyarrow.fs

from ray_dnn.checkpoint import open_folder
from ray_dnn.errors import ConfigError

EVENTS = "events"
LEDGER = "ledger"

_FLUSH_LOCAL_S = 0.5
_FLUSH_REMOTE_S = 15.0


class RunFolder:
    """Where a run writes. Every attempt has files of its own; nothing is ever overwritten.

    Attributes:
        filesystem, path: of the folder.
        attempt: number of this attempt, from 1.
    """

    def __init__(self, storage_path: str, name: str, filesystem: pyarrow.fs.FileSystem | None = None):
        self.filesystem, root = (filesystem, storage_path) if filesystem is not None else open_folder(storage_path)
        self.path = f"{root.rstrip('/')}/{name}"
        try:
            self.filesystem.create_dir(self.path, recursive=True)
            earlier = self.attempts()
        except OSError as error:
            raise ConfigError(
                f"RunConfig(storage_path={storage_path!r}): {self.path} cannot be used: {error}. Give a folder "
                "that can be written."
            ) from error
        self.attempt = max(earlier, default=0) + 1

    def attempts(self) -> list[int]:
        """The attempts that have left an event log."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        names = [info.base_name for info in self.filesystem.get_file_info(selector)]
        found = {int(m.group(1)) for n in names if (m := re.match(rf"{EVENTS}-(\d+)", n))}
        return sorted(found)

    def append_file(self, kind: str) -> LineFile:
        """A file of this attempt to append lines to."""
        return LineFile(self.filesystem, f"{self.path}/{kind}-{self.attempt:04d}")


class LineFile:
    """Lines that are appended. Where storage cannot append, each flush becomes a numbered part of its own."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, stem: str):
        self._filesystem = filesystem
        self._stem = stem
        self._lines: list[str] = []  # not flushed yet
        self._flushed = time.monotonic()
        self._parts = 0
        try:
            self._stream = filesystem.open_append_stream(f"{stem}.jsonl")
        except NotImplementedError:
            self._stream = None
        self._every = _FLUSH_LOCAL_S if self._stream else _FLUSH_REMOTE_S

    def write(self, line: str) -> None:
        """Append a line; it reaches storage within seconds, or at `flush`."""
        self._lines.append(line)
        if time.monotonic() - self._flushed >= self._every:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._lines:
            return
        data = ("\n".join(self._lines) + "\n").encode()
        if self._stream is not None:
            self._stream.write(data)
            self._stream.flush()
        else:
            with self._filesystem.open_output_stream(f"{self._stem}.{self._parts:06d}.jsonl") as stream:
                stream.write(data)
            self._parts += 1
        self._lines = []

    def close(self) -> None:
        self.flush()
        if self._stream is not None:
            self._stream.close()


def read_lines(filesystem: pyarrow.fs.FileSystem, root: str, kind: str, attempt: int | None = None) -> list[str]:
    """The lines of a run's file, all parts together.

    Args:
        root: the run's folder.
        kind: `EVENTS` or `LEDGER`.
        attempt: None for the last one.
    """
    names = sorted(info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(root)))
    mine = [n for n in names if n.startswith(f"{kind}-")]
    if not mine:
        raise FileNotFoundError(f"{root} holds no {kind} of any attempt")
    prefix = mine[-1][: len(kind) + 5] if attempt is None else f"{kind}-{attempt:04d}"
    lines: list[str] = []
    for name in (n for n in mine if n.startswith(prefix)):
        with filesystem.open_input_file(f"{root}/{name}") as file:
            lines += file.read().decode().splitlines()
    return lines
