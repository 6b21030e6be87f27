"""Nodes that are going to end, as Ray was told: spot notices, an autoscaler, a person."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from ray_dnn.cluster import draining_nodes
from ray_dnn.lookout import Lookout

_LOOK_S = 0.5
LEAVE_S = 8.0  # before its node ends, an agent leaves that has not been replaced by then, or earlier for long steps


class Draining(Lookout):
    """Which nodes are going to end, and when."""

    def __init__(self, post: Callable[[Callable[[], None]], None], told: Callable[[str, float | None], None]):
        """
        Args:
            post: has something done by the driver's thread.
            told: called there with each node, and how long it is going to be there; None: nobody knows.
        """
        super().__init__("which nodes are going to end", self._look_for_notices, _LOOK_S)
        self._post, self._told = post, told
        self._seen: dict[str, float | None] = {}  # what was told; of this object's thread
        self._deadlines: dict[str, float] = {}  # by node; of the driver's thread

    def _look_for_notices(self) -> None:
        for node, deadline in draining_nodes().items():
            if node not in self._seen or self._seen[node] != deadline:
                self._seen[node] = deadline
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
