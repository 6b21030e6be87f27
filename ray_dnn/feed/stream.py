"""One pass over a dataset's units, as the driver sees it: lots of rows, in the order of the epoch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ray_dnn.errors import ConfigError, DataError
from ray_dnn.feed.dealing import Lot
from ray_dnn.feed.reading import Order, Read, ReadingError, read
from ray_dnn.feed.source import Source
from ray_dnn.sampler import Epoch, Numbering

_TASK_BYTES, _TASK_UNITS = 16 << 20, 64  # that one task reads: so many bytes, but at most so many units
_FIRST_GUESS = 4 << 20  # bytes of a unit, while nothing is known
_TICK_S = 0.5  # between two looks whether the pass is still wanted
_SAY_S = 10.0  # of waiting, before it is said; then twice as long, and so on


class Reader:
    """Reads a dataset's units for the driver.

    Args:
        counts: rows of units that are known although ``source`` does not say them.
        say: told what is waited for, when that takes long.
        wanted: whether the run still goes on.

    Attributes:
        counts: rows of units, as far as they are known.
        row_bytes: of an average row.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        counts: Mapping[int, int],
        say: Callable[[str], None],
        wanted: Callable[[], bool],
    ):
        self.source = source
        self.numbering = Numbering(source.counts)
        self.counts = dict(counts)
        if source.counts is not None:
            self.counts |= {unit: int(rows) for unit, rows in enumerate(source.counts)}
        self._seed, self._say, self._wanted = seed, say, wanted
        self._reference: Any = ray.put(source)
        self._bytes = self._units = self._rows = 0  # read so far
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
                    yield self._held(stream, numbers[0])
                else:
                    yield from self._finish(stream, numbers, task)
                under_way.popleft()
        finally:
            for _, task in under_way:
                if task is not None:
                    ray.cancel(task)

    def _group(self, stream: Epoch, index: int) -> list[int]:
        """The units that the next task reads: of one branch, and of one kind."""
        first = int(stream.units[index])
        if self.source.places(first) is not None:
            return [first]
        usual = self._bytes / self._units if self._units else _FIRST_GUESS
        numbers: list[int] = []
        size = 0.0
        for unit in stream.units[index : index + _TASK_UNITS]:
            if numbers and (size >= _TASK_BYTES or self.source.units[unit][0] != self.source.units[first][0]):
                break
            numbers.append(int(unit))
            size += self.source.unit(int(unit)).size or usual
        return numbers

    def _begin(self, numbers: list[int], epoch: int, ship: bool) -> Any:
        if self.source.places(numbers[0]) is not None:
            return None
        options = dict(self.source.branches[self.source.units[numbers[0]][0]].options)
        if "label_selector" not in options:
            options["scheduling_strategy"] = "SPREAD"
        firsts = tuple(self.numbering.first(unit) for unit in numbers)
        order = Order(self._reference, tuple(numbers), firsts, self._seed, epoch, ship)
        return read.options(**options).remote(order)

    def _held(self, stream: Epoch, unit: int) -> list[Lot]:
        first = self.numbering.first(unit)
        lots = []
        for place in self.source.places(unit) or []:
            lots.append(Lot(place.ref, place.start, place.stop, first))
            stream.add(lots[-1].rows)
            first += lots[-1].rows
        self._end(stream, unit, sum(lot.rows for lot in lots))
        return lots

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
            self._bytes, self._rows = self._bytes + size, self._rows + shipped
            yield [Lot(table, 0, shipped, None, size)] if size else []
        self._units += len(numbers)

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
        known = self.counts.setdefault(unit, rows)
        if known != rows:
            raise ConfigError(
                f"datasets[{self.source.name!r}], {self.source.unit(unit).name}: gave {rows} rows where {known} were "
                "expected. Either a file has changed, a filter depends on more than its row, or a map_batches that "
                "changes the number of rows was given udf_modifying_row_count=False."
            )
        stream.end()


class StoppedError(Exception):
    """The run does not want rows any more."""
