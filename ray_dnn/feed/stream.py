"""One pass over a dataset's units, as the driver sees it: lots of rows, in the order of the epoch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dnn.errors import ConfigError, DataError
from ray_dnn.feed.reading import Order, Read, ReadingError, read
from ray_dnn.feed.source import Lot, Source
from ray_dnn.sampler import Epoch, Numbering

_TASK_UNITS = 64  # that one task reads at most
_FIRST_GUESS = 4 << 20  # bytes of a unit, while nothing is known
_SPREAD_BYTES = 1 << 20
_TASK_BYTES, _TASKS_IN_STORE = 16 << 20, 32  # that one task makes: so much, or such a part of the store
_TICK_S = 0.5  # between two looks whether the pass is still wanted
_SAY_S = 10.0  # of waiting, before it is said; then twice as long, and so on


def placement(size: float) -> dict[str, Any]:
    """Where a task runs that makes so many bytes: on any node, or, if that is not worth it, on the driver's.

    Without the driver's node there is no run, so what lies there is not lost before it.
    """
    if size >= _SPREAD_BYTES:
        return {"scheduling_strategy": "SPREAD"}
    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True)}


class Reader:
    """Reads a dataset's units for the driver.

    Args:
        room: in the object store.
        counts: rows of units that are known although ``source`` does not say them.
        say: told what is waited for, when that takes long.
        wanted: whether the run still goes on.

    Attributes:
        counts: rows of units, as far as they are known.
        news: those of them that nobody has been told of.
        row_bytes: of an average row.
        read: rows, those that were only counted too.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        counts: Mapping[int, int],
        room: Room,
        say: Callable[[str], None],
        wanted: Callable[[], bool],
    ):
        self.source = source
        self.numbering = Numbering(source.counts)
        self.counts = dict(counts)
        if source.counts is not None:
            self.counts |= {unit: int(rows) for unit, rows in enumerate(source.counts)}
        self.news: dict[int, int] = {}
        self._seed, self._room, self._say, self._wanted = seed, room, say, wanted
        self._reference: Any = ray.put(source)
        self._bytes = self._units = self._rows = 0  # that were shipped so far
        self.read = 0
        cpus = ray.cluster_resources().get("CPU", 1)
        self._at_once = max(2, min(64, int(cpus) // 2))

    @property
    def row_bytes(self) -> float:
        return self._bytes / self._rows if self._rows else self.source.row_bytes

    def lots(self, stream: Epoch, epoch: int, ship: bool = True) -> Generator[list[Lot], None, None]:
        """Read the units that ``stream`` has not counted yet, and count them.

        ``ship``: whether rows are wanted; else they are only counted.

        Raises:
            DataError, UserCodeError: rows cannot be read or transformed.
        """
        under_way: deque[tuple[list[int], Any]] = deque()
        index = stream.counted
        try:
            while index < len(stream.units) or under_way:
                while index < len(stream.units) and len(under_way) < self._at_once:
                    numbers = self._group(stream, index)
                    index += len(numbers)
                    under_way.append((numbers, self._begin(numbers, epoch, ship)))
                numbers, task = under_way[0]
                if task is None:
                    yield self._held(stream, numbers)
                else:
                    yield from self._finish(stream, numbers, task)
                under_way.popleft()
        finally:
            for _, task in under_way:
                if task is not None:  # by ending its process: an exception in the middle of an import would spoil it
                    ray.cancel(task, force=True)

    def _group(self, stream: Epoch, index: int) -> list[int]:
        """The units that the next task reads, all of one branch."""
        branch = self.source.branch(stream.units[index])
        numbers: list[int] = []
        size = 0.0
        for unit in map(int, stream.units[index : index + _TASK_UNITS]):
            if numbers and (size >= self._room.task or self.source.branch(unit) is not branch):
                break
            numbers.append(unit)
            size += self._size(unit)
        return numbers

    def _size(self, unit: int) -> float:
        """Bytes of a unit, as far as can be said before it is read."""
        usual = self._bytes / self._units if self._units else _FIRST_GUESS
        return self.source.unit(unit).size or usual

    def _begin(self, numbers: list[int], epoch: int, ship: bool) -> Any:
        branch = self.source.branch(numbers[0])
        if branch.held:
            return None
        options = dict(branch.options)
        if "label_selector" not in options:
            options |= placement(sum(self._size(unit) for unit in numbers))
        firsts = tuple(self.numbering.first(unit) for unit in numbers)
        order = Order(self._reference, tuple(numbers), firsts, self._seed, epoch, int(self._room.task / 2), ship)
        return read.options(**options).remote(order)

    def _held(self, stream: Epoch, numbers: list[int]) -> list[Lot]:
        """Take rows that need not be read."""
        found = []
        for unit in numbers:
            lots = self.source.lots(unit, self.numbering.first(unit))
            rows = sum(lot.rows for lot in lots)
            stream.add(rows)
            self._end(stream, unit, rows)
            found += lots
        return found

    def _finish(self, stream: Epoch, numbers: list[int], task: Any) -> Generator[list[Lot], None, None]:
        """Take what a task gives, as it comes."""
        rows = ended = 0  # of the unit that is being read; units
        while ended < len(numbers):
            self._await(task, self.source.unit(numbers[ended]).name)
            table = next(task)
            reads, size = self._answer(next(task, table))  # a task that fails gives its error, and nothing more
            for entry in reads:
                rows += entry.rows
                stream.add(entry.rows)
                if entry.last:
                    self._end(stream, entry.unit, rows)
                    rows, ended = 0, ended + 1
            shipped = sum(entry.rows for entry in reads)
            self.read += shipped
            if size:  # not only counted
                self._bytes, self._rows = self._bytes + size, self._rows + shipped
            yield [Lot(table, 0, shipped, None, size)] if size else []
        self._units += len(numbers) if self._bytes else 0

    def _await(self, task: Any, name: str) -> None:
        began, said = time.monotonic(), _SAY_S
        while not ray.wait([task], timeout=_TICK_S, fetch_local=False)[0]:
            if not self._wanted():
                raise StoppedError
            if time.monotonic() - began > said:
                said *= 2
                self._say(f"rows of datasets[{self.source.name!r}]: {name} is being read")

    def _answer(self, reference: Any) -> tuple[list[Read], int]:
        try:
            answer: tuple[list[Read], int] = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, ReadingError):
                raise error.cause.error from error.cause.cause
            raise DataError(f"datasets[{self.source.name!r}]: a task that reads it failed: {error}") from error
        return answer

    def _end(self, stream: Epoch, unit: int, rows: int) -> None:
        if unit not in self.counts:
            self.counts[unit] = self.news[unit] = rows
        elif (known := self.counts[unit]) != rows:
            raise ConfigError(
                f"datasets[{self.source.name!r}], {self.source.unit(unit).name}: gave {rows} rows where {known} were "
                "expected. Either a file has changed, a filter depends on more than its row, or a map_batches that "
                "changes the number of rows was given udf_modifying_row_count=False."
            )
        stream.end()


@dataclass(frozen=True)
class Room:
    """What the object store of the cluster has room for, in bytes.

    Attributes:
        all: in the whole cluster.
        task: that one task should make at a time. The feed has about a dozen times as much in the store, besides the
            rows of a window.
    """

    all: float
    task: float

    @classmethod
    def of_cluster(cls) -> Room:
        """The present room."""
        nodes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
        return cls(sum(nodes), min(_TASK_BYTES, min(nodes) / _TASKS_IN_STORE))


class StoppedError(Exception):
    """The run does not want rows any more."""
