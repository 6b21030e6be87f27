"""Deaths, hangs and wrong bits on a real Ray cluster. Each test compares bits and rows with an undisturbed run."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from jobs_for_tests import (
    accuracy,
    assert_every_row_once,
    digest,
    loss,
    trainer,
)
from ray.train import FailureConfig, Result, RunConfig, TrainingFailedError
from torch import nn

from ray_dnn.config import Audit
from ray_dnn.errors import AgentLostError, AuditError
from ray_dnn.events import (
    AgentGone,
    Decided,
    FirstStep,
    GenerationFormed,
    Waiting,
)
from ray_dnn.liveness import Patience
from ray_dnn.testing import (
    Corrupt,
    Fault,
    Kill,
    Partition,
    Slow,
    Stop,
    fit_with_faults,
    read_events,
    start_with_faults,
)

pytestmark = pytest.mark.usefixtures("cluster")

LONG: dict[str, Any] = {"epochs": 8, "evaluate_every": 5}  # 56 steps
JOB: dict[str, Any] = {"evaluate": accuracy}


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trainer(tmp_path_factory.mktemp("undisturbed"), 1, JOB, LONG).fit()


def faulty(path: Path, agents: int | tuple[int, int], failures: int = 0, **more: Any) -> Any:
    """A trainer of the same job. ``failures``: falls below the minimum that it survives."""
    job = trainer(path, agents, JOB | more.pop("spec", {}), LONG | more.pop("config", {}), **more)
    config = FailureConfig(max_failures=failures)
    object.__setattr__(job, "run_config", RunConfig(name="run", storage_path=str(path), failure_config=config))
    return job


def assert_undisturbed(result: Result, undisturbed: Result) -> None:
    """The same bits, metrics, evaluations and rows."""
    assert digest(result) == digest(undisturbed)
    assert undisturbed.metrics_dataframe.equals(result.metrics_dataframe)
    assert result.metrics is not None
    assert undisturbed.metrics is not None
    for name in ("loss", "validation/accuracy", "steps", "rows"):
        assert result.metrics[name] == undisturbed.metrics[name]
    assert_every_row_once(result, 8)


def gone(result: Result | str) -> list[str]:
    """Why agents went, but for those that stayed to the end."""
    return [e.reason for e in read_events(result) if isinstance(e, AgentGone) and "has ended" not in e.reason]


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_survivors_go_on_wherever_in_a_step_an_agent_dies(tmp_path: Path, undisturbed: Result) -> None:
    places = ["computing", "exchange-middle", "exchange-last", "applying"]
    faults = [Kill(at, step=3 + 10 * index, rank=index % 3) for index, at in enumerate(places)]
    faults.append(Kill("evaluating", step=50, rank=0))
    sizes = {0: 3} | {fault.step: 3 for fault in faults if fault.step}
    result = fit_with_faults(faulty(tmp_path, (1, 3)), faults, sizes)
    assert_undisturbed(result, undisturbed)
    assert len(gone(result)) == len(faults)
    # The event log tells the story of the first one.
    events = read_events(result)
    death = next(e for e in events if isinstance(e, AgentGone))
    assert death.reason.startswith("died")
    # By the later ones the watcher, which starts beside the agents, has had a look for sure.
    assert gone(result)[-1].startswith("died, last seen in ")
    formed = next(e for e in events if isinstance(e, GenerationFormed) and e.lost)
    assert formed.lost == [death.agent]
    assert len(formed.agents) == 2
    first = next(e for e in events if isinstance(e, FirstStep) and e.generation == formed.generation)
    assert first.step == 3
    assert first.called <= first.left <= first.formed <= first.agreed <= first.committed
    assert events.index(death) < events.index(formed) < events.index(first)


def test_agents_that_die_before_they_take_part_are_replaced(tmp_path: Path, undisturbed: Result) -> None:
    faults = [Kill("starting", agent=1), Kill("building", agent=2), Kill("admission", agent=3)]
    result = fit_with_faults(faulty(tmp_path, 2), faults)
    assert_undisturbed(result, undisturbed)
    assert len(gone(result)) == 3


def test_deaths_while_a_newcomer_joins_and_while_a_run_ends(tmp_path: Path, undisturbed: Result) -> None:
    faults = [
        Kill("copying", step=10, rank=0),  # the source
        Kill("copying", step=20, agent=5),  # a newcomer
        Kill("forming", step=30, rank=1),
        Kill("finishing", rank=1),
    ]
    result = fit_with_faults(faulty(tmp_path, (1, 4)), faults, {0: 2, 10: 3, 20: 4, 30: 4, 40: 3})
    assert_undisturbed(result, undisturbed)


def test_several_deaths_at_once_and_a_death_during_the_recovery_of_another(tmp_path: Path, undisturbed: Result) -> None:
    faults: list[Fault] = [
        *(Kill("exchange-middle", step=7, rank=rank) for rank in (0, 1, 3)),  # all but one
        Kill("computing", step=26, rank=1),
        Kill("forming", step=26, rank=2),  # which only happens in the recovery of the one before
        Kill("computing", step=40, rank=3),  # in the step before which the number grows
        Kill("computing", step=40, rank=0),
    ]
    result = fit_with_faults(faulty(tmp_path, (1, 4)), faults, {0: 4, 25: 4, 40: 4})
    assert_undisturbed(result, undisturbed)


def test_below_the_minimum_the_others_wait_with_their_state(tmp_path: Path, undisturbed: Result) -> None:
    faults = [Kill("computing", step=9, rank=0), Kill("exchange-last", step=30, rank=1)]
    result = fit_with_faults(faulty(tmp_path, 2, failures=2), faults)
    assert_undisturbed(result, undisturbed)
    waits = [e.what for e in read_events(result) if isinstance(e, Waiting)]
    assert any("1 of at least 2 replicas are there, holding the state after step 9 in memory" in what for what in waits)


def failure(run: Any, match: str) -> BaseException | None:
    with pytest.raises(TrainingFailedError, match=match) as caught:
        run.result()
    alive = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
    assert not alive
    return caught.value.__cause__


def test_one_fall_below_the_minimum_too_many_ends_the_run(tmp_path: Path) -> None:
    run = start_with_faults(faulty(tmp_path, 2), [Kill("computing", step=9, rank=0)])
    cause = failure(run, r"1 of at least 2 replicas are left, for the 1. time; .*max_failures=0")
    assert isinstance(cause, AgentLostError)


def test_when_all_agents_are_lost_the_user_is_told_how_to_go_on(tmp_path: Path) -> None:
    faults = [Kill("computing", step=9, rank=rank) for rank in (0, 1)]
    run = start_with_faults(faulty(tmp_path, (1, 2)), faults, {0: 2})
    failure(run, r"All agents were lost after step \d+ .*Start the run again")


def test_agents_that_never_come_to_train_end_the_run(tmp_path: Path) -> None:
    run = start_with_faults(faulty(tmp_path, 1), [Kill("building", agent=n) for n in range(1, 6)])
    failure(run, "5 agents in a row did not come to train")


# -- hangs -------------------------------------------------------------------------------------------------------------


def test_stopped_deadlocked_and_looping_agents_are_found(tmp_path: Path, undisturbed: Result) -> None:
    faults = [
        Stop("exchange-middle", step=6, rank=1),
        Stop("building", agent=4),
        Slow("computing", step=20, rank=1),
        Slow("applying", step=35, rank=0, busy=True),
    ]
    job = faulty(tmp_path, (1, 3), patience=Patience(idle_s=1.5, busy_s=3.5))
    result = fit_with_faults(job, faults, {0: 3, 20: 3, 35: 3})
    assert_undisturbed(result, undisturbed)
    reasons = gone(result)
    assert len([reason for reason in reasons if "has been stopped" in reason]) == 2
    assert any("idle for" in reason and "computing, step 20" in reason for reason in reasons)
    assert any("has been in applying, step 35 for" in reason for reason in reasons)


def holding_the_lock(seconds: float, at: int) -> Any:
    """The loss; in one step it computes for some seconds without letting go of the interpreter's lock."""
    calls = 0

    def slow(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        import ctypes
        import time

        calls += 1
        if calls == at:
            end = time.monotonic() + seconds
            crc = ctypes.PyDLL(None).memset  # PyDLL keeps the lock
            crc.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
            memory = ctypes.create_string_buffer(2**28)
            while time.monotonic() < end:
                crc(memory, 0, len(memory))
        return loss(model, batch)

    return slow


def test_an_extension_that_holds_the_lock_while_it_computes_is_alive(tmp_path: Path, undisturbed: Result) -> None:
    job = faulty(tmp_path, 2, spec={"loss": holding_the_lock(6, at=20)}, patience=Patience(idle_s=1.5, silent_s=4))
    result = job.fit()
    assert_undisturbed(result, undisturbed)
    assert gone(result) == []


def test_a_step_that_hangs_on_every_agent_ends_the_run(tmp_path: Path) -> None:
    faults = [Slow("computing", step=5, rank=0) for _ in range(3)]
    job = faulty(tmp_path, 2, failures=-1, patience=Patience(idle_s=1.2))
    failure(start_with_faults(job, faults), "Step 5 hung on 3 agents in a row")


def test_connections_that_break_or_fall_silent_are_made_anew(tmp_path: Path, undisturbed: Result) -> None:
    faults = [
        Partition("exchange-first", step=8, rank=1, closed=True),
        Partition("exchange-middle", step=20, rank=0, peer=2),
    ]
    job = faulty(tmp_path, 3, patience=Patience(stalled_s=1.5))
    result = fit_with_faults(job, faults)
    assert_undisturbed(result, undisturbed)
    assert gone(result) == []


# -- wrong bits --------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_before_it_does_harm(tmp_path: Path, undisturbed: Result) -> None:
    faults = [
        Corrupt("computing", step=6, rank=2, what="weights"),
        Corrupt("computing", step=20, rank=0, what="gradient"),
        Corrupt("exchange-first", step=30, rank=1, what="wire"),
    ]
    job = faulty(tmp_path, (2, 3), audit=Audit(workers=5))
    result = fit_with_faults(job, faults, {0: 3, 20: 3})
    assert_undisturbed(result, undisturbed)
    assert result.metrics is not None
    assert result.metrics["same_bits"]
    first, second = gone(result)
    assert "computes wrongly: before step 6 its state differs" in first
    assert re.search(r"computes wrongly: it computed the contribution of virtual worker \d in step 20 wrongly", second)
    reasons = [e.reason for e in read_events(result) if isinstance(e, Decided)]
    assert any("garbled what it carried" in reason for reason in reasons)


def test_two_agents_that_differ_end_the_run_for_nobody_can_tell_who_is_wrong(tmp_path: Path) -> None:
    job = faulty(tmp_path, 2, audit=Audit())
    cause = failure(start_with_faults(job, [Corrupt("computing", step=6, rank=0)]), "no majority")
    assert isinstance(cause, AuditError)
