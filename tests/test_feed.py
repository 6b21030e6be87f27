"""Rows, from datasets to steps: the same ones in the same order, whatever Ray's blocks and the cluster are."""

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from feeding import alive, column, numbers

from benchmarks.feed_alone import feed
from ray_dnn.config import TrainConfig
from ray_dnn.errors import ConfigError, DataError, UserCodeError
from ray_dnn.feed.collate import default_collate
from ray_dnn.feed.datasets import open_datasets
from ray_dnn.sampler import NUMBERS

pytestmark = pytest.mark.usefixtures("cluster")

CONFIG = TrainConfig(64, virtual_workers=3, epochs=2, shuffle_window=256)


def flat(steps: list[list[Any]]) -> list[Any]:
    return [value for step in steps for value in step]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,010 rows in five Parquet files of three row groups each, and their column ``id``."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(5):
        ids = np.arange(number * 202, (number + 1) * 202)
        pq.write_table(pa.table({"id": ids, "x": ids / 7}), folder / f"{number}.parquet", row_group_size=80)
    return folder


def parquet(folder: Path, **options: Any) -> Any:
    return ray.data.read_parquet(str(folder), **options)


# -- the order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", ["none", "windowed", "global"])
def test_every_row_comes_once_an_epoch_with_its_own_number(files: Path, shuffle: Any) -> None:
    config = TrainConfig(64, virtual_workers=3, epochs=2, shuffle=shuffle, shuffle_window=256)
    fed = feed(parquet(files), config)
    ids, found = [], []
    for tables in fed.steps():
        ids += [i for table in tables for i in table.column("id").to_pylist()]
        found += [i for table in tables for i in table.column(NUMBERS).to_pylist()]
    fed.close()
    assert ids == found  # the row's number is its place in the dataset
    assert sorted(ids[:1010]) == sorted(ids[1010:]) == list(range(1010))
    assert (ids[:1010] == ids[1010:]) == (shuffle == "none")
    assert (ids[:1010] == list(range(1010))) == (shuffle == "none")


@pytest.mark.parametrize("blocks", [1, 7, 40])
def test_blocks_and_read_parallelism_change_nothing(files: Path, blocks: int) -> None:
    double = lambda batch: {"id": batch["id"] * 2}  # noqa: E731
    made = ray.data.range(1500, override_num_blocks=blocks).map_batches(double)
    assert column(made, CONFIG, "id") == column(ray.data.range(1500).map_batches(double), CONFIG, "id")
    assert numbers(parquet(files, override_num_blocks=blocks), CONFIG) == numbers(parquet(files), CONFIG)
    held = pa.table({"id": np.arange(1500)})
    size = -(-1500 // blocks)
    cut = ray.data.from_arrow([held.slice(at, size) for at in range(0, 1500, size)])
    assert column(cut, CONFIG, "id") == column(ray.data.from_arrow(held), CONFIG, "id")
    assert column(cut.repartition(3), CONFIG, "id") == column(cut, CONFIG, "id")


def test_workers_share_each_batch_evenly_and_local_steps_have_batches_of_their_own(files: Path) -> None:
    fed = feed(parquet(files), TrainConfig(64, virtual_workers=3, epochs=1), batches=2)
    counts = []
    for step, tables in enumerate(fed.steps()):
        counts.append([fed.supply.counts(step, worker) for worker in range(3)])
        assert [table.num_rows for table in tables] == [sum(c) for c in counts[-1]]
    fed.close()
    assert counts[:-1] == [[(22, 22), (21, 21), (21, 21)]] * 7
    assert counts[-1] == [[(22, 17), (21, 17), (21, 16)]][0]


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_a_filter_of_unknown_selectivity_makes_an_epoch_as_long_as_it_is(files: Path) -> None:
    kept = parquet(files).filter(lambda row: row["id"] % 3 == 0)
    ids = column(kept, CONFIG, "id")
    expected = [i for i in range(1010) if i % 3 == 0]
    assert len(ids) == 2 * 6  # batches of 64 of 337 rows
    assert sorted(flat(ids[:6])) == sorted(flat(ids[6:])) == expected
    counted = feed(kept, CONFIG)
    assert len(list(counted.steps())) == 12
    counted.close()
    assert sum(counted.counts.values()) == len(expected)


def test_steps_may_end_a_job_before_it_is_known_how_long_an_epoch_is(files: Path) -> None:
    kept = parquet(files).filter(lambda row: row["id"] % 3 == 0)
    short = column(kept, TrainConfig(64, steps=2, shuffle_window=256, virtual_workers=3), "id")
    assert short == column(kept, CONFIG, "id")[:2]


def test_batches_of_a_transform_are_cut_from_one_unit(files: Path) -> None:
    def centred(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": batch["id"], "least": np.full(len(batch["id"]), batch["id"].min())}

    seen = column(parquet(files).map_batches(centred, batch_size=50), CONFIG, "least")
    again = column(parquet(files, override_num_blocks=2).map_batches(centred, batch_size=50), CONFIG, "least")
    assert seen == again
    firsts = {file * 202 + group for file in range(5) for group in (0, 50, 80, 130, 160)}
    assert set(flat(seen)) == firsts


class Stateful:
    """A transform that is a class: made once a process."""

    def __init__(self, add: int):
        self.add = add

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": batch["id"] + self.add}


def test_classes_flat_maps_projections_and_unions(files: Path) -> None:
    made = parquet(files).map_batches(Stateful, fn_constructor_args=(5,), concurrency=1)
    assert sorted(flat(column(made, CONFIG, "id"))) == sorted([i + 5 for i in range(1010)] * 2)
    twice = parquet(files).flat_map(lambda row: [row, row]).drop_columns(["x"])
    assert Counter(flat(column(twice, CONFIG, "id"))) == dict.fromkeys(range(1010), 4)
    both = parquet(files).select_columns(["id"]).union(ray.data.range(30))
    assert Counter(flat(column(both, CONFIG, "id"))) == Counter(dict.fromkeys(range(1010), 2)) + Counter(
        dict.fromkeys(range(30), 2)
    )


def noise(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch  # in the function: it may be loaded before the first unit of a process or in it

    size = len(batch["id"])
    return {"id": batch["id"], "n": np.random.rand(size), "p": [random.random()] * size, "t": torch.rand(size).numpy()}


def test_random_transforms_draw_the_same_numbers_wherever_and_whenever_they_run(files: Path) -> None:
    made = parquet(files).map_batches(noise)
    runs = [feed(made, TrainConfig(64, epochs=2, virtual_workers=1)) for _ in range(2)]
    drawn = [[tuple(t.select(["id", "n", "p", "t"]).to_pydict().values()) for (t,) in run.steps()] for run in runs]
    for run in runs:
        run.close()
    assert drawn[0] == drawn[1]
    for index in (1, 2, 3):
        by_id = [sorted(zip(step[0], step[index], strict=True)) for step in drawn[0]]
        first = sorted(pair for step in by_id[:16] for pair in step)
        second = sorted(pair for step in by_id[16:] for pair in step)
        assert first != second  # each epoch draws anew


def test_every_kind_of_file(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": np.arange(90)})
    for kind in ("csv", "json"):
        (tmp_path / kind).mkdir()
        for part in range(3):
            rows = frame[part * 30 : (part + 1) * 30]
            path = tmp_path / kind / f"{part}.{kind}"
            rows.to_csv(path, index=False) if kind == "csv" else rows.to_json(path, orient="records", lines=True)
    (tmp_path / "text").mkdir()
    for part in range(70):
        (tmp_path / "text" / f"{part:02}.txt").write_text(f"{part}\n")
    none = TrainConfig(50, epochs=1, shuffle="none", virtual_workers=2)
    assert flat(column(ray.data.read_csv(str(tmp_path / "csv")), none, "id")) == list(range(90))
    assert flat(column(ray.data.read_json(str(tmp_path / "json"), lines=True), none, "id")) == list(range(90))
    text = flat(column(ray.data.read_text(str(tmp_path / "text")), none, "text"))
    assert text == [str(part) for part in range(70)]
    binary = ray.data.read_binary_files(str(tmp_path / "text"), include_paths=True)
    assert [Path(p).stem for p in flat(column(binary, none, "path"))] == [f"{part:02}" for part in range(70)]


def test_images_and_ragged_columns(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(9):
        Image.new("RGB", (4 + number % 2, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
    config = TrainConfig(4, epochs=1, virtual_workers=2)
    images = column(ray.data.read_images(str(tmp_path)), config, "image")
    assert sorted(int(np.asarray(image).flat[0]) for image in flat(images)) == list(range(9))
    ragged = ray.data.from_items([{"id": i, "list": list(range(i))} for i in range(30)])
    assert sorted(len(found) for found in flat(column(ragged, config, "list"))) == list(range(30))
    tensors = ray.data.from_numpy(np.arange(240, dtype=np.float32).reshape(40, 2, 3))
    fed = feed(tensors, TrainConfig(16, epochs=1, virtual_workers=1, shuffle="none"))
    rows = [batch["data"] for (batch,) in fed.batches()]
    fed.close()
    assert torch.equal(torch.cat(rows).reshape(-1), torch.arange(240.0))


class Squares(torch.utils.data.Dataset):
    """A map-style dataset that augments at random, as they do."""

    def __init__(self, form: str, size: int = 600):
        self.form, self.size = form, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        x, noise = torch.full((2, 3), index), torch.rand(())
        return {"dict": {"x": x, "n": noise}, "tuple": (x, noise), "one": x}[self.form]


@pytest.mark.parametrize("form", ["dict", "tuple", "one"])
def test_map_style_datasets_give_batches_of_their_samples_form(form: str) -> None:
    config = TrainConfig(64, virtual_workers=1, epochs=2)
    runs = []
    for _ in range(2):
        fed = feed(Squares(form), config)
        runs.append([batch for (batch,) in fed.batches()])
        fed.close()
    parts = {"dict": lambda b: list(b.values()), "tuple": list, "one": lambda b: [b]}[form]
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))
    get = {"dict": lambda b: b["x"], "tuple": lambda b: b[0], "one": lambda b: b}[form]
    assert [type(b) for b in runs[0][:1]] == [{"dict": dict, "tuple": tuple, "one": torch.Tensor}[form]]
    x = torch.cat([get(batch) for batch in runs[0]])
    assert x.shape == (1200, 2, 3)
    assert sorted(x[:600, 0, 0].tolist()) == sorted(x[600:, 0, 0].tolist()) == list(range(600))
    if form == "dict":
        noise = torch.cat([batch["n"] for batch in runs[0]])
        assert noise.dtype == torch.float32
        assert len(set(noise.tolist())) > 1100  # no two units, and no two epochs, draw the same


class Pair(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(("sample", "what"), [(([1], 2), "list"), (Counter(a=Path()), "Path"), (Pair(1, 2), "Pair")])
def test_samples_that_are_no_rows_are_refused_by_type(sample: Any, what: str) -> None:
    class Odd(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return sample

    with pytest.raises(ConfigError, match=rf"datasets\['train'\]: a sample .*{what}"):
        open_datasets({"train": Odd()})


# -- beginning in the middle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", ["none", "windowed", "global"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_feed_that_begins_at_a_step_goes_on_as_one_that_came_there(files: Path, shuffle: Any, filtered: bool) -> None:
    config = TrainConfig(64, virtual_workers=3, epochs=2, shuffle=shuffle, shuffle_window=256)
    made = parquet(files)
    if filtered:
        made = made.filter(lambda row: row["id"] % 3 == 0)
    whole = numbers(made, config)
    for step in (1, 5, len(whole) // 2, len(whole) - 1):
        assert numbers(made, config, step) == whole[step:]


def test_rows_that_were_counted_before_are_not_read_again(files: Path) -> None:
    kept = parquet(files).filter(lambda row: row["id"] % 3 == 0)
    config = TrainConfig(16, virtual_workers=3, epochs=1, shuffle_window=32)
    first = feed(kept, config)
    whole = [[t.column(NUMBERS).to_pylist() for t in tables] for tables in first.steps()]
    first.close()
    unknown = feed(kept, config, 18)
    assert [[t.column(NUMBERS).to_pylist() for t in tables] for tables in unknown.steps()] == whole[18:]
    assert any("only to count them" in what for what in unknown.said)
    known = feed(kept, config, 18, first.counts)
    assert [[t.column(NUMBERS).to_pylist() for t in tables] for tables in known.steps()] == whole[18:]
    assert known.said == []
    read = known.rows_read
    for fed in (unknown, known):
        fed.close()
    assert read <= 337 - 18 * 16 + 32 + 27  # what is left, a window, and a unit


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_what_depends_on_the_cluster_is_refused_by_name(files: Path) -> None:
    for made, name in (
        (parquet(files).random_shuffle(), "RandomShuffle"),
        (parquet(files).sort("id"), "Sort"),
        (parquet(files).groupby("id").count(), "Aggregate"),
        (parquet(files).repartition(3, shuffle=True), "Repartition"),
    ):
        with pytest.raises(ConfigError, match=rf"datasets\['train'\] holds {name}.*\.materialize\(\)"):
            open_datasets({"train": made})
    with pytest.raises(ConfigError, match=r"shuffle=…\): the order is the trainer's"):
        open_datasets({"train": parquet(files, shuffle="files")})
    held = parquet(files, override_num_blocks=1).materialize().map_batches(lambda batch: {"id": batch["id"]})
    assert sorted(flat(column(held, CONFIG, "id"))) == sorted([*range(1010)] * 2)


def test_what_is_no_dataset_or_has_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"datasets\['train'\] is a list; it must be a ray.data.Dataset"):
        open_datasets({"train": [1, 2, 3]})
    with pytest.raises(ConfigError, match=r"datasets\['train'\] has no rows"):
        open_datasets({"train": ray.data.from_arrow(pa.table({"id": np.arange(0)}))})
    with pytest.raises(ConfigError, match=r"datasets\['train'\] has no rows: none passed its filters"):
        column(ray.data.range(10).filter(lambda row: False), CONFIG, "id")


def test_blocks_that_may_be_left_out_are_refused_by_name(files: Path) -> None:
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 3
    try:
        made = parquet(files)
    finally:
        context.max_errored_blocks = 0
    with pytest.raises(ConfigError, match="max_errored_blocks=3: blocks that cannot be read would be left out"):
        open_datasets({"train": made})


def test_a_file_that_cannot_be_read_is_named_with_its_row_group(tmp_path: Path) -> None:
    for number in range(3):
        pq.write_table(pa.table({"id": np.arange(1000)}), tmp_path / f"{number}.parquet", row_group_size=500)
    made = ray.data.read_parquet(str(tmp_path))
    broken = tmp_path / "1.parquet"
    data = bytearray(broken.read_bytes())
    data[4:400] = bytes(396)  # in the first row group
    sources = open_datasets({"train": made})
    assert sources["train"].rows == 3000
    broken.write_bytes(data)
    with pytest.raises(DataError, match=r"datasets\['train'\], .*1.parquet, row group 0 cannot be read"):
        column(made, CONFIG, "id")


def test_a_transform_that_raises_is_the_users_and_names_the_rows(files: Path) -> None:
    def fails(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 333:
            raise KeyError("no such thing")
        return row

    with pytest.raises(UserCodeError, match=r"KeyError in a transform of datasets\['train'\], .*1.parquet") as caught:
        column(parquet(files).map(fails), CONFIG, "id")
    assert isinstance(caught.value.__cause__, KeyError)
    assert "in fails" in caught.value.remote_traceback


def test_a_unit_that_changes_its_length_is_found_out(files: Path) -> None:
    made = parquet(files).map_batches(lambda batch: {"id": batch["id"][:-1]}, udf_modifying_row_count=False)
    with pytest.raises(ConfigError, match=r"row group 0: gave 79 rows where 80 were expected"):
        column(made, CONFIG, "id")


def test_a_feed_that_is_closed_in_the_middle_leaves_nothing_behind(files: Path) -> None:
    fed = feed(parquet(files), CONFIG)
    next(iter(fed.steps()))
    assert alive()
    fed.close()
    assert not alive()


def test_transforms_do_not_load_torch_for_nothing(files: Path) -> None:
    made = parquet(files).map_batches(lambda batch: {"torch": ["torch" in sys.modules] * len(batch["id"])})
    assert not all(flat(column(made, TrainConfig(1010, steps=1), "torch")))


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_rows_that_are_evaluated_come_in_their_order(files: Path) -> None:
    filtered = parquet(files).filter(lambda row: row["id"] % 3 == 0)
    fed = feed({"train": parquet(files), "validation": filtered, "held": ray.data.range(50)}, CONFIG)
    next(iter(fed.steps()))
    found = []
    while table := fed.supply.rows("validation", len(found), len(found) + 100, fed.check):
        found += table.column("id").to_pylist()
        if table.num_rows < 100:
            break
    assert found == [i for i in range(1010) if i % 3 == 0]
    assert fed.supply.rows("held", 20, 90, fed.check).column("id").to_pylist() == list(range(20, 50))
    assert fed.supply.rows("held", 90, 95, fed.check).num_rows == 0
    fed.close()


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [["a", "b"], [[1], [2, 3]]], ids=["text", "ragged"])
def test_a_column_that_is_no_tensor_is_refused_by_name(column: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"The column 'odd' has type .* Give TrainSpec"):
        default_collate(pa.table({"odd": column}), torch.Generator())


def test_columns_of_numbers_become_tensors() -> None:
    batch = default_collate(pa.table({"a": [3, 1], "b": [0.5, 1.5]}), torch.Generator())
    assert batch["a"].tolist() == [3, 1]
    assert batch["b"].dtype == torch.float64
