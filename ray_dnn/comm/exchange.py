"""The sum over virtual workers along the fixed tree, whatever agent computed what.

Each replica has folded the subtrees its range covers. The vector is cut into one slice a replica. In the first phase
every replica sends to each other one its header and that one's slice of each of its subtrees; then each folds the rest
of the tree for its own slice. In the second phase the finished slices are gathered, each behind one byte more, so that
whoever has completed the exchange knows that everybody else has completed the first phase. With ranges that align with
the tree the bytes moved are those of an all-reduce. Only plain additions happen, always with the same operands: equal
bits.

A vector is a list of lanes, one a dtype: flat tensors of float32 and float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ray_dnn.comm.mesh import Mesh
from ray_dnn.marks import Marks
from ray_dnn.phases import Phase
from ray_dnn.plan import Plan
from ray_dnn.tree import Node, fold

Vector = list[torch.Tensor]

_SLICE_ELEMENTS = 16  # slices start at multiples of this: 64 bytes in float32


def slice_bounds(length: int, parts: int) -> list[int]:
    """Where the slices of a lane begin and end: ``parts + 1`` offsets, aligned, as even as alignment allows."""
    blocks = -(-length // _SLICE_ELEMENTS)
    return [min(length, (blocks * p // parts) * _SLICE_ELEMENTS) for p in range(parts)] + [length]


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().numpy().data


def _ready() -> memoryview:
    return memoryview(bytearray(1))


class TreeExchange:
    """Combines the vectors of one plan over one mesh (one member a replica)."""

    def __init__(self, mesh: Mesh, plan: Plan, marks: Marks | None = None):
        self._mesh = mesh
        self._plan = plan
        self._marks = marks or Marks()
        self._covers = [plan.cover(r) for r in range(plan.replicas)]
        self._scratch: dict[tuple[int, Node, int], torch.Tensor] = {}  # receive buffers by (peer, node, lane)

    def combine(
        self,
        header: bytes,
        header_sizes: Sequence[int],
        folded: Mapping[Node, Vector],
        out: Vector,
        between: Callable[[list[bytes]], None] = lambda headers: None,
    ) -> list[bytes]:
        """Sum over the whole tree.

        Args:
            header: small bytes that everybody gets from everybody.
            header_sizes: the lengths of everybody's headers, by replica.
            folded: this replica's covering nodes and their vectors. Left unchanged.
            out: the vector that the sum is written to. Same lanes as the others.
            between: called with the headers between the two phases. Whoever completes the exchange knows that this
                call has returned on every member.

        Returns:
            The headers, by replica.
        """
        rank, mesh = self._mesh.rank, self._mesh
        self._marks.enter(Phase.EXCHANGE_FIRST)
        bounds = [slice_bounds(len(lane), mesh.size) for lane in out]
        headers = {peer: bytearray(header_sizes[peer]) for peer in mesh.peers}
        sends, receives = {}, {}
        for peer in mesh.peers:
            sends[peer] = [memoryview(header)] + [
                view_bytes(lane[b[peer] : b[peer + 1]])
                for node in self._covers[rank]
                for lane, b in zip(folded[node], bounds, strict=True)
            ]
            receives[peer] = [memoryview(headers[peer])] + [
                view_bytes(self._received(peer, node, lane, b[rank + 1] - b[rank], out[lane].dtype))
                for node in self._covers[peer]
                for lane, b in enumerate(bounds)
            ]
        mesh.exchange(sends, receives)
        for lane, b in enumerate(bounds):
            self._fold_slice(lane, folded, out[lane], b[rank], b[rank + 1])
        everyone = [header if r == rank else bytes(headers[r]) for r in range(mesh.size)]
        between(everyone)
        self._marks.enter(Phase.EXCHANGE_MIDDLE)
        slices = [
            [_ready()] + [view_bytes(lane[b[r] : b[r + 1]]) for lane, b in zip(out, bounds, strict=True)]
            for r in range(mesh.size)
        ]
        missing = sum(len(slices[peer]) for peer in mesh.peers)

        def received(peer: int, index: int) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                self._marks.enter(Phase.EXCHANGE_LAST)

        mesh.exchange(dict.fromkeys(mesh.peers, slices[rank]), {peer: slices[peer] for peer in mesh.peers}, received)
        return everyone

    def _received(self, peer: int, node: Node, lane: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        key = (peer, node, lane)
        have = self._scratch.get(key)
        if have is None or have.dtype != dtype or len(have) < length:
            have = self._scratch[key] = torch.empty(length, dtype=dtype)
        return have[:length]

    def _fold_slice(self, lane: int, folded: Mapping[Node, Vector], out: torch.Tensor, start: int, stop: int) -> None:
        """Fold the tree above the covers for one slice. Sums go to receive buffers, the last one to ``out``."""
        if start == stop:
            return
        rank = self._mesh.rank
        target = out[start:stop]
        values: dict[Node, torch.Tensor] = {}
        for replica, nodes in enumerate(self._covers):
            for node in nodes:
                values[node] = (
                    folded[node][lane][start:stop]
                    if replica == rank
                    else self._scratch[(replica, node, lane)][: stop - start]
                )
        own = {value.data_ptr() for node, value in values.items() if node in self._covers[rank]}

        def add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            # Two subtrees of one replica are never siblings (they would be one cover), so one side is scratch.
            return torch.add(left, right, out=right if left.data_ptr() in own else left)

        root = Node(0, self._plan.workers)
        if root in values:  # this replica hosts everything
            target.copy_(values[root])
            return
        left, right = (fold(child, values.get, add) for child in root.children())
        torch.add(left, right, out=target)
