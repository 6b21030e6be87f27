"""What is done about members that are slower than others. Pure: the same observations give the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ray_dnn.plan import Plan, lay, sizes, step_s

_GAIN = 0.85  # of the time that a step takes now, at most, for a new plan to be laid
_STEPS, _PAUSE_S = 100, 0.2  # in so many steps it must gain as much as the pause takes
_SURE_STEPS, _SURE_S = 3, 2.0  # for which it must have been there
_WAIT_MAX_S = 600.0
_SENSE = 2.0  # times what the others take for a whole step, in which one virtual worker must be done
_HOPELESS_STEPS, _HOPELESS_S = 10, 5.0  # for which that must have been so


class Balance:
    """Says when a plan should be laid anew, for replicas have become slower or faster than it was laid for.

    That costs a pause. So the gain must be worth it, and must have been there for a while: speeds on shared machines
    go up and down. Each time in a row it has to be there for twice as long.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # when the gain began to be there
        self._steps = 0  # for which it has been there
        self._wait_s = _SURE_S

    def begin(self, changed: bool) -> None:
        """A generation begins. ``changed``: whether its members are others than before."""
        self._since = None
        if changed:
            self._wait_s = _SURE_S

    def look(self, plan: Plan, speeds: Sequence[float], now: float) -> str | None:
        """A step has been committed, with these speeds of late. Returns why a new plan is wanted, or None."""
        better = lay(plan.number, plan.workers, speeds)
        present, then = step_s(plan.bounds, speeds), step_s(better.bounds, speeds)
        if then > _GAIN * present or (present - then) * _STEPS < _PAUSE_S:
            self._since = None
            return None
        if self._since is None:
            self._since, self._steps = now, 0
        self._steps += 1
        if self._steps < _SURE_STEPS or now - self._since < self._wait_s:
            return None
        self._since, self._wait_s = None, min(2 * self._wait_s, _WAIT_MAX_S)
        return (
            f"speeds have changed: {sizes(better.bounds)} virtual workers by agent would take {then / present:.0%} of "
            "the time"
        )


@dataclass(frozen=True)
class Hopeless:
    """Members whom the others are better off without, however few virtual workers they host.

    Attributes:
        names: of them.
        times: as fast would the others be.
    """

    names: frozenset[str]
    times: float


def beyond_sense(workers: int, speeds: Sequence[float]) -> tuple[list[int], float]:
    """Members, by index, each of which takes more than twice as long for one virtual worker as those who are not among
    them would for all; and how many times as fast a step would be without them. Nobody, and 1, where there are none.

    As everybody hosts at least one virtual worker, they hold up all others.
    """
    by_speed = sorted(range(len(speeds)), key=lambda index: (speeds[index], index))
    total = sum(speeds)
    left = [total - before for before in accumulate(speeds[index] for index in by_speed)]  # without the first, two, …
    could = [
        count
        for count, others in enumerate(left[:-1], start=1)
        if others > _SENSE * workers * speeds[by_speed[count - 1]]  # at best, for a division is rounded
    ]
    for count in reversed(could):
        others = [speeds[index] for index in sorted(by_speed[count:])]
        without = step_s(lay(0, workers, others).bounds, others)
        if 1 / speeds[by_speed[count - 1]] > _SENSE * without:
            return sorted(by_speed[:count]), step_s(lay(0, workers, speeds).bounds, speeds) / without
    return [], 1.0


class Stragglers:
    """Says which members are slow beyond sense, once they have been so for a while."""

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()  # who have been of late
        self._since = 0.0  # when they began to be
        self._steps = 0  # for which they have been

    def look(self, workers: int, names: Sequence[str], speeds: Sequence[float], now: float) -> Hopeless | None:
        """A step has been committed by these, with these speeds of late."""
        indexes, times = beyond_sense(workers, speeds)
        found = frozenset(names[index] for index in indexes)
        if found != self._names:
            self._names, self._since, self._steps = found, now, 0
        self._steps += 1
        if not found or self._steps < _HOPELESS_STEPS or now - self._since < _HOPELESS_S:
            return None
        self._names = frozenset()
        return Hopeless(found, times)
