"""The seam between the engine and what is trained: a strategy.

In every step the engine calls ``contribute`` once for each virtual worker that has rows, on whichever agent hosts it,
sums the contributions along the fixed tree, and calls ``apply`` with the result on every agent. The engine guarantees
that each contribution starts from committed buffers and from random generators seeded by (seed, step, worker); the
strategy guarantees that it depends on nothing else and leaves the state as it found it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ray_dnn.sampler import Rows

if TYPE_CHECKING:
    from ray_dnn.engine.state import TrainingState

WorkerState = Any


@dataclass(frozen=True)
class Micro:
    """Rows that are computed at once.

    Attributes:
        data: what ``collate`` made of them.
        rows: how many.
    """

    data: Any
    rows: int


@dataclass(frozen=True)
class Batch:
    """A virtual worker's rows of one batch.

    Attributes:
        microbatches: the batch in pieces of at most ``microbatch_size`` rows.
        row_ids: the rows' numbers in the dataset, int64. Shape: (rows,).
    """

    microbatches: Sequence[Micro]
    row_ids: Rows

    @property
    def rows(self) -> int:
        return len(self.row_ids)


@dataclass(frozen=True)
class Contribution:
    """What one virtual worker gives in a step.

    Attributes:
        sums: by name a tensor that is already multiplied by the weight, in the shape that `Strategy.vector` declares;
            None or absent: this worker did not touch it. The engine copies it before the next contribution.
        weight: rows, tokens, or whatever the mean is over. At least 0.
        metrics: by name a pair (total, weight), float. The same names in every step; "loss" among them.
    """

    sums: Mapping[str, torch.Tensor | None]
    weight: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Combined:
    """The sum of all contributions.

    Attributes:
        means: by name ``sum of sums / sum of weights``, for the names that at least one worker touched, on the device
            of the model. In a vector that the strategy may change, and that is used again when `Strategy.apply` has
            returned.
        weight: the sum of the weights, above 0.
    """

    means: Mapping[str, torch.Tensor]
    weight: float


class Strategy:
    """Base of all strategies. Frozen values: they travel to the agents and are part of the job.

    Class attributes:
        worker_state: what a virtual worker keeps from step to step: "none"; "combined": every agent holds everybody's,
            as part of the committed state; "mirrored": its host and one other agent hold it.
        local_batches: how many batches one step uses.
        only_reads: whether ``contribute`` never writes to the state, not even to put it back afterwards. Newcomers then
            copy the state straight from where it is while contributions are computed.
        hands_over: whether the sums that ``contribute`` returns are the very gradients that it asks for with
            ``state.gradients(…, final=True)``. They are then combined while backward computes others.

    The last two are said of the class's own ``contribute``: a class that overrides it says them anew.
    """

    worker_state: ClassVar[Literal["none", "combined", "mirrored"]] = "none"
    only_reads: ClassVar[bool] = False
    hands_over: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "contribute" in vars(cls):
            cls.only_reads = vars(cls).get("only_reads", False)
            cls.hands_over = vars(cls).get("hands_over", False)

    @property
    def local_batches(self) -> int:
        return 1

    def vector(self, state: TrainingState) -> dict[str, torch.Tensor]:
        """Names, shapes and dtypes of what is contributed in ``state.phase``. By default: its trainable parameters."""
        return dict(state.trainable())

    def init_worker(self, state: TrainingState, worker: int) -> WorkerState:
        """The state a virtual worker starts with: a tree of dicts, lists, numbers and tensors."""
        return None

    def contribute(
        self, state: TrainingState, worker_state: WorkerState, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Contribution, WorkerState]:
        """One virtual worker's contribution, and its new state. Must not change ``state`` or ``worker_state``.

        Args:
            state: the committed state; ``state.phase`` says which optimizer's turn it is.
            worker_state: of this virtual worker; its tensors are on the device of the model.
            batches: ``local_batches`` of them (fewer at the end of an epoch), some of which may have no rows.
            rng: seeded by (seed, step, worker), as are the global generators. It draws in host memory.
        """
        raise NotImplementedError

    def apply(self, state: TrainingState, combined: Combined) -> None:
        """Update the committed state. Called with the same values on every agent."""
        raise NotImplementedError
