"""The contributions that one agent computes in a step, folded as far as the tree allows.

What is finished survives an interruption: contributions depend on nothing but the committed state, so those computed
before a death are good after it, as far as they lie inside of the range that the agent hosts then.

Folding does not wait for a contribution to be whole: each part of it is added to the sums to its left as soon as it is
there, while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from ray_dnn.engine.contribute import Contributor, Given, Leaf
from ray_dnn.engine.worker_states import WorkerStates
from ray_dnn.tree import Node, completed

Tick = tuple[int, int]  # step, phase
Ready = Callable[[Node, Leaf, str], None]


class Folding:
    """Finished pieces of the tree for one step and phase.

    Attributes:
        given: what else the finished contributions consist of, by worker.
    """

    def __init__(
        self,
        contributor: Contributor,
        states: WorkerStates,
        finished: Callable[[int, Given, Leaf], None] | None = None,
    ):
        self._contributor = contributor
        self._states = states
        self._finished = finished  # called with each whole contribution before it is added to another
        self._tick: Tick = (-1, -1)
        self._pieces: dict[Node, Leaf] = {}  # disjoint subtrees, each complete
        self._free: dict[str, list[Leaf]] = {phase: [] for phase in contributor.state.phases}
        self.given: dict[int, Given] = {}

    def fold(
        self,
        tick: Tick,
        nodes: Iterable[Node],
        agent: str,
        begin: Callable[[int], None],
        ready: Ready | None = None,
    ) -> dict[Node, Leaf]:
        """The folded contributions below each of these nodes.

        Args:
            tick: that is computed. Pieces of another one are dropped.
            nodes: disjoint subtrees.
            agent: the name to use in errors.
            begin: called with each worker before its contribution is computed. What it raises ends the call; a later
                one goes on from there.
            ready: called with one of the nodes, its leaf, and a name whose slot there will not change any more. Not
                for all of them: what was finished before is not told of.
        """
        if tick != self._tick:
            self.clear()
            self._tick = tick
        wanted = list(nodes)
        for piece in list(self._pieces):
            if not any(node.start <= piece.start and piece.stop <= node.stop for node in wanted):
                self._drop(piece)
        for node in wanted:
            self._complete(node, node, lambda worker, top: self._compute(worker, top, agent, begin, ready))
        return {node: self._pieces[node] for node in wanted}

    def clear(self) -> None:
        """Forget everything; the memory is used again."""
        for piece in list(self._pieces):
            self._drop(piece)

    def borrow(self, phase: str) -> Leaf:
        """Memory of no piece, until `give_back`."""
        free = self._free[phase]
        return free.pop() if free else self._contributor.new_leaf(phase)

    def give_back(self, phase: str, leaf: Leaf) -> None:
        """It is not used any more."""
        self._free[phase].append(leaf)

    def _drop(self, piece: Node) -> None:
        self.give_back(self._phase, self._pieces.pop(piece))
        for worker in range(*piece):
            del self.given[worker]

    @property
    def _phase(self) -> str:
        return self._contributor.state.phases[self._tick[1]]

    def _complete(self, node: Node, top: Node, compute: Callable[[int, Node], None]) -> None:
        if node in self._pieces:
            return
        if node.is_leaf:
            compute(node.start, top)
            return
        left, right = node.children()
        self._complete(left, top, compute)
        self._complete(right, top, compute)
        if left in self._pieces and right in self._pieces:  # else they were added up while a leaf was computed
            spare = self._pieces.pop(right)
            self._pieces[node] = self._pieces.pop(left).add(spare)
            self.give_back(self._phase, spare)

    def _compute(self, worker: int, top: Node, agent: str, begin: Callable[[int], None], ready: Ready | None) -> None:
        """Compute a contribution and add it to the sums to its left that it completes."""
        begin(worker)
        leaf = self.borrow(self._phase)
        apart = self._finished is not None
        node, lefts = (Node(worker, worker + 1), []) if apart else completed(worker, top)
        chain = [leaf, *(self._pieces[left] for left in lefts)]

        def given(name: str) -> None:
            for value, total in pairwise(chain):
                total.slots[name].add_(value.slots[name])
            if node == top and ready is not None:
                ready(top, chain[-1], name)

        try:
            self.given[worker] = self._contributor.contribute(worker, self._states.of(worker), leaf, agent, given)
        except BaseException:
            for left in lefts:  # parts of them may have been added to
                self._drop(left)
            self.give_back(self._phase, leaf)
            raise
        if self._finished is not None:
            self._finished(worker, self.given[worker], leaf)
        for value, total in pairwise(chain):
            total.add_buffers(value)
        for left in lefts:
            del self._pieces[left]
        self._pieces[node] = chain.pop()
        for spare in chain:
            self.give_back(self._phase, spare)
