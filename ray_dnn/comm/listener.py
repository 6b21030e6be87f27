"""Accepting connections for an agent's whole life, and sorting them by how they introduce themselves."""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray_dnn.comm.introduction import SECRET_BYTES, Address, Hello, Steps, greet
from ray_dnn.comm.tls import Tls
from ray_dnn.errors import RayDnnError
from ray_dnn.network import PORTS

_INTRODUCTION_S = 10.0  # until a connection must have introduced itself
_STRANGERS = 512  # connections that have not introduced themselves; for one more, the oldest of them is cut off
_BACKLOG = 512  # connections that the system holds until they are accepted
_PAUSE_S = 0.05  # where the process may open no more descriptors


class PeerLostError(RayDnnError):
    """A peer's connection closed: it died, or it left the generation. Never reaches the user.

    Attributes:
        peer: its rank in the mesh.
        channel: of the mesh.
    """

    def __init__(self, peer: int, detail: str, channel: int = 0):
        super().__init__(f"the connection to rank {peer} closed: {detail}")
        self.peer = peer
        self.channel = channel


class GarbledError(PeerLostError):
    """Bytes arrived otherwise than they were sent. Never reaches the user."""


class AbandonedError(RayDnnError):
    """The generation was abandoned while this thread waited in it. Never reaches the user."""


class NoPortError(RayDnnError):
    """All ports that agents may listen on are taken. Reaches the user as the reason why an agent is gone."""


@dataclass(frozen=True)
class _Stranger:
    """A connection that has not introduced itself yet."""

    connection: socket.socket
    steps: Steps[Hello]
    deadline: float


class Listener:
    """Accepts connections of all generations and keeps them until their mesh takes them.

    Connections of a channel that is served belong to no generation: they are handed over as they come.

    One thread accepts, and drives all introductions: whoever says nothing, too little or nonsense holds up nobody and
    costs a descriptor, for a while.

    Args:
        host: the address to listen on.
        tls: None: connections are plain.
        ports: to choose one from; None: the system chooses.

    Raises:
        NoPortError: all of the ports are taken.
    """

    def __init__(self, host: str, secret: bytes, tls: Tls | None = None, ports: range | None = None):
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"the secret must have {SECRET_BYTES} bytes, not {len(secret)}")
        self.tls = tls
        self._secret = secret
        self._socket = _listen(host, ports)
        self._socket.setblocking(False)  # who has called may have gone again before it is accepted
        self.address: Address = self._socket.getsockname()[:2]
        self._strangers: dict[int, _Stranger] = {}  # by descriptor, the oldest first; the thread's alone
        self._poller = select.poll()  # for these, and for the socket
        self._poller.register(self._socket, select.POLLIN)
        self._arrived: dict[Hello, socket.socket] = {}  # connections that nobody has taken yet
        self._served: dict[int, Callable[[socket.socket], None]] = {}  # by channel
        self._oldest = 0  # connections of generations below this are refused; only rises
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ray_dnn-listener", daemon=True)
        self._thread.start()

    def serve(self, channel: int, take: Callable[[socket.socket], None]) -> None:
        """Have ``take`` called, in a thread of its own, with each connection that introduces itself for a channel."""
        self._served[channel] = take

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._look()
        finally:
            for descriptor in list(self._strangers):
                self._cut_off(descriptor)
            self._socket.close()

    def _look(self) -> None:
        """Wait until something happens, and deal with it. Who has called before comes before who calls now."""
        first = next(iter(self._strangers.values()), None)
        wait_ms = None if first is None else max(0.0, first.deadline - time.monotonic()) * 1000
        ready = dict(self._poller.poll(wait_ms))
        for descriptor in ready.keys() & self._strangers.keys():
            self._hear(descriptor)
        now = time.monotonic()
        for descriptor in [d for d, stranger in self._strangers.items() if stranger.deadline <= now]:
            self._cut_off(descriptor)
        if self._socket.fileno() in ready and not self._closed:
            self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has gone again
        except OSError:  # there are no descriptors left, or it was closed
            if self._strangers:
                self._cut_off(next(iter(self._strangers)))
            else:
                time.sleep(_PAUSE_S)
            return
        try:
            connection.setblocking(False)
            if self.tls is not None:
                connection = self.tls.accepted(connection)
        except OSError:
            connection.close()  # it has gone again
            return
        if len(self._strangers) >= _STRANGERS:
            self._cut_off(next(iter(self._strangers)))
        deadline = time.monotonic() + _INTRODUCTION_S
        self._strangers[connection.fileno()] = _Stranger(connection, greet(connection, self._secret), deadline)
        self._poller.register(connection, 0)
        self._hear(connection.fileno())

    def _hear(self, descriptor: int) -> None:
        """Go on with an introduction; whoever does not know the secret is cut off."""
        stranger = self._strangers[descriptor]
        try:
            self._poller.modify(descriptor, next(stranger.steps))
        except StopIteration as introduced:
            self._forget(descriptor)
            self._introduced(stranger.connection, introduced.value)
        except OSError:
            self._cut_off(descriptor)

    def _forget(self, descriptor: int) -> None:
        del self._strangers[descriptor]
        self._poller.unregister(descriptor)

    def _cut_off(self, descriptor: int) -> None:
        stranger = self._strangers[descriptor]
        self._forget(descriptor)
        stranger.connection.close()

    def _introduced(self, connection: socket.socket, hello: Hello) -> None:
        if (take := self._served.get(hello.channel)) is not None:
            threading.Thread(target=take, args=(connection,), daemon=True).start()
            return
        with self._changed:
            if self._closed or hello.generation < self._oldest:
                stale: socket.socket | None = connection  # of a generation gone by
            else:
                stale = self._arrived.pop(hello, None)
                self._arrived[hello] = connection
                self._changed.notify_all()
        if stale is not None:
            stale.close()

    # -- from other threads --------------------------------------------------------------------------------------------

    def take(self, hello: Hello, deadline: float, abandoned: threading.Event) -> socket.socket:
        """Wait for the connection that introduced itself as ``hello``."""
        with self._changed:
            while hello not in self._arrived:
                if abandoned.is_set():
                    raise AbandonedError(f"generation {hello.generation} was abandoned while it formed")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PeerLostError(hello.rank, "it did not connect in time", hello.channel)
                self._changed.wait(left)
            return self._arrived.pop(hello)

    def forget_before(self, generation: int) -> None:
        """Refuse and close what belongs to generations before ``generation``."""
        with self._changed:
            self._oldest = max(self._oldest, generation)
            for hello in [h for h in self._arrived if h.generation < self._oldest]:
                self._arrived.pop(hello).close()

    def wake(self) -> None:
        """Have `take` look again whether it was abandoned."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for connection in self._arrived.values():
                connection.close()
            self._arrived.clear()
        # shutdown wakes the thread, which closes what is its own; closed from here, another descriptor might be polled.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()


def _listen(host: str, ports: range | None) -> socket.socket:
    """A socket that listens on a free port."""
    if ports is None:
        return socket.create_server((host, 0), backlog=_BACKLOG)
    for port in random.sample(ports, len(ports)):  # agents that start together do not try the same ones in turn
        try:
            return socket.create_server((host, port), backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise NoPortError(
        f"{PORTS}={ports[0]}-{ports[-1]}: all {len(ports)} ports are taken on {host}. Each agent on a node needs one: "
        "give a wider range."
    )
