"""Accepting connections for an agent's whole life, and sorting them by how they introduce themselves."""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ray_dnn.errors import RayDnnError

Address = tuple[str, int]

_SECRET_BYTES = 32
_HELLO = struct.Struct(f"!8s{_SECRET_BYTES}sqqq")
_MAGIC = b"ray_dnn1"
_HELLO_TIMEOUT_S = 10.0


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


class Hello(NamedTuple):
    """How a connection introduces itself: which generation and channel it belongs to, and who opened it."""

    generation: int
    channel: int
    rank: int


class Listener:
    """Accepts connections of all generations and keeps them until their mesh takes them.

    Connections of a channel that is served belong to no generation: they are handed over as they come.
    """

    def __init__(self, host: str, secret: bytes):
        if len(secret) != _SECRET_BYTES:
            raise ValueError(f"the secret must have {_SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._socket = socket.create_server((host, 0), backlog=512)
        self._arrived: dict[Hello, socket.socket] = {}  # connections that nobody has taken yet
        self._served: dict[int, Callable[[socket.socket], None]] = {}  # by channel
        self._oldest = 0  # connections of generations below this are refused; only rises
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._accept, name="ray_dnn-listener", daemon=True).start()

    @property
    def address(self) -> Address:
        host, port = self._socket.getsockname()[:2]
        return host, port

    def serve(self, channel: int, take: Callable[[socket.socket], None]) -> None:
        """Have ``take`` called, in a thread of its own, with each connection that introduces itself for a channel."""
        self._served[channel] = take

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """Read the introduction; whoever does not know the secret is cut off without an answer."""
        try:
            connection.settimeout(_HELLO_TIMEOUT_S)
            raw = _receive_exactly(connection, _HELLO.size)
            magic, secret, *key = _HELLO.unpack(raw)
            if magic != _MAGIC or not hmac.compare_digest(secret, self._secret):
                raise ConnectionError("not a member of this job")
            hello = Hello(*key)
            if (take := self._served.get(hello.channel)) is not None:
                take(connection)
                return
            with self._changed:
                if self._closed or hello.generation < self._oldest:
                    raise ConnectionError("a generation gone by")
                stale = self._arrived.pop(hello, None)
                self._arrived[hello] = connection
                self._changed.notify_all()
            if stale is not None:
                stale.close()
        except OSError:
            connection.close()

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
        # shutdown wakes the thread that is blocked in accept; close alone would not.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def introduction(secret: bytes, hello: Hello) -> bytes:
    """What a connection says first."""
    return _HELLO.pack(_MAGIC, secret, *hello)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ConnectionError("closed")
        data += chunk
    return bytes(data)
