"""Which newcomer follows which member, as the driver sees it (see `ray_dnn.engine.follow`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_dnn.events import AgentFollowed, EventLog
from ray_dnn.fleet import Replica
from ray_dnn.loop import Loop

_TRIES = 3  # members that a newcomer follows in vain, before it joins without


@dataclass(eq=False)
class _Following:
    """A newcomer that follows, from its first try until it is one no more.

    Attributes:
        leader: whom it follows now; None: nobody.
        done: whether it may join: it is close behind, or following is of no use.
        failures: so far.
    """

    leader: Replica | None = None
    done: bool = False
    failures: int = 0


class Followings:
    """Has newcomers follow members, one each, until they may join.

    Args:
        changed: called in the loop when a newcomer may join, or needs another member to follow.
    """

    def __init__(self, loop: Loop, log: EventLog, changed: Callable[[], None]):
        self._loop, self._log, self._changed = loop, log, changed
        self._all: dict[str, _Following] = {}  # by newcomer's name

    def may_join(self, newcomer: Replica) -> bool:
        """Whether the others would wait for it no longer than they must."""
        return newcomer.name in self._all and self._all[newcomer.name].done

    def look(self, newcomers: Sequence[Replica], members: Sequence[Replica]) -> None:
        """Have those follow who do not. ``members``: who can be followed now."""
        self._all = {replica.name: self._all.get(replica.name, _Following()) for replica in newcomers}
        there = set(members)
        idle = [r for r in newcomers if not self._all[r.name].done and self._all[r.name].leader not in there]
        # Each member leads one at a time: what it keeps for a follower takes memory. The newest ones may have to learn.
        taken = {following.leader for following in self._all.values()}
        free = [member for member in members if member not in taken and member.proven] if idle else []
        for newcomer in idle:
            self._start(newcomer, self._all[newcomer.name], free)

    def _start(self, newcomer: Replica, following: _Following, free: list[Replica]) -> None:
        """Have it follow one of those who are free, if there is any."""
        following.leader = leader = free.pop(following.failures % len(free)) if free else None
        if leader is None:
            return
        started = time.monotonic()

        def followed(reasons: list[str | None] | None, error: Exception | None) -> None:
            if self._all.get(newcomer.name) is not following or following.leader is not leader or error is not None:
                return  # it is over; of a death the fleet hears too
            reason = next((reason for reason in reasons or [] if reason is not None), None)
            following.failures += reason is not None
            following.done = reason is None or following.failures >= _TRIES
            if reason is not None:
                following.leader = None
            self._log.add(AgentFollowed(newcomer.name, leader.name, time.monotonic() - started, reason))
            self._changed()

        calls = [agent.follow.remote(leader.hello(rank).address) for rank, agent in enumerate(newcomer.agents)]
        self._loop.gather(calls, followed)
