"""How a connection begins: each side proves to the other that it knows the job's secret, and none says it.

Who connects says what the connection is for, with a random number. Who was called answers with one of its own, and
with a proof: a keyed hash of all that both have said. The caller answers with another proof, and goes on without
waiting. So it takes one round trip, and what somebody has recorded opens no connection again. Without TLS nothing that
follows is protected by it: whoever can change what is on its way can wait until the introduction is over.

Both sides are written as generators that yield the poll events they wait for and never block, so that any number of
them can be driven by one poll loop.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import select
import socket
import ssl
import struct
from collections.abc import Generator
from typing import NamedTuple, TypeVar

from ray_dnn.comm.tls import Tls

Address = tuple[str, int]
T = TypeVar("T")
Steps = Generator[int, None, T]  # yields the poll events that it waits for

SECRET_BYTES = 32
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_MAGIC = b"ray_dnn2"
_CALL = struct.Struct(f"!8sqqq{_NONCE_BYTES}s")
_ANSWER = struct.Struct(f"!{_NONCE_BYTES}s{_PROOF_BYTES}s")


class Hello(NamedTuple):
    """How a connection introduces itself: which generation and channel it belongs to, and who opened it."""

    generation: int
    channel: int
    rank: int


def socket_to(address: Address, tls: Tls | None) -> socket.socket:
    """A socket, not connected yet, that does not block."""
    connection = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    if tls is not None:
        connection = tls.calling(connection, address[0])
    connection.setblocking(False)
    return connection


def introduce(connection: socket.socket, address: Address, secret: bytes, hello: Hello) -> Steps[None]:
    """Connect to a listener, and introduce oneself.

    Raises:
        OSError: it is not there, or not a member of this job.
    """
    yield from _connect(connection, address)
    yield from call(connection, secret, hello)


def _connect(connection: socket.socket, address: Address) -> Steps[None]:
    error = connection.connect_ex(address)
    if error == errno.EINPROGRESS:  # how it went shows when it becomes writable
        yield select.POLLOUT
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def call(connection: socket.socket, secret: bytes, hello: Hello) -> Steps[None]:
    """Introduce oneself over a connection to somebody who does `greet`.

    Raises:
        OSError: it is not a member of this job.
    """
    yield from _shake_hands(connection)
    said = _CALL.pack(_MAGIC, *hello, secrets.token_bytes(_NONCE_BYTES))
    yield from _send(connection, said)
    nonce, proof = _ANSWER.unpack((yield from _receive(connection, _ANSWER.size)))
    if not hmac.compare_digest(proof, _proof(secret, b"listener", said, nonce)):
        raise ConnectionError("whoever listens there is not a member of this job")
    yield from _send(connection, _proof(secret, b"caller", said, nonce))


def greet(connection: socket.socket, secret: bytes) -> Steps[Hello]:
    """Have a connection that was accepted introduce itself.

    Raises:
        OSError: it is not a member of this job.
    """
    yield from _shake_hands(connection)
    said = yield from _receive(connection, _CALL.size)
    magic, *key, _ = _CALL.unpack(said)
    if magic != _MAGIC:
        raise ConnectionError("another protocol")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    yield from _send(connection, _ANSWER.pack(nonce, _proof(secret, b"listener", said, nonce)))
    proof = yield from _receive(connection, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(secret, b"caller", said, nonce)):
        raise ConnectionError("not a member of this job")
    return Hello(*key)


def _proof(secret: bytes, side: bytes, said: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, side + said + nonce, "sha256")


def _shake_hands(connection: socket.socket) -> Steps[None]:
    while isinstance(connection, ssl.SSLSocket):
        try:
            connection.do_handshake()
            return
        except ssl.SSLWantReadError:
            yield select.POLLIN
        except ssl.SSLWantWriteError:
            yield select.POLLOUT


def _send(connection: socket.socket, data: bytes) -> Steps[None]:
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view) :]
        except BlockingIOError:
            yield select.POLLOUT


def _receive(connection: socket.socket, size: int) -> Steps[bytes]:
    data, done = bytearray(size), 0
    while done < size:
        try:
            count = connection.recv_into(memoryview(data)[done:])
        except BlockingIOError:
            yield select.POLLIN
            continue
        if not count:
            raise ConnectionError("it closed")
        done += count
    return bytes(data)
