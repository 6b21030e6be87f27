"""The feed on clusters that are small, full, or lose a node. Each test compares rows and bits with an easy life's."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import nodes
from jobs_for_tests import CONFIG, SPEC, accuracy, table
from ray.train import Result, RunConfig, ScalingConfig

from benchmarks.feed_alone import feed
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.sampler import NUMBERS
from ray_dnn.testing import Kill, Stop, fit_with_faults, read_ledger

MIB = 2**20
QUICKLY = {  # a dead node is known to be dead after a second and a half
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


def cluster_of(cpus: int, store: int) -> AbstractContextManager[Any]:
    return nodes(num_cpus=cpus, object_store_memory=store, _system_config=QUICKLY)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small job's rows, in Parquet files of two row groups each."""
    folder = tmp_path_factory.mktemp("rows")
    whole = table(800)
    for number in range(4):
        pq.write_table(whole.slice(number * 200, 200), folder / f"{number}.parquet", row_group_size=100)
    return folder


def even(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A transform that keeps a number of rows that nobody knows beforehand, and adds noise."""
    kept = {name: values[batch["row"] % 4 != 0] for name, values in batch.items()}
    return kept | {"x0": kept["x0"] + np.random.randn(len(kept["x0"])).astype(np.float32) / 100}


def others(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `even` leaves out."""
    return {name: values[batch["row"] % 4 == 0] for name, values in batch.items()}


def trainer(path: Path, rows: Path, agents: int | tuple[int, int], **config: Any) -> Trainer:
    train = ray.data.read_parquet(str(rows)).map_batches(even)
    validation = ray.data.read_parquet(str(rows)).map_batches(others)
    return Trainer(
        TrainSpec(**SPEC | {"evaluate": accuracy}),
        {"train": train, "validation": validation},
        TrainConfig(**CONFIG | {"epochs": 3, "shuffle_window": 128, "evaluate_every": 7} | config),
        scaling_config=ScalingConfig(num_workers=agents),
        run_config=RunConfig(name="run", storage_path=str(path)),
    )


def outcome(result: Result) -> dict[str, Any]:
    """Everything that must not depend on the cluster."""
    assert result.metrics is not None
    names = ("weights_digest", "loss", "validation/accuracy", "steps", "rows")
    return {name: result.metrics[name] for name in names} | {"history": result.metrics_dataframe.to_dict()}


@pytest.fixture(scope="module")
def undisturbed(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By two agents that hold both CPUs of their cluster."""
    with cluster_of(2, 100 * MIB):
        result = trainer(tmp_path_factory.mktemp("undisturbed"), rows, 2).fit()
        assert_every_row_once(result)
        return outcome(result)


def assert_every_row_once(result: Result) -> None:
    ledger = read_ledger(result.path)
    assert ledger.rows == 600
    for epoch in range(3):
        assert ledger.counts(epoch).tolist() == [1] * 600


def test_agents_that_hold_all_cpus_do_not_starve_those_who_read(
    rows: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with cluster_of(1, 100 * MIB):
        result = trainer(tmp_path, rows, 1).fit()
        assert outcome(result) == undisturbed
        assert_every_row_once(result)


def test_deaths_hangs_and_joins_use_every_row_once_and_learn_the_same(
    rows: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    faults = [
        Kill("supply", step=4, rank=0),
        Kill("reading", step=9, rank=1),
        Stop("computing", step=18, rank=0),  # the last step of the first epoch
        Kill("reading", step=25, rank=1),
    ]
    with cluster_of(8, 100 * MIB):
        job = trainer(tmp_path, rows, (1, 3))
        result = fit_with_faults(job, faults, {0: 2, 9: 3, 18: 2, 25: 3})
        assert outcome(result) == undisturbed
        assert_every_row_once(result)


# -- larger than memory ------------------------------------------------------------------------------------------------

WIDE = 16_000  # bytes of a row


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 MB of Parquet, in files of five row groups."""
    folder = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(3)
    for number in range(12):
        data = pa.py_buffer(rng.bytes(1000 * WIDE))
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(WIDE), 1000, [None, data])
        ids = pa.array(np.arange(number * 1000, (number + 1) * 1000))
        whole = pa.table({"id": ids, "data": column})
        pq.write_table(whole, folder / f"{number:02}.parquet", row_group_size=200, compression="none")
    return folder


def steps_of(wide: Path, config: TrainConfig) -> Iterator[list[int]]:
    """The numbers of the rows of each step."""
    fed = feed(ray.data.read_parquet(str(wide)), config)
    try:
        for tables in fed.steps():
            yield [number for t in tables for number in t.column(NUMBERS).to_pylist()]
    finally:
        fed.close()


def spilled() -> list[Path]:
    """Objects that the store had no room for."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    return [path for folder in session.glob("ray_spilled_objects*") for path in folder.iterdir()]


def test_a_dataset_of_several_times_the_store_streams_through_it(wide: Path) -> None:
    config = TrainConfig(200, virtual_workers=4, epochs=1, shuffle_window=1000)
    with cluster_of(2, 80 * MIB):
        seen = []
        for step in steps_of(wide, config):
            seen += step
            assert not spilled()
        assert sorted(seen) == list(range(12_000))
        with pytest.raises(ValueError, match=r"16\.\d kB a row: .* has 0.08 GB, .* 25%. Lower"):
            list(steps_of(wide, TrainConfig(200, virtual_workers=4, epochs=1)))
        with pytest.raises(ValueError, match=r"Use TrainConfig\(shuffle='windowed'\)"):
            list(steps_of(wide, TrainConfig(200, virtual_workers=4, epochs=1, shuffle="global")))


def test_blocks_of_a_node_that_dies_are_made_again(wide: Path) -> None:
    config = TrainConfig(200, virtual_workers=4, epochs=1, shuffle_window=1000)
    with cluster_of(2, 150 * MIB) as cluster:
        undisturbed = list(steps_of(wide, config))
        node = cluster.add_node(num_cpus=2, object_store_memory=150 * MIB)
        seen = []
        for step in steps_of(wide, config):
            seen.append(step)
            if len(seen) == 20:
                os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        assert seen == undisturbed
