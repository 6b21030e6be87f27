"""How agents come to the same state: whoever is behind first, newcomers afterwards."""

from concurrent import futures
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_dnn.comm.mesh import GarbledError, Mesh
from ray_dnn.engine import codec, stream
from ray_dnn.engine.reports import EvaluationReport
from ray_dnn.engine.step import Position
from ray_dnn.engine.transfer import _receive, _send, agree, roles
from ray_dnn.errors import ProtocolError
from ray_dnn.marks import Marks
from tests.test_mesh import LIMIT_S, connected, start, together


class Engine:
    """Has evaluated some things."""

    def __init__(self, evaluations: int):
        self.history = [{"step": float(n)} for n in range(evaluations)]
        self.marks = Marks()
        self.state = SimpleNamespace(phases=("only",))
        self.last = None
        self.copied = 0

    @property
    def position(self) -> Position:
        return Position(0, len(self.history))

    def evaluated(self, entry: dict[str, float]) -> EvaluationReport:
        self.history.append(entry)
        return EvaluationReport(len(self.history), 0, {})

    def export(self) -> Any:
        return self.history

    def home(self) -> Any:
        return None

    def home_of_round(self) -> Any:
        return None

    def load(self, tree: Any) -> None:
        self.copied += 1
        self.history = tree


def come_to_agree(mesh: Mesh, engine: Any, holds: bool) -> list[int]:
    """The serials of the reports that this agent owes now."""
    reports: list[Any] = [EvaluationReport(n + 1, 0, {}, time=0.0) for n in range(len(engine.history))] if holds else []
    owed: list[Any] = []
    agree(mesh, engine, holds, lambda: reports, owed.append)
    return [report.serial for report in owed]


def test_no_newcomer_copies_the_state_before_everybody_has_caught_up() -> None:
    engines = [Engine(3), Engine(2), Engine(0), Engine(2)]
    copying: list[Future[Any]] = []
    early: list[bool] = []

    def slowly(entry: dict[str, float]) -> EvaluationReport:
        early.append(bool(futures.wait(copying, 0.3).done))
        return Engine.evaluated(engines[3], entry)

    engines[3].evaluated = slowly  # type: ignore[method-assign]
    with connected(4) as members:
        copying.append(start(lambda: come_to_agree(members[2], engines[2], False)))
        calls = [lambda r=r: come_to_agree(members[r], engines[r], True) for r in (0, 1, 3)]  # type: ignore[misc]
        owed = [*together(calls), copying[0].result(LIMIT_S)]
    assert early == [False]
    assert [len(engine.history) for engine in engines] == [3, 3, 3, 3]
    assert [engine.copied for engine in engines] == [0, 0, 1, 0]
    assert owed == [[], [3], [3], [1, 2, 3]]


def test_agents_that_cannot_be_of_one_run_say_so() -> None:
    with connected(2) as members:
        calls = [start(lambda r=r: come_to_agree(members[r], Engine(3 * r), True)) for r in range(2)]  # type: ignore[misc]
        errors = [call.exception(LIMIT_S) for call in calls]
    assert [type(error) for error in errors] == [ProtocolError] * 2


TREE: Any = {
    "small": [torch.arange(5), 1.5, None],
    "large": torch.randn(700, 900),  # of more than one piece
    "odd": torch.randn(1501).to(torch.bfloat16),  # no whole number of words
    "transposed": torch.randn(50, 60).t(),
    "channels last": torch.randn(2, 3, 20, 20).to(memory_format=torch.channels_last),
    "with gaps": torch.randn(60, 80)[:, ::2],
    "expanded": torch.randn(60, 1).expand(60, 70),
}


def test_a_tree_arrives_with_every_bit_and_in_its_own_memory() -> None:
    mine = torch.zeros(700, 900)
    home = {"large": mine, "transposed": torch.zeros(60, 50), "odd": torch.zeros(1501)}
    with connected(2) as (one, other):
        sending = start(lambda: _send(one, [1], TREE))
        tree = _receive(other, 0, home)
        sending.result(LIMIT_S)
    assert codec.first_difference(TREE, tree) is None
    assert codec.digest(TREE) == codec.digest(tree)
    assert tree["large"] is mine
    assert tree["transposed"] is not home["transposed"]  # which lies in memory otherwise
    assert tree["channels last"].is_contiguous(memory_format=torch.channels_last)


def test_state_that_arrives_with_another_bit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(2) as (one, other):

        def garbled(sends: Any, receives: Any, received: Any = None) -> None:
            Mesh.exchange(other, sends, receives, received)
            for buffer in (buffer for buffers in receives.values() for buffer in buffers if len(buffer) == 2**20):
                buffer[77] ^= 4

        monkeypatch.setattr(other, "exchange", garbled)
        sending = start(lambda: _send(one, [1], TREE))
        with pytest.raises(GarbledError, match="other bytes than they were sent"):
            _receive(other, 0, None)
        sending.result(LIMIT_S)


def sent_with(damage: Any) -> list[bytearray]:
    """What a tree is sent as, with damage done to it."""
    wire: list[bytearray] = []
    stream.send(lambda pieces: wire.extend(bytearray(piece) for piece in pieces), TREE)
    damage(wire)
    return wire


def received(wire: list[bytearray]) -> Any:
    data = memoryview(b"".join(wire))
    at = 0

    def fill(pieces: list[memoryview]) -> None:
        nonlocal at
        for piece in pieces:
            piece[:] = data[at : at + len(piece)]
            at += len(piece)

    return stream.receive(fill)


def swap(wire: list[bytearray], piece: int, one: slice, other: slice) -> None:
    wire[piece][one], wire[piece][other] = wire[piece][other], wire[piece][one]


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda wire, at=at: wire[1].__setitem__(at, wire[1][at] ^ 1) for at in (0, 20, -1)),
        *(lambda wire, p=p, at=at: wire[p].__setitem__(at, wire[p][at] ^ 128) for p in (2, 4) for at in (0, 7, -1)),
        lambda wire: swap(wire, 2, slice(0, 1), slice(1, 2)),  # two bytes of a word
        lambda wire: swap(wire, 2, slice(0, 8), slice(8, 16)),  # two words
        lambda wire: swap(wire, 2, slice(0, 4096), slice(8192, 12288)),
        lambda wire: wire[2].__setitem__(slice(64, 128), bytes(64)),  # never written
        lambda wire: wire.__setitem__(slice(2, 4), [wire[2][:-8], wire[3], wire[2][-8:]]),  # lost and found later
        lambda wire: wire[-1].__setitem__(3, wire[-1][3] ^ 1),
    ],
)
def test_no_damage_goes_unnoticed(damage: Any) -> None:
    assert codec.first_difference(received(sent_with(lambda wire: None)), TREE) is None
    with pytest.raises(stream.WrongBytesError):
        received(sent_with(damage))


def test_newcomers_share_out_among_those_who_have_the_state() -> None:
    said = [Position(3, 1), None, Position(4, 1), None, None, Position(4, 1), None]
    who = roles(said)
    assert [who.source_of(newcomer) for newcomer in who.newcomers] == [2, 5, 0, 2]


def test_two_newcomers_copy_from_two_members() -> None:
    engines = [Engine(3), Engine(0), Engine(3), Engine(0)]
    with connected(4) as members:
        sent = [0, 0, 0, 0]
        for member in members:
            member.moved = lambda count, rank=member.rank: sent.__setitem__(rank, sent[rank] + count)
        together(
            [lambda r=r: come_to_agree(members[r], engines[r], bool(engines[r].history)) for r in range(4)]  # type: ignore[misc]
        )
    assert [engine.copied for engine in engines] == [0, 1, 0, 1]
    assert [len(engine.history) for engine in engines] == [3, 3, 3, 3]
    assert sent[0] == sent[2]
