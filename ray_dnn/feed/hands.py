"""Processes that read units and deal rows out, kept for a whole run.

They are actors, not tasks, for two reasons. Ray ends a task's process when all CPUs are taken and it has been idle for
a second, so every other task of a feed beside agents would pay for a process to start. And a task that is not wanted
any more could only be cancelled; Ray 2.60 can end the *caller* when a task answers while it is being cancelled. An
actor is simply ended. What one has made is made again by it, elsewhere, when its node dies.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dnn.errors import RayDnnError
from ray_dnn.feed.dealing import Deal
from ray_dnn.feed.reading import Order, read
from ray_dnn.feed.source import Source
from ray_dnn.portable import portable

_KEPT: dict[str, Any] = {
    "num_cpus": 0,  # agents may hold them all
    "max_restarts": -1,
    "max_task_retries": -1,  # of deaths, not of exceptions
}
_STREAMED: dict[str, Any] = {"num_returns": "streaming", "_generator_backpressure_num_objects": 8}


class ReadingError(Exception):
    """What went wrong in a process: an error, and its cause, which pickling the error alone would lose."""

    def __init__(self, error: RayDnnError, cause: Exception | None):
        super().__init__(error, cause)
        self.error, self.cause = error, cause


class _Hand:
    """The process."""

    def __init__(self) -> None:
        self._sources: dict[str, Source] = {}  # by reference

    def up(self) -> None:
        """Load what takes long."""
        import ray.data  # noqa: F401

    def read(self, order: Order) -> Iterator[Any]:
        """See `ray_dnn.feed.reading.read`."""
        key = order.source.hex()
        if key not in self._sources:
            self._sources[key] = ray.get(order.source)
        try:
            yield from read(self._sources[key], order)
        except RayDnnError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
            raise ReadingError(error, portable(cause) if cause else None) from None

    def deal(self, what: Deal) -> Any:
        """The table of each virtual worker."""
        tables = what.tables()
        return tables[0] if len(tables) == 1 else tuple(tables)


class Hand:
    """Such a process, as its owner sees it.

    Args:
        kind: what `Hands.take` knows it by.
        options: what it asks Ray for.
    """

    def __init__(self, kind: tuple[Any, ...], options: Mapping[str, Any]):
        self.kind = kind
        process: Any = ray.remote(_Hand)
        self._actor = process.options(**_KEPT | dict(options)).remote()
        self._up: Any = None  # a reference that resolves when it is able to read

    def up(self) -> bool:
        """Whether it has begun to read."""
        return bool(ray.wait([self._up], timeout=0)[0])

    def read(self, order: Order) -> Any:
        """A generator of references, a table's and a description's by turns."""
        if self._up is None:
            self._up = self._actor.up.remote()
        return self._actor.read.options(**_STREAMED).remote(order)

    def deal(self, what: Deal, workers: int) -> tuple[Any, ...]:
        """References to the tables of so many virtual workers."""
        tables = self._actor.deal.options(num_returns=workers).remote(what)
        return tuple(tables) if workers > 1 else (tables,)

    def end(self) -> None:
        """End it, whatever it does. What it has made cannot be made again then."""
        ray.kill(self._actor)


class Hands:
    """The processes of a run. May be used by several threads."""

    def __init__(self) -> None:
        self._all: list[Hand] = []
        self._idle: defaultdict[tuple[Any, ...], list[Hand]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, options: Mapping[str, Any], home: bool) -> Hand:
        """A process with these options that nobody else has; a new one if there is none.

        ``home``: on the driver's node, if that is free to say. Without it there is no run, so what lies there is not
        lost before it. Else the processes are spread over all nodes.
        """
        kind = (repr(sorted(options.items())), home)
        with self._lock:
            if self._idle[kind]:
                return self._idle[kind].pop()
            hand = Hand(kind, _where(home) | dict(options))
            self._all.append(hand)
            return hand

    def put_back(self, hand: Hand) -> None:
        """It has done what it was asked for."""
        with self._lock:
            self._idle[hand.kind].append(hand)

    def end(self, hand: Hand) -> None:
        """What it was asked for is not wanted any more."""
        with self._lock:
            self._all.remove(hand)
        hand.end()

    def close(self) -> None:
        """End them all."""
        with self._lock:
            for hand in self._all:
                hand.end()
            self._all.clear()
            self._idle.clear()


def _where(home: bool) -> dict[str, Any]:
    if not home:
        return {"scheduling_strategy": "SPREAD"}
    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True)}
