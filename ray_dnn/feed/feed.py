"""The driver's side of the feed: reads ahead of the steps, and tells what agents need to know."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import numpy as np
import ray

from ray_dnn.errors import ConfigError
from ray_dnn.feed.dealing import Deal
from ray_dnn.feed.hands import Hand, Hands
from ray_dnn.feed.source import Lot, Source
from ray_dnn.feed.stream import HOME_BYTES, TICK_S, Reader, Room, StoppedError
from ray_dnn.feed.supply import Evaluated, News, Portion
from ray_dnn.sampler import Epoch, RowOrder, Schedule, split_evenly

_AHEAD = 4  # portions that wait for the one that is used
_PORTION_STEPS = 1024
_WINDOW_SHARE, _HELD_SHARE = 0.25, 0.8  # of the object store: for one window, for a dataset that is shuffled globally


@dataclass(frozen=True)
class Hears:
    """Who is told what the feed does. Called from its threads.

    Attributes:
        news: for the agents, about rows.
        counted: units and their rows, each unit once, in the order in which they are read.
        says: what is waited for or done that takes long, in words.
        failed: it cannot go on.
    """

    news: Callable[[News], None]
    counted: Callable[[dict[int, int]], None]
    says: Callable[[str], None]
    failed: Callable[[Exception], None]


class Feed:
    """Rows for all agents of a run.

    Args:
        sources: the datasets; "train" and those that are evaluated.
        first_step: where the run begins.
        counts: rows of units of the training set that an earlier run has counted.

    Attributes:
        schedule: of the run; its rows become known at the latest when the first epoch has been read.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        order: RowOrder,
        schedule: Schedule,
        hears: Hears,
        first_step: int = 0,
        counts: Mapping[int, int] | None = None,
    ):
        self.schedule = schedule
        self._order, self._hears, self._first_step = order, hears, first_step
        self._wanted = True
        self._committed = first_step
        self._portions: list[Portion] = []  # those that may still be asked for, and the first one
        self._evaluated: list[Evaluated] = []
        self._changed = threading.Condition()  # guards the four above
        self._room, self._hands = Room.of_cluster(), Hands()
        self._dealers: cycle[Hand] | None = None  # once there is much to deal out
        self._train = self._reader(sources["train"], counts or {})
        self._others = [self._reader(source, {}) for name, source in sources.items() if name != "train"]
        if schedule.rows is None and len(self._train.counts) == len(sources["train"].units):
            self.schedule = replace(schedule, rows=sum(self._train.counts.values()))
        self._threads: list[threading.Thread] = []

    def _reader(self, source: Source, counts: Mapping[int, int]) -> Reader:
        return Reader(source, self._order.seed, counts, self._hands, self._room, self._hears.says, lambda: self._wanted)

    def start(self) -> None:
        """Begin to read."""
        self._go(self._run)

    def _go(self, call: Callable[[], None]) -> None:
        def run() -> None:
            try:
                call()
            except StoppedError:
                pass
            except Exception as error:
                self._hears.failed(error)

        thread = threading.Thread(target=run, name="ray_dnn-feed", daemon=True)
        self._threads.append(thread)
        thread.start()

    def news(self) -> News:
        """All that an agent needs to know now."""
        with self._changed:
            return News(tuple(self._portions), tuple(self._evaluated), self.schedule.total_steps)

    def committed(self, steps: int) -> None:
        """So many steps are committed."""
        with self._changed:
            self._committed = steps
            # Who committed the last step may be lost, all of them; then it is done again.
            self._portions = [p for p in self._portions if p.first == self._first_step or p.last > steps - 1]
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._wanted = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._hands.close()

    # -- training ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._train.home:
            self._dealer()  # which starts while rows are read
        step = self._first_step
        self._locate(step)
        while (total := self.schedule.total_steps) is None or step < total:
            epoch = 0 if self.schedule.rows is None else step // self.schedule.steps_per_epoch
            with closing(self._epoch(epoch, step)) as portions:
                for portion in portions:
                    self._publish(portion)
                    step = portion.last

    def _locate(self, step: int) -> None:
        """Count rows until it is known which a step uses."""
        stream = self._stream(0)
        self._count(stream, 0, lambda: self.schedule.known(step, stream.rows) or step == 0)
        if stream.complete:
            self._complete(stream)

    def _stream(self, epoch: int) -> Epoch:
        return Epoch(self._order, epoch, len(self._train.source.units), self._train.numbering)

    def _count(self, stream: Epoch, epoch: int, enough: Callable[[], bool]) -> None:
        """Count a stream's rows until it is enough: what is known first, then by reading."""
        while not stream.complete and not enough():
            unit = int(stream.units[stream.counted])
            if unit not in self._train.counts:
                break
            stream.count(self._train.counts[unit])
        if stream.complete or enough():
            return
        self._hears.says("datasets['train']: rows are read only to count them, for nobody knows how many pass filters")
        with closing(self._train.lots(stream, epoch, ship=False)) as coming:
            for _ in coming:
                if enough():
                    break

    def _epoch(self, epoch: int, step: int) -> Generator[Portion, None, None]:
        """The portions from a step on, to the end of its epoch."""
        stream = self._stream(epoch)
        start = self.schedule.batches(step)[0][1]
        window = _Window(begin=self._skip(stream, epoch, self._order.span(start, start + 1)[0]))
        with closing(self._train.lots(stream, epoch)) as coming:
            yield from self._steps(epoch, step, stream, window, coming)

    def _steps(
        self, epoch: int, step: int, stream: Epoch, window: _Window, coming: Iterator[list[Lot]]
    ) -> Iterator[Portion]:
        size = 1
        while step < (last := self._clip(epoch, step + size)):
            while not self._there(step, last, stream) and (lots := next(coming, None)) is not None:
                window.add(lots)
                self._check_room(window)
            self._tell_counts()
            if stream.complete:
                self._complete(stream)
                last = self._clip(epoch, last)
            if step >= last:
                break
            yield self._deal(epoch, step, last, stream, window)
            step, size = last, min(2 * size, self._usual_steps())

    def _skip(self, stream: Epoch, epoch: int, place: int) -> int:
        """Pass over units that lie wholly before a place. Returns where the first unit that does not begins."""
        if place == 0:
            return 0
        ahead = self._stream(epoch)
        self._count(ahead, epoch, lambda: ahead.rows > place)
        for unit in ahead.units[: ahead.counted]:
            rows = self._train.counts[int(unit)]
            if stream.rows + rows > place:
                break
            stream.count(rows)
        return stream.rows

    def _clip(self, epoch: int, step: int) -> int:
        """This step, or the end of the epoch or of the job, where that is known to be before it."""
        ends = [step]
        if self.schedule.rows is not None:
            ends.append((epoch + 1) * self.schedule.steps_per_epoch)
        if self.schedule.total_steps is not None:
            ends.append(self.schedule.total_steps)
        return min(ends)

    def _there(self, step: int, last: int, stream: Epoch) -> bool:
        """Whether all rows of steps ``step..last`` have been read, and it is known which they are."""
        if stream.complete:
            return True
        if not self.schedule.known(last - 1, stream.rows):
            return False
        first, end = self.schedule.batches(step)[0], self.schedule.batches(last - 1)[-1]
        reach = self._order.span(first[1], end[2])[1]
        return reach is not None and stream.rows >= reach

    def _complete(self, stream: Epoch) -> None:
        """All rows of an epoch are counted."""
        if self.schedule.rows is None:
            if not stream.rows:
                raise ConfigError("datasets['train'] has no rows: none passed its filters.")
            self.schedule = replace(self.schedule, rows=stream.rows)
            self._hears.news(News(steps=self.schedule.total_steps))

    def _check_room(self, window: _Window) -> None:
        """Refuse rows that have to be in the object store together and do not fit."""
        row_bytes, order = self._train.row_bytes, self._order
        if order.shuffle == "none" or not window.size:
            return
        if order.shuffle == "global":
            size, share = max(window.size, row_bytes * (self.schedule.rows or 0)), _HELD_SHARE
            how = "Use TrainConfig(shuffle='windowed')."
        else:
            size, share = row_bytes * min(order.window, self.schedule.rows or order.window), _WINDOW_SHARE
            how = f"Lower TrainConfig(shuffle_window={order.window})."
        if size > share * self._room.all:
            raise ConfigError(
                f"datasets['train']: {row_bytes / 1e3:.1f} kB a row: rows that have to be together to be shuffled take "
                f"{size / 1e9:.2f} GB or more; the cluster's object store has {self._room.all / 1e9:.2f} GB, of which "
                f"they may take {share:.0%}. {how}"
            )

    def _deal(self, epoch: int, step: int, last: int, stream: Epoch, window: _Window) -> Portion:
        """Have the rows of some steps dealt out. Rows that come before what later steps need are dropped."""
        schedule, order = self.schedule, self._order
        batches = [schedule.batches(s) for s in range(step, last)]
        start, stop = batches[0][0][1], batches[-1][-1][2]
        first, reach = order.span(start, stop)
        window.drop_before(first)
        counts = np.full((last - step, schedule.local_batches, schedule.virtual_workers), -1, np.int32)
        for index, of_step in enumerate(batches):
            for batch, (_, begin, end) in enumerate(of_step):
                counts[index, batch] = split_evenly(end - begin, schedule.virtual_workers, schedule.min_rows)
        lots = window.up_to(stream.rows if reach is None else min(reach, stream.rows))
        what = Deal(order, epoch, start, stop, lots, window.begin, stream.rows, counts)
        return Portion(step, last, counts, self._tables(what))

    def _tables(self, what: Deal) -> tuple[Any, ...]:
        """Deal rows out: few of them here, which takes no process, many elsewhere."""
        if sum(lot.rows for lot in what.lots) * self._train.row_bytes >= HOME_BYTES:
            return self._dealer().deal(what, self.schedule.virtual_workers)
        references = list({lot.ref for lot in what.lots})
        while len(ray.wait(references, num_returns=len(references), timeout=TICK_S)[0]) < len(references):
            if not self._wanted:
                raise StoppedError
        return tuple(map(ray.put, what.tables()))

    def _dealer(self) -> Hand:
        """Who deals next: each in its turn."""
        if self._dealers is None:
            nodes = sum(node["Alive"] for node in ray.nodes())
            self._dealers = cycle(self._hands.take({}, home=False) for _ in range(min(nodes, _AHEAD)))
        return next(self._dealers)

    def _usual_steps(self) -> int:
        rows = self.schedule.local_batches * self.schedule.batch_size
        return int(max(1, min(_PORTION_STEPS, self._room.call / max(1.0, self._train.row_bytes * rows))))

    def _publish(self, portion: Portion) -> None:
        with self._changed:
            while self._wanted and sum(p.last > self._committed for p in self._portions) > _AHEAD:
                self._changed.wait()
            if not self._wanted:
                raise StoppedError
            self._portions.append(portion)
        self._hears.news(News((portion,), (), self.schedule.total_steps))
        if portion.first == self._first_step and self._others:  # the training set comes first
            self._go(self._read_others)

    def _tell_counts(self) -> None:
        new, self._train.news = self._train.news, {}
        if new:
            self._hears.counted(new)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _read_others(self) -> None:
        """Read all that is evaluated. It stays in the object store, or where that spills to."""
        for reader in self._others:
            stream = Epoch(RowOrder(0, "none", 1), 0, len(reader.source.units), reader.numbering)
            with closing(reader.lots(stream, epoch=-1)) as coming:
                for index, lots in enumerate(coming):
                    part = Evaluated(reader.source.name, index, tuple(lots), stream.complete)
                    with self._changed:
                        self._evaluated.append(part)
                    self._hears.news(News(evaluated=(part,)))
            if not stream.rows:
                raise ConfigError(f"datasets[{reader.source.name!r}] has no rows: none passed its filters.")


@dataclass
class _Window:
    """Rows of a stream that have been read and may still be needed.

    Attributes:
        begin: the place of the first one.
        size: bytes of them, as far as known.
    """

    begin: int
    lots: deque[Lot] = field(default_factory=deque)
    size: int = 0

    def add(self, lots: list[Lot]) -> None:
        """Rows that follow."""
        for lot in lots:
            self.size += lot.size
            both = self.lots[-1].joined(lot) if self.lots else None
            if both is not None:
                self.lots[-1] = both
            else:
                self.lots.append(lot)

    def drop_before(self, place: int) -> None:
        """Drop lots that lie wholly before a place."""
        while self.lots and self.begin + self.lots[0].rows <= place:
            lot = self.lots.popleft()
            self.begin, self.size = self.begin + lot.rows, self.size - lot.size

    def up_to(self, place: int) -> tuple[Lot, ...]:
        """The lots that hold rows before a place."""
        found, at = [], self.begin
        for lot in self.lots:
            if at >= place:
                break
            found.append(lot)
            at += lot.rows
        return tuple(found)
