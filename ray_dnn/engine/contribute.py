"""One virtual worker's contribution, from nothing but committed state, its rows and its seed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dnn.comm.exchange import Vector
from ray_dnn.comm.shared import SharedMemory
from ray_dnn.engine import codec
from ray_dnn.engine.batches import BatchSource
from ray_dnn.engine.layout import Layout
from ray_dnn.engine.loss import Pairs
from ray_dnn.engine.numerics import without_kernel
from ray_dnn.engine.outlet import Outlet, Ready
from ray_dnn.engine.records import NONFINITE_LOSS, RecordFormat
from ray_dnn.engine.rng import generator, seed_everything
from ray_dnn.engine.state import TrainingState
from ray_dnn.errors import ConfigError, RayDnnError, UserCodeError
from ray_dnn.ledger import row_checksum
from ray_dnn.marks import Marks
from ray_dnn.phases import Phase
from ray_dnn.strategies.base import Strategy, WorkerState

T = TypeVar("T")


@dataclass
class Leaf:
    """A contribution as the tree folds it.

    Attributes:
        vector: lanes of the contribution.
        buffers: lanes of the weighted changes of float buffers.
        slots: views of the vector, by name.
    """

    vector: Vector
    buffers: Vector
    slots: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, other: Leaf) -> Leaf:
        """This leaf plus another, in this leaf's memory."""
        for mine, theirs in zip(self.vector, other.vector, strict=True):
            mine.add_(theirs)
        return self.add_buffers(other)

    def add_buffers(self, other: Leaf) -> Leaf:
        """As `add`, only the buffers."""
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            mine.add_(theirs)
        return self


@dataclass
class Given:
    """Everything that one contribution consists of besides its leaf.

    Attributes:
        metrics: (total, weight) by name.
        values: present values of changed integer and boolean buffers.
        worker_state: the new one.
    """

    rows: int = 0
    digest: int = 0
    flags: int = 0
    weight: float = 0.0
    metrics: Pairs = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    worker_state: WorkerState = None


class Contributor:
    """Computes contributions, in any order, each from the committed state alone.

    Attributes:
        memory: where leaves lie; None: in memory that nobody else reads.
        seen: what the user made of contributions, where they are looked at (see `ray_dnn.engine.looking`); by phase,
            worker and rank.
    """

    def __init__(self, state: TrainingState, strategy: Strategy, source: BatchSource):
        self.state = state
        self.strategy = strategy
        self.source = source
        self.marks = Marks()
        self.memory: SharedMemory | None = None
        self.seen: dict[tuple[int, int, int], Any] = {}
        self.layouts: dict[str, Layout] = {}
        for phase in state.phases:
            state.phase = phase
            self.layouts[phase] = Layout(strategy.vector(state))
        state.phase = state.phases[0]

    def new_leaf(self, phase: str) -> Leaf:
        layout = self.layouts[phase]
        vector = layout.zeros(self.memory)
        slots = {name: layout.view(vector, name) for name in layout.slots}
        return Leaf(vector, self.state.buffers.layout.zeros(self.memory), slots)

    @torch.no_grad()
    def contribute(
        self, worker: int, worker_state: WorkerState, leaf: Leaf, agent: str = "", ready: Ready | None = None
    ) -> Given:
        """Compute ``worker``'s contribution of the present step and phase into ``leaf``.

        ``ready``: called with each name when its slot in the leaf will not change any more, maybe while others are
        still computed.

        Raises:
            UserCodeError: the user's code raised.
        """
        outlet = Outlet(leaf.slots, ready)
        state, layout = self.state, self.layouts[self.state.phase]
        if not self.source.rows(state.step, worker):
            outlet.close()
            for lane in leaf.buffers:
                lane.zero_()
            return Given(worker_state=worker_state)
        place = (state.config.seed, state.step, state.phases.index(state.phase), worker)
        where = f"agent {agent or '?'}, step {state.step}, virtual worker {worker}"
        seed_everything("collate", state.config.seed, state.step, worker)
        with self.marks.during(Phase.READING):
            batches = guarded("collate", where, lambda: self.source.batches(state.step, worker))
        ids = [int(i) for batch in batches for i in batch.row_ids]
        where += f", rows {_short(ids)}"
        seed_everything("contribute", *place)
        rng = generator("strategy", *place)
        with torch.enable_grad(), state.handing_over(outlet if self.strategy.hands_over else None):
            given, new_state = guarded(
                "loss", where, lambda: self.strategy.contribute(state, worker_state, batches, rng)
            )
        weight = float(given.weight)
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"The weight of a contribution was {weight} ({where}); it must be finite and at least 0.")
        strange = set(given.sums) - set(layout.slots)
        if strange:
            raise ConfigError(f"The strategy contributed {sorted(strange)[:3]}, which its vector() does not declare.")
        for name, tensor in given.sums.items():
            if name not in outlet.given:
                outlet.give(name, tensor)
        outlet.close()
        changed = state.buffers.changed()
        state.buffers.deltas(changed, weight, leaf.buffers)
        names = [n for n in state.buffers.others if n in changed]
        values = dict(zip(names, state.buffers.values(names), strict=True))
        state.buffers.restore()
        return Given(
            rows=len(ids),
            digest=row_checksum(batch.row_ids for batch in batches),
            flags=_flags(given.metrics),
            weight=weight,
            metrics=dict(given.metrics),
            touched=frozenset(n for n, t in given.sums.items() if t is not None),
            changed=frozenset(changed),
            values=values,
            worker_state=new_state,
        )

    def first(self, worker: int = 0) -> tuple[Given, codec.Tree]:
        """A contribution of the job's present step as a tree too, for comparing: every bit that would be exchanged."""
        leaf = self.new_leaf(self.state.phase)
        given = self.contribute(worker, self.strategy.init_worker(self.state, worker), leaf)
        buffers = self.state.buffers
        tree = {
            "gradient": {n: slot for n, slot in leaf.slots.items() if n in given.touched},
            "buffer": {n: buffers.layout.view(leaf.buffers, n) for n in buffers.floats if n in given.changed},
            "value": given.values,
            "metric": dict(given.metrics),
            "weight": given.weight,
            "rows": given.digest,
            "worker_state": given.worker_state,
        }
        return given, tree


def to_record(form: RecordFormat, given: Given, state_bytes: int) -> NDArray[np.void]:
    """A contribution's record. Shape: (1,)."""
    record = form.empty()
    if given.rows == 0:
        record["state_bytes"] = state_bytes
        return record
    for name in ("rows", "digest", "flags", "weight"):
        record[name] = getattr(given, name)
    record["state_bytes"] = state_bytes
    form.set_metrics(record, given.metrics)
    for field_name, names, present in (
        ("touched", form.vector, given.touched),
        ("floats", form.floats, given.changed),
        ("others", form.others, given.changed),
    ):
        record[field_name][0] = [name in present for name in names]
    return record


def guarded(function: str, where: str, call: Callable[[], T]) -> T:
    """Run user code; what it raises becomes a `UserCodeError` that says in which function and where, and has the
    user's exception as its cause.

    Raises:
        ConfigError: an operation in it has no deterministic kernel.
    """
    try:
        return call()
    except RayDnnError:
        raise
    except Exception as error:
        if operation := without_kernel(error):
            raise ConfigError(
                f"{operation} in {function}, {where}: torch has no deterministic kernel for it here. Use another "
                "operation, or give up equal bits with TrainConfig(deterministic=False)."
            ) from error
        raise UserCodeError(type(error).__name__, function, where, traceback.format_exc()) from error


def finite(vector: Vector) -> bool:
    """Whether all elements are finite. A finite sum proves it in one pass; else each element is looked at."""
    return all(bool(lane.sum().isfinite()) or bool(lane.isfinite().all()) for lane in vector)


def _flags(metrics: Any) -> int:
    """Whether gradients are finite is looked at where they are summed up."""
    loss = metrics.get("loss")
    return NONFINITE_LOSS if loss is not None and not np.isfinite(loss[0]) else 0


def _short(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:8]))}, … {len(ids)} in all]"
