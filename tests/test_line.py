"""A connection of its own: it ends when it should, and waits end when they should."""

import contextlib
import queue
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_dnn.comm.introduction import Address, socket_to
from ray_dnn.comm.line import Line, LineLostError
from ray_dnn.comm.listener import Listener
from ray_dnn.engine import codec, stream
from ray_dnn.engine.lead import START, Kind, Leader, Parcel
from ray_dnn.engine.step import Position
from tests.test_mesh import LIMIT_S, SECRET, start


@contextlib.contextmanager
def lines(patience_s: float = LIMIT_S) -> Iterator[tuple[Line, Line]]:
    one, other = (Line(connection, patience_s=patience_s) for connection in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_what_is_sent_arrives_in_pieces_of_any_size() -> None:
    data = bytes(range(256)) * 40_000
    with lines() as (one, other):
        sending = start(lambda: one.send([memoryview(data[:7]), memoryview(b""), memoryview(data[7:])]))
        inbox = [bytearray(5), bytearray(len(data) - 5)]
        assert other.wait()
        other.fill([memoryview(piece) for piece in inbox])
        sending.result(LIMIT_S)
    assert b"".join(inbox) == data


def test_a_wait_ends_when_it_is_interrupted_and_the_line_goes_on() -> None:
    with lines() as (one, other):
        waiting = start(other.wait)
        other.interrupt()
        assert waiting.result(LIMIT_S) is False
        assert other.wait() is False
        one.send([memoryview(b"more")])
        assert other.wait()  # there is something, which counts more
        got = bytearray(4)
        other.fill([memoryview(got)])
        assert got == b"more"


def test_every_use_ends_when_the_line_is_cut_or_closed_or_nothing_moves() -> None:
    room = memoryview(bytearray(2**24))
    with lines() as (one, other):
        uses = [start(lambda: one.send([room])), start(lambda: one.fill([room]))]
        other.fill([memoryview(bytearray(1))])
        one.cut()
        for use in uses:
            with pytest.raises(LineLostError, match="was cut"):
                use.result(LIMIT_S)
    with lines() as (one, other):
        filling = start(lambda: one.fill([room]))
        other.close()
        with pytest.raises(LineLostError, match="closed"):
            filling.result(LIMIT_S)
    with lines(patience_s=0.05) as (one, other):
        for use in (lambda: one.fill([room]), lambda: one.send([room]), one.wait):
            with pytest.raises(LineLostError, match="no byte moved"):
                use()


def dial(address: Address, secret: bytes = SECRET) -> Line:
    line = Line(socket_to(address, None), patience_s=LIMIT_S)
    try:
        line.open(address, secret, 7)
    except LineLostError:
        line.close()
        raise
    return line


def test_connections_of_a_served_channel_are_handed_over_whatever_the_generation() -> None:
    taken: queue.Queue[socket.socket] = queue.Queue()
    listener = Listener("127.0.0.1", SECRET)
    listener.serve(7, taken.put)
    listener.forget_before(9)
    mine = dial(listener.address)
    theirs = Line(taken.get(timeout=LIMIT_S))
    mine.send([memoryview(b"x")])
    got = bytearray(1)
    theirs.fill([memoryview(got)])
    assert got == b"x"
    mine.close()
    theirs.close()
    with pytest.raises(LineLostError, match=r"connecting failed: .* not a member"):
        dial(listener.address, b"t" * 32)
    listener.close()
    with pytest.raises(LineLostError, match="connecting failed"):
        dial(listener.address)
    assert taken.empty()


def test_connecting_to_whoever_says_nothing_ends_when_it_is_cut_or_takes_too_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()
        line = Line(socket_to(address, None), patience_s=LIMIT_S)
        opening = start(lambda: line.open(address, SECRET, 7))
        accepted, _ = silent.accept()
        line.cut()
        with pytest.raises(LineLostError, match="was cut"):
            opening.result(LIMIT_S)
        line.close()
        accepted.close()
        line = Line(socket_to(address, None), patience_s=0.05)
        with pytest.raises(LineLostError, match="no byte moved"):
            line.open(address, SECRET, 7)
        line.close()


@pytest.mark.parametrize("sent", [0, 1, 2, 3])
def test_a_parcel_is_what_the_tree_was_when_it_was_made(sent: int) -> None:
    tree = {"a": torch.randn(400_000), "b": torch.randn(300, 7).t(), "n": 3}
    before = codec.digest(tree)
    parcel = Parcel(Kind.STATE, tree)
    memory = parcel.memory()
    pieces = [bytes(piece) for _, window in zip(range(sent), memory, strict=False) for piece in window]
    size = parcel.size
    assert parcel.keep() == parcel.keep() == size
    tree["a"].zero_()
    tree["b"].zero_()
    pieces += [bytes(piece) for window in memory for piece in window]
    wire: list[bytes] = []
    views = ([memoryview(piece)] for piece in pieces)
    stream.send_parts(lambda window: wire.extend(map(bytes, window)), parcel.head, views)
    data = memoryview(b"".join(wire))

    def fill(window: list[memoryview]) -> None:
        nonlocal data
        for piece in window:
            piece[:], data = data[: len(piece)], data[len(piece) :]

    assert codec.digest(stream.receive(fill)) == before


def leading(weights: torch.Tensor, only_reads: bool) -> Any:
    """An engine as its leader sees it."""
    return SimpleNamespace(
        position=Position(3, 0),
        export=lambda: {"weights": weights},
        joined=None,
        spare=lambda phase: [torch.zeros(10)],
        state=SimpleNamespace(phase="only"),
        contributor=SimpleNamespace(strategy=SimpleNamespace(only_reads=only_reads)),
    )


@pytest.mark.parametrize("only_reads", [True, False])
def test_a_state_that_contributions_write_to_is_copied_at_once(only_reads: bool) -> None:
    weights = torch.ones(6_000_000)  # more than sockets hold
    leader = Leader(leading(weights, only_reads))
    mine, theirs = socket.socketpair()
    follower = Line(theirs)
    leader.accept(mine, list)
    leader.begin()
    if only_reads:
        leader.committing(SimpleNamespace(buffer_sums=[], to_tree=dict))  # type: ignore[arg-type]
    weights.zero_()
    kind = Kind.BEAT
    while kind is Kind.BEAT:
        start = bytearray(START.size)
        follower.fill([memoryview(start)])
        number, *position = START.unpack(start)
        kind = Kind(number)
        assert Position(*position) == (3, 0)
    tree = stream.receive(follower.fill)
    assert tree["engine"]["weights"].eq(1).all()
    follower.close()
