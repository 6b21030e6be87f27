"""Filesystems for tests, which agents use too."""

import time
from pathlib import Path
from typing import Any

import pyarrow.fs

LOCAL = pyarrow.fs.LocalFileSystem()


class Failing(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """A local filesystem that behaves like an object store: no appending.

    Attributes:
        away: a file; while it is there, the storage refuses to be written to.
        waits: it does not refuse then, but waits, and says so by the file ``….waiting``.
    """

    def __init__(self, away: str, waits: bool):
        self.away, self.waits = away, waits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Failing) and other.away == self.away

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.away)

    def get_type_name(self) -> str:
        return "failing"

    def _check(self) -> None:
        while Path(self.away).exists():
            if not self.waits:
                raise OSError("the storage is away")
            Path(f"{self.away}.waiting").touch()
            time.sleep(0.02)

    def get_file_info(self, paths: list[str]) -> Any:
        return LOCAL.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return LOCAL.get_file_info(selector)

    def normalize_path(self, path: str) -> Any:
        return LOCAL.normalize_path(path)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._check()
        LOCAL.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._check()
        LOCAL.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._check()
        LOCAL.delete_file(path)

    def move(self, source: str, target: str) -> None:
        raise NotImplementedError

    def copy_file(self, source: str, target: str) -> None:
        raise NotImplementedError

    def open_input_stream(self, path: str) -> Any:
        return LOCAL.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return LOCAL.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._check()
        return LOCAL.open_output_stream(path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError("no appending here")


def failing(away: Path, waits: bool = False) -> pyarrow.fs.FileSystem:
    """See `Failing`."""
    return pyarrow.fs.PyFileSystem(Failing(str(away), waits))
