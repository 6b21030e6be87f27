"""Checkpoints of runs on a real cluster: what was lost goes on from them, and ends with the undisturbed run's bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from jobs_for_tests import accuracy, assert_every_row_once, build_model, digest, features, slowly, trainer
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, TrainingFailedError
from storages import failing
from strategies_for_tests import CountingLocalSGD, ErrorFeedback
from test_strategies import Divided
from torch import nn
from torch.nn import functional

from ray_dnn import load_weights
from ray_dnn.errors import CheckpointError, ConfigError, FencedError
from ray_dnn.events import (
    AgentGone,
    AgentStarted,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointWritten,
    Event,
    GenerationFormed,
    RunResumed,
)
from ray_dnn.testing import Kill, read_events, read_ledger, start_with_faults

pytestmark = pytest.mark.usefixtures("cluster")

EPOCHS = 4
LONG: dict[str, Any] = {"epochs": EPOCHS, "evaluate_every": 9}
OFTEN: dict[str, Any] = LONG | {"checkpoint_every": 5}
JOB: dict[str, Any] = {"evaluate": accuracy}
SLOW: dict[str, Any] = JOB | {"loss": slowly(0.008)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trainer(tmp_path_factory.mktemp("undisturbed"), 1, JOB, LONG).fit()


def assert_same(result: Result, undisturbed: Result) -> None:
    """Bits, rows, evaluations."""
    assert digest(result) == digest(undisturbed)
    assert_every_row_once(result, EPOCHS)
    assert result.metrics is not None
    assert undisturbed.metrics is not None
    for name in ("steps", "rows", "loss", "validation/accuracy"):
        assert result.metrics[name] == undisturbed.metrics[name]
    assert result.metrics_dataframe.to_dict() == undisturbed.metrics_dataframe.to_dict()
    one, other = read_ledger(result), read_ledger(undisturbed)
    assert [(line.rows, line.digests) for line in one.lines] == [(line.rows, line.digests) for line in other.lines]


def events(run: Result | str | Path, kind: type[Event], attempt: int | None = None) -> list[Any]:
    found = read_events(run if isinstance(run, Result) else str(run), attempt)
    return [event for event in found if isinstance(event, kind)]


def until(there: Callable[[], bool]) -> None:
    while not there():
        time.sleep(0.01)


def checkpoints(path: Path) -> list[Path]:
    return sorted((path / "run").glob("checkpoint-*"))


def test_a_run_that_lost_all_agents_goes_on_from_its_checkpoint(tmp_path: Path, undisturbed: Result) -> None:
    faults = [Kill("computing", step=17, rank=0), Kill("computing", step=17, rank=1)]
    lost = start_with_faults(trainer(tmp_path, (1, 2), SLOW, OFTEN), faults, {0: 2})
    with pytest.raises(TrainingFailedError, match="Start the run again under its name"):
        lost.result()
    written = [e.step for e in events(tmp_path / "run", CheckpointWritten)]
    assert written == [5, 10, 15][: len(written)]
    result = trainer(tmp_path, 3, JOB, OFTEN).fit()
    assert [e.step for e in events(result, RunResumed)] == written[-1:]
    assert_same(result, undisturbed)
    assert load_weights(result.checkpoint).keys() == dict(build_model().state_dict()).keys()


def kill(path: Path, seen: int) -> None:
    """Let a driver of the small job train until so many checkpoints are there, complete or not, and end it."""
    command = [sys.executable, __file__, str(path), ray.get_runtime_context().gcs_address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        while len(checkpoints(path)) < seen:
            assert driver.poll() is None
        driver.send_signal(signal.SIGKILL)


def test_a_driver_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path, undisturbed: Result) -> None:
    for seen in (1, 3):  # each time in the middle of a checkpoint
        kill(tmp_path, seen)
    result = trainer(tmp_path, 2, JOB, OFTEN).fit()
    assert_same(result, undisturbed)
    assert [event.attempt for event in events(result, RunResumed)] in ([1], [2])


def test_all_agents_lost_is_a_failure_that_may_be_allowed(tmp_path: Path, undisturbed: Result) -> None:
    faults = [Kill("computing", step=17, rank=0), Kill("computing", step=17, rank=1)]
    failures = RunConfig(name="run", storage_path=str(tmp_path), failure_config=FailureConfig(max_failures=1))
    job = replace(trainer(tmp_path, (1, 2), SLOW, OFTEN), run_config=failures)
    result = start_with_faults(job, faults, {0: 2}).result()
    assert_same(result, undisturbed)
    assert events(result, RunResumed, attempt=2)


def written(path: Path, **config: Any) -> Path:
    """A run that ended after 15 of its steps."""
    trainer(path, 2, JOB, LONG | {"epochs": None, "steps": 15, "checkpoint_every": 5} | config).fit()
    return path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("ended"))


def copied(ended: Path, to: Path) -> list[Path]:
    """A copy of a run, and its checkpoints."""
    shutil.copytree(ended, to, dirs_exist_ok=True)
    return checkpoints(to)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_longer_run_goes_on_where_a_shorter_one_ended(ended: Path, tmp_path: Path, undisturbed: Result) -> None:
    copied(ended, tmp_path)
    result = trainer(tmp_path, 1, JOB, LONG).fit()
    assert [event.step for event in events(result, RunResumed)] == [15]
    assert digest(result) == digest(undisturbed)
    assert_every_row_once(result, EPOCHS)
    again = trainer(tmp_path, 1, JOB, LONG).fit()  # there is nothing left to do
    assert (digest(again), again.metrics_dataframe.to_dict()) == (digest(result), result.metrics_dataframe.to_dict())


def test_a_shorter_run_than_there_is_already_is_refused(ended: Path, tmp_path: Path) -> None:
    copied(ended, tmp_path)
    with pytest.raises(ConfigError, match="checkpoint of step 15, and the job as it is now has 14 steps"):
        trainer(tmp_path, 1, JOB, LONG | {"epochs": 2}).fit()


def test_a_damaged_checkpoint_is_passed_over_and_said(ended: Path, tmp_path: Path, undisturbed: Result) -> None:
    *older, newest = copied(ended, tmp_path)
    flip(newest / "model.safetensors")
    (older[-1] / "state.head").unlink()
    result = trainer(tmp_path, 1, JOB, LONG).fit()
    assert [Path(e.path).name for e in events(result, CheckpointDamaged)] == [newest.name, older[-1].name]
    assert [event.step for event in events(result, RunResumed)] == [5]
    assert digest(result) == digest(undisturbed)


def test_without_one_that_can_be_used_nothing_is_touched(ended: Path, tmp_path: Path) -> None:
    for checkpoint in copied(ended, tmp_path):
        flip(checkpoint / "manifest.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"No checkpoint of .* can be used, and nothing was changed"):
        trainer(tmp_path, 1, JOB, LONG).fit()
    assert sorted(tmp_path.rglob("*")) == before


def divided_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(features(batch)), batch["y"])


def other_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def other_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("spec", "config", "match"),
    [
        ({}, {"seed": 1}, r"TrainConfig\(seed\): 0 then, 1 now"),
        ({}, {"batch_size": 16, "virtual_workers": 4}, r"\(batch_size\): 32 then, 16 now; .*workers\): 5 then, 4 now"),
        ({}, {"num_threads": 2}, r"num_threads\): 1 then, 2 now"),
        ({"model": other_model}, {}, "What differs: the model: 146 parameters"),
        (
            {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1)},
            {},
            "the optimizer 'optimizer': AdamW",
        ),
    ],
    ids=["seed", "batch", "threads", "model", "optimizer"],
)
def test_another_job_under_the_same_name_is_refused(
    ended: Path, tmp_path: Path, spec: dict[str, Any], config: dict[str, Any], match: str
) -> None:
    copied(ended, tmp_path)
    with pytest.raises((ConfigError, TrainingFailedError), match=match):
        trainer(tmp_path, 1, JOB | spec, LONG | config).fit()


def test_a_new_run_begins_with_old_weights(ended: Path, tmp_path: Path) -> None:
    newest = checkpoints(ended)[-1]
    few = {"epochs": None, "steps": 3}
    results = {}
    for load in ("weights", "all"):
        job = replace(trainer(tmp_path / load, 1, config=few), start_from=str(newest), load=load)
        results[load] = digest(job.fit())
    again = RunConfig(name="again", storage_path=str(tmp_path))
    more = replace(trainer(tmp_path, 2, config=few), start_from=str(newest), load="all", run_config=again)
    assert digest(more.fit()) == results["all"]
    assert len({*results.values(), digest(trainer(tmp_path / "none", 1, config=few).fit())}) == 3
    with pytest.raises(TrainingFailedError, match=r"does not hold the weights of this model: 1\.bias"):
        replace(trainer(tmp_path / "x", 1, {"model": other_model}, few), start_from=str(newest)).fit()


def test_of_two_drivers_under_one_name_the_older_one_ends(tmp_path: Path) -> None:
    config = {"epochs": None, "steps": 100_000, "checkpoint_every": 10}
    older = trainer(tmp_path, 1, SLOW, config).start()
    for event in older.events():
        if isinstance(event, CheckpointWritten):
            break
    newer = trainer(tmp_path, 1, SLOW, config).start()
    with pytest.raises(TrainingFailedError, match="was started again meanwhile") as caught:
        older.result()
    assert isinstance(caught.value.__cause__, FencedError)
    newer.stop()
    assert newer.result().metrics["steps"] >= 10


def test_only_so_many_checkpoints_are_kept(tmp_path: Path) -> None:
    keep = RunConfig(name="run", storage_path=str(tmp_path), checkpoint_config=CheckpointConfig(2))
    result = replace(trainer(tmp_path, 2, JOB, OFTEN), run_config=keep).fit()
    left = [path.name for path in checkpoints(tmp_path)]
    assert left[-1].endswith("000000028")
    assert len(left) == 2
    assert [Path(c.path).name for c, _ in result.best_checkpoints] == left
    for checkpoint, _ in result.best_checkpoints:
        load_weights(checkpoint)


def test_a_storage_that_goes_away_for_a_while_stops_nobody(tmp_path: Path, undisturbed: Result) -> None:
    away = tmp_path / "away"
    config = RunConfig(name="run", storage_path=str(tmp_path), storage_filesystem=failing(away))
    handle = replace(trainer(tmp_path, 2, SLOW, OFTEN), run_config=config).start()
    failed = 0
    for event in handle.events():
        if isinstance(event, CheckpointWritten) and not failed:
            away.touch()
        if isinstance(event, CheckpointFailed):
            failed += 1
            away.unlink(missing_ok=True)
    assert failed
    assert_same(handle.result(), undisturbed)


def test_a_storage_that_stays_away_ends_the_run_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Result
) -> None:
    away, rescued = tmp_path / "away", tmp_path / "rescued"
    rescued.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rescued))
    monkeypatch.setattr("ray_dnn.checkpoints._AGAIN_S", 0.2)
    monkeypatch.setattr("ray_dnn.checkpoints._GIVE_UP_S", 0.1)
    monkeypatch.setattr("ray_dnn.storage._CLOSE_S", 0.5)
    config = RunConfig(name="run", storage_path=str(tmp_path), storage_filesystem=failing(away))
    handle = replace(trainer(tmp_path, 2, {**JOB, "loss": slowly(0.03)}, OFTEN), run_config=config).start()
    for event in handle.events():
        if isinstance(event, CheckpointWritten):
            away.touch()
    with pytest.raises(TrainingFailedError, match=r"has refused for .* is in .* move all that is there") as caught:
        handle.result()
    assert isinstance(caught.value.__cause__, CheckpointError)
    (folder,) = rescued.iterdir()
    for found in folder.iterdir():
        shutil.move(found, tmp_path / "run")
    result = trainer(tmp_path, 1, JOB, OFTEN).fit()
    (resumed,) = events(result, RunResumed)
    assert 5 < resumed.step < 28
    assert_same(result, undisturbed)


def test_whoever_dies_before_its_parts_are_written_leaves_them_to_another(tmp_path: Path, undisturbed: Result) -> None:
    away = tmp_path / "slow"
    config = RunConfig(name="run", storage_path=str(tmp_path), storage_filesystem=failing(away, waits=True))
    handle = replace(trainer(tmp_path, (1, 3), SLOW, OFTEN), run_config=config).start()
    pids = {}
    for event in handle.events():
        if isinstance(event, AgentStarted):
            pids[event.agent] = event.pid
        if isinstance(event, GenerationFormed) and len(event.agents) == 3 and not away.exists():
            away.touch()  # from now on, nobody can write
            until(lambda: (tmp_path / "slow.waiting").exists())
            os.kill(pids[event.agents[-1]], signal.SIGKILL)
        if isinstance(event, AgentGone):
            away.unlink(missing_ok=True)
    assert_same(handle.result(), undisturbed)


@pytest.mark.parametrize(
    ("agents", "more"),
    [
        ((1, 2), {"strategy": CountingLocalSGD()}),
        ((2, 3), {"strategy": ErrorFeedback()}),
        ((4, 2), {"replica_size": 2, "spec": {"model": Divided, "loss": divided_loss}}),
    ],
    ids=["combined states", "mirrored states", "replicas of two"],
)
def test_all_that_a_run_has_goes_on(tmp_path: Path, agents: tuple[int, int], more: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", agents[0], **more).fit()
    assert whole.metrics is not None
    few = {"epochs": None, "steps": whole.metrics["steps"] // 2}
    trainer(tmp_path / "parts", agents[0], config=few, **more).fit()
    assert digest(trainer(tmp_path / "parts", agents[1], **more).fit()) == digest(whole)


if __name__ == "__main__":  # the driver that is killed
    ray.init(address=sys.argv[2], log_to_driver=False)
    trainer(Path(sys.argv[1]), 1, SLOW, OFTEN).fit()
