"""A run's folder: the event log, the ledger and the checkpoints, on any filesystem that pyarrow knows.

All that is written while a run goes on is written by one thread. Where the storage refuses, it is tried again, for a
while, and the run goes on meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow.fs

from ray_dnn.checkpoint import Place
from ray_dnn.errors import ConfigError

EVENTS = "events"
LEDGER = "ledger"
CHECKPOINT = "checkpoint"
_ATTEMPT = "attempt"

_FLUSH_LOCAL_S = 0.5
_FLUSH_REMOTE_S = 15.0
_AGAIN_S, _AGAIN_MAX_S = 0.5, 15.0  # until what the storage refused is tried again
_CLOSE_S = 30.0  # that the last lines may take

T = TypeVar("T")


class RunFolder:
    """Where a run writes. Every attempt has files of its own; nothing is ever overwritten.

    Attributes:
        place: the folder.
        attempt: number of this attempt, from 1; 0 until it is claimed.
    """

    def __init__(self, storage_path: str, name: str, filesystem: pyarrow.fs.FileSystem | None = None):
        self.place = run_place(storage_path, name, filesystem)
        self.attempt = 0
        self._io = ThreadPoolExecutor(1, "ray_dnn-storage")
        try:
            self.place.make()
            self.names()
        except OSError as error:
            raise ConfigError(
                f"RunConfig(storage_path={storage_path!r}): {self.place.path} cannot be used: {error}. Give a folder "
                "that can be written."
            ) from error

    @property
    def path(self) -> str:
        return self.place.path

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        return self.place.filesystem

    def names(self) -> list[str]:
        """What is in it."""
        return sorted(self.place.sizes(missing=True))

    def claim(self) -> None:
        """Become the newest attempt. Of two that do so at once, one comes after the other."""
        about = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()
        while True:
            number = max(self._claims(), default=0) + 1
            mine = f"{_ATTEMPT}-{number:04d}-{secrets.token_hex(8)}.json"
            self.place.write(mine, about)
            if mine == min(name for n, names in self._claims().items() if n == number for name in names):
                self.attempt = number
                return

    def _claims(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name in self.names():
            if match := re.fullmatch(rf"{_ATTEMPT}-(\d+)-\w+\.json", name):
                found.setdefault(int(match[1]), []).append(name)
        return found

    def newer(self) -> int | None:
        """The number of an attempt that was claimed after this one."""
        newest = max(self._claims(), default=0)
        return newest if newest > self.attempt else None

    def checkpoints(self) -> list[str]:
        """The names of the folders of checkpoints, complete or not."""
        return [name for name in self.names() if name.startswith(f"{CHECKPOINT}-")]

    def append_file(self, kind: str) -> LineFile:
        """A file of this attempt to append lines to."""
        return LineFile(self.place, f"{kind}-{self.attempt:04d}", self.do)

    def do(self, call: Callable[[], T]) -> Future[T]:
        """Have something done by the thread that writes, after all that it was asked before."""
        return self._io.submit(call)

    def close(self) -> None:
        """Nothing is written any more."""
        self._io.shutdown(wait=False)


def run_place(storage_path: str, name: str, filesystem: pyarrow.fs.FileSystem | None = None) -> Place:
    """The folder of a run."""
    root = Place(filesystem, storage_path) if filesystem is not None else Place.of(storage_path)
    return Place(root.filesystem, f"{root.path.rstrip('/')}/{name}")


class LineFile:
    """Lines that are appended. They are in numbered parts: one where storage can append and does not fail.

    Attributes:
        failing_since: when the storage began to refuse; None: it does not.
    """

    def __init__(self, place: Place, stem: str, do: Callable[[Callable[[], None]], Future[None]]):
        self._place, self._stem, self._do = place, stem, do
        self._lines: list[str] = []  # that no thread has been asked to write
        self._flushed = time.monotonic()
        self.failing_since: float | None = None
        self._unwritten: deque[bytes] = deque()  # that it has been asked to; it takes them off
        # Of the thread that writes:
        self._stream: Any = None
        self._parts = 0
        self._every = _FLUSH_LOCAL_S
        self._append(b"")  # a folder that cannot be written is refused here

    def write(self, line: str) -> None:
        """Append a line; it reaches storage within seconds, or at `flush`."""
        self._lines.append(line)
        if time.monotonic() - self._flushed >= self._every:
            self.flush()

    def flush(self) -> Future[None]:
        """Have all lines written. The answer comes when that has been tried."""
        self._flushed = time.monotonic()
        lines, self._lines = self._lines, []
        if lines:
            self._unwritten.append("".join(f"{line}\n" for line in lines).encode())
        return self._do(self._try)

    def unwritten(self) -> tuple[str, bytes]:
        """What has not reached storage, and the name of the file that it belongs to."""
        waiting = "".join(f"{line}\n" for line in self._lines).encode()
        return self._part(), b"".join(list(self._unwritten)) + waiting

    def _try(self) -> None:
        waiting = list(self._unwritten)
        if not waiting:
            return
        try:
            self._append(b"".join(waiting))
            for _ in waiting:
                self._unwritten.popleft()
            self.failing_since = None
        except OSError:
            self.failing_since = self.failing_since or time.monotonic()
            self._stream = None  # whose end may be torn: go on in another part

    def _append(self, data: bytes) -> None:
        """Write to the end of the present part, or a part of its own."""
        if self._stream is None:
            try:
                self._stream = self._place.filesystem.open_append_stream(f"{self._place.path}/{self._part()}")
            except NotImplementedError:
                self._every = _FLUSH_REMOTE_S
                if data:
                    self._place.write(self._part(), data)
                    self._parts += 1
                return
            self._parts += 1
        if data:
            self._stream.write(data)
            self._stream.flush()

    def _part(self) -> str:
        number = f".{self._parts:06d}" if self._parts or self._every == _FLUSH_REMOTE_S else ""
        return f"{self._stem}{number}.jsonl"

    def close(self) -> None:
        """Write what is left, if the storage takes it within a while."""
        deadline = time.monotonic() + _CLOSE_S
        pause = _AGAIN_S
        self.flush().result()
        while self.failing_since is not None and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, _AGAIN_MAX_S)
            self.flush().result()
        if self._stream is not None:
            self._stream.close()


def read_lines(place: Place, kind: str, attempt: int | None = None) -> list[str]:
    """The lines of one attempt's file, all parts together.

    Args:
        place: the run's folder.
        kind: `EVENTS` or `LEDGER`.
        attempt: None for the last one.
    """
    found = _parts(place, kind)
    if not found or (attempt is not None and attempt not in found):
        raise FileNotFoundError(f"{place.path} holds no {kind} of {'any attempt' if attempt is None else attempt}")
    lines: list[str] = []
    for name in found[max(found) if attempt is None else attempt]:
        lines += place.read(name).decode().split("\n")[:-1]  # behind the last line's end is what was torn off
    return lines


def attempts(place: Place, kind: str) -> list[int]:
    """The attempts that have left such a file."""
    return sorted(_parts(place, kind))


def _parts(place: Place, kind: str) -> Mapping[int, list[str]]:
    """The names of the parts of each attempt's file, in order."""
    found: dict[int, list[str]] = {}
    # The first part may have no number, so it is the names without their ends that are in order.
    for name in sorted(place.sizes(missing=True), key=lambda name: name.removesuffix(".jsonl")):
        if match := re.fullmatch(rf"{kind}-(\d+)(\.\d+)?\.jsonl", name):
            found.setdefault(int(match[1]), []).append(name)
    return found
