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

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ray_dnn.comm.mesh import Mesh, Transfer
from ray_dnn.comm.shared import Links
from ray_dnn.marks import Marks
from ray_dnn.phases import Phase
from ray_dnn.plan import Plan
from ray_dnn.tree import Node

Vector = list[torch.Tensor]
Between = Callable[[list[bytes]], None]

_ALIGN = 16  # slices start at multiples of so many elements: 64 bytes in float32
_SMALLEST, _LARGEST = 2**18, 2**22  # elements of a bucket; a vector is cut into about eight
_CHUNK = 2**15  # elements that are folded at once, so that sums in between stay in the cache
_READY = struct.Struct("?")  # whether all of one's slices are finite


class Bucket(NamedTuple):
    """A stretch of a lane. Replica ``r`` folds the slice ``bounds[r] .. bounds[r + 1]``."""

    lane: int
    bounds: tuple[int, ...]


def slice_bounds(length: int, parts: int) -> list[int]:
    """Where the slices of a stretch begin and end: ``parts + 1`` offsets, aligned, as even as alignment allows."""
    blocks = -(-length // _ALIGN)
    return [min(length, (blocks * p // parts) * _ALIGN) for p in range(parts)] + [length]


def cut(lengths: Sequence[int], parts: int) -> list[Bucket]:
    """The buckets of lanes of these lengths, in the order in which they leave: from the end to the start."""
    buckets = []
    for lane, length in enumerate(lengths):
        size = max(_SMALLEST, min(_LARGEST, -(-length // 8 // _ALIGN) * _ALIGN))
        for start in range(0, length, size):
            bounds = slice_bounds(min(size, length - start), parts)
            buckets.append(Bucket(lane, tuple(start + bound for bound in bounds)))
    return buckets[::-1]


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().numpy().data


def _nothing(headers: list[bytes]) -> None:
    pass


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
        between: Between = _nothing,
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
            self._sums[dtype] = [torch.empty(_CHUNK, dtype=dtype) for _ in range(len(sums) - 1)]
        return self._sums[dtype]


def additions(root: Node, known: Sequence[Node]) -> list[tuple[int, int, int]]:
    """How the values of some nodes add up to that of the root: ``(left, right, into)``, in order.

    Operands are numbered: first the known nodes as they come, behind them the sums, of which the first is the result.
    A sum's memory is used again when it has been added to another.
    """
    found: list[tuple[int, int, int]] = []

    def add_up(node: Node, into: int) -> int:
        if node in known:
            return known.index(node)
        left, right = node.children()
        one = add_up(left, into)
        other = add_up(right, into + 1)
        found.append((one, other, into))
        return into

    add_up(root, len(known))
    return found


class Combination:
    """One sum over the tree, from the first bucket that is ready to the end.

    Attributes:
        finite: whether the sum is finite in every element. Known when `finish` returns.
    """

    def __init__(self, exchange: TreeExchange, out: Vector, header_sizes: Sequence[int], apart: bool):
        mesh, links, covers = exchange.mesh, exchange.links, exchange.covers
        self._exchange, self._out = exchange, out
        self._apart = apart or mesh.checked  # checksums end a transfer
        self._rank = mesh.rank
        self._buckets = cut([len(lane) for lane in out], mesh.size)
        self._senders = [peer for peer in mesh.peers if peer not in links.reads]
        self._receivers = [peer for peer in mesh.peers if peer not in links.read_by]
        self._places = struct.Struct(f"!{len(out)}q")  # of the lanes of one vector in shared memory
        self._heads = {
            peer: bytearray(len(covers[peer]) * self._places.size + header_sizes[peer]) for peer in mesh.peers
        }
        self._missing = [  # by bucket: what has not arrived of everybody's slices
            sum(len(covers[peer]) if peer in self._senders else 1 for peer in mesh.peers) for _ in self._buckets
        ]
        self._own: Mapping[Node, Vector] | None = None  # until `finish`
        self._folded: set[int] = set()  # buckets
        self._lengths = {node: [b.bounds[-1] - b.bounds[0] for b in self._buckets] for node in covers[self._rank]}
        self._queue = [(node, index) for node in covers[self._rank] for index in range(len(self._buckets))]
        self._sent = 0  # of the queue
        self.finite = True
        receives = {peer: self._expected(peer) for peer in mesh.peers}
        self._transfer: Transfer = mesh.begin(receives, self._received)

    def _expected(self, peer: int) -> list[memoryview]:
        """What comes from a peer in the first transfer: slices of its subtrees, its header, finished slices."""
        expected = []
        if peer in self._senders:
            expected += [view_bytes(self._part(peer, n, i)) for n, i in self._indexed(peer)]
        expected.append(memoryview(self._heads[peer]))
        if peer in self._senders and not self._apart:
            expected += self._finished(peer)
        return expected

    def _indexed(self, peer: int) -> list[tuple[Node, int]]:
        return [(node, index) for node in self._exchange.covers[peer] for index in range(len(self._buckets))]

    def _part(self, peer: int, node: Node, index: int) -> torch.Tensor:
        """Where a peer's part of this member's slice of a bucket arrives."""
        lane, bounds = self._buckets[index]
        length = bounds[self._rank + 1] - bounds[self._rank]
        return self._exchange.scratch(peer, node, index, length, self._out[lane].dtype)

    def _finished(self, rank: int) -> list[memoryview]:
        """The memory of a member's slices of the result, in the order in which they are sent."""
        return [view_bytes(self._out[lane][bounds[rank] : bounds[rank + 1]]) for lane, bounds in self._buckets]

    # -- as it becomes ready -------------------------------------------------------------------------------------------

    @property
    def early(self) -> bool:
        """Whether `ready` is of any use: whether there is anybody to send to."""
        return bool(self._receivers)

    def ready(self, node: Node, vector: Vector, lane: int, start: int, stop: int) -> None:
        """These elements of a subtree's vector will not change any more. They leave when their bucket is ready."""
        lengths = self._lengths[node]
        for index, (its_lane, bounds) in enumerate(self._buckets):
            if its_lane == lane:
                lengths[index] -= max(0, min(stop, bounds[-1]) - max(start, bounds[0]))
        before = self._sent
        while self._sent < len(self._queue):
            head, index = self._queue[self._sent]
            if head != node or lengths[index]:
                break
            self._send(vector, index)
        if self._sent > before or self._transfer.unsent:
            self._transfer.pump()

    def _send(self, vector: Vector, index: int) -> None:
        lane, bounds = self._buckets[index]
        for peer in self._receivers:
            self._transfer.send(peer, [view_bytes(vector[lane][bounds[peer] : bounds[peer + 1]])])
        self._sent += 1

    # -- when all is ready ---------------------------------------------------------------------------------------------

    def finish(
        self,
        header: bytes,
        folded: Mapping[Node, Vector],
        between: Between = _nothing,
    ) -> list[bytes]:
        """Sum over the whole tree.

        Args:
            header: small bytes that everybody gets from everybody.
            folded: this replica's covering nodes and their vectors. Left unchanged, and to be left unchanged until
                this returns.
            between: called with the headers between the two phases. Whoever completes the exchange knows that this
                call has returned on every member.

        Returns:
            The headers, by replica.
        """
        exchange, mesh = self._exchange, self._exchange.mesh
        marks, links = exchange.marks, exchange.links
        marks.enter(Phase.EXCHANGE_FIRST)
        self._own = folded
        while self._sent < len(self._queue):
            node, index = self._queue[self._sent]
            self._send(folded[node], index)
        places = b"".join(self._places.pack(*map(links.descriptor, folded[n])) for n in exchange.covers[self._rank])
        for peer in mesh.peers:
            self._transfer.send(peer, [memoryview(places + header)])
        self._transfer.push()
        for index, missing in enumerate(self._missing):
            if not missing and index not in self._folded:
                self._fold(index)
        self._transfer.finish()
        everyone = [
            header if r == self._rank else bytes(self._heads[r][len(exchange.covers[r]) * self._places.size :])
            for r in range(mesh.size)
        ]
        between(everyone)
        marks.enter(Phase.EXCHANGE_MIDDLE)
        self._gather()
        return everyone

    def _received(self, peer: int, index: int) -> None:
        """Something of the first transfer is here; fold what can be folded."""
        if peer in self._senders:
            parts = len(self._exchange.covers[peer]) * len(self._buckets)
            if index < parts:
                self._arrived(index % len(self._buckets))
        elif index == 0:
            for bucket in range(len(self._buckets)):
                self._arrived(bucket)

    def _arrived(self, index: int) -> None:
        self._missing[index] -= 1
        if not self._missing[index] and self._own is not None:
            self._fold(index)

    def _fold(self, index: int) -> None:
        """Fold the tree above the covers for this member's slice of a bucket, and send the result."""
        self._folded.add(index)
        lane, bounds = self._buckets[index]
        start, stop = bounds[self._rank], bounds[self._rank + 1]
        target = self._out[lane][start:stop]
        values = self._values(index, start, stop) if start < stop else []
        total = 0.0
        for at in range(0, stop - start, _CHUNK):
            chunk = target[at : at + _CHUNK]
            self._fold_chunk([value[at : at + _CHUNK] for value in values], chunk)
            total += float(chunk.sum())
        # A finite total proves that all elements are; else each is looked at.
        self.finite = self.finite and (math.isfinite(total) or bool(target.isfinite().all()))
        if not self._apart:
            for peer in self._receivers:
                self._transfer.send(peer, [view_bytes(target)])

    def _values(self, index: int, start: int, stop: int) -> list[torch.Tensor]:
        """Everybody's subtrees, for this member's slice of a bucket."""
        lane = self._buckets[index].lane
        links, values = self._exchange.links, []
        assert self._own is not None
        for replica, nodes in enumerate(self._exchange.covers):
            for number, node in enumerate(nodes):
                if replica == self._rank:
                    values.append(self._own[node][lane][start:stop])
                elif replica in links.reads:
                    place = self._places.unpack_from(self._heads[replica], number * self._places.size)[lane]
                    values.append(links.view(replica, place, self._out[lane].dtype)[start:stop])
                else:
                    values.append(self._part(replica, node, index))
        return values

    def _fold_chunk(self, values: list[torch.Tensor], target: torch.Tensor) -> None:
        if len(values) == 1:  # this replica hosts everything
            target.copy_(values[0])
            return
        between = [memory[: len(target)] for memory in self._exchange.sums(target.dtype)]
        operands = [*values, target, *between]
        for left, right, into in self._exchange.additions:
            torch.add(operands[left], operands[right], out=operands[into])

    def _gather(self) -> None:
        """Get what the others folded, and tell them that this member is ready."""
        mesh, links, marks = self._exchange.mesh, self._exchange.links, self._exchange.marks
        ready = self._places.pack(*map(links.descriptor, self._out)) + _READY.pack(self.finite)
        told = {peer: bytearray(len(ready)) for peer in mesh.peers}
        missing = len(told)

        def received(peer: int, index: int) -> None:
            nonlocal missing
            if index < len(receives[peer]) - 1:
                return
            self._take(peer, told[peer])
            missing -= 1
            if not missing:
                marks.enter(Phase.EXCHANGE_LAST)

        slices = self._finished(self._rank) if self._apart else []
        sends = {p: [*(slices if p in self._receivers else []), memoryview(ready)] for p in mesh.peers}
        receives = {
            p: [*(self._finished(p) if self._apart and p in self._senders else []), memoryview(told[p])]
            for p in mesh.peers
        }
        mesh.exchange(sends, receives, received)

    def _take(self, peer: int, told: bytearray) -> None:
        """A peer is ready: read its slices where it was not to send them."""
        self.finite = self.finite and _READY.unpack_from(told, self._places.size)[0]
        if peer not in self._exchange.links.reads:
            return
        places = self._places.unpack_from(told)
        for lane, bounds in self._buckets:
            theirs = self._exchange.links.view(peer, places[lane], self._out[lane].dtype)
            start, stop = bounds[peer], bounds[peer + 1]
            self._out[lane][start:stop].copy_(theirs[start:stop])
