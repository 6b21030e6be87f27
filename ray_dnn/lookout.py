"""Looking at what Ray knows, again and again."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

logger = logging.getLogger("ray_dnn")


class Lookout:
    """Looks from a thread of its own, for an answer may take long when the cluster's head is busy or away.

    Args:
        what: is looked for, in words.
        look: what the thread does every ``every_s`` seconds. It may raise: the head is away, or Ray is being shut down.
        share: of the thread's time, at most, that looking takes.
    """

    def __init__(self, what: str, look: Callable[[], None], every_s: float, share: float = math.inf):
        self._what, self._look_once, self._every_s, self._share = what, look, every_s, share
        self._closed = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._look, name="ray_dnn-lookout", daemon=True).start()

    def _look(self) -> None:
        said, took = False, 0.0
        while not self._closed.wait(max(self._every_s, took / self._share)):
            began = time.monotonic()
            try:
                self._look_once()
            except Exception as error:
                if not said and not self._closed.is_set():
                    logger.warning("Ray does not say %s: %s", self._what, error)
                said = True
            took = time.monotonic() - began

    def close(self) -> None:
        self._closed.set()
