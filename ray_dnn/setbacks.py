"""What has gone wrong in a run so far, and what follows from it: pure decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_MOST_FALSE_STARTS = 5  # newcomers in a row that were lost before they had committed a step
_MOST_HANGS = 3  # agents that hang in the same step
_MOST_BREAKS = 3  # broken connections in a row, before somebody is blamed
_WAIT_MAX_S = 60.0
_UNDISTURBED_S = 2.0  # most that replacements are put off for the first step after a loss


class Setbacks:
    """Counts losses until the run makes progress again. Methods that may end the run return the reason why, or None.

    Args:
        minimum: replicas that the user wants at least.
        max_failures: how often there may be fewer; below 0: any number of times.
    """

    def __init__(self, minimum: int, max_failures: int):
        self._minimum, self._max_failures = minimum, max_failures
        self._falls = 0  # below the minimum
        self._below = False  # whether there are fewer now
        self._false_starts = 0  # in a row
        self._not_before = 0.0  # when newcomers may be asked for again
        self._undisturbed_until = 0.0  # likewise: those who are left come to their first step before; 0 once they have
        self._breaks = 0  # in a row
        self._accused: Counter[str] = Counter()  # at the other end of connections that broke, since the last step
        self._hangs: Counter[int] = Counter()  # by step

    def left(self, count: int, step: int, reason: str) -> str | None:
        """So many replicas are left."""
        if count == 0 and step:
            return (
                f"All agents were lost after step {step} ({reason}), and with them the state. Start the run again "
                "under its name: it goes on from its last checkpoint (see TrainConfig(checkpoint_every=…)). Allow more "
                "agents, or keep some of them on machines that stay."
            )
        if count < self._minimum:
            self._undisturbed_until = 0.0
        if count >= self._minimum or self._below:
            return None
        self._below = True
        self._falls += 1
        if self._max_failures < 0 or self._falls <= self._max_failures:
            return None
        return (
            f"After step {step}: {reason}, and {count} of at least {self._minimum} replicas are left, for the "
            f"{self._falls}. time; FailureConfig(max_failures={self._max_failures}) ends the run there. Raise it (-1: "
            "no limit) to have the others wait for replacements, or lower the minimum."
        )

    @property
    def spare(self) -> int:
        """How often there may still be too few; below 0: any number of times."""
        return self._max_failures if self._max_failures < 0 else self._max_failures - self._falls

    @property
    def left_to_fail(self) -> int | None:
        """How often there may be too few from now on, if they are once more; None: they may not."""
        if self._max_failures < 0:
            return self._max_failures
        spare = self._max_failures - self._falls - (not self._below)
        return spare if spare >= 0 else None

    def formed(self, count: int) -> None:
        """So many replicas take part in a new generation."""
        self._below = count < self._minimum

    def go_on(self, now: float) -> None:
        """Those who are left go on by themselves; there are enough of them.

        Whatever starts on their machines now takes cores from the step that everybody waits for: to import torch alone
        takes 2 to 3 seconds of a core. So newcomers are asked for after that step, or when it takes long.
        """
        self._undisturbed_until = now + _UNDISTURBED_S

    def false_start(self, what: str, count: int, now: float) -> str | None:
        """A newcomer was lost before it had committed a step, while there were ``count`` others."""
        self._false_starts += 1
        self._not_before = now + backoff(self._false_starts)
        if self._false_starts < _MOST_FALSE_STARTS or count >= self._minimum:
            return None
        return f"{self._false_starts} agents in a row did not come to train. The last: {what}"

    @property
    def careful(self) -> bool:
        """Whether newcomers are lost one after the other."""
        return self._false_starts > 1

    def wait_s(self, now: float) -> float:
        """Seconds until the next newcomer should be asked for."""
        return max(0.0, max(self._not_before, self._undisturbed_until) - now)

    def hung(self, step: int, who: str, how: str) -> str | None:
        """An agent was given up because it hung in a step."""
        self._hangs[step] += 1
        if self._hangs[step] < _MOST_HANGS:
            return None
        return (
            f"Step {step} hung on {_MOST_HANGS} agents in a row; the last one, {who}, {how}. It is likely the job "
            "itself that waits for ever there. If it only takes long, raise Trainer(patience=Patience(idle_s=…, "
            "busy_s=…))."
        )

    def accuse(self, replica: str) -> None:
        """Somebody lost the connection to this replica."""
        self._accused[replica] += 1

    def broke(self, members: Mapping[str, bool]) -> str | None:
        """A connection broke, for no known reason. Returns who must go, if anybody.

        A newcomer rather than one that has proven itself, then the most accused, then the newest; never the last one
        that has proven itself, for it alone holds the state.

        Args:
            members: whether each has proven itself, in the order in which they joined.
        """
        self._breaks += 1
        places = {name: place for place, name in enumerate(members)}
        last = [name for name in members if sum(members.values()) > 1 or not members[name]]
        if self._breaks < _MOST_BREAKS or not last:
            return None
        return max(last, key=lambda name: (not members[name], self._accused[name], places[name]))

    def committed(self, proven: bool, newest: bool = True) -> None:
        """A step was committed.

        Args:
            proven: whether it is the first one of a newcomer.
            newest: whether the newest generation has committed it.
        """
        self._breaks, self._accused = 0, Counter()
        if newest:
            self._undisturbed_until = 0.0
        if proven:
            self._false_starts, self._not_before = 0, 0.0


def backoff(losses: int) -> float:
    """Seconds until the next newcomer is asked for, after so many in a row were lost: 0, 1, 2, 4 … 60."""
    return 0.0 if losses < 2 else min(_WAIT_MAX_S, 2.0 ** (losses - 2))
