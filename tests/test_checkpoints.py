"""Checkpoints of runs on a real cluster: what was lost goes on from them, and ends with the undisturbed run's bits."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from jobs_for_tests import SPEC, accuracy, assert_every_row_once, build_model, digest, slowly, trainer
from ray.train import CheckpointConfig, Result, RunConfig, TrainingFailedError
from torch import nn

from ray_dnn import TrainConfig, Trainer, TrainSpec, load_weights
from ray_dnn.errors import CheckpointError, ConfigError, FencedError
from ray_dnn.events import CheckpointDamaged, CheckpointFailed, CheckpointWritten, Event, RunResumed
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
    result = trainer(tmp_path, (1, 2), JOB, OFTEN).fit()
    assert_same(result, undisturbed)
    assert [event.attempt for event in events(result, RunResumed)] in ([1], [2])


if __name__ == "__main__":  # the driver that is killed
    ray.init(address=sys.argv[2], log_to_driver=False)
    trainer(Path(sys.argv[1]), 2, SLOW, OFTEN).fit()
