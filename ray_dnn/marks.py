"""An agent's marks: it says at each phase where it is, for a watcher to read and for a fault plan to strike at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from ray_dnn.phases import Phase, Status

_RANKS = 63  # that fit into the status


def _nowhere(status: Status) -> None:
    pass


class Marks:
    """Where this agent is. Written by its compute thread alone.

    Attributes:
        status: the present one.
        rank: of this agent's replica in the generation.
    """

    def __init__(self, write: Callable[[Status], None] = _nowhere):
        self._write = write
        self._entered: Callable[[Status, int], None] | None = None
        self.status = Status()
        self.rank = 0

    def on_enter(self, entered: Callable[[Status, int], None]) -> None:
        """Have ``entered(status, rank)`` called at each phase. Fault plans strike there."""
        self._entered = entered

    def join(self, generation: int, rank: int) -> None:
        """A generation begins."""
        self.status, self.rank = self.status._replace(generation=generation), rank

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """A phase begins. ``step``: where it is another than before."""
        now = self.status
        self.status = now._replace(phase=phase, step=now.step if step is None else step, moves=now.moves + 1, waits=0)
        self._write(self.status)
        if self._entered is not None:
            self._entered(self.status, self.rank)

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """A phase inside of another one."""
        before = self.status.phase
        self.enter(phase)
        yield
        self.status = self.status._replace(phase=before, moves=self.status.moves + 1)
        self._write(self.status)

    @contextlib.contextmanager
    def unarmed(self) -> Iterator[None]:
        """Fault plans are not told of what is entered inside: it is not what they name, only computed alike."""
        entered, self._entered = self._entered, None
        try:
            yield
        finally:
            self._entered = entered

    def waits(self, ranks: Iterable[int]) -> None:
        """It has waited for these for a while."""
        mask = sum(1 << rank for rank in ranks if rank < _RANKS)
        if mask != self.status.waits:
            self.status = self.status._replace(waits=mask)
            self._write(self.status)

    def moved(self, count: int) -> None:
        """So many bytes went to or came from other agents."""
        self.status = self.status._replace(moved=self.status.moved + count)
        self._write(self.status)
