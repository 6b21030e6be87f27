"""The result of one phase's exchange: everything that an agent needs to commit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dnn.comm.exchange import Vector
from ray_dnn.engine.records import RecordFormat


@dataclass(frozen=True)
class Round:
    """The combined result of a phase.

    Attributes:
        phase: whose it is.
        records: of all virtual workers.
        weight: the sum of theirs.
        held: the newest decision that every replica held.
        seconds: computed by each replica, for its virtual workers (``hosted``).
        members: names of the replicas' agents at this rank.
        generation: that made it.
        vector: the combined contributions.
        finite: whether they are finite in every element.
        floats: names of the float buffers that changed; the sums of their changes are in ``buffer_sums``.
        values: new values of the other buffers that changed.
    """

    phase: str
    records: NDArray[np.void]
    weight: float
    held: int
    seconds: list[float]
    hosted: list[int]
    members: tuple[str, ...]
    generation: int
    vector: Vector
    finite: bool
    floats: set[str]
    buffer_sums: Vector
    values: dict[str, torch.Tensor]

    def host(self, worker: int) -> str:
        """The agent that computed a virtual worker's contribution, by name."""
        return self.members[int(np.searchsorted(np.cumsum(self.hosted), worker, side="right"))]

    def to_tree(self) -> dict[str, Any]:
        """The result as a tree that can be encoded."""
        changed = {name: getattr(self, name) for name in _PLAIN}
        raw = torch.frombuffer(bytearray(self.records.tobytes()), dtype=torch.uint8)
        return changed | {"records": raw, "floats": sorted(self.floats)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], form: RecordFormat, vector: Vector) -> Round:
        """The result that `to_tree` was given. Its vector is copied to ``vector``, where it is not there already."""
        values = dict(tree)
        for mine, theirs in zip(vector, values["vector"], strict=True):
            if mine is not theirs:
                mine.copy_(theirs)
        records = np.frombuffer(values["records"].numpy().tobytes(), form.dtype)
        changed = {"records": records, "floats": set(values["floats"]), "vector": vector}
        return cls(**values | changed)


_PLAIN = (
    "phase",
    "weight",
    "held",
    "seconds",
    "hosted",
    "members",
    "generation",
    "vector",
    "finite",
    "buffer_sums",
    "values",
)
