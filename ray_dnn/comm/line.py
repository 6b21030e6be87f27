"""One connection between two agents, apart from any generation."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from ray_dnn.comm.introduction import Address, Hello, introduce
from ray_dnn.comm.tls import buffered
from ray_dnn.errors import RayDnnError

_PATIENCE_S = 5.0


class LineLostError(RayDnnError):
    """The connection closed, was cut, or no byte moved for too long. Never reaches the user."""


class Line:
    """A connection that one thread at each end uses. Whatever ends it, ends it for good.

    Args:
        moved: told how many bytes went out or came in.
        patience_s: how long no byte may move while somebody waits for one.
    """

    def __init__(
        self,
        connection: socket.socket,
        moved: Callable[[int], None] = lambda count: None,
        patience_s: float = _PATIENCE_S,
    ):
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._moved = moved
        self._patience_s = patience_s
        self._wake_read, self._wake_write = os.pipe()
        self._lock = threading.Lock()  # guards the descriptors against `cut` during `close`
        self._closed = False
        self._cut = False  # whether `cut` was called; never false again
        self._interrupted = False  # whether `interrupt` was called; never false again

    def open(self, address: Address, secret: bytes, channel: int) -> None:
        """Connect to an agent's listener, for a channel that it serves.

        Raises:
            LineLostError: it cannot be reached, or is not a member of this job.
        """
        try:
            for event in introduce(self._connection, address, secret, Hello(0, channel, 0)):
                self._wait(event)
        except OSError as error:
            raise LineLostError(f"connecting failed: {error}") from error

    def send(self, pieces: Sequence[memoryview]) -> None:
        """Send all of these.

        Raises:
            LineLostError: not all of it was sent.
        """
        for piece in pieces:
            done = 0
            while done < len(piece):
                done += self._move(self._connection.send, piece[done:], select.POLLOUT)

    def fill(self, pieces: Sequence[memoryview]) -> None:
        """Fill all of these.

        Raises:
            LineLostError: not all of it arrived.
        """
        for piece in pieces:
            done = 0
            while done < len(piece):
                done += self._move(self._connection.recv_into, piece[done:], select.POLLIN)

    def wait(self) -> bool:
        """Wait until something has arrived. False where nothing has, and `interrupt` was called."""
        return buffered(self._connection) > 0 or self._wait(select.POLLIN, interruptible=True)

    def _move(self, call: Callable[[memoryview], int], piece: memoryview, event: int) -> int:
        if self._cut:
            raise LineLostError("it was cut")
        try:
            count = call(piece)
        except BlockingIOError:
            self._wait(event)
            return 0
        except OSError as error:
            raise LineLostError(str(error)) from error
        if not count:
            raise LineLostError("the other end closed")
        self._moved(count)
        return count

    def _wait(self, event: int, interruptible: bool = False) -> bool:
        """Wait until the connection is ready for this. Returns False where it is not, and was interrupted."""
        poller = select.poll()
        poller.register(self._connection, event)
        poller.register(self._wake_read, select.POLLIN)
        deadline = time.monotonic() + self._patience_s
        while True:
            enough = interruptible and self._interrupted
            ready = dict(poller.poll(0 if enough else max(0.0, deadline - time.monotonic()) * 1000))
            if self._cut:  # its byte stays in the pipe
                raise LineLostError("it was cut")
            if self._wake_read in ready:
                os.read(self._wake_read, 1)
            elif ready:
                return True
            elif enough:
                return False
            else:
                raise LineLostError(f"no byte moved for {self._patience_s:g} s")

    def interrupt(self) -> None:
        """End every present and future `wait` where nothing has arrived. From any thread, at any time."""
        with self._lock:
            self._interrupted = True
            self._wake()

    def cut(self) -> None:
        """End every present and future use with `LineLostError`. From any thread, at any time."""
        with self._lock:
            self._cut = True
            self._wake()

    def _wake(self) -> None:
        if not self._closed:
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        """Close it; by the thread that uses it."""
        with self._lock:
            if self._closed:
                return
            self._closed = self._cut = True
            self._connection.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
