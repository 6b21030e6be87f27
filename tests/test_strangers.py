"""Who does not belong to a job gets into no generation of it and reads nothing of it, whatever they know or try.

The members of these tests are in this process; strangers reach them over the loopback device. `taps` let a test read
and change what is on its way, as somebody can who sits between the machines.
"""

import contextlib
import os
import secrets
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import HOST, Pki, make_pki
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dnn.comm import listener as listening
from ray_dnn.comm.exchange import TreeExchange
from ray_dnn.comm.introduction import Address, Hello, Steps, call, greet, introduce, socket_to
from ray_dnn.comm.listener import Listener, NoPortError
from ray_dnn.comm.mesh import AbandonedError, Mesh, PeerLostError
from ray_dnn.comm.tls import Connection, Tls
from ray_dnn.errors import ConfigError
from ray_dnn.plan import Plan
from ray_dnn.tree import Node
from tests.test_mesh import LIMIT_S, SECRET, start, together

examples = settings(deadline=None, derandomize=True, max_examples=50)
NUMBERS = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest, pki: Pki) -> Tls | None:
    return Tls(pki.ours) if request.param else None


@contextlib.contextmanager
def listeners(count: int, tls: Tls | None) -> Iterator[list[Listener]]:
    with contextlib.ExitStack() as undo:
        made = [Listener(HOST, SECRET, tls) for _ in range(count)]
        for listener in made:
            undo.callback(listener.close)
        yield made


def member(at: list[Listener], rank: int, addresses: list[Address] | None = None, generation: int = 1) -> Mesh:
    mesh = Mesh(generation, rank, len(at))
    try:
        mesh.form(at[rank], SECRET, addresses or [listener.address for listener in at], LIMIT_S)
    except BaseException:
        mesh.close()
        raise
    return mesh


def can_form(at: list[Listener]) -> bool:
    """Whether the members come together, and understand each other."""
    members = together([lambda rank=rank: member(at, rank, generation=9) for rank in range(len(at))])  # type: ignore[misc]
    gathered = together([lambda m=m: m.gather(bytes([m.rank])) for m in members])  # type: ignore[misc]
    for each in members:
        each.close()
    return gathered == [[bytes([rank]) for rank in range(len(at))]] * len(at)


def knock(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=LIMIT_S)


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the other side ends it, whatever it says before."""
    with connection:
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return True  # else it timed out


def drive(steps: Steps[object], connection: socket.socket) -> object:
    """Do one side of an introduction, in a thread of its own."""
    poller = select.poll()
    while True:
        try:
            poller.register(connection, next(steps))
        except StopIteration as done:
            return done.value
        if not poller.poll(LIMIT_S * 1000):
            raise TimeoutError


# -- introductions -----------------------------------------------------------------------------------------------------


class Between:
    """Two sides of an introduction, and what passes between them, one message at a time.

    ``change(number, data)``: what becomes of a message, from 0.
    """

    def __init__(self, change: Callable[[int, bytes], bytes] = lambda number, data: data):
        self._change, self._number = change, 0

    def introduce(self, hello: Hello, secret: bytes, their_secret: bytes) -> tuple[bool, Hello | None]:
        """Whether the caller is content; and as whom the listener knows it."""
        caller, near = socket.socketpair()
        far, called = socket.socketpair()
        with caller, near, far, called:
            for each in (caller, near, far, called):
                each.setblocking(False)
            calling, greeting = call(caller, secret, hello), greet(called, their_secret)
            content, known = False, None
            for side, steps in [(near, calling), (far, greeting)] * 2:
                try:
                    next(steps)
                except StopIteration as done:
                    content, known = content or steps is calling, done.value or known
                except ConnectionError:
                    break
                self._pass(side, far if side is near else near)
            return content, known

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):  # it has said nothing
            target.sendall(self._change(self._number, source.recv(4096)))
            self._number += 1


@examples
@given(st.builds(Hello, NUMBERS, NUMBERS, NUMBERS), st.booleans())
def test_only_who_knows_the_secret_is_known_and_is_told_so(hello: Hello, same: bool) -> None:
    theirs = SECRET if same else secrets.token_bytes(32)
    assert Between().introduce(hello, SECRET, theirs) == ((True, hello) if same else (False, None))


@examples
@given(st.integers(0, 2), st.integers(0, 2**16))
def test_an_introduction_that_was_changed_on_its_way_is_worth_nothing(message: int, place: int) -> None:
    def change(number: int, data: bytes) -> bytes:
        if number != message:
            return data
        changed = bytearray(data)
        changed[place // 8 % len(data)] ^= 1 << place % 8
        return bytes(changed)

    assert Between(change).introduce(Hello(1, 2, 3), SECRET, SECRET)[1] is None


def test_the_secret_is_not_said() -> None:
    said: list[bytes] = []

    def listen(number: int, data: bytes) -> bytes:
        said.append(data)
        return data

    assert Between(listen).introduce(Hello(1, 0, 1), SECRET, SECRET) == (True, Hello(1, 0, 1))
    assert [len(data) for data in said] == [64, 64, 32]
    assert SECRET[:4] not in b"".join(said)


@examples
@given(st.binary(max_size=300))
def test_no_bytes_are_an_introduction(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(data)
        steps = greet(ours, SECRET)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError):
            list(steps)  # it would wait for ever, and be asked again for ever, if it waited for more


# -- strangers ---------------------------------------------------------------------------------------------------------

HELLO = struct.pack("!8sqqq32s", b"ray_dnn2", 9, 0, 1, bytes(32))
SAID = {
    "wrong_proof": HELLO + bytes(32),
    "another_version": b"ray_dnn1" + SECRET + bytes(24),
    "http": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(64),
    "garbage": bytes(range(256)) * 300,
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_who_says_something_else_is_cut_off_and_takes_nobodys_place(tls: Tls | None, said: bytes) -> None:
    with listeners(2, tls) as at:
        connection = knock(at[0].address)
        with contextlib.suppress(ConnectionError):  # cut off while it still speaks
            connection.sendall(said)
        assert is_cut_off(connection)
        assert can_form(at)


def test_who_says_little_and_leaves_is_forgotten(tls: Tls | None) -> None:
    with listeners(2, tls) as at:
        before = descriptors()
        connections = [knock(at[0].address) for _ in range(5)]
        for connection in connections:
            connection.sendall(HELLO[:20])
            connection.close()
        assert can_form(at)
        deadline = time.monotonic() + LIMIT_S
        while descriptors() != before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def lasting_threads() -> list[str]:
    """All but those that do one call for a test."""
    return sorted(thread.name for thread in threading.enumerate() if "(body)" not in thread.name)


def test_who_says_nothing_holds_up_nobody(tls: Tls | None) -> None:
    with listeners(2, tls) as at:
        threads = lasting_threads()
        silent = [knock(at[0].address) for _ in range(20)]
        silent[0].sendall(HELLO[:20])
        assert can_form(at)
        assert lasting_threads() == threads
        for connection in silent:
            connection.close()


def test_who_does_not_come_to_an_end_is_cut_off_in_the_end(tls: Tls | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with listeners(1, tls) as (listener,):
        monkeypatch.setattr(listening, "_INTRODUCTION_S", 0.05)
        silent, slow = (knock(listener.address) for _ in range(2))
        slow.sendall(HELLO[:20])
        assert is_cut_off(silent)
        assert is_cut_off(slow)


def test_of_too_many_who_say_nothing_the_oldest_are_cut_off(tls: Tls | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_STRANGERS", 4)
    with listeners(2, tls) as at:
        before = descriptors()
        silent = [knock(at[0].address) for _ in range(24)]
        assert all(is_cut_off(connection) for connection in silent[:-4])  # which closes it here too
        assert descriptors() <= before + 4 * 2
        assert can_form(at)
        assert is_cut_off(silent[-4])
        for connection in silent[-3:]:
            connection.close()


def test_generations_gone_by_are_cut_off(tls: Tls | None) -> None:
    with listeners(1, tls) as (listener,):
        early, late = (socket_to(listener.address, tls) for _ in range(2))
        drive(introduce(early, listener.address, SECRET, Hello(3, 0, 1)), early)
        listener.forget_before(5)
        drive(introduce(late, listener.address, SECRET, Hello(4, 0, 1)), late)
        for connection in (early, late):
            connection.settimeout(LIMIT_S)
            assert is_cut_off(connection)


def test_a_member_that_forms_leaves_when_it_is_told_though_the_other_says_nothing(tls: Tls | None) -> None:
    """As one does that is stopped: its machine accepts the connection, and nobody is there."""
    with listeners(2, tls) as at, socket.create_server((HOST, 0)) as silent:
        mesh = Mesh(1, 1, 2)
        forming = start(lambda: mesh.form(at[1], SECRET, [silent.getsockname(), at[1].address], LIMIT_S))
        accepted, _ = silent.accept()
        mesh.abandon()
        assert isinstance(forming.exception(LIMIT_S), AbandonedError)
        mesh.close()
        accepted.close()


def test_for_whom_a_member_waits_while_it_forms_is_told(tls: Tls | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_dnn.comm.mesh._WAITING_MS", 10)
    told = threading.Event()
    with listeners(2, tls) as at, socket.create_server((HOST, 0)) as silent:
        mesh = Mesh(1, 1, 2, waits=lambda ranks: told.set() if ranks == [0] else None)
        forming = start(lambda: mesh.form(at[1], SECRET, [silent.getsockname(), at[1].address], LIMIT_S))
        assert told.wait(LIMIT_S)
        mesh.abandon()
        assert isinstance(forming.exception(LIMIT_S), AbandonedError)
        mesh.close()


@pytest.mark.parametrize("theirs", ["foreign", "elsewhere"])
def test_a_member_does_not_speak_to_one_with_a_certificate_of_another_authority_or_node(pki: Pki, theirs: str) -> None:
    with listeners(1, Tls(getattr(pki, theirs))) as (false,), listeners(2, Tls(pki.ours)) as at:
        with pytest.raises(PeerLostError, match=r"connecting failed: .*certificate verify failed"):
            member(at, 1, [false.address, at[1].address])
        assert can_form(at)


class NoCertificate:
    """TLS of somebody who trusts the cluster's authority, and has nothing to show."""

    def __init__(self, authority: str):
        self._context = ssl.create_default_context(cafile=authority)
        self._context.sslsocket_class = Connection

    def calling(self, connection: socket.socket, host: str) -> ssl.SSLSocket:
        return self._context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)


@pytest.mark.parametrize("shown", ["of_another_authority", "none", "no_tls"])
def test_who_has_no_certificate_of_the_cluster_is_cut_off_even_with_the_secret(pki: Pki, shown: str) -> None:
    theirs: Any = {
        "of_another_authority": Tls(replace(pki.foreign, authority=pki.ours.authority)),
        "none": NoCertificate(pki.ours.authority),
        "no_tls": None,
    }[shown]
    with listeners(2, Tls(pki.ours)) as at:
        with socket_to(at[0].address, theirs) as connection, pytest.raises(OSError, match=r"alert|closed|reset|EOF"):
            drive(introduce(connection, at[0].address, SECRET, Hello(9, 0, 1)), connection)
        assert can_form(at)


def test_a_certificate_of_the_cluster_does_not_stand_in_for_the_secret(pki: Pki) -> None:
    """As somebody has who runs another job on it."""
    with listeners(2, Tls(pki.ours)) as at:
        with (
            socket_to(at[0].address, Tls(pki.ours)) as connection,
            pytest.raises(ConnectionError, match="not a member of this job"),
        ):
            drive(introduce(connection, at[0].address, bytes(32), Hello(9, 0, 1)), connection)
        assert can_form(at)


def test_files_that_are_no_certificates_are_named(pki: Pki, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")
    for files in (replace(pki.ours, key=str(bad)), replace(pki.ours, authority=str(bad)), replace(pki.ours, key="/no")):
        with pytest.raises(ConfigError, match=r"RAY_TLS_.*(bad\.pem|/no).*cannot be used"):
            Tls(files)


# -- on the way --------------------------------------------------------------------------------------------------------


class Tap:
    """Somebody between a caller and a listener, who sees and may change what passes.

    Attributes:
        address: what the caller takes for the listener's.
        seen: what the caller and the listener have sent.
        flip: where a bit of what the caller sends is flipped from now on, as a place in it; or None.
    """

    def __init__(self, target: Address):
        self._server = socket.create_server((HOST, 0))
        self.address: Address = self._server.getsockname()
        self.seen = (bytearray(), bytearray())
        self.flip: int | None = None
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._open, args=(target,))]
        self._threads[0].start()

    def _open(self, target: Address) -> None:
        near, _ = self._server.accept()
        far = socket.create_connection(target)
        self._ends = [near, far]
        back = threading.Thread(target=self._pass, args=(1, far, near))
        self._threads.append(back)
        back.start()
        self._pass(0, near, far)

    def _pass(self, side: int, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if side == 0 and self.flip is not None and self.flip - len(self.seen[0]) in range(len(data)):
                    data[self.flip - len(self.seen[0])] ^= 1
                self.seen[side].extend(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        for each in (self._server, *self._ends):
            each.close()


@contextlib.contextmanager
def tapped(tls: Tls | None) -> Iterator[tuple[list[Mesh], Tap, list[Listener]]]:
    """Two members, and somebody between them."""
    with listeners(2, tls) as at:
        tap = Tap(at[0].address)
        members = together([lambda: member(at, 0), lambda: member(at, 1, [tap.address, at[1].address])])
        try:
            yield members, tap, at
        finally:
            for each in members:
                each.close()
            tap.close()


def holds_a_piece(seen: bytes, data: bytes, length: int = 12) -> bool:
    """Whether any stretch of ``data`` that begins at a multiple of ``length`` is in what was seen."""
    return any(data[at : at + length] in seen for at in range(0, len(data) - length, length))


def test_who_reads_what_passes_reads_no_gradient_where_there_is_tls(tls: Tls | None) -> None:
    gradients = [torch.randn(3_000, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    plan = Plan(0, (0, 1, 2))

    def combine(mesh: Mesh) -> torch.Tensor:
        out = torch.empty(3_000)
        node = Node(mesh.rank, mesh.rank + 1)
        TreeExchange(mesh, plan).combine(b"", [0, 0], {node: [gradients[mesh.rank]]}, [out])
        return out

    with tapped(tls) as (members, tap, _):
        sums = together([lambda m=m: combine(m) for m in members])  # type: ignore[misc]
        seen = bytes(tap.seen[0]), bytes(tap.seen[1])
    total = gradients[0] + gradients[1]
    assert all(torch.equal(each, total) for each in sums)
    assert min(map(len, seen)) > total.nbytes // 2
    secret = [*gradients, total]
    found = [holds_a_piece(b"".join(seen), each.numpy().tobytes()) for each in secret]
    assert found == [tls is None] * 3  # and so it would have been found
    assert SECRET[:8] not in b"".join(seen)


def test_what_was_recorded_of_an_introduction_opens_no_other_connection(tls: Tls | None) -> None:
    with tapped(tls) as (members, tap, at):
        together([lambda m=m: m.gather(b"x") for m in members])  # type: ignore[misc]
        with knock(at[0].address) as again:
            with contextlib.suppress(ConnectionError):  # cut off while it still speaks
                again.sendall(tap.seen[0])
            assert is_cut_off(again)
        assert together([lambda m=m: m.gather(bytes([m.rank])) for m in members]) == [[b"\0", b"\1"]] * 2  # type: ignore[misc]


def test_with_tls_what_was_changed_on_its_way_is_not_taken(pki: Pki) -> None:
    inbox = bytearray(100_000)
    with tapped(Tls(pki.ours)) as ((low, high), tap, _):
        together([lambda m=m: m.gather(b"x") for m in (low, high)])  # type: ignore[misc]
        tap.flip = len(tap.seen[0]) + 50_000
        sending = start(lambda: high.exchange({0: [memoryview(bytes([1]) * 100_000)]}, {}))
        with pytest.raises(PeerLostError, match="decryption failed or bad record mac"):
            low.exchange({}, {1: [memoryview(inbox)]})
        sending.exception(LIMIT_S)
    assert set(inbox) <= {0, 1}


# -- ports -------------------------------------------------------------------------------------------------------------


def test_a_listener_keeps_to_its_ports_and_names_them_when_all_are_taken() -> None:
    first = Listener(HOST, SECRET, ports=range(28_000, 32_000))
    port = first.address[1]
    assert port in range(28_000, 32_000)
    with pytest.raises(NoPortError, match=f"RAY_DNN_PORTS={port}-{port}: all 1 ports are taken on {HOST}"):
        Listener(HOST, SECRET, ports=range(port, port + 1))
    first.close()
    Listener(HOST, SECRET, ports=range(port, port + 1)).close()  # and they are free again
