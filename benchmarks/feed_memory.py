"""How much memory it takes to stream a dataset that is several times as large as the object store."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray._private import worker  # there is no public way to its processes and folders

from benchmarks.memory import kib

LOOK_S = 0.05


@dataclass
class Peaks:
    """The most there was, in bytes.

    Attributes:
        store: that the object store has ever taken from the machine, what it allocates beside it when it is full
            included.
        spilled: from there to disk, at a time.
        private: of this process beyond what it had, without memory that it shares.
    """

    store: int = 0
    spilled: int = 0
    private: int = 0

    def look(self, before: int) -> None:
        """Look again. ``before``: KiB of private memory that this process had."""
        self.store = max(self.store, _store())
        self.spilled = max(self.spilled, _spilled())
        self.private = max(self.private, 1024 * (kib("status", "RssAnon") - before))


@contextlib.contextmanager
def peaks() -> Iterator[Peaks]:
    """The peaks until the end of the block, of a cluster of one node that this process has started."""
    found, over, before = Peaks(), threading.Event(), kib("status", "RssAnon")

    def watch() -> None:
        while not over.wait(LOOK_S):
            found.look(before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def _store() -> int:
    """Bytes of the files that the object store maps. Their pages are taken when they are first written to."""
    (raylet,) = worker._global_node.all_processes["raylet"]
    size = 0
    for file in Path(f"/proc/{raylet.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "plasma" in os.readlink(file):
                size += 512 * file.stat().st_blocks
    return size


def _spilled() -> int:
    size = 0
    for file in Path(worker._global_node.get_session_dir_path()).glob("ray_spilled_objects*/*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            size += file.stat().st_size
    return size
