"""What virtual workers keep from step to step, where the strategy asks for it.

*combined*: every agent holds everybody's state, so it survives and moves like the rest of the committed state.
*mirrored*: a worker's state is held by its host and by one other agent, the host's successor. The new version reaches
both before the exchange completes; it replaces the old one only when the step is committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine import codec
from ray_dnn.engine.state import TrainingState
from ray_dnn.plan import Plan
from ray_dnn.strategies.base import WorkerState

if TYPE_CHECKING:
    from ray_dnn.strategies.base import Strategy


def holders(plan: Plan, worker: int, kind: str) -> tuple[int, ...]:
    """The replicas that hold a worker's state under a plan: the host first."""
    host = plan.host(worker)
    if kind == "none":
        return ()
    if kind == "mirrored":
        return (host, (host + 1) % plan.replicas)
    return (host, *(r for r in range(plan.replicas) if r != host))


def moves(
    kind: str, plan_before: Plan, before: Sequence[str], plan: Plan, now: Sequence[str]
) -> dict[tuple[int, int], list[int]]:
    """Which states must be copied when a plan follows another: (index in ``before``, index in ``now``) -> workers.

    ``before`` and ``now`` name the replicas of the two plans. Every present host is asked for what it hosts.
    """
    copies: dict[tuple[int, int], list[int]] = {}
    for worker in range(plan.workers):
        had = holders(plan_before, worker, kind)
        for to in holders(plan, worker, kind):
            if now[to] not in [before[holder] for holder in had]:
                copies.setdefault((had[0], to), []).append(worker)
    return copies


class WorkerStates:
    """The states of virtual workers that this agent holds."""

    def __init__(self, strategy: Strategy, state: TrainingState):
        self.kind = strategy.worker_state
        self._strategy = strategy
        self._state = state
        self._committed: dict[int, bytes] = {}  # encoded, by worker; only workers that this agent is a holder of
        self._next: dict[int, bytes] = {}  # versions of the present step, not committed yet

    def start(self) -> None:
        """Give every worker its first state (the same on every agent, for it depends on the job alone)."""
        if self.kind != "none":
            workers = range(self._state.config.virtual_workers)
            self._committed = {w: codec.encode(self._strategy.init_worker(self._state, w)) for w in workers}

    def clear(self) -> None:
        """Hold nothing: first states are not what a newcomer needs."""
        self._committed = {}

    def lay(self, mesh: Mesh, plan: Plan) -> None:
        """Take a place in a plan and let go of states that are not held under it."""
        self._mesh, self._plan = mesh, plan
        self._next = {}
        if self.kind != "none":
            mine = [w for w in range(plan.workers) if mesh.rank in holders(plan, w, self.kind)]
            missing = [w for w in mine if w not in self._committed]
            if missing:
                raise ValueError(f"the states of the virtual workers {missing} did not arrive")
            self._committed = {w: self._committed[w] for w in mine}

    def of(self, worker: int) -> WorkerState:
        """A worker's committed state, in memory of its own."""
        return None if self.kind == "none" else codec.decode(self._committed[worker])

    def pack(self, state: WorkerState) -> bytes:
        return b"" if self.kind == "none" else codec.encode(state, "the worker state")

    def exchange(self, packed: Mapping[int, bytes], sizes: NDArray[np.int64]) -> None:
        """Send new versions to their other holders and receive those that this agent holds."""
        if self.kind == "none":
            return
        self._next = dict(packed)
        rank = self._mesh.rank
        sends: dict[int, list[memoryview]] = {}
        receives: dict[int, list[memoryview]] = {}
        inbox: dict[int, bytearray] = {}
        for worker in range(self._plan.workers):
            host, *others = holders(self._plan, worker, self.kind)
            for other in others:
                if host == rank and other != rank:
                    sends.setdefault(other, []).append(memoryview(packed[worker]))
                elif other == rank and host != rank:
                    inbox[worker] = bytearray(int(sizes[worker]))
                    receives.setdefault(host, []).append(memoryview(inbox[worker]))
        self._mesh.exchange(sends, receives)
        self._next |= {worker: bytes(data) for worker, data in inbox.items()}

    def commit(self) -> None:
        self._committed |= self._next
        self._next = {}

    def export(self) -> dict[int, bytes]:
        """What this agent holds, encoded, by worker."""
        return dict(self._committed)

    def take(self, states: Mapping[int, bytes]) -> None:
        """Hold further states, as others exported them."""
        self._committed |= states
