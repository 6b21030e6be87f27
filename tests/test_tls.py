"""Connections with TLS are driven as plain ones are: the same bytes arrive, and waits end when they should."""

import contextlib
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from certificates import HOST, Pki, make_pki
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dnn.comm.introduction import Hello, call, greet
from ray_dnn.comm.line import Line, LineLostError
from ray_dnn.comm.mesh import AbandonedError, GarbledError, Mesh, PeerLostError
from ray_dnn.comm.tls import Connection, Tls
from ray_dnn.faults import Corrupt, Partition
from ray_dnn.network import AUTHORITY, CERTIFICATE, KEY, USE_TLS, Network, TlsFiles
from tests.test_mesh import LIMIT_S, SECRET, start, together, views

examples = settings(deadline=None, derandomize=True, max_examples=25)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def tls(pki: Pki) -> Tls:
    return Tls(pki.ours)


def pair(tls: Tls, room: int = 65536, host: str = HOST) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection that is introduced. ``room``: for bytes on their way. ``host``: that is called."""
    one, other = socket.socketpair()
    for each in (one, other):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        each.setblocking(False)
    ends = tls.calling(one, host), tls.accepted(other)
    sides = [call(ends[0], SECRET, Hello(0, 0, 1)), greet(ends[1], SECRET)]
    while sides:
        for side in list(sides):
            if next(side, None) is None:
                sides.remove(side)
    return ends


@contextlib.contextmanager
def connected(tls: Tls, room: int = 65536) -> Iterator[tuple[Mesh, Mesh]]:
    low, high = Mesh(0, 0, 2), Mesh(0, 1, 2)
    one, other = pair(tls, room)
    low.attach(1, one)
    high.attach(0, other)
    yield low, high
    low.close()
    high.close()


@contextlib.contextmanager
def lines(tls: Tls, patience_s: float = LIMIT_S) -> Iterator[tuple[Line, Line]]:
    one, other = (Line(connection, patience_s=patience_s) for connection in pair(tls))
    yield one, other
    one.close()
    other.close()


sizes = st.lists(st.integers(0, 300) | st.sampled_from([16_383, 16_384, 16_385, 65_537, 700_000]), max_size=5)


@examples
@given(sizes, sizes, st.sampled_from([1, 20_000, 1_000_000]), st.integers(1, 3))
def test_everybody_receives_what_was_sent_in_order(
    tls: Tls, upwards: list[int], downwards: list[int], room: int, rounds: int
) -> None:
    """What one side receives may end in the middle of what the other has encrypted in one piece."""
    rng = random.Random(room)
    sent = [[rng.randbytes(n) for n in upwards], [rng.randbytes(n) for n in downwards]]

    def exchange(mesh: Mesh) -> list[bytearray]:
        inbox = [bytearray(len(data)) for data in sent[1 - mesh.rank]]
        peer = 1 - mesh.rank
        for _ in range(rounds):
            for data in inbox:
                data[:] = bytes(len(data))
            mesh.exchange({peer: views(sent[mesh.rank])}, {peer: views(inbox)})
        return inbox

    with connected(tls, room) as members:
        inboxes = together([lambda m=m: exchange(m) for m in members])  # type: ignore[misc]
    assert inboxes == sent[::-1]


def test_what_is_pumped_beside_other_work_arrives_too(tls: Tls) -> None:
    data = random.Random(1).randbytes(1_000_000)
    with connected(tls, room=4096) as (low, high):
        inbox = bytearray(len(data))
        receiving = start(lambda: high.exchange({}, {0: [memoryview(inbox)]}))
        transfer = low.begin({})
        transfer.send(1, [memoryview(data[:600_000])])
        while transfer.unsent:
            transfer.pump()
        transfer.send(1, [memoryview(data[600_000:])])
        transfer.pump()
        transfer.finish()
        receiving.result(LIMIT_S)
    assert inbox == data


def test_a_wait_ends_when_the_other_side_closes_or_the_generation_is_abandoned(tls: Tls) -> None:
    room = memoryview(bytearray(10))
    with connected(tls) as (low, high):
        waiting = start(lambda: low.exchange({}, {1: [room]}))
        high.close()
        assert isinstance(waiting.exception(LIMIT_S), PeerLostError)
    with connected(tls) as (low, high):
        waiting = start(lambda: low.exchange({}, {1: [room]}))
        low.abandon()
        assert isinstance(waiting.exception(LIMIT_S), AbandonedError)
        low.close()
        with pytest.raises(PeerLostError):
            high.exchange({0: [memoryview(bytes(10_000_000))]}, {})


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "silent"])
def test_a_fault_can_cut_a_connection(tls: Tls, closed: bool) -> None:
    room = memoryview(bytearray(10))
    with connected(tls) as (low, high):
        Partition("computing", closed=closed).strike(SimpleNamespace(mesh=low))  # type: ignore[arg-type]
        waiting = [start(lambda m=m: m.exchange({}, {1 - m.rank: [room]})) for m in (low, high)]  # type: ignore[misc]
        if not closed:
            low.abandon()
            high.abandon()
        found = [type(each.exception(LIMIT_S)) for each in waiting]
    assert found == [PeerLostError if closed else AbandonedError] * 2


def test_a_fault_can_flip_a_bit_before_it_is_encrypted(tls: Tls) -> None:
    with connected(tls) as (low, high):
        low.checked = high.checked = True
        Corrupt("computing", what="wire").strike(SimpleNamespace(mesh=low, engine=True))  # type: ignore[arg-type]
        sending = start(lambda: low.exchange({1: [memoryview(bytes(300_000))]}, {}))
        with pytest.raises(GarbledError):
            high.exchange({}, {0: [memoryview(bytearray(300_000))]})
        sending.result(LIMIT_S)


def test_a_line_waits_for_nothing_that_has_arrived_with_something_else(tls: Tls) -> None:
    with lines(tls, patience_s=1.0) as (one, other):
        one.send([memoryview(b"abc")])
        got = [bytearray(1) for _ in range(3)]
        for each in got:
            assert other.wait()
            other.fill([memoryview(each)])
        assert got == [b"a", b"b", b"c"]
        other.interrupt()
        assert not other.wait()


def test_what_is_sent_on_a_line_arrives_in_pieces_of_any_size(tls: Tls) -> None:
    data = bytes(range(256)) * 40_000
    with lines(tls) as (one, other):
        sending = start(lambda: one.send([memoryview(data[:7]), memoryview(b""), memoryview(data[7:])]))
        inbox = [bytearray(5), bytearray(len(data) - 5)]
        other.fill([memoryview(piece) for piece in inbox])
        sending.result(LIMIT_S)
        assert b"".join(inbox) == data
        one.close()
        with pytest.raises(LineLostError, match="closed"):
            other.fill([memoryview(bytearray(1))])


def test_both_sides_speak_the_newest_version_and_show_certificates(tls: Tls) -> None:
    for end in pair(tls):
        with end:
            assert isinstance(end, Connection)
            assert end.version() == "TLSv1.3"
            assert end.getpeercert()


# -- what the documentation says to do ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "security.md").read_text()


def test_the_commands_that_make_certificates_make_good_ones(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("the program openssl is not there")
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    subprocess.run(["sh", "-eu"], input=script, text=True, cwd=tmp_path, check=True, capture_output=True)
    for folder, address in [*[(f"192.168.1.1{n}", f"192.168.1.1{n}") for n in range(3)], ("tls", "10.0.1.200")]:
        paths = [str(tmp_path / folder / name) for name in ("node.pem", "node.key", "authority.pem")]
        for host in (address, "127.0.0.1", "localhost"):
            for end in pair(Tls(TlsFiles(*paths)), host=host):
                end.close()
    assert (tmp_path / "tls" / "node.key").stat().st_mode & 0o077 == 0


def test_the_lines_for_a_cluster_file_say_all_that_is_needed() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = yaml.safe_load(text)
    variables = dict(option.removeprefix("--env ").split("=") for option in lines["docker"]["run_options"])
    assert variables.keys() == {USE_TLS, CERTIFICATE, KEY, AUTHORITY}
    assert Network.of(variables).tls == TlsFiles(
        *(f"/home/ray/tls/{n}" for n in ("node.pem", "node.key", "authority.pem"))
    )
    assert lines["file_mounts"] == {"/home/ray/tls": "./tls"}
    cluster = yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())
    assert lines.keys() <= cluster.keys()
