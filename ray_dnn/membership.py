"""Who should take part: pure decisions from what was observed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_dnn.events import in_words

Resources = Mapping[str, float]  # amounts by name, as Ray has them

_MOST_STARTING = 8  # at a time, or as many as there are members: the cluster may never have room for more


@dataclass(frozen=True)
class View:
    """What the driver sees. A replica is one agent, or the agents that together hold one.

    Attributes:
        minimum, maximum: replicas that the user allows.
        workers: virtual workers; more replicas than these would have nothing to do.
        target: replicas that the user asked for at last (`resize`), or the maximum.
        members: of the present generation, in the order in which they joined. Empty before the first one.
        ready: built and admitted, waiting for a step boundary, in the order in which they became ready.
        starting: asked for and not ready yet.
        leaving: members that must go, for their nodes end.
        expiring: members that should be replaced, for their nodes are going to end; they stay until then.
        slow: members that the others are better off without: they go if enough are left, else they are replaced.
        one_by_one: whether no two may leave at once.
        careful: whether newcomers are lost in a row, so that one is tried at a time.
    """

    minimum: int
    maximum: int
    workers: int
    target: int
    members: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()
    starting: int = 0
    leaving: frozenset[str] = frozenset()
    expiring: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()
    one_by_one: bool = False
    careful: bool = False

    @property
    def wanted(self) -> int:
        """Replicas that there should be."""
        return max(self.minimum, min(self.target, self.maximum, self.workers))


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        members: that the next generation should have, or None: too few to form one.
        joining, leaving: how they differ from the present ones.
        ask: replicas to ask the cluster for.
        withdraw: starting replicas that are not wanted any more.
        dismiss: ready replicas that are not wanted any more.
        reason: in plain words.
        stop: whether members must leave, and nobody can go on without them: the state should be written, and wait.
    """

    members: tuple[str, ...] | None
    joining: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    ask: int = 0
    withdraw: int = 0
    dismiss: tuple[str, ...] = ()
    reason: str = ""
    stop: bool = False

    @property
    def changed(self) -> bool:
        """Whether there should be a new generation."""
        return bool(self.joining or self.leaving)


def decide(view: View) -> Decision:
    """The next generation's members and what to ask the cluster for.

    Members stay unless they must leave, newcomers take the places of those that expire, or there are more than wanted
    (then the newest go). Newcomers join in the order in which they became ready. A generation below the minimum is
    never formed, nor one of newcomers alone: somebody must hold the state.
    """
    view = _without_slow(view)
    ending = view.leaving | view.expiring
    lasting = [m for m in view.members if m not in ending]
    places = max(0, view.wanted - len(lasting))  # for newcomers first, then for members that expire
    lacking = places - len(view.ready) - view.starting
    most_starting = 1 if view.careful else max(_MOST_STARTING, len(view.members))
    ask, withdraw = max(0, min(lacking, most_starting - view.starting)), min(view.starting, max(0, -lacking))
    dismiss = view.ready[places:]
    going = set(_going(view, lasting, max(0, places - len(view.ready))))
    staying = [m for m in view.members if m not in going]
    # Whoever holds the state alone stays beside those who take it over.
    alone = bool(staying) and {*staying} <= ending
    most = min(view.workers, view.wanted + 1) if alone else view.wanted
    joining = view.ready[: max(0, min(places, most - len(staying)))]
    members = (*staying, *joining)
    there = len({*view.members, *view.ready} - view.leaving)
    stuck = not going and not joining and {*members} <= view.leaving  # there can be one member only
    stop = bool(view.leaving) and (there < view.minimum or stuck)
    if stop or len(members) < view.minimum:
        reason = f"{there} of at least {view.minimum} replicas are there, {view.starting + ask} are starting"
        return Decision(None, (), (), ask, withdraw, dismiss, reason, stop)
    leaving = tuple(m for m in view.members if m in going)
    words = [f"{in_words(joining)} joining"] if joining and view.members else []
    words += [f"{in_words(leaving)} leaving"] if leaving else []
    first = f"the first {len(members)} are ready"
    reason = " and ".join(words) or ("nothing changed" if view.members else first)
    return Decision(members, joining, leaving, ask, withdraw, dismiss, reason)


def _without_slow(view: View) -> View:
    """Slow members as such that must leave, or where too few would be left as such that should be replaced."""
    staying = {*view.members} - view.leaving - view.slow
    if staying and len(staying) + len(view.ready) >= view.minimum:
        return replace(view, leaving=view.leaving | view.slow)
    return replace(view, expiring=view.expiring | view.slow)


def _going(view: View, lasting: list[str], spare: int) -> list[str]:
    """Members that leave, in the order in which they do. ``spare``: places for members that expire."""
    expiring = [m for m in view.members if m in view.expiring and m not in view.leaving]
    going = [m for m in view.members if m in view.leaving]
    going += [*expiring[spare:], *reversed(lasting[view.wanted :])]
    if view.one_by_one:
        going = going[:1]
    everybody = len(going) == len(view.members)
    return going[:-1] if everybody and view.ready else going  # one stays until others have the state


def to_give_up(needs: Resources, free: Resources, each: Resources, surplus: int) -> int:
    """How many of ``surplus`` replicas to give up so that a run can start; 0 where that would not help.

    Args:
        needs: of that run.
        free: in the cluster. Where that is enough and the run waits all the same, it lies scattered: one more will do.
        each: what one replica holds.
    """
    lacking = {key: amount - free.get(key, 0.0) for key, amount in needs.items() if amount > free.get(key, 0.0)}
    if any(not each.get(key) for key in lacking):
        return 0
    count = max((math.ceil(amount / each[key] - 1e-9) for key, amount in lacking.items()), default=1)
    return count if count <= surplus else 0


class Script:
    """Sizes that tests ask for by step, exactly. Until a size is reached, nothing smaller goes on.

    Attributes:
        size: asked for now; None: there is no script.
        reached: whether there has been a generation of that size.
        coming: further sizes, by step.
    """

    def __init__(self, sizes: Mapping[int, int]):
        self.coming = dict(sorted(sizes.items()))
        self.size = self.coming.pop(0, None)
        self.reached = False

    def arrived(self, step: int) -> None:
        """The run has stopped before this step."""
        for due in [s for s in self.coming if s <= step]:
            self.size, self.reached = self.coming.pop(due), False

    def formed(self, count: int) -> None:
        """A generation of so many replicas begins."""
        self.reached = self.reached or count == self.size

    def limits(self, minimum: int, maximum: int, target: int) -> tuple[int, int, int]:
        """What the user allows and wants, as far as the script says nothing else."""
        if self.size is None:
            return minimum, maximum, target
        return (minimum if self.reached else self.size), self.size, self.size
