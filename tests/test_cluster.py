"""Runs on a real Ray cluster: membership, endings and refusals. Each compares bits or row counts where it trains."""

import itertools
import re
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from jobs_for_tests import (
    accuracy,
    assert_every_row_once,
    build_model,
    build_optimizer,
    claim,
    digest,
    features,
    loss,
    slowly,
    trainer,
)
from ray.train import Result, TrainingFailedError
from torch import nn

from ray_dnn import Loss, RayDnnError, load_weights
from ray_dnn.errors import AdmissionError, HiddenStateError, NonFiniteError
from ray_dnn.events import (
    AgentAdmitted,
    AgentFollowed,
    AgentGone,
    AgentRefused,
    AgentStarted,
    Decided,
    GenerationFormed,
    HiddenStateSuspected,
    Progress,
    RunFinished,
    StepSkipped,
    Waiting,
)
from ray_dnn.testing import fit_resizing, read_events

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The small job on one agent."""
    return trainer(tmp_path_factory.mktemp("undisturbed"), 1, {"evaluate": accuracy}, {"evaluate_every": 5}).fit()


def assert_nothing_left() -> None:
    """No actor is alive and no resource is taken."""
    alive = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
    assert not alive
    assert ray.cluster_resources()["CPU"] == 16


def failure(job: Any) -> TrainingFailedError:
    with pytest.raises(TrainingFailedError) as caught:
        job.fit()
    assert_nothing_left()
    return caught.value


# -- membership --------------------------------------------------------------------------------------------------------


def test_three_agents_give_the_bits_and_metrics_of_one(tmp_path: Path, undisturbed: Result) -> None:
    result = trainer(tmp_path, 3, {"evaluate": accuracy}, {"evaluate_every": 5}).fit()
    assert digest(result) == digest(undisturbed)
    assert_every_row_once(result)
    one, three = undisturbed.metrics, result.metrics
    assert one is not None
    assert three is not None
    for name in ("loss", "validation/accuracy", "steps", "rows"):
        assert one[name] == three[name]
    assert undisturbed.metrics_dataframe.equals(result.metrics_dataframe)


def test_agents_that_join_and_leave_change_nothing(tmp_path: Path, undisturbed: Result) -> None:
    job = trainer(tmp_path, (1, 3), {"evaluate": accuracy}, {"evaluate_every": 5})
    result = fit_resizing(job, {0: 2, 3: 3, 6: 1, 9: 2})
    assert digest(result) == digest(undisturbed)
    assert undisturbed.metrics_dataframe.equals(result.metrics_dataframe)
    assert_every_row_once(result)
    formed = [e for e in read_events(result) if isinstance(e, GenerationFormed)]
    assert [(e.step, len(e.agents), len(e.joined), len(e.left)) for e in formed] == [
        (0, 2, 2, 0),
        (3, 3, 1, 0),
        (6, 1, 0, 2),
        (9, 2, 1, 0),
    ]
    assert_nothing_left()


@ray.remote(num_cpus=10)
class Occupant:
    """Takes up room until it is killed."""

    def there(self) -> None:
        """Return once it is placed."""


ENDLESS: dict[str, Any] = {"epochs": None, "steps": 1_000_000}


def undisturbed_for(result: Result, path: Path) -> Result:
    """One agent, for as many steps as a run that was stopped by hand."""
    assert result.metrics is not None
    return trainer(path, 1, config={"epochs": None, "steps": result.metrics["steps"]}).fit()


def test_agents_join_when_there_is_room_while_the_others_go_on(tmp_path: Path) -> None:
    occupant = Occupant.remote()
    ray.get(occupant.there.remote())
    job = trainer(tmp_path / "growing", (1, 3), {"loss": slowly(0.004)}, ENDLESS)
    job.scaling_config.resources_per_worker = {"CPU": 5}
    handle = job.start()
    for event in handle.events():
        if isinstance(event, Progress):
            break
    room = time.time()
    ray.kill(occupant)
    for event in handle.events():
        if isinstance(event, GenerationFormed) and len(event.agents) == 3:
            break
    handle.stop()
    result = handle.result()
    assert digest(result) == digest(undisturbed_for(result, tmp_path / "alone"))
    events = read_events(result)
    joined = [e for e in events if isinstance(e, GenerationFormed) and e.joined]
    assert joined[0].agents == ["agent-1"]
    # While the newcomer started (which takes some seconds from when there is room), imported and built, the first agent
    # went on. Of two newcomers either may be the first.
    first = joined[1].joined[0]
    started = next(e.time for e in events if isinstance(e, AgentStarted) and e.agent == first)
    assert room < started < joined[1].time
    meanwhile = [e for e in events if isinstance(e, Progress) and room < e.time < joined[1].time]
    assert meanwhile
    # And it had their state before they stopped for it.
    assert all(e.failed is None for e in events if isinstance(e, AgentFollowed))


def test_resizing_by_hand_takes_effect_at_a_step_boundary(tmp_path: Path) -> None:
    handle = trainer(tmp_path / "resized", (1, 3), {"loss": slowly(0.004)}, ENDLESS).start()
    with pytest.raises(ValueError, match=r"resize\(4\): must be from 1 to 3"):
        handle.resize(4)
    for event in handle.events():
        if isinstance(event, GenerationFormed) and len(event.agents) == 3:
            handle.resize(1)
        if isinstance(event, GenerationFormed) and event.left:
            break
    handle.stop()
    result = handle.result()
    assert digest(result) == digest(undisturbed_for(result, tmp_path / "alone"))
    sizes = [len(e.agents) for e in read_events(result) if isinstance(e, GenerationFormed)]
    assert 3 in sizes
    assert sizes[-1] == 1


def test_two_jobs_that_do_not_fit_together_run_one_after_the_other(tmp_path: Path, undisturbed: Result) -> None:
    heavy = {"CPU": 4}
    handles = []
    for name in "ab":
        job = trainer(tmp_path / name, 3, {"evaluate": accuracy, "loss": slowly(0.002)}, {"evaluate_every": 5})
        job.scaling_config.resources_per_worker = heavy
        handles.append(job.start())
    results = [handle.result() for handle in handles]
    assert {digest(r) for r in results} == {digest(undisturbed)}
    spans = []
    for result in results:
        events = read_events(result)
        started = min(e.time for e in events if isinstance(e, AgentStarted))
        spans.append((started, max(e.time for e in events if isinstance(e, AgentGone))))
    (_, first_end), (second_start, _) = sorted(spans)
    assert second_start > first_end - 1.0
    waits = [e for r in results for e in read_events(r) if isinstance(e, Waiting)]
    assert any("3 times (4 CPU)" in e.what and "free" in e.what for e in waits)


def test_a_run_with_agents_to_spare_makes_room_for_another_that_cannot_start(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"epochs": None, "steps": 10**6}
    handles = []
    for name in "ab":
        job = trainer(tmp_path / name, (1, 3), {"loss": slowly(0.002)}, endless)
        job.scaling_config.resources_per_worker = {"CPU": 5}  # of 16
        handles.append(job.start())
        wanted = 3 if name == "a" else 1
        formed = (len(e.agents) for e in handles[-1].events() if isinstance(e, GenerationFormed))
        assert wanted in formed
    for handle in handles:
        handle.stop()
    results = [handle.result() for handle in handles]
    for number, result in enumerate(results):
        assert result.metrics is not None
        steps = endless | {"steps": result.metrics["steps"]}
        alone = trainer(tmp_path / f"alone-{number}", 1, {"loss": loss}, steps).fit()
        assert digest(result) == digest(alone)
        assert not any(e.lost for e in read_events(result) if isinstance(e, GenerationFormed))
    said = [e.what for e in read_events(results[0]) if isinstance(e, Waiting)]
    assert "another run cannot start: this one makes room for it with 1 of its 3 replicas" in said


# -- endings -----------------------------------------------------------------------------------------------------------


def test_the_result_carries_the_weights(tmp_path: Path, undisturbed: Result) -> None:
    weights = load_weights(undisturbed.checkpoint)
    model = build_model()
    model.load_state_dict(weights, strict=True)
    assert weights["0.weight"].shape == (16, 4)
    names = [e for e in read_events(undisturbed) if isinstance(e, RunFinished)]
    assert names[0].weights_digest == digest(undisturbed)


def test_stopping_and_checkpointing_by_hand(tmp_path: Path) -> None:
    handle = trainer(tmp_path, 2, {"loss": slowly(0.005)}, ENDLESS).start()
    for event in handle.events():
        if isinstance(event, Progress):
            break
    checkpoint = handle.checkpoint()
    handle.stop()
    result = handle.result()
    assert load_weights(checkpoint).keys() == load_weights(result.checkpoint).keys()
    assert digest(result) == digest(undisturbed_for(result, tmp_path / "again"))
    with pytest.raises(RayDnnError, match="The run has ended"):
        handle.checkpoint()


def test_early_stopping_is_the_same_on_every_cluster(tmp_path: Path) -> None:
    spec = {"evaluate": accuracy, "stop": lambda history: len(history) >= 3}
    results = [trainer(tmp_path / str(n), n, spec, {"evaluate_every": 2, "epochs": 5}).fit() for n in (1, 2)]
    assert len({digest(r) for r in results}) == 1
    assert all(r.metrics is not None and r.metrics["steps"] == 6 for r in results)


class Awkward(Exception):
    """An exception that cannot be pickled."""

    def __init__(self, one: int, two: int):
        super().__init__("awkward")
        self.lock = __import__("threading").Lock()


def raising(error: BaseException, row: int | None = None) -> Any:
    def broken(*args: Any) -> Any:
        if row is None or bool((args[1]["row"] == row).any()):
            raise error
        return loss(*args)

    return broken


@pytest.mark.parametrize("where", ["model", "scheduler", "collate", "evaluate", "after_update"])
def test_an_exception_of_the_users_code_ends_the_run_with_its_traceback(tmp_path: Path, where: str) -> None:
    error = failure(trainer(tmp_path, 1, {where: raising(ValueError("no such luck"))}))
    assert isinstance(error.__cause__, ValueError)
    shown = "".join(traceback.format_exception(error))
    assert "no such luck" in shown
    assert "in broken" in shown


def test_an_exception_names_agent_step_worker_and_rows(tmp_path: Path) -> None:
    error = failure(trainer(tmp_path, 2, {"loss": raising(KeyError("row 150"), row=150)}))
    assert isinstance(error.__cause__, KeyError)
    assert re.search(r"loss, agent agent-\d, step \d+, virtual worker \d, rows \[.*150", str(error))


def test_an_exception_that_cannot_be_pickled_is_shown_all_the_same(tmp_path: Path) -> None:
    def broken(*args: Any) -> Any:
        raise Awkward(1, 2)

    shown = "".join(traceback.format_exception(failure(trainer(tmp_path, 2, {"loss": broken}))))
    assert "Awkward: awkward" in shown


# -- admission, hidden state, non-finite -------------------------------------------------------------------------------


def odd_one_out(folder: Path, odd: int) -> Any:
    """A loss that the ``odd``-th process computes a little differently, as another kind of machine would."""

    def different(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not hasattr(torch, "_number_of_this_process"):
            torch._number_of_this_process = claim(folder, 64)
        return loss(model, batch) * (1 + 1e-6 * (torch._number_of_this_process == odd))

    return different


def test_a_newcomer_with_other_arithmetic_is_refused_by_name(tmp_path: Path, undisturbed: Result) -> None:
    spec = {"loss": odd_one_out(tmp_path, 1), "evaluate": accuracy}
    handle = trainer(tmp_path / "run", (1, 2), spec, {"evaluate_every": 5, "epochs": None, "steps": 2_000}).start()
    refusals = []
    for event in handle.events():
        if isinstance(event, AgentRefused):
            refusals.append(event)
            break
    handle.stop()
    result = handle.result()
    assert "other bits than agent-1 in" in refusals[0].reason
    assert "gradient" in refusals[0].reason
    assert result.metrics is not None
    assert result.metrics["same_bits"] is True


def test_other_arithmetic_among_the_first_agents_is_an_error(tmp_path: Path) -> None:
    error = failure(trainer(tmp_path / "run", 2, {"loss": odd_one_out(tmp_path, 1)}))
    assert isinstance(error.__cause__, AdmissionError)


def test_without_determinism_other_arithmetic_is_admitted_and_marked(tmp_path: Path) -> None:
    result = trainer(tmp_path / "run", 2, {"loss": odd_one_out(tmp_path, 1)}, {"deterministic": False}).fit()
    assert result.metrics is not None
    assert result.metrics["same_bits"] is False
    assert_every_row_once(result)
    assert [e.same_bits for e in read_events(result) if isinstance(e, AgentAdmitted)].count(False) == 1


class Counting(nn.Module):
    """Scales its output by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * (1 + 0.01 * self.calls)


class Logging(Counting):
    """Counts its calls and does not use the number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x)


def test_hidden_state_is_caught_and_named(tmp_path: Path) -> None:
    error = failure(trainer(tmp_path, 2, {"model": Counting}))
    assert isinstance(error.__cause__, HiddenStateError)
    assert "model.calls" in str(error)


def test_hidden_state_without_effect_is_a_warning(tmp_path: Path) -> None:
    result = trainer(tmp_path, 2, {"model": Logging}).fit()
    (event,) = [e for e in read_events(result) if isinstance(e, HiddenStateSuspected)]
    assert event.names == ["model.calls"]


def poisoned(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """NaN for the rows 17 and 101."""
    bad = ((batch["row"] == 17) | (batch["row"] == 101)).any()
    return loss(model, batch) * torch.where(bad, float("nan"), 1.0)


def test_a_contribution_that_is_not_finite_is_named(tmp_path: Path) -> None:
    error = failure(trainer(tmp_path, 2, {"loss": poisoned}))
    assert isinstance(error.__cause__, NonFiniteError)
    assert re.search(r"step \d+: not finite: virtual worker \d on agent-\d, \d+ rows from \[.*\]: gradient", str(error))


def test_steps_that_are_not_finite_are_skipped_alike_everywhere(tmp_path: Path) -> None:
    results = [trainer(tmp_path / str(n), n, {"loss": poisoned}, {"nonfinite": "skip"}).fit() for n in (1, 2)]
    assert len({digest(r) for r in results}) == 1
    skipped = [[e.step for e in read_events(r) if isinstance(e, StepSkipped)] for r in results]
    assert skipped[0] == skipped[1]
    assert 2 <= len(skipped[0]) <= 4
    for result in results:
        assert_every_row_once(result)


def tokens(model: nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
    """A loss whose mean is over something else than rows: three for each row of class 1, else one."""
    each = nn.functional.cross_entropy(model(features(batch)), batch["y"], reduction="none")
    weights = 1.0 + 2.0 * batch["y"]
    return Loss((each * weights).sum(), weights.sum(), {"rows": (batch["y"].numel(), 1.0)})


def test_a_loss_that_is_not_a_mean_over_rows(tmp_path: Path) -> None:
    spec = {"loss": tokens, "optimizer": build_optimizer}
    results = [trainer(tmp_path / str(n), n, spec).fit() for n in (1, 2)]
    assert len({digest(r) for r in results}) == 1


@cache
def is_first(folder: Path) -> bool:
    """Whether this process is the first that asks."""
    return claim(folder, 1) == 0


def uneven(folder: Path) -> Callable[..., torch.Tensor]:
    """A loss that takes three times as long in one of the processes, and needs no core for it."""

    def sleeping(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        time.sleep(0.09 if is_first(folder) else 0.03)
        return loss(model, batch)

    return sleeping


def test_an_agent_three_times_slower_gets_fewer_virtual_workers(tmp_path: Path) -> None:
    config: dict[str, Any] = {"batch_size": 48, "virtual_workers": 12, "epochs": None}
    endless = config | {"steps": 10**6}
    handle = trainer(tmp_path / "uneven", 2, {"loss": uneven(tmp_path)}, endless).start()
    for event in handle.events():
        if isinstance(event, Decided) and event.kind == "rebalance":
            handle.stop()
    result = handle.result()
    assert result.metrics is not None
    formed = [e for e in read_events(result) if isinstance(e, GenerationFormed)]
    assert formed[0].bounds == [0, 6, 12]
    shares = sorted(b - a for a, b in itertools.pairwise(formed[1].bounds))
    assert shares[0] in (2, 3, 4, 5)  # 3, were it not for what else this machine does
    alone = trainer(tmp_path / "alone", 1, {"loss": loss}, config | {"steps": result.metrics["steps"]}).fit()
    assert digest(result) == digest(alone)
