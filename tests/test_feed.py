"""Rows by number: the same ones whatever Ray Data's blocks are."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from ray_dnn.errors import ConfigError
from ray_dnn.feed import BlockReader, default_collate, index_dataset

pytestmark = pytest.mark.usefixtures("cluster")


def numbers(dataset: Any, ids: list[int]) -> list[int]:
    index = index_dataset("train", dataset)
    return BlockReader(index).rows(np.array(ids)).column("id").to_pylist()


@pytest.mark.parametrize("blocks", [1, 7, 40])
def test_a_row_has_the_same_number_for_every_number_of_blocks(blocks: int) -> None:
    dataset = ray.data.range(1000, override_num_blocks=blocks).map_batches(lambda b: {"id": b["id"] * 2})
    assert numbers(dataset, [999, 0, 500, 500, 3]) == [1998, 0, 1000, 1000, 6]


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(5):
        pq.write_table(pa.table({"id": [number * 10 + i for i in range(10)]}), tmp_path / f"{number}.parquet")
    assert numbers(ray.data.read_parquet(str(tmp_path)), [0, 10, 49]) == [0, 10, 49]


def test_rows_that_were_fetched_ahead_are_the_same() -> None:
    reader = BlockReader(index_dataset("train", ray.data.range(100, override_num_blocks=4)))
    ids = np.array([3, 77, 50])
    reader.prefetch(ids)
    assert reader.rows(ids) == reader.rows(ids)


def test_reading_leaves_the_users_dataset_settings_alone() -> None:
    dataset = ray.data.range(10)
    dataset.context.execution_options.preserve_order = False
    index_dataset("train", dataset)
    assert dataset.context.execution_options.preserve_order is False


def test_pandas_and_tensor_columns_become_tensors() -> None:
    frame = ray.data.from_pandas(pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5]}))
    rows = BlockReader(index_dataset("train", frame)).rows(np.array([2, 0]))
    batch = default_collate(rows, torch.Generator())
    assert batch["a"].tolist() == [3, 1]
    assert batch["b"].dtype == torch.float64
    images = ray.data.from_numpy(np.arange(24, dtype=np.float32).reshape(4, 2, 3))
    rows = BlockReader(index_dataset("train", images)).rows(np.array([3, 1]))
    assert default_collate(rows, torch.Generator())["data"].tolist() == [
        [[18, 19, 20], [21, 22, 23]],
        [[6, 7, 8], [9, 10, 11]],
    ]


@pytest.mark.parametrize("column", [["a", "b"], [[1], [2, 3]]], ids=["text", "ragged"])
def test_a_column_that_is_no_tensor_is_refused_by_name(column: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"The column 'odd' has type .* Give TrainSpec"):
        default_collate(pa.table({"odd": column}), torch.Generator())


def test_what_is_no_dataset_or_has_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"datasets\['train'\] is a list; it must be a ray.data.Dataset"):
        index_dataset("train", [1, 2, 3])
    with pytest.raises(ConfigError, match=r"datasets\['train'\] has no rows"):
        index_dataset("train", ray.data.range(10).filter(lambda row: False))
