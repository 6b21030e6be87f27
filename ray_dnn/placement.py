"""On which nodes newcomers should be, so that all agents of a run lie to each other as they should. Pure.

Agents that start together have their places from Ray, all at once, which keeps the strategy among them. Newcomers come
one by one: for them it is kept by naming the nodes that are meant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

NODE = "ray.io/node-id"  # a label that Ray gives every node


@dataclass(frozen=True)
class Wish:
    """Nodes for newcomers.

    Attributes:
        only: on one of these; None: on any.
        never: on none of these, where ``only`` is None.
        bad: nodes that none should be on, as was known then.
        must: whether nothing else will do; otherwise any node is better than none.
    """

    only: frozenset[str] | None = None
    never: frozenset[str] = frozenset()
    bad: frozenset[str] = frozenset()
    must: bool = False

    def selector(self, labels: Mapping[str, str]) -> dict[str, str]:
        """A selector for these labels on these nodes. One that names nodes itself stays as it is."""
        if self.only is not None:
            return {NODE: f"in({','.join(sorted(self.only))})"} | dict(labels)
        if self.never:
            return {NODE: f"!in({','.join(sorted(self.never))})"} | dict(labels)
        return dict(labels)


def wish(strategy: str, agents: Mapping[str, int], room: Collection[str], bad: Collection[str] = ()) -> Wish:
    """Where the next agents should be.

    Args:
        strategy: one of Ray's for placement groups.
        agents: how many there are already, by node.
        room: nodes that could take some now.
        bad: nodes that none should be on.
    """
    here, shunned = frozenset(node for node, count in agents.items() if count), frozenset(bad)
    good = frozenset(room) - shunned
    if strategy == "STRICT_PACK" and here:
        return Wish(only=here, bad=shunned, must=True)
    if strategy == "STRICT_SPREAD":
        return Wish(never=here | shunned, bad=shunned, must=True)
    if strategy == "SPREAD":
        least = min((agents.get(node, 0) for node in good), default=0)
        preferred = frozenset(node for node in good if agents.get(node, 0) == least)
    else:
        preferred = good & here
    return Wish(only=preferred if preferred != good and preferred else None, never=shunned, bad=shunned)


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is selected, as Ray has it: "a", "!a", "in(a,b)", "!in(a,b)"."""
    return all(_fits(labels.get(key), wanted) for key, wanted in selector.items())


def _fits(label: str | None, wanted: str) -> bool:
    refused = wanted.startswith("!")
    listed = re.fullmatch(r"in\((.*)\)", wanted.removeprefix("!"))
    values = [value.strip() for value in listed[1].split(",")] if listed else [wanted.removeprefix("!")]
    return (label in values) != refused


def free_slots(count: int, slots: int, used: Sequence[int]) -> list[int]:
    """Which of the numbered slots the next ones should take: those that nobody has, the lowest first.

    Where all are taken, for the time in which one that leaves and its successor are both there, the least taken.
    """
    taken = Counter(used)
    return sorted(range(slots), key=lambda slot: (taken[slot], slot))[:count]
