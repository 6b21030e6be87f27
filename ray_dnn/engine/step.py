"""The step: contribute, combine, apply."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dnn.comm.exchange import TreeExchange, Vector
from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine import codec, unmoved
from ray_dnn.engine.contribute import Contributor, Given, Leaf, finite, guarded, to_record
from ray_dnn.engine.evaluate import Evaluator
from ray_dnn.engine.records import NONFINITE_GRADIENT, Place, RecordFormat, Report
from ray_dnn.engine.rng import seed_everything
from ray_dnn.engine.worker_states import WorkerStates
from ray_dnn.errors import NonFiniteError
from ray_dnn.parallel import ReplicaGroup
from ray_dnn.plan import Plan
from ray_dnn.strategies.base import Combined
from ray_dnn.tree import Node, fold


@dataclass(frozen=True)
class StepReport:
    """What is known about a committed step; the same on every agent, but for the times.

    Attributes:
        step: its number, from 0.
        generation: that committed it.
        metrics: means over the whole batch; "loss" among them.
        rows: used in the step, and by each virtual worker (``worker_rows``), with checksums of the row numbers.
        skipped: why nothing was updated, or None.
        held: the newest decision that every replica held.
        compute_s, exchange_s: of this agent.
        speeds: contributions per second, by replica.
        began: when it began, in seconds since the epoch.
        evaluation: metrics of an evaluation after this step, or None.
        time: when it was committed, in seconds since the epoch.
    """

    step: int
    generation: int
    metrics: dict[str, float]
    rows: int
    worker_rows: tuple[int, ...]
    worker_digests: tuple[int, ...]
    skipped: str | None
    held: int
    compute_s: float
    exchange_s: float
    speeds: tuple[float, ...]
    began: float
    evaluation: dict[str, float] | None = None
    time: float = field(default_factory=time.time)


@dataclass
class _Round:
    """The result of one phase's exchange.

    Attributes:
        records: of all virtual workers.
        weight: the sum of theirs.
        held: the newest decision that every replica holds.
        seconds: computed by each replica.
        floats: names of the float buffers that changed; their sums are in the engine's ``_buffer_sums``.
        values: new values of the other buffers that changed.
    """

    records: NDArray[np.void]
    weight: float
    held: int
    seconds: list[float]
    exchange_s: float
    floats: set[str]
    values: dict[str, torch.Tensor]


class Engine:
    """Runs steps of one replica (of one rank of it) inside a generation.

    Attributes:
        contributor: computes contributions.
        states: of virtual workers.
    """

    def __init__(
        self, contributor: Contributor, evaluator: Evaluator | None, group: ReplicaGroup, metrics: dict[str, list[str]]
    ):
        state = contributor.state
        self.contributor = contributor
        self.state = state
        self.states = WorkerStates(contributor.strategy, state)
        self._evaluator = evaluator
        self._group = group
        self._formats = {
            phase: RecordFormat(
                list(contributor.layouts[phase].slots), state.buffers.floats, state.buffers.others, metrics[phase]
            )
            for phase in state.phases
        }
        # Two vectors in turn: a combined vector stays as it is until the next exchange has completed.
        self._combined = {phase: [contributor.layouts[phase].zeros() for _ in range(2)] for phase in state.phases}
        self._buffer_sums = state.buffers.layout.zeros()
        self._free: dict[str, list[Leaf]] = {phase: [] for phase in state.phases}
        self._checked = False  # whether the state was found to be movable after an update
        self.history: list[dict[str, float]] = []  # evaluations so far; the same on every agent

    def enter(self, generation: int, mesh: Mesh, plan: Plan, names: tuple[str, ...]) -> None:
        """Take a place in a generation. ``names``: of the agents at this rank, by replica."""
        self.generation, self.mesh, self.plan, self._names = generation, mesh, plan, names
        self._exchange = TreeExchange(mesh, plan)
        self.states.lay(mesh, plan)

    @property
    def finished(self) -> bool:
        """Whether the job has no more steps, or its ``stop`` says so."""
        if self.state.step >= self.contributor.source.schedule.total_steps:
            return True
        stop = self.state.spec.stop
        return bool(self.history and stop and guarded("stop", lambda: stop([dict(h) for h in self.history])))

    def step(self, held: int) -> StepReport:
        """Compute, combine and commit one step. ``held``: the newest decision of the driver that this agent holds."""
        state, step = self.state, self.state.step
        held = self._group.minimum(held)
        self.contributor.source.prefetch(step + 1, self.plan.hosted(self.mesh.rank))
        metrics: dict[str, float] = {}
        skipped: list[str] = []
        exchange_s = 0.0
        began, started = time.time(), time.perf_counter()
        for phase in state.phases:
            state.phase = phase
            round_ = self._combine(held)
            exchange_s += round_.exchange_s
            metrics |= self._metrics(round_)
            if reason := self._apply(round_):
                skipped.append(reason)
        state.phase = state.phases[0]
        self._after_update(step)
        state.step = step + 1
        seconds = time.perf_counter() - started
        return StepReport(
            step=step,
            generation=self.generation,
            metrics=metrics,
            rows=int(round_.records["rows"].sum()),
            worker_rows=tuple(int(n) for n in round_.records["rows"]),
            worker_digests=tuple(int(n) for n in round_.records["digest"]),
            skipped="; ".join(skipped) or None,
            held=round_.held,
            compute_s=seconds - exchange_s,
            exchange_s=exchange_s,
            speeds=tuple(len(self.plan.hosted(r)) / max(s, 1e-6) for r, s in enumerate(round_.seconds)),
            began=began,
            evaluation=self._evaluate(),
        )

    # -- contribute --------------------------------------------------------------------------------------------------

    def _combine(self, held: int) -> _Round:
        """Contribute for every hosted worker of this phase and sum over all."""
        state, plan, rank = self.state, self.plan, self.mesh.rank
        phase = state.phase
        form = self._formats[phase]
        given: dict[int, Given] = {}
        started = time.perf_counter()
        folded = {node: self._fold(node, given) for node in plan.cover(rank)}
        computed = time.perf_counter()
        packed = {w: self.states.pack(g.worker_state) for w, g in given.items()}
        records = np.concatenate([to_record(form, given[w], len(packed[w])) for w in plan.hosted(rank)])
        layout = self.contributor.layouts[phase]
        place = Place(self.generation, state.step, state.phases.index(phase), plan.number, layout.hash)
        header = form.pack(place, Report(held, computed - started, records))
        sizes = [form.size(len(plan.hosted(r))) for r in range(plan.replicas)]
        self._combined[phase].reverse()
        out = self._combined[phase][0]
        vectors = {node: leaf.vector for node, leaf in folded.items()}
        headers = self._exchange.combine(header, sizes, vectors, out)
        reports = [form.unpack(raw, place, r) for r, raw in enumerate(headers)]
        everyone = np.concatenate([r.records for r in reports])
        floats, values = self._combine_buffers(form, everyone, folded, given)
        self.states.exchange(packed, everyone["state_bytes"])
        for leaf in folded.values():
            self._free[phase].append(leaf)
        return _Round(
            records=everyone,
            weight=sum(float(w) for w in everyone["weight"]),
            held=min(r.held for r in reports),
            seconds=[r.seconds for r in reports],
            exchange_s=time.perf_counter() - computed,
            floats=floats,
            values=values,
        )

    def _fold(self, node: Node, given: dict[int, Given]) -> Leaf:
        free = self._free[self.state.phase]

        def known(part: Node) -> Leaf | None:
            if not part.is_leaf:
                return None
            leaf = free.pop() if free else self.contributor.new_leaf(self.state.phase)
            worker = part.start
            given[worker] = self.contributor.contribute(
                worker, self.states.of(worker), leaf, self._names[self.mesh.rank]
            )
            return leaf

        def add(left: Leaf, right: Leaf) -> Leaf:
            left.add(right)
            free.append(right)
            return left

        return fold(node, known, add)

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
        value = torch.empty_like(self.state.buffers.committed(name), memory_format=torch.contiguous_format)
        self.mesh.exchange({}, {host: [codec.tensor_bytes(value)]})
        return value

    # -- apply -------------------------------------------------------------------------------------------------------

    def _apply(self, round_: _Round) -> str | None:
        """Apply the combined result of a phase. Returns why nothing was updated, or None."""
        state, records = self.state, round_.records
        layout, out = self.contributor.layouts[state.phase], self._combined[state.phase][0]
        overflow = self._nonfinite(round_, out)
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
            with torch.no_grad():
                means = [lane / round_.weight for lane in out]
            seed_everything("apply", state.config.seed, state.step, state.phase)
            combined = Combined({n: layout.view(means, n) for n in layout.slots if n in touched}, round_.weight)
            guarded(f"optimizer, step {state.step}", lambda: self.contributor.strategy.apply(state, combined))
        with torch.no_grad():
            state.buffers.apply(round_.floats, self._buffer_sums, round_.weight, round_.values)
        self.states.commit()
        return None

    def _nonfinite(self, round_: _Round, out: Vector) -> str | None:
        """Which contributions were not finite, in words that are the same on every agent but for names of hosts."""
        records = round_.records
        bad = [int(w) for w in np.flatnonzero(records["flags"])]
        if bad:
            what = [
                f"virtual worker {w} on {self._names[self.plan.host(w)]}, "
                f"{int(records['rows'][w])} rows from {self._first_rows(w)}: "
                + ("gradient" if records["flags"][w] & NONFINITE_GRADIENT else "loss")
                for w in bad
            ]
            return f"step {self.state.step}: not finite: " + "; ".join(what)
        if not finite(out):
            return f"step {self.state.step}: every contribution was finite, their sum was not"
        return None

    def _first_rows(self, worker: int) -> str:
        ids = [int(i) for part in self.contributor.source.row_ids(self.state.step, worker) for i in part]
        return str(ids[:8])[:-1] + (", …]" if len(ids) > 8 else "]")

    def _metrics(self, round_: _Round) -> dict[str, float]:
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
                guarded(f"after_update, step {step}", lambda: after(state.model, state.extra, step))
            unmoved.refuse_changes(before, unmoved.of_modules(state.model), f"after_update, step {step}")
            # What it did to buffers is part of the committed state.
            state.buffers.commit()
        state.check()
        if not self._checked:
            codec.check(state.export())
            self._checked = True

    def _evaluate(self) -> dict[str, float] | None:
        every, done = self.state.config.evaluate_every, self.state.step
        last = done >= self.contributor.source.schedule.total_steps
        return self.finish() if last or (every is not None and done % every == 0) else None

    def finish(self) -> dict[str, float] | None:
        """Evaluate now, unless that was done at this very step. None where there is nothing (new) to say."""
        done = float(self.state.step)
        if self._evaluator is None or (self.history and self.history[-1]["step"] == done):
            return None
        metrics = self._evaluator.run(self.mesh)
        self.history.append({"step": done} | metrics)
        return metrics
