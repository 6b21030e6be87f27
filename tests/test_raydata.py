"""The canary: Ray Data's internals are what `ray_dnn.feed.raydata` takes them for. No cluster is needed to see that."""

import inspect

import pytest
from ray.data._internal.datasource.range_datasource import RangeDatasource
from ray.data._internal.execution.operators.map_transformer import MapTransformer
from ray.data._internal.logical import operators
from ray.data._internal.logical.interfaces import LogicalOperator
from ray.data.datasource.file_based_datasource import FileBasedDatasource

# What raydata.py does with each operator that a dataset can hold.
LEAVES = {
    "FromArrow",
    "FromBlocks",
    "FromItems",
    "FromNumpy",
    "FromPandas",
    "InputData",
    "Read",
    "ReadFiles",
    "ListFiles",
}
ROW_WISE = {"Filter", "FlatMap", "MapBatches", "MapRows", "Project"}
NO_OPERATION = {"Repartition", "StreamingRepartition"}  # the first one unless it shuffles
UNIONS = {"Union"}
REFUSED = {
    "Aggregate",
    "Count",
    "Download",
    "Join",
    "Limit",
    "Mix",
    "RandomShuffle",
    "RandomizeBlocks",
    "Sort",
    "StreamingSplit",
    "Zip",
}
NEVER_HELD = {"Write"}  # for writing runs at once


def concrete() -> dict[str, type]:
    classes = {name: value for name, value in vars(operators).items() if inspect.isclass(value)}
    found = {name: value for name, value in classes.items() if issubclass(value, LogicalOperator)}
    return {name: value for name, value in found.items() if not name.startswith(("Abstract", "NAry"))}


def test_every_operator_is_known() -> None:
    assert set(concrete()) == LEAVES | ROW_WISE | NO_OPERATION | UNIONS | REFUSED | NEVER_HELD


@pytest.mark.parametrize("name", sorted(ROW_WISE))
def test_row_wise_operators_are_maps_that_say_whether_rows_stay_as_many(name: str) -> None:
    kind = concrete()[name]
    assert issubclass(kind, operators.AbstractMap)
    assert "can_modify_num_rows" in {*vars(kind), *getattr(kind, "__dataclass_fields__", {})}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_no_map(name: str) -> None:
    assert not issubclass(concrete()[name], operators.AbstractMap)


def test_files_and_ranges_have_the_fields_that_are_used() -> None:
    source = inspect.getsource(FileBasedDatasource)
    for used in ("def _paths(self)", "def _file_sizes(self)", "self._shuffle =", "self._data_context ="):
        assert used in source
    assert RangeDatasource(10)._n == 10


def test_transforms_are_applied_with_these_arguments() -> None:
    assert [*inspect.signature(MapTransformer.apply_transform).parameters] == [
        "self",
        "input_blocks",
        "ctx",
        "report_custom_op_stats",
        "clock",
    ]
