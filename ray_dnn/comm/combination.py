"""One sum over the tree, as it happens. `ray_dnn.comm.exchange` has the theory of operation."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ray_dnn.comm import buckets
from ray_dnn.comm.mesh import Transfer
from ray_dnn.phases import Phase
from ray_dnn.tree import Node

if TYPE_CHECKING:
    from ray_dnn.comm.exchange import TreeExchange

Vector = list[torch.Tensor]
Between = Callable[[list[bytes]], None]

_FINITE = struct.Struct("?")  # whether all of one's slices are finite


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().numpy().data


def nothing(headers: list[bytes]) -> None:
    """To be done between the phases."""


class Combination:
    """One sum over the tree, from the first bucket that is ready to the end.

    From every peer come, in this order: its parts (of each of its subtrees, for each bucket, the slice that this member
    folds), its head (places in shared memory, header), its finished slices, and its word that it is ready. Parts and
    slices are left out where this member reads them in the peer's memory.

    Attributes:
        finite: whether the sum is finite in every element. Known when `finish` returns.
        headers: of all members, by replica; one's own from `finish` on.
    """

    def __init__(self, exchange: TreeExchange, out: Vector, header_sizes: Sequence[int], apart: bool):
        mesh, links, covers = exchange.mesh, exchange.links, exchange.covers
        self._exchange, self._out, self._mesh, self._rank = exchange, out, mesh, mesh.rank
        self._apart = apart or mesh.checked  # checksums end a transfer
        self._buckets = buckets.cut([len(lane) for lane in out], mesh.size)
        self._senders = [peer for peer in mesh.peers if peer not in links.reads]
        self._receivers = [peer for peer in mesh.peers if peer not in links.read_by]
        self._places = struct.Struct(f"!{len(out)}q")  # of the lanes of one vector in shared memory
        self._heads = {p: bytearray(len(covers[p]) * self._places.size + header_sizes[p]) for p in mesh.peers}
        self._ready = {p: bytearray(self._places.size + _FINITE.size) for p in mesh.peers}
        self._missing = [  # by bucket: what has not arrived of everybody's slices
            sum(len(covers[p]) if p in self._senders else 1 for p in mesh.peers) for _ in self._buckets
        ]
        self._heads_left = self._ready_left = len(mesh.peers)  # to come
        self._folded: set[int] = set()  # buckets
        self._own: Mapping[Node, Vector] | None = None  # until `finish`
        self._lengths = {node: [b.bounds[-1] - b.bounds[0] for b in self._buckets] for node in covers[self._rank]}
        self._queue = [(node, index) for node in covers[self._rank] for index in range(len(self._buckets))]
        self._sent = 0  # of the queue
        self.finite = True
        self.headers = [b""] * mesh.size
        first = {p: [*self._parts_of(p), memoryview(self._heads[p])] for p in mesh.peers}
        second = {p: [*(self._slices(p) if p in self._senders else []), memoryview(self._ready[p])] for p in mesh.peers}
        self._heads_at = {p: len(buffers) - 1 for p, buffers in first.items()}
        self._ends_at = {p: len(first[p]) + len(second[p]) - 1 for p in mesh.peers}
        if not self._apart:
            first = {p: first[p] + second[p] for p in mesh.peers}
        self._transfer: Transfer = mesh.begin(first, self._received)
        self._second = second  # what the second transfer receives, where it is apart

    def _parts_of(self, peer: int) -> list[memoryview]:
        if peer not in self._senders:
            return []
        nodes = self._exchange.covers[peer]
        return [view_bytes(self._part(peer, node, i)) for node in nodes for i in range(len(self._buckets))]

    def _part(self, peer: int, node: Node, index: int) -> torch.Tensor:
        """Where a peer's part of this member's slice of a bucket arrives."""
        lane, bounds = self._buckets[index]
        length = bounds[self._rank + 1] - bounds[self._rank]
        return self._exchange.scratch(peer, node, index, length, self._out[lane].dtype)

    def _slices(self, rank: int) -> list[memoryview]:
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

    def finish(self, header: bytes, folded: Mapping[Node, Vector], between: Between = nothing) -> list[bytes]:
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
        covers, links = self._exchange.covers, self._exchange.links
        self._exchange.marks.enter(Phase.EXCHANGE_FIRST)
        self._own, self._between = folded, between
        while self._sent < len(self._queue):
            node, index = self._queue[self._sent]
            self._send(folded[node], index)
        places = b"".join(self._places.pack(*map(links.descriptor, folded[n])) for n in covers[self._rank])
        self.headers[self._rank] = header
        for peer in self._mesh.peers:
            self._transfer.send(peer, [memoryview(places + header)])
        self._transfer.push()
        for index, missing in enumerate(self._missing):
            if not missing and index not in self._folded:
                self._fold(index)
        if not self._apart:
            self._turn()
        self._transfer.finish()
        if self._apart:
            self._transfer = self._mesh.begin(self._second, self._received_apart)
            self._turn()
            self._transfer.finish()
        return self.headers

    def _received(self, peer: int, index: int) -> None:
        """Something has arrived; do what can be done with it."""
        head = self._heads_at[peer]
        if index < head:
            self._arrived(index % len(self._buckets))
        elif index == head:
            self.headers[peer] = bytes(self._heads[peer][len(self._exchange.covers[peer]) * self._places.size :])
            self._heads_left -= 1
            for bucket in range(len(self._buckets)) if peer not in self._senders else ():
                self._arrived(bucket)
        elif index == self._ends_at[peer]:
            self._take(peer)
        if index <= head and not self._apart:
            self._turn()

    def _received_apart(self, peer: int, index: int) -> None:
        self._received(peer, self._heads_at[peer] + 1 + index)

    def _arrived(self, index: int) -> None:
        self._missing[index] -= 1
        if not self._missing[index] and self._own is not None:
            self._fold(index)

    def _turn(self) -> None:
        """Where the first phase is done: tell everybody so, and where one's slices are."""
        if self._own is None or self._heads_left or len(self._folded) < len(self._buckets):
            return
        self._between(self.headers)
        self._exchange.marks.enter(Phase.EXCHANGE_MIDDLE)
        places = self._places.pack(*map(self._exchange.links.descriptor, self._out))
        for peer in self._mesh.peers:
            slices = self._slices(self._rank) if self._apart and peer in self._receivers else []
            self._transfer.send(peer, [*slices, memoryview(places + _FINITE.pack(self.finite))])

    # -- folding -------------------------------------------------------------------------------------------------------

    def _fold(self, index: int) -> None:
        """Fold the tree above the covers for this member's slice of a bucket, and send the result."""
        self._folded.add(index)
        lane, bounds = self._buckets[index]
        start, stop = bounds[self._rank], bounds[self._rank + 1]
        target = self._out[lane][start:stop]
        values = self._values(index, start, stop) if start < stop else []
        total = 0.0
        for at in range(0, stop - start, buckets.CHUNK):
            chunk = target[at : at + buckets.CHUNK]
            self._fold_chunk([value[at : at + buckets.CHUNK] for value in values], chunk)
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

    def _take(self, peer: int) -> None:
        """A peer is ready: read its slices where it was not to send them."""
        told = self._ready[peer]
        self.finite = self.finite and _FINITE.unpack_from(told, self._places.size)[0]
        if peer in self._exchange.links.reads:
            places = self._places.unpack_from(told)
            for lane, bounds in self._buckets:
                theirs = self._exchange.links.view(peer, places[lane], self._out[lane].dtype)
                start, stop = bounds[peer], bounds[peer + 1]
                self._out[lane][start:stop].copy_(theirs[start:stop])
        self._ready_left -= 1
        if not self._ready_left:
            self._exchange.marks.enter(Phase.EXCHANGE_LAST)
