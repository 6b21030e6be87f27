"""One pass over a dataset's units, as the driver sees it: lots of rows, in the order of the epoch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_dnn.errors import ConfigError, DataError
from ray_dnn.feed.hands import Hand, Hands, ReadingError
from ray_dnn.feed.reading import Order, Read
from ray_dnn.feed.source import Lot, Source
from ray_dnn.sampler import Epoch, Numbering

_CALL_UNITS = 64  # that one call reads at most
_FIRST_GUESS = 4 << 20  # bytes of a unit, while nothing is known
HOME_BYTES = 1 << 20  # less than that is read and dealt out where the driver is
_CALL_BYTES, _CALLS_IN_STORE = 16 << 20, 32  # that one call makes: so much, or such a part of the store
TICK_S = 0.2  # between two looks whether rows are still wanted
_PATIENCE_S = 1.0  # of waiting, before more is read at once: as long as it takes to start a process
_SAY_S = 10.0  # of waiting, before it is said; then twice as long, and so on


class Reader:
    """Reads a dataset's units for the driver.

    Args:
        room: in the object store.
        hands: that read.
        counts: rows of units that are known although ``source`` does not say them.
        say: told what is waited for, when that takes long.
        wanted: whether the run still goes on.

    Attributes:
        counts: rows of units, as far as they are known.
        news: those of them that nobody has been told of.
        row_bytes: of an average row.
        read: rows, those that were only counted too.
        home: whether the dataset is so small that it is read where the driver is.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        counts: Mapping[int, int],
        hands: Hands,
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
        self._seed, self._hands, self._room, self._say, self._wanted = seed, hands, room, say, wanted
        self._reference: Any = ray.put(source)
        self._bytes = self._units = self._rows = 0  # that were shipped so far
        self.read = 0
        self._at_once = 1  # calls; as many as it takes
        self._hurried = 0.0  # when that was raised, or a process had not begun yet
        self.home = sum(self._size(unit) for unit in range(len(source.units))) < HOME_BYTES

    @property
    def row_bytes(self) -> float:
        return self._bytes / self._rows if self._rows else self.source.row_bytes

    def lots(self, stream: Epoch, epoch: int, ship: bool = True) -> Generator[list[Lot], None, None]:
        """Read the units that ``stream`` has not counted yet, and count them.

        ``ship``: whether rows are wanted; else they are only counted.

        Raises:
            DataError, UserCodeError: rows cannot be read or transformed.
        """
        calls: deque[_Call] = deque()
        index = stream.counted
        try:
            while index < len(stream.units) or calls:
                while index < len(stream.units) and len(calls) < self._at_once:
                    calls.append(self._begin(self._group(stream, index), epoch, ship))
                    index += len(calls[-1].numbers)
                call = calls[0]
                if call.hand is None:
                    yield self._held(stream, calls.popleft().numbers)
                elif not self._ready(call):
                    self._hurry(calls)
                else:
                    lots = self._take(stream, call)
                    if call.ended == len(call.numbers):
                        self._hands.put_back(call.hand)
                        calls.popleft()
                    yield lots
        finally:
            for call in calls:
                if call.hand is not None:
                    self._hands.end(call.hand)

    def _group(self, stream: Epoch, index: int) -> list[int]:
        """The units that are read next by one call, all of one branch."""
        branch = self.source.branch(stream.units[index])
        numbers: list[int] = []
        size = 0.0
        for unit in map(int, stream.units[index : index + _CALL_UNITS]):
            if numbers and (size >= self._room.call or self.source.branch(unit) is not branch):
                break
            numbers.append(unit)
            size += self._size(unit)
        return numbers

    def _size(self, unit: int) -> float:
        """Bytes of a unit, as far as can be said before it is read."""
        usual = self._bytes / self._units if self._units else _FIRST_GUESS
        return self.source.unit(unit).size or usual

    def _begin(self, numbers: list[int], epoch: int, ship: bool) -> _Call:
        """Have units read, unless they are in the object store as they are."""
        branch = self.source.branch(numbers[0])
        if branch.held:
            return _Call(numbers)
        hand = self._hands.take(branch.options, self.home)
        firsts = tuple(self.numbering.first(unit) for unit in numbers)
        order = Order(self._reference, tuple(numbers), firsts, self._seed, epoch, int(self._room.call / 2), ship)
        return _Call(numbers, hand, hand.read(order))

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

    def _ready(self, call: _Call) -> bool:
        """Whether it has given something, after waiting for it a little."""
        if ray.wait([call.coming], timeout=TICK_S, fetch_local=False)[0]:
            return True
        if not self._wanted():
            raise StoppedError
        if time.monotonic() - call.began > call.said:
            call.said *= 2
            name = self.source.unit(call.numbers[call.ended]).name
            self._say(f"rows of datasets[{self.source.name!r}]: {name} is being read")
        return False

    def _hurry(self, calls: Sequence[_Call]) -> None:
        """Rows are waited for: have twice as many processes read, unless some have only just begun."""
        now = time.monotonic()
        if not all(call.hand is None or call.hand.up() for call in calls):
            self._hurried = now
        elif now - max(self._hurried, calls[0].began) >= _PATIENCE_S:
            most = int(ray.cluster_resources().get("CPU", 1)) // 2
            self._at_once = max(2, min(64, most, 2 * self._at_once))
            self._hurried = now

    def _take(self, stream: Epoch, call: _Call) -> list[Lot]:
        """Take what has been read."""
        table = next(call.coming)
        reads, size = self._answer(next(call.coming, table))  # a call that fails gives its error, and nothing more
        for entry in reads:
            call.rows += entry.rows
            stream.add(entry.rows)
            if entry.last:
                self._end(stream, entry.unit, call.rows)
                call.rows, call.ended = 0, call.ended + 1
                self._units += 1 if size else 0
        shipped = sum(entry.rows for entry in reads)
        self.read += shipped
        call.wait()
        if not size:  # only counted
            return []
        self._bytes, self._rows = self._bytes + size, self._rows + shipped
        return [Lot(table, 0, shipped, None, size)]

    def _answer(self, reference: Any) -> tuple[list[Read], int]:
        try:
            answer: tuple[list[Read], int] = ray.get(reference)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, ReadingError):
                raise error.cause.error from error.cause.cause
            raise DataError(f"datasets[{self.source.name!r}]: a process that reads it failed: {error}") from error
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


@dataclass
class _Call:
    """Units that are being read.

    Attributes:
        hand: by whom.
        coming: what that gives.
        rows: that came of the unit of which some came last.
        ended: units.
        began, said: since when something is waited for, and how long before that is said.
    """

    numbers: list[int]
    hand: Hand | None = None
    coming: Any = None
    rows: int = 0
    ended: int = 0
    began: float = field(default_factory=time.monotonic)
    said: float = _SAY_S

    def wait(self) -> None:
        """From now on something is waited for."""
        self.began, self.said = time.monotonic(), _SAY_S


@dataclass(frozen=True)
class Room:
    """What the object store of the cluster has room for, in bytes.

    Attributes:
        all: in the whole cluster.
        call: that one call to a process should make at a time. The feed has about a dozen times as much in the store,
            besides the rows of a window.
    """

    all: float
    call: float

    @classmethod
    def of_cluster(cls) -> Room:
        """The present room."""
        nodes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
        return cls(sum(nodes), min(_CALL_BYTES, min(nodes) / _CALLS_IN_STORE))


class StoppedError(Exception):
    """The run does not want rows any more."""
