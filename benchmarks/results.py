"""Results of benchmarks as they are kept, with the machine that they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.tables import Table

FOLDER = Path(__file__).parent / "published"
PACKAGES = ("torch", "ray", "pyarrow", "numpy")


@dataclass(frozen=True)
class Result:
    """One run of a benchmark.

    Attributes:
        machine: processor, cores, memory, kernel and versions, in words.
        load: processes that wanted to run in the minute before.
        day: in ISO format.
    """

    table: Table
    machine: str
    load: float
    day: str

    @property
    def command(self) -> str:
        """What measures it again."""
        return f'make bench ARGS="{self.table.name}"'

    def write(self, folder: Path = FOLDER) -> None:
        """Keep it, instead of the one before."""
        folder.mkdir(exist_ok=True)
        tree = {"machine": self.machine, "load": self.load, "day": self.day, "table": self.table.to_json()}
        (folder / f"{self.table.name}.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def from_json(tree: dict[str, Any]) -> Result:
    """What `Result.write` wrote."""
    return Result(Table.from_json(tree["table"]), tree["machine"], tree["load"], tree["day"])


def read(names: Iterable[str], folder: Path = FOLDER) -> list[Result]:
    """The last result of each, in this order; those that were never measured are left out."""
    files = [folder / f"{name}.json" for name in names]
    return [from_json(json.loads(file.read_text())) for file in files if file.exists()]


def load() -> float:
    """Of the machine at present."""
    return round(os.getloadavg()[0], 1)


def today() -> str:
    """In ISO format."""
    return datetime.date.today().isoformat()


def machine() -> str:
    """This machine, in words."""
    processor = _found(r"model name\s*: (.+)", "/proc/cpuinfo") or platform.machine()
    gib = int(_found(r"MemTotal:\s*(\d+)", "/proc/meminfo") or 0) / 2**20
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    kind = "virtual machine" if re.search(r"\bhypervisor\b", Path("/proc/cpuinfo").read_text()) else "machine"
    return (
        f"{kind} with {len(os.sched_getaffinity(0))} cores ({processor}), {gib:.0f} GiB of memory, no accelerator; "
        f"Linux {platform.release()}, Python {platform.python_version()}, {versions}"
    )


def _found(pattern: str, file: str) -> str | None:
    found = re.search(pattern, Path(file).read_text())
    return found[1].strip() if found else None
