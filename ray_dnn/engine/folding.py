"""The contributions that one agent computes in a step, folded as far as the tree allows.

What is finished survives an interruption: contributions depend on nothing but the committed state, so those computed
before a death are good after it, as far as they lie inside of the range that the agent hosts then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ray_dnn.engine.contribute import Contributor, Given, Leaf
from ray_dnn.engine.worker_states import WorkerStates
from ray_dnn.tree import Node

Tick = tuple[int, int]  # step, phase


class Folding:
    """Finished pieces of the tree for one step and phase.

    Attributes:
        given: what else the finished contributions consist of, by worker.
    """

    def __init__(self, contributor: Contributor, states: WorkerStates, finished: Callable[[int, Given, Leaf], None]):
        self._contributor = contributor
        self._states = states
        self._finished = finished  # called with each contribution before it is added to another
        self._tick: Tick = (-1, -1)
        self._pieces: dict[Node, Leaf] = {}  # disjoint subtrees, each complete
        self._free: dict[str, list[Leaf]] = {phase: [] for phase in contributor.state.phases}
        self.given: dict[int, Given] = {}

    def fold(self, tick: Tick, nodes: Iterable[Node], agent: str, begin: Callable[[int], None]) -> dict[Node, Leaf]:
        """The folded contributions below each of these nodes.

        Args:
            tick: that is computed. Pieces of another one are dropped.
            nodes: disjoint subtrees.
            agent: the name to use in errors.
            begin: called with each worker before its contribution is computed. What it raises ends the call; a later
                one goes on from there.
        """
        if tick != self._tick:
            self.clear()
            self._tick = tick
        wanted = list(nodes)
        for piece in list(self._pieces):
            if not any(node.start <= piece.start and piece.stop <= node.stop for node in wanted):
                self._drop(piece)
        for node in wanted:
            self._complete(node, agent, begin)
        return {node: self._pieces[node] for node in wanted}

    def clear(self) -> None:
        """Forget everything; the memory is used again."""
        for piece in list(self._pieces):
            self._drop(piece)

    def _drop(self, piece: Node) -> None:
        self._free[self._phase].append(self._pieces.pop(piece))
        for worker in range(*piece):
            del self.given[worker]

    @property
    def _phase(self) -> str:
        return self._contributor.state.phases[self._tick[1]]

    def _complete(self, node: Node, agent: str, begin: Callable[[int], None]) -> None:
        if node in self._pieces:
            return
        if node.is_leaf:
            self._pieces[node] = self._compute(node.start, agent, begin)
            return
        left, right = node.children()
        self._complete(left, agent, begin)
        self._complete(right, agent, begin)
        spare = self._pieces.pop(right)
        self._pieces[node] = self._pieces.pop(left).add(spare)
        self._free[self._phase].append(spare)

    def _compute(self, worker: int, agent: str, begin: Callable[[int], None]) -> Leaf:
        begin(worker)
        free = self._free[self._phase]
        leaf = free.pop() if free else self._contributor.new_leaf(self._phase)
        given = self._contributor.contribute(worker, self._states.of(worker), leaf, agent)
        self._finished(worker, given, leaf)
        self.given[worker] = given
        return leaf
