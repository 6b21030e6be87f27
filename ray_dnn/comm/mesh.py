"""Stream sockets between every two members of a generation, driven by the thread that waits for them.

Theory of operation
-------------------
Every agent has one `Listener` for its whole life; its address travels to the others over Ray. For each generation
every two members open one connection: the higher rank connects, and introduces itself with the generation, the channel
and its rank (see `ray_dnn.comm.introduction`). The listener's thread sorts accepted connections by what they say, so
they may arrive before their owner knows of the generation; connections of generations gone by are closed.

`Mesh.exchange` then moves bytes: for each peer a list of buffers to send and a list of buffers to fill, in the same
order on both sides. It is a poll loop in the calling thread. Nothing else ever reads these sockets, which gives three
properties that process groups lack:

* a wait ends at once when the generation is abandoned (`Mesh.abandon` wakes the poll loop from any thread);
* a peer's death ends it within a millisecond (its sockets close);
* a peer that was left behind and wakes up writes nowhere: the sockets of an abandoned mesh are closed on this side, and
  received bytes reach memory only in `exchange`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence

from ray_dnn.comm.introduction import Address, Hello, Steps, introduce, socket_to
from ray_dnn.comm.listener import AbandonedError, GarbledError, Listener, PeerLostError
from ray_dnn.errors import ProtocolError

__all__ = ["AbandonedError", "Address", "GarbledError", "Hello", "Listener", "Mesh", "PeerLostError"]

Buffers = Sequence[memoryview]

_CHECKSUM = struct.Struct("!I")
_WAITING_MS = 1000  # until it is worth a word for whom a member waits


class Mesh:
    """The connections of one member to all others of a generation, on one channel.

    Attributes:
        rank, size: of this member, and how many members there are.
        generation, channel: that it belongs to.
        checked: whether checksums travel with the bytes. The same on all members.
        moved: told how many bytes went out or came in.
        waits: told for which ranks this member has waited for over a second.
    """

    def __init__(
        self,
        generation: int,
        rank: int,
        size: int,
        channel: int = 0,
        checked: bool = False,
        moved: Callable[[int], None] | None = None,
        waits: Callable[[list[int]], None] | None = None,
    ):
        self.generation = generation
        self.rank = rank
        self.size = size
        self.channel = channel
        self.checked = checked
        self.moved = moved
        self.waits = waits
        self._peers: dict[int, socket.socket] = {}
        self._listener: Listener | None = None  # while this mesh forms
        self._abandoned = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        self._closing = threading.Lock()  # guards the descriptors against abandon() during close()
        self._closed = False

    @property
    def peers(self) -> list[int]:
        """All ranks but one's own."""
        return [r for r in range(self.size) if r != self.rank]

    def form(self, listener: Listener, secret: bytes, addresses: Sequence[Address], timeout_s: float = 600.0) -> None:
        """Connect to all lower ranks and take the connections of all higher ones. ``addresses``: by rank.

        The time limit is long: a member may be late because it computes. Whoever knows better abandons the mesh.
        """
        deadline = time.monotonic() + timeout_s
        listener.forget_before(self.generation)
        self._listener = listener
        hello = Hello(self.generation, self.channel, self.rank)
        introductions: dict[int, tuple[int, Steps[None]]] = {}  # descriptor -> peer, and what is still to be done
        for peer in range(self.rank):
            connection = socket_to(addresses[peer], listener.tls)
            self._adopt(peer, connection)
            introductions[connection.fileno()] = peer, introduce(connection, addresses[peer], secret, hello)
        self._introduce(introductions, deadline)
        for peer in range(self.rank + 1, self.size):
            hello = Hello(self.generation, self.channel, peer)
            self.attach(peer, listener.take(hello, deadline, self._abandoned))

    def _introduce(self, introductions: dict[int, tuple[int, Steps[None]]], deadline: float) -> None:
        """Connect to all lower ranks at once, and introduce this member."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        ready = list(introductions)
        for descriptor in introductions:
            poller.register(descriptor, 0)
        while True:
            for descriptor in ready:
                peer, steps = introductions[descriptor]
                try:
                    poller.modify(descriptor, next(steps))
                except StopIteration:
                    del introductions[descriptor]
                    poller.unregister(descriptor)
                except OSError as error:
                    raise PeerLostError(peer, f"connecting failed: {error}", self.channel) from error
            if not introductions:
                return
            ready = self._next_to_introduce(poller, [peer for peer, _ in introductions.values()], deadline)

    def _next_to_introduce(self, poller: select.poll, peers: list[int], deadline: float) -> list[int]:
        """The descriptors of those of whom something was heard."""
        while True:
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                raise PeerLostError(peers[0], "connecting took too long", self.channel)
            ready = [descriptor for descriptor, _ in poller.poll(min(left_ms, _WAITING_MS))]
            if self._wake_read in ready:
                raise self._abandonment()
            if ready:
                return ready
            if self.waits is not None:
                self.waits(peers)

    def _abandonment(self) -> AbandonedError:
        return AbandonedError(f"generation {self.generation} was abandoned")

    def check(self) -> None:
        """Raise `AbandonedError` where this mesh was abandoned."""
        if self._abandoned.is_set():
            raise self._abandonment()

    def _adopt(self, peer: int, connection: socket.socket) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[peer] = connection

    def attach(self, peer: int, connection: socket.socket) -> None:
        """Use a connection made elsewhere (tests use socket pairs)."""
        self._adopt(peer, connection)
        connection.setblocking(False)

    def begin(self, receives: Mapping[int, Buffers], received: Callable[[int, int], None] | None = None) -> Transfer:
        """Begin to receive, and to send what `Transfer.send` is given. One at a time.

        Args:
            receives: for each peer the buffers to fill, in the order in which it sends them. Bytes, contiguous.
            received: called with (peer, index) whenever a buffer is full, in the thread that waits.
        """
        return Transfer(self, self._peers, self._wake_read, receives, received)

    def exchange(
        self,
        sends: Mapping[int, Buffers],
        receives: Mapping[int, Buffers],
        received: Callable[[int, int], None] | None = None,
    ) -> None:
        """Send and receive until all is done. ``sends``: for each peer the buffers to send; the others: see `begin`.

        Raises:
            PeerLostError: a peer's connection closed. The buffers are in an undefined state.
            AbandonedError: `abandon` was called.
        """
        transfer = self.begin(receives, received)
        for peer, buffers in sends.items():
            transfer.send(peer, buffers)
        transfer.finish()

    def gather(self, payload: bytes | bytearray) -> list[bytes]:
        """Everybody's payload, by rank. All payloads must have the same length."""
        inbox = {peer: bytearray(len(payload)) for peer in self.peers}
        mine = memoryview(payload)
        self.exchange({p: [mine] for p in self.peers}, {p: [memoryview(b)] for p, b in inbox.items()})
        return [bytes(payload) if r == self.rank else bytes(inbox[r]) for r in range(self.size)]

    def gather_variable(self, payload: bytes) -> list[bytes]:
        """Everybody's payload, by rank; lengths may differ."""
        sizes = [struct.unpack("!q", raw)[0] for raw in self.gather(struct.pack("!q", len(payload)))]
        inbox = {peer: bytearray(sizes[peer]) for peer in self.peers}
        mine = memoryview(payload)
        self.exchange({p: [mine] for p in self.peers}, {p: [memoryview(b)] for p, b in inbox.items()})
        return [payload if r == self.rank else bytes(inbox[r]) for r in range(self.size)]

    def abandon(self) -> None:
        """End every present and future wait in this mesh with `AbandonedError`. From any thread, at any time."""
        self._abandoned.set()
        with self._closing:
            if not self._closed:
                os.write(self._wake_write, b"x")
                if self._listener is not None:
                    self._listener.wake()

    def close(self) -> None:
        """Close all connections; peers that still wait for us see `PeerLostError`."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            for connection in self._peers.values():
                connection.close()
            os.close(self._wake_read)
            os.close(self._wake_write)


class Transfer:
    """Bytes on their way between a member and the others, from `Mesh.begin` to `finish`."""

    def __init__(
        self,
        mesh: Mesh,
        connections: Mapping[int, socket.socket],
        wake: int,
        receives: Mapping[int, Buffers],
        received: Callable[[int, int], None] | None,
    ):
        self._mesh = mesh
        self._connections = connections
        self._wake = wake
        self._flows = {
            peer: _Flow(mesh, peer, connection, receives.get(peer, ()), received)
            for peer, connection in connections.items()
        }
        self._failure: PeerLostError | None = None  # what went wrong in `pump`

    def send(self, peer: int, buffers: Buffers) -> None:
        """Send these behind what was given before. They must stay as they are until `finish` has returned."""
        self._flows[peer].append(buffers, self._connections[peer])

    @property
    def unsent(self) -> bool:
        """Whether something given to `send` is not with the kernel yet."""
        return any(flow.needs & select.POLLOUT for flow in self._flows.values())

    def pump(self) -> None:
        """Do what can be done without waiting. Never raises: what goes wrong is raised by `finish`."""
        if self._failure is None:
            try:
                for flow in self._flows.values():
                    flow.advance(flow.needs)
            except PeerLostError as error:
                self._failure = error

    def push(self) -> None:
        """Hand to the kernel what it takes, before anything is received. Errors: see `Mesh.exchange`."""
        if self._failure is not None:
            raise self._failure
        for flow in self._flows.values():
            flow.advance(flow.needs & select.POLLOUT)

    def finish(self) -> None:
        """Send and receive until all is done; ``received`` may send more. Errors: see `Mesh.exchange`."""
        for flow in self._flows.values():
            flow.close()
        self.push()
        for flow in self._flows.values():
            flow.advance(flow.needs & select.POLLIN)
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        masks: dict[int, int] = {}  # what is polled for, by peer; nothing where it is done
        while self._watch(poller, masks):
            events = poller.poll(_WAITING_MS)
            if not events and self._mesh.waits is not None:
                self._mesh.waits(list(masks))
            ready = dict(events)
            if self._wake in ready:
                break
            for peer in list(masks):
                flow = self._flows[peer]
                if event := ready.get(flow.connection.fileno(), 0):
                    flow.advance(event)
        self._mesh.check()

    def _watch(self, poller: select.poll, masks: dict[int, int]) -> bool:
        """Poll for what flows need now. Returns whether there is anything left to do."""
        for peer, flow in self._flows.items():
            before, needs = masks.get(peer, 0), flow.needs
            if needs and not before:
                poller.register(flow.connection, needs)
            elif needs and needs != before:
                poller.modify(flow.connection, needs)
            elif before and not needs:
                poller.unregister(flow.connection)
            masks[peer] = needs
            if not needs:
                del masks[peer]
        return bool(masks)


class _Flow:
    """What is still to be sent to and received from one peer."""

    def __init__(
        self,
        mesh: Mesh,
        peer: int,
        connection: socket.socket,
        receives: Buffers,
        received: Callable[[int, int], None] | None,
    ):
        self.peer = peer
        self.connection = connection
        self._outward = connection  # a fault plan may put another in its place, from the next buffer on
        self._mesh = mesh
        self._out: list[memoryview] = []
        self._in = [_bytes(b) for b in receives]
        self._last = len(self._in)  # buffers that were asked for; what comes after is the checksum
        self._received = received
        self._out_at = self._in_at = 0  # the buffer at work
        self._out_done = self._in_done = 0  # bytes of it that are done
        self._closed = False  # whether the checksum is behind what is to be sent
        if mesh.checked and receives:
            self._in.append(memoryview(bytearray(_CHECKSUM.size)))

    def append(self, buffers: Buffers, connection: socket.socket) -> None:
        """Send these too, over this connection."""
        if self._closed:
            raise ProtocolError("the checksum of what was sent before is on its way")
        self._outward = connection
        self._out += [_bytes(b) for b in buffers]

    def close(self) -> None:
        """Where checksums travel: nothing more will be sent."""
        if self._mesh.checked:
            self._closed = True
            self._out += [memoryview(_checksum(self._out))] if self._out else []

    @property
    def needs(self) -> int:
        """The poll events that it waits for; 0 when all is done."""
        needs_in = select.POLLIN if self._in_at < len(self._in) else 0
        needs_out = select.POLLOUT if self._out_at < len(self._out) else 0
        return needs_in | needs_out

    def advance(self, ready: int) -> None:
        """Do what can be done without waiting."""
        try:
            if ready & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._receive()
            if ready & (select.POLLOUT | select.POLLHUP | select.POLLERR):
                self._send()
        except OSError as error:
            raise PeerLostError(self.peer, str(error), self._mesh.channel) from error

    def _send(self) -> None:
        while self._out_at < len(self._out):
            view = self._out[self._out_at]
            while self._out_done < len(view):
                try:
                    count = self._outward.send(view[self._out_done :])
                except BlockingIOError:
                    return
                self._out_done += count
                self._moved(count)
            self._out_at, self._out_done = self._out_at + 1, 0

    def _receive(self) -> None:
        while self._in_at < len(self._in):
            view = self._in[self._in_at]
            while self._in_done < len(view):
                try:
                    count = self.connection.recv_into(view[self._in_done :])
                except BlockingIOError:
                    return
                if count == 0:
                    raise PeerLostError(self.peer, "it left", self._mesh.channel)
                self._in_done += count
                self._moved(count)
            index = self._in_at
            self._in_at, self._in_done = index + 1, 0
            if index == self._last and self._in[index] != _checksum(self._in[:index]):
                raise GarbledError(self.peer, "bytes arrived otherwise than they were sent", self._mesh.channel)
            if self._received is not None and index < self._last:
                self._received(self.peer, index)

    def _moved(self, count: int) -> None:
        if self._mesh.moved is not None:
            self._mesh.moved(count)


def _checksum(buffers: Buffers) -> bytes:
    total = 0
    for buffer in buffers:
        total = zlib.crc32(buffer, total)
    return _CHECKSUM.pack(total)


def _bytes(buffer: memoryview) -> memoryview:
    if not buffer.contiguous:
        raise ProtocolError("only contiguous buffers can be exchanged")
    # An empty view cannot be cast; it has nothing to move either.
    return buffer.cast("B") if buffer.nbytes else memoryview(b"")
