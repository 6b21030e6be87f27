"""What virtual workers keep from step to step, where the strategy asks for it.

*combined*: every agent holds everybody's state, so it survives and moves like the rest of the committed state.
*mirrored*: a worker's state is held by its host and by one other agent, the host's successor. The new version reaches
both before the exchange completes; it replaces the old one only when the step is committed. So whichever single agent
dies, whenever it dies, each worker's state of the newest committed step is on an agent that lives.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine import codec
from ray_dnn.engine.device import to_device
from ray_dnn.engine.state import TrainingState
from ray_dnn.errors import AgentLostError
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


def moves(kind: str, plan: Plan, held: Sequence[Collection[int]]) -> dict[tuple[int, int], list[int]]:
    """Which states must be copied so that all holders under a plan have them: (from, to) -> workers.

    ``held``: the workers whose states each replica has.

    Raises:
        AgentLostError: a worker's host and its mirror were lost at once.
    """
    copies: dict[tuple[int, int], list[int]] = {}
    for worker in range(plan.workers):
        sources = [replica for replica, workers in enumerate(held) if worker in workers]
        for to in holders(plan, worker, kind):
            if not sources:
                raise AgentLostError(
                    f"The agents that held the state of virtual worker {worker}, its host and its mirror, were lost at "
                    "once. Nothing else has it."
                )
            if to not in sources:
                copies.setdefault((sources[0], to), []).append(worker)
    return copies


class WorkerStates:
    """The states of virtual workers that this agent holds."""

    def __init__(self, strategy: Strategy, state: TrainingState):
        self.kind = strategy.worker_state
        self._strategy = strategy
        self._state = state
        self._committed: dict[int, bytes] = {}  # encoded, by worker; only workers that this agent is a holder of
        self._next: dict[int, bytes] = {}  # versions of the present step, not committed yet
        self._placed = False  # whether it has ever had a place in a plan: not while it follows others

    def start(self) -> None:
        """Give every worker its first state (the same on every agent, for it depends on the job alone)."""
        if self.kind != "none":
            workers = range(self._state.config.virtual_workers)
            self._committed = {w: codec.encode(self._strategy.init_worker(self._state, w)) for w in workers}

    def restore(self, states: Mapping[int, bytes]) -> None:
        """Hold these, encoded, by worker: of every worker."""
        self._committed = dict(states)

    def clear(self) -> None:
        """Hold nothing: first states are not what a newcomer needs."""
        self._committed = {}

    def settle(self, mesh: Mesh, plan: Plan) -> None:
        """Take a place in a plan: receive the states that this agent is to hold, send those that others lack.

        What is not held any more is let go of only at the next commit: until then others may need it.
        """
        self._mesh, self._plan, self._placed = mesh, plan, True
        self._next = {}
        if self.kind == "none":
            return
        mine = bytes(worker in self._committed for worker in range(plan.workers))
        held = [{w for w, has in enumerate(raw) if has} for raw in mesh.gather(mine)]
        copies = moves(self.kind, plan, held)
        rank = mesh.rank
        mine_to = {to: workers for (source, to), workers in copies.items() if source == rank}
        outbox = {to: codec.encode([_raw(self._committed[w]) for w in workers]) for to, workers in mine_to.items()}
        sizes = {to: struct.pack("<q", len(data)) for to, data in outbox.items()}
        heads = {source: bytearray(8) for source, to in copies if to == rank}
        mesh.exchange(_boxes(sizes), _boxes(heads))
        inbox = {source: bytearray(struct.unpack("<q", head)[0]) for source, head in heads.items()}
        mesh.exchange(_boxes(outbox), _boxes(inbox))
        for source, data in inbox.items():
            for worker, state in zip(copies[source, rank], codec.decode(data), strict=True):
                self._committed[worker] = state.numpy().tobytes()

    def of(self, worker: int) -> WorkerState:
        """A worker's committed state, in memory of its own, on the device of the model."""
        return None if self.kind == "none" else to_device(codec.decode(self._committed[worker]), self._state.device)

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
        """The step is committed: its new versions replace the old ones."""
        if self.kind != "none" and self._placed:
            rank, plan = self._mesh.rank, self._plan
            mine = [w for w in range(plan.workers) if rank in holders(plan, w, self.kind)]
            self._committed |= self._next
            self._committed = {w: self._committed[w] for w in mine}
        self._next = {}

    def export(self) -> dict[int, bytes]:
        """What this agent holds, encoded, by worker."""
        return dict(self._committed)


def _raw(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _boxes(data: Mapping[int, bytes | bytearray]) -> dict[int, list[memoryview]]:
    return {peer: [memoryview(raw)] for peer, raw in data.items()}
