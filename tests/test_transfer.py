"""How agents come to the same state: whoever is behind first, newcomers afterwards."""

from concurrent import futures
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from ray_dnn.comm.mesh import GarbledError, Mesh
from ray_dnn.engine.reports import EvaluationReport
from ray_dnn.engine.step import Position
from ray_dnn.engine.transfer import _receive, _send, agree
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

    def load(self, tree: Any) -> None:
        self.copied += 1
        self.history = tree


def come_to_agree(mesh: Mesh, engine: Any, holds: bool) -> list[int]:
    """The serials of the reports that this agent owes now."""
    reports: list[Any] = [EvaluationReport(n + 1, 0, {}) for n in range(len(engine.history))] if holds else []
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


def test_state_that_arrives_with_another_bit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(2) as (one, other):
        data = bytearray(b"the state" * 1000)
        sending = start(lambda: _send(one, [1], bytes(data)))
        good = _receive(other, 0)
        sending.result(LIMIT_S)
        assert good == data

        def garbled(sends: Any, receives: Any, received: Any = None) -> None:
            Mesh.exchange(other, sends, receives, received)
            for (buffer,) in receives.values():
                if len(buffer) > 100:
                    buffer[77] ^= 4

        monkeypatch.setattr(other, "exchange", garbled)
        sending = start(lambda: _send(one, [1], bytes(data)))
        with pytest.raises(GarbledError, match="other bytes than it was sent"):
            _receive(other, 0)
        sending.result(LIMIT_S)
