"""TLS on the connections between agents: version 1.3, and both sides show a certificate of the cluster's authority.

A connection with TLS is a socket like any other to the poll loops that drive it: `send` and `recv_into` do what can be
done without waiting, or raise BlockingIOError. Two things are otherwise, and those who drive it keep to them:

* What has arrived may be inside of the connection already, where poll does not see it. So whoever wants bytes asks for
  them first and waits only when told to (`buffered` says what is there).
* What `send` could not finish must be given to it again, the same bytes first.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from typing import Any

from ray_dnn.errors import ConfigError
from ray_dnn.network import AUTHORITY, CERTIFICATE, KEY, TlsFiles

_PIECE = 65536  # bytes that one call encrypts: what it could not send it has to be given again


class Connection(ssl.SSLSocket):
    """A socket with TLS that tells to wait as a plain one does."""

    def send(self, data: Any, flags: int = 0) -> int:
        """Encrypt and send a part, if there is room for it."""
        try:
            return super().send(memoryview(data)[:_PIECE], flags)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            raise _not_now() from None

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Receive and decrypt a part, if something is there. 0: the other side has gone."""
        try:
            return super().recv_into(buffer, nbytes, flags)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            raise _not_now() from None


def _not_now() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def buffered(connection: socket.socket) -> int:
    """Bytes that can be received although poll may not see them."""
    return connection.pending() if isinstance(connection, ssl.SSLSocket) else 0


class Tls:
    """Makes connections with TLS.

    Raises:
        ConfigError: a file cannot be used.
    """

    def __init__(self, files: TlsFiles):
        self._caller = _context(ssl.PROTOCOL_TLS_CLIENT, files)  # which also compares the address with the certificate
        self._listener = _context(ssl.PROTOCOL_TLS_SERVER, files)
        self._listener.verify_mode = ssl.CERT_REQUIRED
        self._listener.num_tickets = 0  # a caller that only sends would never read them

    def calling(self, connection: socket.socket, host: str) -> ssl.SSLSocket:
        """A socket that is going to connect to a host."""
        return self._caller.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)

    def accepted(self, connection: socket.socket) -> ssl.SSLSocket:
        """A socket that was accepted."""
        return self._listener.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)


def _context(side: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.sslsocket_class = Connection
    try:
        context.load_verify_locations(files.authority)
    except OSError as error:
        raise ConfigError(f"{AUTHORITY}={files.authority}: cannot be used: {error}") from error
    try:
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:
        raise ConfigError(
            f"{CERTIFICATE}={files.certificate} and {KEY}={files.key}: cannot be used: {error}"
        ) from error
    return context
