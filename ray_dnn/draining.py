"""Nodes that are going to end, as Ray was told: spot notices, an autoscaler, a person."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

from ray_dnn.cluster import draining_nodes

logger = logging.getLogger("ray_dnn")

_LOOK_S = 0.5
LEAVE_S = 8.0  # before its node ends, an agent leaves that has not been replaced by then, or earlier for long steps


class Draining:
    """Which nodes are going to end, and when.

    Looks from a thread of its own, for an answer may take long when the cluster's head is busy or away.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None], told: Callable[[str, float | None], None]):
        """
        Args:
            post: has something done by the driver's thread.
            told: called there with each node, and how long it is going to be there; None: nobody knows.
        """
        self._post, self._told = post, told
        self._deadlines: dict[str, float] = {}  # by node; of the driver's thread
        self._closed = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._look, name="ray_dnn-draining", daemon=True).start()

    def _look(self) -> None:
        seen: dict[str, float | None] = {}
        said = False
        while not self._closed.wait(_LOOK_S):
            try:
                found = draining_nodes()
            except Exception as error:  # the head is away, or Ray is being shut down
                if not said and not self._closed.is_set():
                    logger.warning("Ray does not say which nodes are going to end: %s", error)
                said = True
                continue
            for node, deadline in found.items():
                if node not in seen or seen[node] != deadline:
                    seen[node] = deadline
                    self._post(lambda node=node, deadline=deadline: self._on_notice(node, deadline))  # type: ignore[misc]

    def _on_notice(self, node: str, deadline: float | None) -> None:
        left = None if deadline is None else max(0.0, deadline - time.time())
        self._deadlines[node] = float("inf") if left is None else time.monotonic() + left
        self._told(node, left)

    @property
    def nodes(self) -> Collection[str]:
        """Those that are going to end."""
        return self._deadlines.keys()

    def ends_in(self, node: str) -> float:
        """Seconds until it ends."""
        return self._deadlines.get(node, float("inf")) - time.monotonic()

    def close(self) -> None:
        self._closed.set()
