"""Other runs on the same cluster that cannot start: whoever has more agents than its minimum makes room for them."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray_dnn.cluster import free, waiting_minimums
from ray_dnn.lookout import Lookout
from ray_dnn.membership import Resources

_LOOK_S = 2.0
_SHARE = 0.05  # of a thread's time, at most, that looking takes
_WAITS_S = 4.0  # for which a run must have been waiting


class Neighbours(Lookout):
    """Runs that cannot start."""

    def __init__(self, post: Callable[[Callable[[], None]], None], told: Callable[[Resources | None, Resources], None]):
        """
        Args:
            post: has something done by the driver's thread.
            told: called there now and then with what the run needs that has been waiting longest, and what is free;
                with None once, when nobody waits any more.
        """
        super().__init__("which other runs wait", self._look_for_runs, _LOOK_S, _SHARE)
        self._post, self._tell = post, told
        self._since: dict[str, float] = {}  # when each of those who wait was seen first
        self._told = False  # whether somebody waits, as far as was told

    def _look_for_runs(self) -> None:
        waiting, there, now = waiting_minimums(), free(), time.monotonic()
        self._since = {group: self._since.get(group, now) for group in waiting}
        longest = min(waiting, key=lambda group: self._since[group], default=None)
        if longest is not None and now - self._since[longest] >= _WAITS_S:
            self._post(lambda: self._tell(waiting[longest], there))
            self._told = True
        elif self._told and longest is None:
            self._post(lambda: self._tell(None, there))
            self._told = False
