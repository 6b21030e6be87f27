"""Everything that is known of Ray Data's internals.

A `ray.data.Dataset` is a plan: operators over operators down to what reads files or holds blocks. `open_dataset` takes
the plan apart: into leaves, whose units can be read one by one, and the chain of row-wise operators above each, made by
Ray Data's own planner into functions from blocks to blocks. Ray Data's executor is not used: its order of rows, its
batch boundaries and its resources depend on the cluster, and it can neither begin in the middle nor run while agents
hold all CPUs.

``tests/test_raydata.py`` fails where another version of Ray Data has other internals.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from ray_dnn.errors import ConfigError
from ray_dnn.feed.source import Branch, Held, Source, Unit
from ray_dnn.sampler import even_units

_FOOTERS_AT_ONCE = 32
_SMALL_FILES_BYTES, _SMALL_FILES = 1 << 20, 64  # files that make up one unit: so many bytes, but at most so many
_READ_TASKS = 256  # that sources other than files are asked for
_NO_OPERATION = ("Repartition", "StreamingRepartition")  # without a shuffle, they only cut blocks anew
_HOW = "Call .materialize() on it: what is trained on is then these rows, in this order."
_HONOURED = ("num_gpus", "memory", "resources", "accelerator_type", "label_selector", "runtime_env")


def open_dataset(name: str, dataset: Any) -> Source:
    """Take a Ray Dataset apart. Reads lists of files and the footers of Parquet files, no rows.

    Raises:
        ConfigError: it has no rows, or holds an operator whose result depends on the cluster.
    """
    from ray.data._internal.logical.interfaces import LogicalPlan
    from ray.data._internal.logical.optimizers import LogicalOptimizer

    context = dataset.context.copy()
    if context.max_errored_blocks:
        raise ConfigError(
            f"DataContext.max_errored_blocks={context.max_errored_blocks}: blocks that cannot be read would be left "
            "out, so what is learned would depend on luck. Set it to 0, and leave broken files out by name."
        )
    context.execution_options.preserve_order = True
    plan = LogicalOptimizer().optimize(LogicalPlan(dataset._logical_plan.dag, context))
    source = Source(name, _branches(name, plan.dag, [], context))
    if not source.units or source.rows == 0:
        raise ConfigError(f"datasets[{name!r}] has no rows.")
    return source


def _branches(name: str, operator: Any, above: list[Any], context: Any) -> list[Branch]:
    """The leaves below an operator. ``above``: row-wise operators, the last one first."""
    from ray.data._internal.logical import operators as ops

    if isinstance(operator, ops.Union):
        return [branch for child in operator.input_dependencies for branch in _branches(name, child, above, context)]
    if isinstance(operator, ops.ReadFiles):
        (listing,) = operator.input_dependencies
        scanner: Any = operator.scanner
        return [_branch(_ParquetLeaf(operator, listing), above, context, operator, scanner.predicate is None)]
    if isinstance(operator, ops.Read):
        return [_branch(_read_leaf(operator.datasource, context), above, context, operator)]
    if isinstance(operator, ops.AbstractFrom | ops.InputData):
        return [_branch(_held_leaf(operator.input_data), above, context)]
    if type(operator).__name__ in _NO_OPERATION and not getattr(operator, "shuffle", False):
        (child,) = operator.input_dependencies
        return _branches(name, child, above, context)
    if isinstance(operator, ops.AbstractMap):
        (child,) = operator.input_dependencies
        return _branches(name, child, [*above, operator], context)
    raise ConfigError(
        f"datasets[{name!r}] holds {operator.name}, whose result depends on how Ray has cut the blocks. {_HOW}"
    )


def _branch(leaf: Any, above: Sequence[Any], context: Any, reading: Any = None, counted: bool = True) -> Branch:
    options: dict[str, Any] = {}
    for operator in [*above, *([reading] if reading is not None else [])]:
        given = operator.ray_remote_args or {}
        options |= {key: given[key] for key in _HONOURED if given.get(key)}
    counted = counted and not any(operator.can_modify_num_rows for operator in above)
    return Branch(leaf, _Chain(above[::-1], context) if above else None, counted, options)


# -- leaves ------------------------------------------------------------------------------------------------------------


class _ParquetLeaf:
    """Row groups of Parquet files."""

    def __init__(self, operator: Any, listing: Any):
        import pyarrow.parquet as pq  # which agents do without
        from ray.data._internal.datasource_v2.common.listing_utils import _build_pruners

        if listing.shuffle_config_factory() is not None:
            raise ConfigError("read_parquet(shuffle=…): the order is the trainer's. Use TrainConfig(shuffle=…).")
        self._scanner, self._block_udf = operator.scanner, operator.block_udf
        filesystem = listing.filesystem
        pruners = _build_pruners(listing.file_extensions, listing.partition_filter, listing.partition_pruner)
        files = listing.file_indexer.list_file_infos(
            pa.array(listing.paths), filesystem=filesystem, pruners=pruners, preserve_order=True
        )
        paths = [(str(info.path), int(info.size)) for info in files]
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            footers = list(pool.map(lambda file: pq.read_metadata(file[0], filesystem=filesystem), paths))
        self._groups: list[tuple[str, int, int, int, int]] = []  # path, its size, index, rows, bytes of the group
        for (path, size), footer in zip(paths, footers, strict=True):
            for index in range(footer.num_row_groups):
                group = footer.row_group(index)
                if group.num_rows:
                    self._groups.append((path, size, index, group.num_rows, group.total_byte_size))
        self.units = [Unit(f"{path}, row group {index}", rows, size) for path, _, index, rows, size in self._groups]

    def read(self, index: int) -> Iterator[Any]:
        from ray.data._internal.datasource_v2.formats.parquet.parquet_footer_types import ParquetRowGroupChunkMetadata
        from ray.data._internal.datasource_v2.interfaces.file_manifest import FileManifest, create_chunk_metadata

        path, size, group, rows, group_bytes = self._groups[index]
        chunk = create_chunk_metadata(
            ParquetRowGroupChunkMetadata,
            row_group_ids=(group,),
            num_rows=rows,
            uncompressed_size=group_bytes,
            fully_matched=self._scanner.predicate is None,
            rg_sizes=(group_bytes,),
            rg_rows=(rows,),
        )
        manifest = FileManifest.construct_manifest(paths=[path], sizes=[size], chunk_metadatas=[chunk])
        manifest = self._scanner.prune_input_split(manifest)
        for table in self._scanner.create_reader().read(manifest) if len(manifest) else ():
            yield table if self._block_udf is None else self._block_udf(table)


def _read_leaf(datasource: Any, context: Any) -> Any:
    from ray.data._internal.datasource.range_datasource import RangeDatasource
    from ray.data.datasource.file_based_datasource import FileBasedDatasource

    if isinstance(datasource, FileBasedDatasource):
        return _FilesLeaf(datasource)
    if isinstance(datasource, RangeDatasource):
        return _TasksLeaf(datasource.get_read_tasks(len(even_units(datasource._n))))
    return _TasksLeaf(datasource.get_read_tasks(_READ_TASKS))


class _FilesLeaf:
    """Files of any other kind, small ones several to a unit."""

    def __init__(self, datasource: Any):
        if datasource._shuffle is not None:
            raise ConfigError("Reading with shuffle=…: the order is the trainer's. Use TrainConfig(shuffle=…).")
        self._groups: list[list[tuple[str, Any]]] = []
        filled = _SMALL_FILES_BYTES
        for path, size in zip(datasource._paths(), datasource._file_sizes(), strict=True):
            if filled >= _SMALL_FILES_BYTES or len(self._groups[-1]) == _SMALL_FILES:
                self._groups.append([])
                filled = 0
            self._groups[-1].append((path, size))
            filled += int(size) if size is not None else _SMALL_FILES_BYTES
        self.units = [
            Unit(
                group[0][0] if len(group) == 1 else f"{group[0][0]} to {group[-1][0]}",
                None,
                sum(int(size or 0) for _, size in group),
            )
            for group in self._groups
        ]
        self._datasource = copy.copy(datasource)
        self._datasource._data_context = datasource._data_context.copy()
        self._datasource._data_context.execution_options.preserve_order = True

    def read(self, index: int) -> Iterator[Any]:
        datasource = copy.copy(self._datasource)
        paths, sizes = map(list, zip(*self._groups[index], strict=True))
        datasource._paths, datasource._file_sizes = lambda: paths, lambda: sizes
        for task in datasource.get_read_tasks(1):
            yield from task()


class _TasksLeaf:
    """What a source gives as its own read tasks."""

    def __init__(self, tasks: Sequence[Any]):
        self._tasks = list(tasks)
        known = [task.metadata for task in self._tasks]
        self.units = [
            Unit(f"read task {index}", about.num_rows, int(about.size_bytes or 0)) for index, about in enumerate(known)
        ]

    def read(self, index: int) -> Iterator[Any]:
        yield from self._tasks[index]()


def _held_leaf(bundles: Sequence[Any]) -> Held:
    refs: list[Any] = []
    counts: list[int] = []
    size = 0
    for bundle in bundles:
        for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
            rows = metadata.num_rows
            if rows is None:
                rows = ray.get(_count.remote(ref))
            if rows:
                refs.append(ref)
                counts.append(int(rows))
                size += int(metadata.size_bytes or 0)
    total = sum(counts)
    return Held(refs, np.array(counts, np.int64), even_units(total), size / total if total else 0.0)


@ray.remote(num_cpus=0)
def _count(block: Any) -> int:
    from ray.data.block import BlockAccessor

    return int(BlockAccessor.for_block(block).num_rows())


# -- transforms --------------------------------------------------------------------------------------------------------


class _Chain:
    """Row-wise operators as one function from blocks to blocks.

    Each batch that a ``map_batches`` sees is cut from one unit's rows, from its first row on.
    """

    def __init__(self, operators: Sequence[Any], context: Any):
        from ray.data._internal.logical.interfaces import LogicalPlan
        from ray.data._internal.logical.operators import InputData
        from ray.data._internal.planner import create_planner

        below: Any = InputData(input_data=[])
        for operator in operators:
            below = dataclasses.replace(operator, input_dependencies=[below])
        planned, _ = create_planner().plan(LogicalPlan(below, context))
        self._transformers: list[Any] = []
        physical: Any = planned.dag
        while physical.input_dependencies:
            self._transformers.insert(0, physical.get_map_transformer())
            (physical,) = physical.input_dependencies
        self._context = context
        self._ready = False

    def __call__(self, blocks: Iterator[Any]) -> Iterator[Any]:
        from ray.data import DataContext
        from ray.data._internal.execution.interfaces import TaskContext
        from ray.data._internal.execution.operators.map_transformer import TransformClock

        task = TaskContext(task_idx=0, op_name="ray_dnn")
        with DataContext.current(self._context), TaskContext.current(task):
            if not self._ready:  # classes are made once a process
                for transformer in self._transformers:
                    transformer.init()
                self._ready = True
            for transformer in self._transformers:
                blocks = transformer.apply_transform(blocks, task, clock=TransformClock())
            yield from blocks


# -- blocks ------------------------------------------------------------------------------------------------------------


def as_table(block: Any) -> pa.Table:
    """A block of Ray Data, which may be a pandas DataFrame, as a table."""
    if isinstance(block, pa.Table):
        return block
    from ray.data.block import BlockAccessor

    return BlockAccessor.for_block(block).to_arrow()


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables with the same columns as one. Tensors of different shapes and columns of nulls only are welcome."""
    if len(tables) == 1:
        return tables[0]
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables)
    from ray.data._internal.arrow_ops.transform_pyarrow import concat as concat_unlike

    return concat_unlike(list(tables), promote_types=True)


def table_of_samples(samples: Sequence[dict[str, Any]]) -> pa.Table:
    """Samples as rows. Values: numbers, strings, arrays of any shapes."""
    from ray.data._internal.arrow_block import ArrowBlockBuilder

    builder = ArrowBlockBuilder()
    for sample in samples:
        builder.add(sample)
    return builder.build()
