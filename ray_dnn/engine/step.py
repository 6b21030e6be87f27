"""The step: contribute, combine, apply."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dnn.comm.exchange import Combination, TreeExchange, Vector
from ray_dnn.comm.mesh import AbandonedError, Mesh, PeerLostError
from ray_dnn.comm.shared import Links, SharedMemory
from ray_dnn.config import Audit
from ray_dnn.engine import codec, unmoved
from ray_dnn.engine.audit import Auditor
from ray_dnn.engine.contribute import Contributor, Given, Leaf, finite, guarded, to_record
from ray_dnn.engine.device import CPU
from ray_dnn.engine.evaluate import Evaluator
from ray_dnn.engine.folding import Folding
from ray_dnn.engine.lead import Leader
from ray_dnn.engine.records import NONFINITE_GRADIENT, Header, Place, RecordFormat
from ray_dnn.engine.reports import EvaluationReport, Joined, StepReport
from ray_dnn.engine.rng import seed_everything
from ray_dnn.engine.round import Round
from ray_dnn.engine.worker_states import WorkerStates
from ray_dnn.errors import NonFiniteError
from ray_dnn.marks import Marks
from ray_dnn.parallel import ReplicaGroup
from ray_dnn.phases import Phase
from ray_dnn.plan import Plan
from ray_dnn.strategies.base import Combined
from ray_dnn.tree import Node

T = TypeVar("T")


class Position(NamedTuple):
    """How far an agent's committed state is. Agents of one generation differ by at most one of either.

    Attributes:
        commits: phases of steps that were applied.
        evaluations: that were made.
    """

    commits: int
    evaluations: int


class Engine:
    """Runs steps of one replica (of one rank of it) inside a generation.

    A step is committed phase by phase. What a phase's exchange gave (`last`) is kept until the next one has completed,
    so that an agent that has committed can give it to one that has not. Whatever an exchange raises, the committed
    state is as it was before, and the same phase can be computed again, in another generation.

    Attributes:
        contributor: computes contributions.
        states: of virtual workers.
        history: evaluations so far; the same on every agent.
        last: the result of the last phase that was committed.
        leader: tells newcomers that follow this agent what is committed.
        partial: metrics and skips of the phases of the present step that are committed; the same on every agent.
    """

    def __init__(
        self,
        contributor: Contributor,
        evaluator: Evaluator | None,
        group: ReplicaGroup,
        metrics: dict[str, list[str]],
        marks: Marks | None = None,
        audit: Audit | None = None,
        memory: SharedMemory | None = None,
    ):
        """``memory``: what other agents on this machine may read; None: everything is sent."""
        state = contributor.state
        contributor.memory = memory
        self.contributor = contributor
        self.state = state
        self.states = WorkerStates(contributor.strategy, state)
        self.marks = contributor.marks = marks or Marks()
        self.history: list[dict[str, float]] = []
        self.last: Round | None = None
        self.partial: dict[str, Any] = _nothing()
        self._evaluator = evaluator
        self._group = group
        self._auditor = Auditor(audit, contributor, self.states) if audit else None
        self._folding = Folding(contributor, self.states, self._auditor.finished if self._auditor else None)
        self._formats = {
            phase: RecordFormat(
                list(contributor.layouts[phase].slots),
                state.buffers.floats,
                state.buffers.others,
                metrics[phase],
                self._auditor.count if self._auditor else 0,
            )
            for phase in state.phases
        }
        # A spare one to combine into, and the one that `last` refers to, which stays as it is meanwhile.
        self._vectors = {phase: [contributor.layouts[phase].zeros(memory) for _ in range(2)] for phase in state.phases}
        self._buffer_sums = state.buffers.layout.zeros(memory)
        self._checked = False  # whether the state was found to be movable after an update
        self._clock = _Clock()
        self._had = -1  # the last step that the job was found to have
        self.joined: Joined | None = None
        self.leader = Leader(self)

    def enter(self, generation: int, mesh: Mesh, plan: Plan, members: tuple[str, ...]) -> None:
        """Take a place in a generation. ``members``: the names of the agents at this rank, by replica."""
        self.generation, self.mesh, self.plan, self._members = generation, mesh, plan, members
        self._exchange = TreeExchange(mesh, plan, self.marks, Links(mesh, self.contributor.memory))

    @property
    def position(self) -> Position:
        state = self.state
        return Position(state.step * len(state.phases) + state.phases.index(state.phase), len(self.history))

    @property
    def at_boundary(self) -> bool:
        """Whether no phase of the present step is committed."""
        return self.state.phase == self.state.phases[0]

    @property
    def finished(self) -> bool:
        """Whether the job has no more steps, or its ``stop`` says so."""
        if not self._has(self.state.step):
            return True
        stop = self.state.spec.stop
        return bool(self.history and stop and guarded("stop", "", lambda: stop([dict(h) for h in self.history])))

    def _has(self, step: int) -> bool:
        """Whether the job has such a step. Its rows are known then, which may take a while.

        Raises:
            AbandonedError: the generation is over.
        """
        if step != self._had:
            with self.marks.during(Phase.SUPPLY):
                if not self.together(lambda: self.contributor.source.wait(step, lambda: self.mesh.check())):
                    return False
            self._had = step
        return True

    def advance(self, held: int) -> StepReport | None:
        """Compute, combine and commit one phase of the present step. Returns the report when the step is complete.

        ``held``: the newest decision of the driver that this agent holds.

        Raises:
            PeerLostError, AbandonedError: the generation is over. Nothing has changed.
            ConvictedError: replicas compute wrongly. Nothing has changed.
        """
        self._clock.start()
        self.leader.begin()
        if self.at_boundary:
            self.contributor.source.prefetch(self.state.step + 1, self.plan.hosted(self.mesh.rank))
        header, folded = self._contribute(self._group.minimum(held))
        round_ = self.together(lambda: self._combine(header, folded))
        return self.commit(round_)

    def together(self, call: Callable[[], T]) -> T:
        """Do what may fail by the loss of a peer; where it fails on one agent of the replica, it fails on all."""
        if self._group.size == 1:
            return call()
        try:
            result = call()
        except (PeerLostError, AbandonedError):
            self._group.minimum(0)
            raise
        if not self._group.minimum(1):
            raise AbandonedError("another agent of this replica lost its connections")
        return result

    # -- contribute --------------------------------------------------------------------------------------------------

    def _contribute(self, held: int) -> tuple[Header, dict[Node, Leaf]]:
        """Compute and fold the contributions of every hosted worker."""
        state, plan, rank = self.state, self.plan, self.mesh.rank
        tick = (state.step, state.phases.index(state.phase))
        self.marks.enter(Phase.COMPUTING, state.step)
        started, waited = time.perf_counter(), self.contributor.source.waited_s
        self._combination = self._begin_exchange()
        ready = self._leave if self._combination.early else None
        folded = self._folding.fold(tick, plan.cover(rank), self._members[rank], self._begin, ready)
        # Who waits for rows is not slow.
        seconds = time.perf_counter() - started - (self.contributor.source.waited_s - waited)
        given = self._folding.given
        form = self._formats[state.phase]
        self._packed = {w: self.states.pack(given[w].worker_state) for w in plan.hosted(rank)}
        records = np.concatenate([to_record(form, given[w], len(self._packed[w])) for w in plan.hosted(rank)])
        sums = self._auditor.sums(self.mesh, plan) if self._auditor else ()
        return Header(held, seconds, records, sums), folded

    def _begin(self, worker: int) -> None:
        """A contribution begins: a good moment to leave."""
        self._check()

    def _check(self) -> None:
        """Leave, if the generation is over. The agents of a larger replica cannot leave one by one."""
        if self._group.size == 1:
            self.mesh.check()

    def _begin_exchange(self) -> Combination:
        state, plan = self.state, self.plan
        sizes = [self.form.size(len(plan.hosted(r))) for r in range(plan.replicas)]
        apart = self.states.kind != "none" or self._auditor is not None
        return self._exchange.begin(self.spare(state.phase), sizes, apart)

    def _leave(self, node: Node, leaf: Leaf, name: str) -> None:
        """A part of what this agent gives is ready, while the rest is still computed."""
        layout = self.contributor.layouts[self.state.phase]
        self._combination.ready(node, leaf.vector, *layout.extent(name))

    # -- combine -----------------------------------------------------------------------------------------------------

    def _combine(self, header: Header, folded: dict[Node, Leaf]) -> Round:
        """Sum over all workers. Changes nothing but spare memory."""
        state, plan = self.state, self.plan
        phase = state.phase
        form, layout = self._formats[phase], self.contributor.layouts[phase]
        started = time.perf_counter()
        place = Place(self.generation, state.step, state.phases.index(phase), plan.number, layout.hash)
        headers: list[Header] = []

        def between(raw: list[bytes]) -> None:
            headers.extend(form.unpack(data, place, r) for r, data in enumerate(raw))
            if self._auditor:
                self._auditor.compare(self.mesh, plan, [h.sums for h in headers])
            # Before the second phase, so that whoever commits knows that every new state has reached its holders.
            self.states.exchange(self._packed, np.concatenate([h.records["state_bytes"] for h in headers]))

        vectors = {node: leaf.vector for node, leaf in folded.items()}
        self._combination.finish(form.pack(place, header), vectors, between)
        records = np.concatenate([h.records for h in headers])
        finite = self._combination.finite
        if not finite and (state.loss_scale is None or records["flags"].any()):
            records["flags"] |= self._look_for_nonfinite()
        floats, values = self._combine_buffers(form, records, folded, self._folding.given)
        self._clock.exchanged(time.perf_counter() - started)
        return Round(
            phase=phase,
            records=records,
            weight=sum(float(w) for w in records["weight"]),
            held=min(h.held for h in headers),
            seconds=[h.seconds for h in headers],
            hosted=[len(plan.hosted(r)) for r in range(plan.replicas)],
            members=self._members,
            generation=self.generation,
            vector=self._vectors[phase][0],
            finite=finite,
            floats=floats,
            buffer_sums=self._buffer_sums,
            values=values,
        )

    def _look_for_nonfinite(self) -> NDArray[np.int64]:
        """The sum is not finite: compute every contribution once more to say whose is not. By worker."""
        phase, rank = self.state.phase, self.mesh.rank
        leaf = self._folding.borrow(phase)
        flags = []
        for worker in self.plan.hosted(rank):
            self.contributor.contribute(worker, self.states.of(worker), leaf, self._members[rank])
            flags.append(0 if finite(leaf.vector) else NONFINITE_GRADIENT)
        self._folding.give_back(phase, leaf)
        said = self.mesh.gather_variable(np.array(flags, np.int64).tobytes())
        return np.frombuffer(b"".join(said), np.int64)

    @torch.no_grad()
    def _combine_buffers(
        self, form: RecordFormat, records: NDArray[np.void], folded: dict[Node, Leaf], given: dict[int, Given]
    ) -> tuple[set[str], dict[str, torch.Tensor]]:
        """Combine what changed: float buffers like the vector, others from the lowest worker that changed them."""
        buffers = self.state.buffers
        floats, others = form.names("floats", records), form.names("others", records)
        sums, values = self._buffer_sums, {}
        if floats:
            self._exchange.combine(b"", [0] * self.plan.replicas, {n: leaf.buffers for n, leaf in folded.items()}, sums)
        for index, name in enumerate(form.others):
            if name in others:
                worker = int(np.flatnonzero(records["others"][:, index])[0])
                values[name] = self._broadcast(worker, name, given)
        buffers.restore()
        return floats, values

    def _broadcast(self, worker: int, name: str, given: dict[int, Given]) -> torch.Tensor:
        host = self.plan.host(worker)
        if host == self.mesh.rank:
            value = given[worker].values[name].contiguous()
            view = codec.tensor_bytes(value)
            self.mesh.exchange({peer: [view] for peer in self.mesh.peers}, {})
            return value
        there = self.state.buffers.committed(name)
        value = torch.empty(there.shape, dtype=there.dtype)
        self.mesh.exchange({}, {host: [codec.tensor_bytes(value)]})
        return value

    # -- commit ------------------------------------------------------------------------------------------------------

    def spare(self, phase: str) -> Vector:
        """The vector that the next result of a phase goes to."""
        return self._vectors[phase][0]

    def home_of_round(self) -> codec.Tree:
        """Where the next result, as `Round.to_tree` gives it, may be received."""
        return {"vector": self.spare(self.state.phase)}

    def round_of(self, tree: codec.Tree) -> Round:
        """The next result, from a tree."""
        return Round.from_tree(tree, self.form, self.spare(tree["phase"]))

    def commit(self, round_: Round) -> StepReport | None:
        """Apply a phase's result, one's own or one that another agent sent. Returns the report of a complete step."""
        self.leader.committing(round_)
        report = self._commit(round_)
        self.leader.committed()
        return report

    def _commit(self, round_: Round) -> StepReport | None:
        state = self.state
        self.marks.enter(Phase.COMBINED, state.step)
        self._vectors[round_.phase].reverse()
        if round_.buffer_sums is not self._buffer_sums:
            for mine, theirs in zip(self._buffer_sums, round_.buffer_sums, strict=True):
                mine.copy_(theirs)
        self.marks.enter(Phase.APPLYING)
        self._folding.clear()
        reason = self._apply(round_)
        self.last = round_
        self.partial["metrics"] |= self._metrics(round_)
        self.partial["skipped"] += [reason] if reason else []
        following = state.phases.index(state.phase) + 1
        if following < len(state.phases):
            state.phase = state.phases[following]
            return None
        state.phase = state.phases[0]
        self._after_update(state.step)
        state.step += 1
        return self._report(round_)

    def _report(self, round_: Round) -> StepReport:
        partial, self.partial = self.partial, _nothing()
        began, compute_s, exchange_s = self._clock.stop()
        wait_s, self.contributor.source.waited_s = self.contributor.source.waited_s, 0.0
        return StepReport(
            serial=self.state.step + len(self.history),
            step=self.state.step - 1,
            generation=round_.generation,
            members=round_.members,
            metrics=partial["metrics"],
            rows=int(round_.records["rows"].sum()),
            worker_rows=tuple(int(n) for n in round_.records["rows"]),
            worker_digests=tuple(int(n) for n in round_.records["digest"]),
            skipped="; ".join(partial["skipped"]) or None,
            held=round_.held,
            compute_s=compute_s,
            exchange_s=exchange_s,
            wait_s=wait_s,
            speeds=tuple(n / max(s, 1e-6) for n, s in zip(round_.hosted, round_.seconds, strict=True)),
            began=began,
            joined=self.joined,
        )

    def _apply(self, round_: Round) -> str | None:
        """Update the committed state. Returns why nothing was updated, or None."""
        state, records, out = self.state, round_.records, round_.vector
        overflow = self._nonfinite(round_)
        if state.loss_scale is not None:
            gradient_overflow = overflow is not None and not (records["flags"] & ~NONFINITE_GRADIENT).any()
            state.loss_scale.update(gradient_overflow)
            if gradient_overflow:
                return f"fp16 overflow, loss scale lowered to {state.loss_scale.scale:g}"
        if overflow is not None:
            if state.config.nonfinite == "stop":
                raise NonFiniteError(overflow)
            return overflow
        if round_.weight > 0:
            touched = self._formats[state.phase].names("touched", records)
            means = self._folding.borrow(state.phase)  # nobody reads leaves any more when an exchange is complete
            with torch.no_grad():
                for lane, mean in zip(out, means.vector, strict=True):
                    torch.div(lane, round_.weight, out=mean)
            seed_everything("apply", state.config.seed, state.step, state.phase)
            there = {n: slot.to(state.device) for n, slot in means.slots.items() if n in touched}
            combined = Combined(there, round_.weight)
            guarded("optimizer", f"step {state.step}", lambda: self.contributor.strategy.apply(state, combined))
            self._folding.give_back(state.phase, means)
        with torch.no_grad():
            state.buffers.apply(round_.floats, self._buffer_sums, round_.weight, round_.values)
        self.states.commit()
        return None

    def _nonfinite(self, round_: Round) -> str | None:
        """Which contributions were not finite, in words that are the same on every agent but for names of hosts."""
        records = round_.records
        bad = [int(w) for w in np.flatnonzero(records["flags"])]
        if bad:
            what = [
                f"virtual worker {w} on {round_.host(w)}, "
                f"{int(records['rows'][w])} rows from {self._first_rows(w)}: "
                + ("gradient" if records["flags"][w] & NONFINITE_GRADIENT else "loss")
                for w in bad
            ]
            return f"step {self.state.step}: not finite: " + "; ".join(what)
        if not round_.finite:
            return f"step {self.state.step}: every contribution was finite, their sum was not"
        return None

    def _first_rows(self, worker: int) -> str:
        ids = [int(i) for i in self.contributor.source.row_ids(self.state.step, worker)]
        return str(ids[:8])[:-1] + (", …]" if len(ids) > 8 else "]")

    def _metrics(self, round_: Round) -> dict[str, float]:
        means = self._formats[self.state.phase].sum_metrics(round_.records)
        if len(self.state.phases) == 1:
            return means
        return {f"{self.state.phase}/{name}": value for name, value in means.items()}

    def _after_update(self, step: int) -> None:
        state, spec = self.state, self.state.spec
        for scheduler in state.schedulers.values():
            scheduler.step()
        if (after := spec.after_update) is not None:
            seed_everything("after_update", state.config.seed, step)
            before = unmoved.of_modules(state.model)
            with torch.no_grad():
                guarded("after_update", f"step {step}", lambda: after(state.model, state.extra, step))
            unmoved.refuse_changes(before, unmoved.of_modules(state.model), f"after_update, step {step}")
            # What it did to buffers is part of the committed state.
            state.buffers.commit()
        state.check()
        if not self._checked:
            codec.check(state.export())
            self._checked = True

    # -- moving ------------------------------------------------------------------------------------------------------

    @property
    def form(self) -> RecordFormat:
        """The format of this phase's records."""
        return self._formats[self.state.phase]

    def export(self) -> codec.Tree:
        """Everything that is committed but the states of virtual workers, as a tree."""
        state = self.state
        tree = {"state": state.export(), "phase": state.phase, "partial": self.partial, "history": self.history}
        return tree if state.device == CPU else tree | {"counters": state.counters()}

    def home(self) -> codec.Tree:
        """Where what another agent exported may be received: the memory that is this agent's own for good."""
        state = self.state
        return {"state": {"parameters": state.parameters, "buffers": state.buffers.all_committed()}}

    def load(self, tree: codec.Tree) -> None:
        """Take over what another agent exported."""
        self.state.load(tree["state"], tree.get("counters"))
        self.state.phase, self.partial = tree["phase"], tree["partial"]
        self.history[:] = tree["history"]
        self.last = None
        self.states.clear()
        self._folding.clear()

    def begin_anew(self) -> None:
        """Count from the first step again, with the state that there is."""
        self.state.step = 0
        self.history.clear()

    # -- evaluate ----------------------------------------------------------------------------------------------------

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation comes before the next step."""
        every, done = self.state.config.evaluate_every, self.state.step
        if not (self.at_boundary and done > 0 and self.news):
            return False
        return (every is not None and done % every == 0) or not self._has(done)

    @property
    def news(self) -> bool:
        """Whether an evaluation now would say something new."""
        evaluated = bool(self.history) and self.history[-1]["step"] == self.state.step
        return self._evaluator is not None and not evaluated

    def evaluate(self) -> EvaluationReport:
        """Evaluate the committed state."""
        assert self._evaluator is not None
        self.marks.enter(Phase.EVALUATING, self.state.step)
        metrics = self._evaluator.run(self.mesh, self.marks, self.together, self._check)
        return self.evaluated({"step": float(self.state.step)} | metrics)

    def evaluated(self, entry: dict[str, float]) -> EvaluationReport:
        """Take note of an evaluation, one's own or one that another agent sent."""
        self.history.append(entry)
        metrics = {name: value for name, value in entry.items() if name != "step"}
        self.leader.evaluated(entry)
        return EvaluationReport(self.state.step + len(self.history), self.state.step, metrics)


class _Clock:
    """Where the time of a step went on this agent."""

    def __init__(self) -> None:
        self._began = 0.0
        self._started: float | None = None  # None between two steps
        self._exchanged = 0.0

    def start(self) -> None:
        if self._started is None:
            self._began, self._started, self._exchanged = time.time(), time.perf_counter(), 0.0

    def exchanged(self, seconds: float) -> None:
        self._exchanged += seconds

    def stop(self) -> tuple[float, float, float]:
        """When the step began, and its seconds of computing and of exchanging."""
        self.start()
        assert self._started is not None
        seconds = time.perf_counter() - self._started
        self._started = None
        return self._began, seconds - self._exchanged, self._exchanged


def _nothing() -> dict[str, Any]:
    """`Engine.partial` at the beginning of a step."""
    return {"metrics": {}, "skipped": []}
