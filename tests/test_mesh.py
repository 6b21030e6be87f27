"""The mesh: bytes arrive where they belong, waits end when they should, and nobody else gets in."""

import contextlib
import gc
import math
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dnn.comm import buckets, exchange
from ray_dnn.comm.exchange import TreeExchange
from ray_dnn.comm.listener import Listener
from ray_dnn.comm.mesh import AbandonedError, Mesh, PeerLostError
from ray_dnn.comm.shared import Links, SharedMemory
from ray_dnn.plan import Plan
from ray_dnn.tree import Node, fold

SECRET = b"s" * 32
LIMIT_S = 30.0
examples = settings(deadline=None, derandomize=True, max_examples=25)


@contextlib.contextmanager
def connected(size: int) -> Iterator[list[Mesh]]:
    """A mesh over socket pairs."""
    members = [Mesh(0, rank, size) for rank in range(size)]
    for high in range(size):
        for low in range(high):
            one, other = socket.socketpair()
            members[low].attach(high, one)
            members[high].attach(low, other)
    try:
        yield members
    finally:
        for member in members:
            member.close()


def start(call: Callable[[], Any]) -> "Future[Any]":
    """Run in a thread of its own."""
    future: Future[Any] = Future()

    def body() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run at the same time; the results."""
    return [future.result(LIMIT_S) for future in [start(call) for call in calls]]


def views(buffers: list[bytes] | list[bytearray]) -> list[memoryview]:
    return [memoryview(buffer) for buffer in buffers]


# -- exchange --------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(0, 300) | st.sampled_from([70_000, 900_000]), max_size=4)


@examples
@given(st.integers(1, 4), st.data())
def test_everybody_receives_what_was_sent_in_order(size: int, data: st.DataObject) -> None:
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    rng = random.Random(len(pairs))
    sent = {pair: [rng.randbytes(n) for n in data.draw(sizes)] for pair in pairs}
    inbox = {pair: [bytearray(len(b)) for b in buffers] for pair, buffers in sent.items()}
    arrived: dict[tuple[int, int], list[int]] = {pair: [] for pair in pairs}

    def exchange(mesh: Mesh) -> None:
        me = mesh.rank
        mesh.exchange(
            {peer: views(sent[me, peer]) for peer in mesh.peers},
            {peer: views(inbox[peer, me]) for peer in mesh.peers},
            lambda peer, index: arrived[peer, me].append(index),
        )

    with connected(size) as members:
        together([lambda mesh=mesh: exchange(mesh) for mesh in members])  # type: ignore[misc]
    assert inbox == sent
    assert arrived == {pair: list(range(len(buffers))) for pair, buffers in sent.items()}


def test_payloads_are_gathered_by_rank() -> None:
    with connected(3) as members:
        same = together([lambda m=m: m.gather(bytes([m.rank]) * 3) for m in members])  # type: ignore[misc]
        unlike = together([lambda m=m: m.gather_variable(b"x" * m.rank) for m in members])  # type: ignore[misc]
    assert same == [[b"\0\0\0", b"\1\1\1", b"\2\2\2"]] * 3
    assert unlike == [[b"", b"x", b"xx"]] * 3


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    workers = draw(st.integers(1, 9))
    cuts = draw(st.sets(st.integers(1, workers - 1), max_size=3)) if workers > 1 else set()
    return Plan(0, (0, *sorted(cuts), workers))


def shared(memory: SharedMemory | None, vector: list[torch.Tensor]) -> list[torch.Tensor]:
    """A copy of a vector, where others read it."""
    if memory is None:
        return vector
    return [memory.zeros(len(lane), lane.dtype).copy_(lane) for lane in vector]


@mock.patch.object(exchange, "CHUNK", 24)
@mock.patch.multiple(buckets, _SMALLEST=64, CHUNK=24)
@examples
@given(plans(), st.integers(0, 700), st.integers(0, 90), st.integers(0, 99), st.booleans())
def test_the_sum_has_the_bits_of_the_fixed_tree(plan: Plan, singles: int, doubles: int, seed: int, apart: bool) -> None:
    """Some members read each other's memory, others send; parts are ready in any order, early or at the end."""
    rng = torch.Generator().manual_seed(seed)
    dice = random.Random(seed)
    memories = [SharedMemory() if dice.random() < 0.6 else None for _ in range(plan.replicas)]
    early = [dice.random() < 0.7 for _ in range(plan.replicas)]

    def lanes() -> list[torch.Tensor]:
        return [torch.randn(singles, generator=rng), torch.randn(doubles, generator=rng, dtype=torch.float64)]

    def add(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
        return [a + b for a, b in zip(left, right, strict=True)]

    known = {Node(w, w + 1): lanes() for w in range(plan.workers)}
    outs = [lanes() for _ in range(plan.replicas)]

    def combine(mesh: Mesh) -> list[list[bytes]]:
        memory = memories[mesh.rank]
        exchange = TreeExchange(mesh, plan, links=Links(mesh, memory))
        folded = {node: shared(memory, fold(node, known.get, add)) for node in plan.cover(mesh.rank)}
        two = [shared(memory, outs[mesh.rank]) for _ in range(2)]  # in turn, as the engine does
        headers = []
        for turn in range(4):
            combination = exchange.begin(two[turn % 2], list(range(plan.replicas)), apart)
            assert combination.early == (len(exchange.links.read_by) < plan.replicas - 1)
            for node, vector in folded.items() if early[mesh.rank] else ():
                for lane, start, stop in pieces(vector, mesh.rank):
                    combination.ready(node, vector, lane, start, stop)
            headers.append(combination.finish(b"h" * mesh.rank, folded))
            assert combination.finite
        assert all(torch.equal(a, b) for a, b in zip(*two, strict=True))
        for mine, lane in zip(outs[mesh.rank], two[0], strict=True):
            mine.copy_(lane)
        return headers

    def pieces(vector: list[torch.Tensor], rank: int) -> list[tuple[int, int, int]]:
        cuts = [(lane, at, min(at + 50, len(v))) for lane, v in enumerate(vector) for at in range(0, len(v), 50)]
        random.Random(rank).shuffle(cuts)
        return cuts

    with connected(plan.replicas) as members:
        headers = together([lambda m=m: combine(m) for m in members])  # type: ignore[misc]
    assert headers == [[[b"h" * r for r in range(plan.replicas)]] * 4] * plan.replicas
    expected = fold(Node(0, plan.workers), known.get, add)
    for out in outs:
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("memory", [None, SharedMemory], ids=["sent", "read"])
def test_all_learn_that_the_sum_is_not_finite(bad: float, memory: type[SharedMemory] | None) -> None:
    plan = Plan(0, (0, 1, 2, 3))

    def combine(mesh: Mesh) -> bool:
        mine = memory() if memory else None
        exchange = TreeExchange(mesh, plan, links=Links(mesh, mine))
        vector = shared(mine, [torch.full((500,), 3e38 if math.isinf(bad) else 1.0)])
        if mesh.rank == 1 and math.isnan(bad):
            vector[0][123] = bad
        combination = exchange.begin(shared(mine, [torch.zeros(500)]), [0, 0, 0])
        combination.finish(b"", {Node(mesh.rank, mesh.rank + 1): vector})
        return combination.finite

    with connected(3) as members:
        assert together([lambda m=m: combine(m) for m in members]) == [False] * 3  # type: ignore[misc]


@pytest.mark.parametrize("length", [0, 7, 500], ids=["no_slices", "one_slice", "all_slices"])
def test_nobody_completes_an_exchange_before_all_have_done_what_is_between_its_phases(length: int) -> None:
    plan = Plan(0, (0, 1, 2, 3))
    early: list[bool] = []

    def combine(mesh: Mesh, between: Callable[[list[bytes]], None]) -> None:
        exchange, vector = TreeExchange(mesh, plan), [torch.ones(length)]
        exchange.combine(b"h", [1, 1, 1], {Node(mesh.rank, mesh.rank + 1): vector}, [torch.zeros(length)], between)

    with connected(3) as members:
        others = [start(lambda m=m: combine(m, lambda headers: None)) for m in members[:2]]  # type: ignore[misc]

        def look(headers: list[bytes]) -> None:
            early.append(bool(futures.wait(others, 0.3, futures.FIRST_COMPLETED).done))

        combine(members[2], look)
        for future in others:
            future.result(LIMIT_S)
    assert early == [False]


# -- shared memory ---------------------------------------------------------------------------------------------------


def linked(memories: list[SharedMemory | None], checked: bool = False) -> list[Links]:
    with connected(len(memories)) as members:
        for member in members:
            member.checked = checked
        return together([lambda m=m: Links(m, memories[m.rank]) for m in members])  # type: ignore[misc]


def test_only_what_two_members_can_both_do_is_done_through_memory() -> None:
    links = linked([SharedMemory(), None, SharedMemory()])
    assert [link.reads for link in links] == [{2}, set(), {0}]
    assert [link.read_by for link in links] == [{2}, set(), {0}]
    assert all(not link.reads for link in linked([SharedMemory(), SharedMemory()], checked=True))


def test_a_process_of_the_same_number_elsewhere_is_not_taken_for_a_neighbour() -> None:
    one, other = SharedMemory(), SharedMemory()
    pid, descriptor, token = struct.unpack("!qq16s", other.identity)
    assert one.meet(other.identity) == {}
    assert one.meet(struct.pack("!qq16s", pid, descriptor, bytes(reversed(token)))) is None
    assert one.meet(struct.pack("!qq16s", 2**22 + 1, descriptor, bytes(16))) is None
    for number in os.pipe():  # what that process has under the number may be anything, also what cannot be read
        assert one.meet(struct.pack("!qq16s", pid, number, bytes(16))) is None
        os.close(number)


def access_to(tensor: torch.Tensor) -> str:
    """What this process may do with a tensor's memory, as /proc writes it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line.split()[1]
    raise AssertionError("not mapped")


def test_what_a_peer_shared_stays_readable_when_it_is_gone_and_cannot_be_written_to() -> None:
    memories: list[SharedMemory | None] = [SharedMemory(), SharedMemory()]
    first, *links = linked(memories)
    theirs = memories[1]
    assert theirs is not None
    tensors = [theirs.zeros(100, torch.float64) for _ in range(2)]
    descriptors = [theirs.descriptor(tensor) for tensor in tensors]
    tensors[0].fill_(7.0)
    view = first.view(1, descriptors[0], torch.float64)
    assert access_to(view) == "r--s"
    memories[1] = theirs = None
    links.clear()
    del tensors
    gc.collect()
    assert bool((view == 7.0).all())
    with pytest.raises(PeerLostError, match="cannot be read"):
        first.view(1, descriptors[1], torch.float64)


# -- the end of a wait -----------------------------------------------------------------------------------------------


def wait_for(mesh: Mesh, *peers: int, begun: threading.Event | None = None) -> None:
    """Receive two bytes from each peer; ``begun`` is set when the first one is there."""
    mesh.exchange({}, {p: views([bytearray(1), bytearray(1)]) for p in peers}, lambda *_: begun and begun.set())


def send(mesh: Mesh, peer: int, data: bytes = b"x") -> None:
    mesh.exchange({peer: [memoryview(data)]}, {})


def test_a_closed_peer_ends_the_wait_of_all_others() -> None:
    with connected(4) as members:
        waiting = [start(lambda m=m: wait_for(m, *m.peers)) for m in members[:3]]  # type: ignore[misc]
        send(members[3], 0)
        members[3].close()
        errors = [future.exception(LIMIT_S) for future in waiting]
    assert [type(error) for error in errors] == [PeerLostError] * 3
    assert [error.peer for error in errors] == [3] * 3  # type: ignore[union-attr]


def test_sending_to_a_closed_peer_ends_too() -> None:
    with connected(2) as (one, other):
        other.close()
        with pytest.raises(PeerLostError):
            send(one, 1, b"x" * 10_000_000)


def test_abandoning_ends_a_wait_that_has_begun() -> None:
    begun = threading.Event()
    with connected(2) as (one, other):
        waiting = start(lambda: wait_for(one, 1, begun=begun))
        send(other, 0)
        assert begun.wait(LIMIT_S)
        one.abandon()
        assert isinstance(waiting.exception(LIMIT_S), AbandonedError)


def test_abandoning_ends_every_wait_to_come_even_one_for_nothing() -> None:
    with connected(2) as (one, other):
        send(other, 0, b"xx")
        one.abandon()
        one.abandon()
        for _ in range(2):
            with pytest.raises(AbandonedError):
                one.exchange({}, {})
            with pytest.raises(AbandonedError):
                wait_for(one, 1)


def test_a_closed_mesh_can_be_abandoned_and_closed_again() -> None:
    with connected(2) as (one, _):
        one.close()
        one.abandon()
        one.close()


def test_a_peer_that_wakes_up_late_writes_nowhere() -> None:
    begun = threading.Event()
    buffers = [bytearray(1), bytearray(b"kept")]
    with connected(2) as (one, other):
        waiting = start(lambda: one.exchange({}, {1: views(buffers)}, lambda *_: begun.set()))
        send(other, 0)
        assert begun.wait(LIMIT_S)
        one.abandon()
        assert isinstance(waiting.exception(LIMIT_S), AbandonedError)
        send(other, 0, b"late")  # before the mesh is closed: it stays in the kernel
        one.close()
        with pytest.raises(PeerLostError):
            send(other, 0, b"late" * 1_000_000)
    assert buffers == [b"x", b"kept"]


# -- forming ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listeners(count: int) -> Iterator[list[Listener]]:
    made = [Listener("127.0.0.1", SECRET) for _ in range(count)]
    try:
        yield made
    finally:
        for listener in made:
            listener.close()


def form(generation: int, rank: int, at: list[Listener], timeout_s: float = LIMIT_S) -> Mesh:
    mesh = Mesh(generation, rank, len(at))
    try:
        mesh.form(at[rank], SECRET, [listener.address for listener in at], timeout_s=timeout_s)
    except BaseException:
        mesh.close()
        raise
    return mesh


def test_members_form_a_mesh_whoever_comes_first() -> None:
    with listeners(3) as at:
        early = start(lambda: form(7, 2, at))
        others = [start(lambda rank=rank: form(7, rank, at)) for rank in (1, 0)]  # type: ignore[misc]
        members = [future.result(LIMIT_S) for future in (*others[::-1], early)]
        gathered = together([lambda m=m: m.gather(bytes([m.rank])) for m in members])  # type: ignore[misc]
        for member in members:
            member.close()
    assert gathered == [[b"\0", b"\1", b"\2"]] * 3


def test_generations_and_channels_do_not_mix() -> None:
    with listeners(2) as at:
        addresses = [listener.address for listener in at]

        def member(generation: int, rank: int, channel: int) -> Mesh:
            mesh = Mesh(generation, rank, 2, channel)
            mesh.form(at[rank], SECRET, addresses, LIMIT_S)
            return mesh

        keys = [(1, 0), (1, 1), (2, 0)]
        high = [member(generation, 1, channel) for generation, channel in keys]  # connections wait to be taken
        low = [member(generation, 0, channel) for generation, channel in keys]
        for index, mesh in enumerate(high):
            send(mesh, 0, bytes([index, index]))
        for index, mesh in enumerate(low):
            inbox = bytearray(2)
            mesh.exchange({}, {1: [memoryview(inbox)]})
            assert inbox == bytes([index, index])
        for mesh in (*high, *low):
            mesh.close()


def test_a_member_that_never_comes_is_named_when_time_is_up() -> None:
    with listeners(2) as at, pytest.raises(PeerLostError, match="did not connect in time") as caught:
        form(1, 0, at, timeout_s=0.05)
    assert caught.value.peer == 1


def test_a_member_that_is_gone_is_named() -> None:
    with listeners(2) as at:
        addresses = [listener.address for listener in at]
        at[0].close()
        mesh = Mesh(1, 1, 2)
        with pytest.raises(PeerLostError, match="connecting failed") as caught:
            mesh.form(at[1], SECRET, addresses)
        mesh.close()
    assert caught.value.peer == 0


def test_abandoning_ends_the_wait_for_members() -> None:
    with listeners(2) as at:
        mesh = Mesh(1, 0, 2)
        waiting = start(lambda: mesh.form(at[0], SECRET, [listener.address for listener in at], timeout_s=LIMIT_S))
        mesh.abandon()
        assert isinstance(waiting.exception(LIMIT_S), AbandonedError)
        mesh.close()
