"""Other runs on the same cluster that cannot start: whoever has more agents than its minimum makes room for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ray_dnn.cluster import free, waiting_minimums
from ray_dnn.membership import Resources

logger = logging.getLogger("ray_dnn")

_LOOK_S = 2.0
_SHARE = 0.05  # of a thread's time, at most, that looking takes
_WAITS_S = 4.0  # for which a run must have been waiting


class Neighbours:
    """Looks, from a thread of its own, for runs that cannot start."""

    def __init__(self, post: Callable[[Callable[[], None]], None], told: Callable[[Resources | None, Resources], None]):
        """
        Args:
            post: has something done by the driver's thread.
            told: called there now and then with what the run needs that has been waiting longest, and what is free;
                with None once, when nobody waits any more.
        """
        self._post, self._told = post, told
        self._closed = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._look, name="ray_dnn-neighbours", daemon=True).start()

    def _look(self) -> None:
        since: dict[str, float] = {}  # when each of those who wait was seen first
        said = told = False
        took = 0.0
        while not self._closed.wait(max(_LOOK_S, took / _SHARE)):
            began = time.monotonic()
            try:
                waiting, there = waiting_minimums(), free()
            except Exception as error:  # the head is away, or Ray is being shut down
                if not said and not self._closed.is_set():
                    logger.warning("Ray does not say which other runs wait: %s", error)
                said = True
                continue
            now = time.monotonic()
            took = now - began
            since = {group: since.get(group, now) for group in waiting}
            longest = min(since, key=lambda group: since[group], default=None)
            if longest is not None and now - since[longest] >= _WAITS_S:
                needs = waiting[longest]
                self._post(lambda needs=needs, there=there: self._told(needs, there))  # type: ignore[misc]
                told = True
            elif told and longest is None:
                self._post(lambda there=there: self._told(None, there))  # type: ignore[misc]
                told = False

    def close(self) -> None:
        self._closed.set()
