"""The public seam carries local steps, worker state of every kind, and replicas of several agents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_for_tests import assert_every_row_once, digest, loss, trainer
from strategies_for_tests import CountingLocalSGD, ErrorFeedback, LocalSGD
from torch import nn

from ray_dnn.events import AgentGone, GenerationFormed
from ray_dnn.parallel import ColumnParallelLinear, RowParallelLinear
from ray_dnn.testing import Kill, fit_resizing, fit_with_faults, read_events

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.parametrize("strategy", [LocalSGD(), CountingLocalSGD()], ids=lambda s: type(s).__name__)
def test_local_steps_give_the_same_bits_through_joins_and_leaves(tmp_path: Path, strategy: LocalSGD) -> None:
    alone = trainer(tmp_path / "alone", 1, strategy=strategy).fit()
    moving = fit_resizing(trainer(tmp_path / "moving", (1, 4), strategy=strategy), {0: 2, 1: 4, 3: 1, 4: 3})
    assert digest(alone) == digest(moving)
    assert_every_row_once(moving)


def test_mirrored_worker_state_moves_with_its_worker(tmp_path: Path) -> None:
    two = trainer(tmp_path / "two", 2, strategy=ErrorFeedback()).fit()
    moving = fit_resizing(trainer(tmp_path / "moving", (2, 4), strategy=ErrorFeedback()), {0: 3, 2: 4, 5: 2, 8: 4})
    assert digest(two) == digest(moving)
    assert_every_row_once(moving)


def test_mirrored_worker_state_outlives_its_host(tmp_path: Path) -> None:
    two = trainer(tmp_path / "two", 2, strategy=ErrorFeedback()).fit()
    faults = [Kill("exchange-middle", step=3, rank=1), Kill("exchange-last", step=8, rank=0)]
    result = fit_with_faults(trainer(tmp_path / "faulty", (2, 3), strategy=ErrorFeedback()), faults, {0: 3, 8: 3})
    assert digest(two) == digest(result)
    assert_every_row_once(result)


def test_mirrored_worker_state_without_a_place_for_the_mirror_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ErrorFeedback keeps mirrored worker states"):
        trainer(tmp_path, (1, 4), strategy=ErrorFeedback())


class Divided(nn.Module):
    """A tensor-parallel MLP: each agent of a replica holds a part of the two large weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(4, 16)
        self.down = RowParallelLinear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Whole(nn.Module):
    """The same network on one agent, with the same initial weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def divided(path: Path, agents: Any, model: Any = Divided, size: int = 2) -> Any:
    return trainer(path, agents, {"model": model, "loss": loss}, {"clip_norm": 0.5}, replica_size=size)


def test_replicas_of_two_agents_run_through_the_same_engine(tmp_path: Path) -> None:
    one = divided(tmp_path / "one", 2).fit()
    moving = fit_resizing(divided(tmp_path / "moving", (2, 6)), {0: 2, 2: 6, 6: 4})
    assert digest(one) == digest(moving)
    assert_every_row_once(moving)
    formed = [e for e in read_events(moving.path) if isinstance(e, GenerationFormed)]
    assert [len(e.agents) for e in formed] == [2, 6, 4]
    # And the result is that of the whole network, to rounding.
    whole = divided(tmp_path / "whole", 1, Whole, size=1).fit()
    assert one.metrics is not None
    assert whole.metrics is not None
    assert one.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)


def test_a_replica_of_two_agents_dies_with_one_of_them(tmp_path: Path) -> None:
    one = divided(tmp_path / "one", 2).fit()
    faults = [Kill("computing", step=3, rank=1), Kill("exchange-last", step=8, rank=0)]
    result = fit_with_faults(divided(tmp_path / "faulty", (2, 4)), faults, {0: 4, 8: 4})
    assert digest(one) == digest(result)
    assert_every_row_once(result)
    gone = [e.agent for e in read_events(result) if isinstance(e, AgentGone) and "has ended" not in e.reason]
    assert len(gone) == 2


def test_agents_that_do_not_fill_replicas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of replica_size=2"):
        divided(tmp_path, (2, 5))
