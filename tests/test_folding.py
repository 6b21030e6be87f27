"""What an agent has computed of a step outlives any interruption and any change of its range."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dnn.engine.contribute import Given, Leaf
from ray_dnn.engine.folding import Folding
from ray_dnn.plan import lay
from ray_dnn.tree import Node, fold

examples = settings(deadline=None, derandomize=True, max_examples=60)


def contribution(tick: tuple[int, int], worker: int) -> torch.Tensor:
    """Numbers whose sum depends on the order of additions."""
    step, phase = tick
    return torch.randn(5, generator=torch.Generator().manual_seed(1000 * step + 100 * phase + worker))


class Contributor:
    """Computes a contribution a worker, and notes which. A leaf is used for one piece at a time."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(phases=("first", "second"))
        self.tick = (0, 0)
        self.computed: list[int] = []
        self.made = 0

    def new_leaf(self, phase: str) -> Leaf:
        self.made += 1
        vector = torch.full((5,), torch.nan)
        return Leaf([vector], [], {"start": vector[:2], "end": vector[2:]})

    def contribute(self, worker: int, worker_state: Any, leaf: Leaf, agent: str, ready: Callable[[str], None]) -> Given:
        assert worker_state == f"state of {worker}"
        self.computed.append(worker)
        leaf.vector[0].fill_(torch.nan)
        whole = contribution(self.tick, worker)
        for name, part in {"end": whole[2:], "start": whole[:2]}.items():
            leaf.slots[name].copy_(part)
            ready(name)
        return Given(rows=worker)


class States:
    def of(self, worker: int) -> str:
        return f"state of {worker}"


class Told(Exception):
    """To leave."""


def attempt(folding: Folding, contributor: Contributor, nodes: tuple[Node, ...], patience: int) -> Any:
    """Fold, but leave before the contribution number ``patience``. The pieces, or None."""
    begun = 0
    told: dict[tuple[Node, str], tuple[Leaf, torch.Tensor]] = {}

    def ready(node: Node, leaf: Leaf, name: str) -> None:
        assert (node, name) not in told
        told[node, name] = leaf, leaf.slots[name].clone()

    def begin(worker: int) -> None:
        nonlocal begun
        begun += 1
        if begun > patience:
            raise Told

    try:
        pieces = folding.fold(contributor.tick, nodes, "me", begin, ready)
    except Told:
        return None
    for (node, name), (leaf, value) in told.items():  # what was called ready has not changed
        assert pieces[node] is leaf
        assert torch.equal(leaf.slots[name], value)
    return pieces


def inside(piece: Node, nodes: tuple[Node, ...]) -> bool:
    return any(node.start <= piece.start and piece.stop <= node.stop for node in nodes)


@st.composite
def attempts(draw: st.DrawFn) -> tuple[int, list[tuple[tuple[Node, ...], int]]]:
    """Workers, and in turn the nodes of one replica of a plan and how many contributions it finishes."""
    workers = draw(st.integers(1, 13))

    def once() -> tuple[tuple[Node, ...], int]:
        replicas = draw(st.integers(1, min(workers, 4)))
        plan = lay(0, workers, [draw(st.sampled_from([1.0, 2.0, 5.0])) for _ in range(replicas)])
        return plan.cover(draw(st.integers(0, replicas - 1))), draw(st.integers(0, workers))

    return workers, [once() for _ in range(draw(st.integers(1, 6)))]


@examples
@given(attempts(), st.integers(0, 1), st.booleans())
def test_pieces_outlive_interruptions_and_other_ranges_and_fold_to_the_same_bits(
    drawn: tuple[int, list[tuple[tuple[Node, ...], int]]], phase: int, whole: bool
) -> None:
    workers, tries = drawn
    contributor = Contributor()
    contributor.tick = (0, phase)
    finished: list[int] = []

    def look(worker: int, given: Given, leaf: Leaf) -> None:
        assert torch.equal(leaf.vector[0], contribution(contributor.tick, worker))
        finished.append(worker)

    folding = Folding(contributor, States(), look if whole else None)  # type: ignore[arg-type]
    known = {Node(w, w + 1): contribution(contributor.tick, w) for w in range(workers)}
    tries.append((tries[-1][0], workers))  # the last one is not interrupted
    for nodes, patience in tries:
        kept = {w for piece in folding._pieces if inside(piece, nodes) for w in range(*piece)}
        before = len(contributor.computed)
        pieces = attempt(folding, contributor, nodes, patience)
        new = contributor.computed[before:]
        assert len(new) == len(set(new))
        assert not kept & set(new)  # nothing that can be used is computed again
        assert set(folding.given) == {w for piece in folding._pieces for w in range(*piece)}
        leaves = [id(leaf) for leaf in folding._pieces.values()]
        assert len(leaves) == len(set(leaves))
    assert finished == (contributor.computed if whole else [])
    assert pieces.keys() == set(nodes)
    for node, leaf in pieces.items():
        assert torch.equal(leaf.vector[0], fold(node, known.get, torch.add))
    assert {worker: given.rows for worker, given in folding.given.items()} == {w: w for n in nodes for w in range(*n)}


@examples
@given(st.integers(1, 13), st.lists(st.integers(0, 4), max_size=9))
def test_an_agent_whose_range_stays_computes_no_worker_twice(workers: int, patience: list[int]) -> None:
    contributor = Contributor()
    folding = Folding(contributor, States())  # type: ignore[arg-type]
    nodes = lay(0, workers, [1.0] * min(workers, 2)).cover(0)
    for finishes in [*patience, workers]:
        attempt(folding, contributor, nodes, finishes)
    assert contributor.computed == [w for node in nodes for w in range(*node)]


@examples
@given(attempts())
def test_nothing_of_one_step_or_phase_gets_into_another(drawn: tuple[int, list[tuple[tuple[Node, ...], int]]]) -> None:
    workers, tries = drawn
    contributor = Contributor()
    folding = Folding(contributor, States())  # type: ignore[arg-type]
    ticks = [(step, phase) for step in range(len(tries)) for phase in range(2)]
    for (nodes, patience), (tick, following) in zip(
        [t for t in tries for _ in range(2)], pairwise([*ticks, (99, 0)]), strict=True
    ):
        contributor.tick = tick
        attempt(folding, contributor, nodes, patience)
        pieces = attempt(folding, contributor, nodes, workers)
        known = {Node(w, w + 1): contribution(tick, w) for w in range(workers)}
        for node, leaf in pieces.items():
            assert torch.equal(leaf.vector[0], fold(node, known.get, torch.add))
        if following[1]:
            folding.clear()
            assert not folding.given
    assert contributor.made <= 2 * workers  # memory is used again
