"""What the user's threads ask of a run under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray_dnn.errors import RayDnnError


@dataclass(frozen=True, eq=False)
class Request:
    """ "stop", "checkpoint" or "resize" at the next step boundary, or "interrupt" soon, the second time at once."""

    kind: str
    value: int = 0
    answer: Future[Any] = field(default_factory=Future)


class Requests:
    """Passes requests on to the driver until the run has ended. From any thread."""

    def __init__(self, pass_on: Callable[[Request], None]):
        self._pass_on = pass_on
        self._made: list[Request] = []
        self._ended = False  # once true, no request is taken
        self._lock = threading.Lock()  # guards the two above

    def make(self, kind: str, value: int = 0) -> Future[Any]:
        """Ask for something. The answer comes when it is done, or an error when the run ends before."""
        request = Request(kind, value)
        with self._lock:
            if self._ended:
                request.answer.set_exception(RayDnnError("The run has ended; handle.result() has its result."))
                return request.answer
            self._made = [r for r in self._made if not r.answer.done()] + [request]
        self._pass_on(request)
        return request.answer

    def close(self, error: Exception) -> None:
        """The run has ended: what is not answered yet gets this error."""
        with self._lock:
            self._ended = True
        for request in self._made:
            if not request.answer.done():
                request.answer.set_exception(error)
