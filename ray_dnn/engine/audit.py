"""Finding agents that compute wrongly.

Two comparisons, both made from the headers of an exchange, so before anything is applied, and on every agent alike:

* of states: each replica sums the bits of its committed state after it has computed. Those that differ from the
  majority are wrong.
* of contributions: some virtual workers of each step, in turn, are computed by a second replica too. Where the two
  differ, everybody computes that worker's contribution again; the majority decides who was wrong.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from ray_dnn.comm.mesh import Mesh
from ray_dnn.config import Audit
from ray_dnn.engine import codec, stream
from ray_dnn.engine.contribute import Contributor, Given, Leaf
from ray_dnn.engine.worker_states import WorkerStates
from ray_dnn.errors import AuditError, RayDnnError
from ray_dnn.plan import Plan


class ConvictedError(RayDnnError):
    """Some replicas compute wrongly. Raised on every agent alike, before anything is applied. Never reaches the user.

    Attributes:
        ranks: of those replicas.
        reason: what they did.
        late: whether earlier contributions of theirs may have been wrong without being compared.
    """

    def __init__(self, ranks: Sequence[int], reason: str, late: bool):
        super().__init__(reason)
        self.ranks = tuple(ranks)
        self.reason = reason
        self.late = late


def chosen(audit: Audit, step: int, workers: int) -> tuple[int, ...]:
    """The virtual workers whose contributions are compared in a step: each has its turn."""
    count = min(audit.workers, workers)
    return tuple(sorted((step * count + i) % workers for i in range(count)))


def second(plan: Plan, worker: int, step: int) -> int:
    """The replica that computes a worker's contribution too: each of the others has its turn."""
    return (plan.host(worker) + 1 + step // plan.workers % (plan.replicas - 1)) % plan.replicas


def wrong_by_majority(values: Sequence[int]) -> list[int] | None:
    """The indexes of the values that differ from what more than half are; None where there is no such majority."""
    value, count = Counter(values).most_common(1)[0]
    return None if 2 * count <= len(values) else [i for i, other in enumerate(values) if other != value]


def wrong_contributions(first: Mapping[int, int], again: Sequence[int]) -> list[int] | None:
    """Who was wrong about a contribution; None where it cannot be told.

    Args:
        first: by replica the digests that differed.
        again: by replica the digests of the same contribution, computed once more by all.
    """
    wrong = wrong_by_majority(again)
    if wrong is None:
        return None
    right = next(digest for rank, digest in enumerate(again) if rank not in wrong)
    return sorted({*wrong, *(rank for rank, digest in first.items() if digest != right)})


class Auditor:
    """The audit on one agent."""

    def __init__(self, audit: Audit, contributor: Contributor, states: WorkerStates):
        self._audit = audit
        self._contributor = contributor
        self._states = states
        self._digests: dict[int, int] = {}  # of hosted workers' contributions in this step and phase
        self._leaves: dict[str, Leaf] = {}  # to compute second contributions in, by phase
        self.count = 1 + 2 * min(audit.workers, contributor.state.config.virtual_workers)

    @property
    def _chosen(self) -> tuple[int, ...]:
        state = self._contributor.state
        return chosen(self._audit, state.step, state.config.virtual_workers)

    def finished(self, worker: int, given: Given, leaf: Leaf) -> None:
        """A hosted worker's contribution is there."""
        if worker in self._chosen:
            self._digests[worker] = contribution_digest(given, leaf)

    def sums(self, mesh: Mesh, plan: Plan) -> tuple[int, ...]:
        """What this replica's header says: the state's sum, then two digests for each chosen worker."""
        state = self._contributor.state
        if mesh.size == 1:
            return (0,) * self.count
        due = self._audit.states and state.step % self._audit.states == 0
        result = [state_sum(state.export()) if due else 0]
        for worker in self._chosen:
            host = plan.host(worker) == mesh.rank
            other = second(plan, worker, state.step) == mesh.rank
            result += [self._digests[worker] if host else 0, self._again(worker) if other else 0]
        return tuple(result)

    def _again(self, worker: int) -> int:
        phase = self._contributor.state.phase
        leaf = self._leaves.setdefault(phase, self._contributor.new_leaf(phase))
        given = self._contributor.contribute(worker, self._states.of(worker), leaf)
        return contribution_digest(given, leaf)

    def compare(self, mesh: Mesh, plan: Plan, headers: Sequence[tuple[int, ...]]) -> None:
        """Compare what all replicas said. Called by all of them with the same headers.

        Raises:
            ConvictedError: some are wrong.
            AuditError: some differ, and there is no majority to say which are wrong.
        """
        if mesh.size == 1:
            return
        step = self._contributor.state.step
        wrong = wrong_by_majority([sums[0] for sums in headers])
        if wrong is None:
            raise AuditError(f"before step {step} agents hold different states, and no majority says which is right")
        if wrong:
            what = f"before step {step} its state differs from that of the others"
            raise ConvictedError(wrong, what, late=self._audit.states != 1)
        for index, worker in enumerate(self._chosen):
            host, other = plan.host(worker), second(plan, worker, step)
            first = {host: headers[host][1 + 2 * index], other: headers[other][2 + 2 * index]}
            if len(set(first.values())) > 1:
                self._dispute(mesh, step, worker, first)

    def _dispute(self, mesh: Mesh, step: int, worker: int, first: Mapping[int, int]) -> None:
        mine = self._again(worker).to_bytes(8, "little", signed=True)
        again = [_signed(raw) for raw in mesh.gather(mine)]
        wrong = wrong_contributions(first, again)
        what = f"the contribution of virtual worker {worker} in step {step}"
        if wrong is None:
            raise AuditError(f"agents computed {what} differently, and no majority says which is right")
        late = self._audit.workers < self._contributor.state.config.virtual_workers
        raise ConvictedError(wrong, f"it computed {what} wrongly", late)


def contribution_digest(given: Given, leaf: Leaf) -> int:
    """A digest of every bit that a contribution gives to the others. 64 bits, signed."""
    sha = hashlib.sha256()
    for lane in leaf.vector + leaf.buffers:
        sha.update(codec.tensor_bytes(lane))
    said = [given.rows, given.digest, given.flags, given.weight, sorted(given.metrics.items()), sorted(given.touched)]
    sha.update(repr([*said, sorted(given.changed)]).encode())
    sha.update(codec.digest({"values": given.values, "worker_state": given.worker_state}).encode())
    return _signed(sha.digest()[:8])


def state_sum(tree: codec.Tree) -> int:
    """A checksum of all bits of a tree, as fast as memory is read. 64 bits, signed."""
    return _signed(stream.fingerprint(tree).to_bytes(8, "little"))


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)
