"""Asking Ray for places and starting agents in them."""

from __future__ import annotations

import functools
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_dnn.agent import Agent, Striker
from ray_dnn.placement import Wish, matches

# How the names of placement groups begin, for other runs to see: without the one a run cannot start.
_MINIMUM, _GROWTH = "ray_dnn minimum", "ray_dnn growth"
_THREADS = 16  # of an actor: some wait in live(), run() and taken() or write, the others pass messages
_actor = functools.cache(ray.remote)  # of a class: Ray would export each to the cluster, and keep it there


@dataclass(frozen=True)
class Places:
    """What one agent needs, and how places are chosen.

    Attributes:
        resources: of one agent, as in Ray's bundles.
        strategy: how places lie to each other.
        labels: a selector for every agent, or one for each: the first, the second …
        runtime_env: of the agents' processes.
        faults: that are to strike them (see `ray_dnn.testing`).
    """

    resources: dict[str, float]
    strategy: str
    labels: Mapping[str, str] | Sequence[Mapping[str, str]]
    runtime_env: dict[str, Any]
    faults: Striker | None = None

    @property
    def slots(self) -> int:
        """Agents that differ in what they need; 0: none do."""
        return 0 if isinstance(self.labels, Mapping) else len(self.labels)

    def selector(self, slot: int) -> Mapping[str, str]:
        """Labels that one agent's node must have."""
        return self.labels if isinstance(self.labels, Mapping) else self.labels[slot]


class Gang:
    """Places for several agents, given all together or not at all.

    Attributes:
        wish: on which nodes.
        minimum: whether the run cannot start without them; other runs can see that (`waiting_minimums`).
    """

    def __init__(self, places: Places, slots: Sequence[int], wish: Wish, minimum: bool = False):
        """``slots``: of the agents, see `Places.selector`."""
        self._places, self.wish, self.minimum = places, wish, minimum
        self.size = len(slots)
        selectors = [wish.selector(places.selector(slot)) for slot in slots]
        self._group: PlacementGroup = placement_group(
            [dict(places.resources)] * self.size,
            strategy=places.strategy,
            name=f"{_MINIMUM if minimum else _GROWTH} {secrets.token_hex(8)}",  # Ray wants each to be another one
            bundle_label_selector=selectors if any(selectors) else None,
        )
        self.ready = self._group.ready()  # a reference that resolves when the places are there

    def start(self, names: dict[int, str]) -> list[Any]:
        """Start agents in places, by index. Returns actor handles; the actors may still be starting."""
        resources = dict(self._places.resources)
        options: dict[str, Any] = {
            "num_cpus": resources.pop("CPU", 0),
            "num_gpus": resources.pop("GPU", 0),
            "memory": resources.pop("memory", None),
            "resources": resources,
            "max_concurrency": _THREADS,
            "max_restarts": 0,
            "runtime_env": self._places.runtime_env,
        }
        actor = _actor(Agent)
        return [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
                **options,
            ).remote(name, self._places.faults)
            for index, name in names.items()
        ]

    def nodes(self) -> dict[int, str]:
        """The nodes that places are on, by index, as far as they are on any."""
        found = placement_group_table(self._group)["bundles_to_node_id"]
        return {index: node for index, node in found.items() if node}

    def give_back(self) -> None:
        """Give the places back to the cluster; agents in them are killed."""
        remove_placement_group(self._group)


def room() -> str:
    """What the cluster has free, in words."""
    free, total = ray.available_resources(), ray.cluster_resources()
    shown = [key for key in ("CPU", "GPU") if total.get(key)]
    return ", ".join(f"{free.get(key, 0):g} of {total[key]:g} {key} free" for key in shown) or "no CPUs"


def free() -> dict[str, float]:
    """What the cluster has free."""
    resources: dict[str, float] = ray.available_resources()
    return resources


def waiting_minimums() -> dict[str, dict[str, float]]:
    """What runs need in all that cannot start, for the cluster has not enough free; by placement group."""
    waiting = {}
    for group, about in placement_group_table().items():
        pending = about["state"] == "PENDING" and about["stats"]["scheduling_state"] != "INFEASIBLE"
        if pending and about["name"].startswith(_MINIMUM):
            needs = waiting[group] = Counter[str]()
            for bundle in about["bundles"].values():
                needs.update(bundle)
    return {group: dict(needs) for group, needs in waiting.items()}


def nodes_with_room(places: Places, slots: Sequence[int]) -> set[str]:
    """The nodes that could take one of these agents now."""
    left = ray._private.state.available_resources_per_node()
    wanted = [places.selector(slot) for slot in slots]
    return {
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
        and any(matches(node["Labels"], selector) for selector in wanted)
        and all(left.get(node["NodeID"], {}).get(key, 0) >= amount for key, amount in places.resources.items())
    }


def alive_nodes() -> set[str]:
    """The nodes that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def draining_nodes() -> dict[str, float | None]:
    """The nodes that are going to end, with the time when they do, in seconds since the epoch; None: it is not known.

    Not a public interface of Ray: the one that Ray Train looks at.
    """
    deadlines: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 if deadline else None for node, deadline in deadlines.items()}
