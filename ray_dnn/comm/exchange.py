"""The sum over virtual workers along the fixed tree, whatever agent computed what.

Theory of operation
-------------------
Each replica has folded the subtrees its range covers. The vector is cut into buckets, each bucket into one slice a
replica. In the first phase every replica gives each other one its header and that one's slices of each of its subtrees;
then each folds the rest of the tree for its own slices. In the second phase the finished slices are gathered. At the
end everybody tells everybody that it is ready, so whoever has completed the exchange knows that everybody else has
completed the first phase. With ranges that align with the tree the bytes moved are those of an all-reduce. Only plain
additions happen, always with the same operands: equal bits.

What is given to a peer is sent, or lies where the peer reads it (`ray_dnn.comm.shared`): then only the place is sent.

Nothing waits for the whole. A bucket leaves as soon as it is ready (`Combination.ready`), from the last bucket to the
first, which is the order in which backward computes gradients. It is folded as soon as everybody's slices of it are
there, and gathered as soon as it is folded. Whoever computes hands what is ready to the kernel and computes on; there
is no thread that would compete for the core.

A vector is a list of lanes, one a dtype: flat tensors of float32 and float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ray_dnn.comm.buckets import CHUNK, additions
from ray_dnn.comm.combination import Between, Combination, Vector, nothing
from ray_dnn.comm.mesh import Mesh
from ray_dnn.comm.shared import Links
from ray_dnn.marks import Marks
from ray_dnn.plan import Plan
from ray_dnn.tree import Node

__all__ = ["Between", "Combination", "TreeExchange", "Vector"]


class TreeExchange:
    """Combines the vectors of one plan over one mesh (one member a replica)."""

    def __init__(self, mesh: Mesh, plan: Plan, marks: Marks | None = None, links: Links | None = None):
        self.mesh = mesh
        self.plan = plan
        self.marks = marks or Marks()
        self.links = links or Links(mesh)
        self.covers = [plan.cover(r) for r in range(plan.replicas)]
        self._scratch: dict[tuple[int, Node, int, torch.dtype], torch.Tensor] = {}  # received slices
        self.additions = additions(Node(0, plan.workers), [node for cover in self.covers for node in cover])
        self._sums: dict[torch.dtype, list[torch.Tensor]] = {}  # where chunks are added up

    def begin(self, out: Vector, header_sizes: Sequence[int], apart: bool = False) -> Combination:
        """Begin to sum over the whole tree.

        Args:
            out: the vector that the sum will be written to. Same lanes as the others.
            header_sizes: the lengths of everybody's headers, by replica.
            apart: whether something else will go over the mesh between the two phases.
        """
        return Combination(self, out, header_sizes, apart)

    def combine(
        self,
        header: bytes,
        header_sizes: Sequence[int],
        folded: Mapping[Node, Vector],
        out: Vector,
        between: Between = nothing,
    ) -> list[bytes]:
        """Sum over the whole tree what is there already. See `begin` and `Combination.finish`."""
        return self.begin(out, header_sizes).finish(header, folded, between)

    def scratch(self, peer: int, node: Node, bucket: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for what a peer sends. The same for the same arguments."""
        key = (peer, node, bucket, dtype)
        have = self._scratch.get(key)
        if have is None or len(have) < length:
            have = self._scratch[key] = torch.empty(length, dtype=dtype)
        return have[:length]

    def sums(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Memory for the sums of one chunk but the result."""
        if dtype not in self._sums:
            sums = {into for _, _, into in self.additions}
            self._sums[dtype] = [torch.empty(CHUNK, dtype=dtype) for _ in range(len(sums) - 1)]
        return self._sums[dtype]
