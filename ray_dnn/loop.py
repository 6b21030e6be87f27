"""The driver's event loop: everything that happens reaches one thread, in order."""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], None]


class Loop:
    """Runs calls one after another: posted by any thread, due at a time, or following a Ray reference."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Call]] = []  # a heap by time; the number breaks ties
        self._numbers = itertools.count()
        self._ended = False

    def post(self, call: Call) -> None:
        """Run ``call`` soon. From any thread."""
        self._queue.put(call)

    def later(self, seconds: float, call: Call) -> None:
        """Run ``call`` after ``seconds``. From the loop's thread."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), call))

    def watch(self, reference: Any, done: Callable[[Any, Exception | None], None]) -> None:
        """Run ``done(result, error)`` when a Ray reference resolves; ``error`` is None where it succeeded."""
        future = reference.future()

        def arrived(finished: Any) -> None:
            error = finished.exception()
            result = None if error is not None else finished.result()
            self.post(lambda: done(result, error))

        future.add_done_callback(arrived)

    def gather(self, references: Sequence[Any], done: Callable[[list[Any] | None, Exception | None], None]) -> None:
        """Run ``done(results, None)`` when all references have resolved; ``done(None, error)`` at the first error."""
        results: dict[int, Any] = {}
        failed = False

        def one(index: int) -> Callable[[Any, Exception | None], None]:
            def resolved(result: Any, error: Exception | None) -> None:
                nonlocal failed
                if failed:
                    return
                results[index] = result
                if error is not None:
                    failed = True
                    done(None, error)
                elif len(results) == len(references):
                    done([results[i] for i in range(len(references))], None)

            return resolved

        for index, reference in enumerate(references):
            self.watch(reference, one(index))

    def end(self) -> None:
        """Return from `run` after the present call."""
        self._ended = True

    def run(self) -> None:
        """Run calls until `end`."""
        while not self._ended:
            now = time.monotonic()
            if self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
                continue
            wait = self._timers[0][0] - now if self._timers else None
            try:
                call = self._queue.get(timeout=wait)
            except queue.Empty:
                continue
            call()
