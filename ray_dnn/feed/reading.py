"""Units are read, each by itself."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ray_dnn.errors import DataError, UserCodeError
from ray_dnn.feed.raydata import as_table, concat
from ray_dnn.feed.source import Source, numbered
from ray_dnn.sampler import derive_seed


class Read(NamedTuple):
    """Rows of a unit that were read.

    Attributes:
        unit: its number.
        rows: how many.
        last: whether the unit has no more.
    """

    unit: int
    rows: int
    last: bool


@dataclass(frozen=True)
class Order:
    """What is to be read at once.

    Attributes:
        source: a reference to the `Source`.
        units: their numbers, in the order in which they are to be read.
        firsts: the numbers of their first rows.
        seed: the job's.
        epoch: that they are read for.
        bytes: that small units are joined to, before they are shipped together.
        ship: whether the rows are wanted; else they are only counted.
    """

    source: Any
    units: tuple[int, ...]
    firsts: tuple[int, ...]
    seed: int
    epoch: int
    bytes: int
    ship: bool = True


def read(source: Source, order: Order) -> Iterator[Any]:
    """Read units. Gives a table and what is in it by turns: the `Read`s, and the table's bytes.

    Raises:
        DataError, UserCodeError: a unit cannot be read or transformed.
    """
    tables: list[pa.Table] = []
    reads: list[Read] = []
    size = 0
    for unit, first in zip(order.units, order.firsts, strict=True):
        rows = 0
        for table in _unit(source, unit, first, order):
            if size >= order.bytes:
                yield concat(tables)
                yield reads, size
                tables, reads, size = [], [], 0
            if order.ship and table.num_rows:
                tables.append(table)
                size += table.nbytes
            reads.append(Read(unit, table.num_rows, last=False))
            rows += table.num_rows
        reads.append(Read(unit, 0, last=True))
    yield concat(tables) if tables else None
    yield reads, size


def _unit(source: Source, number: int, first: int, order: Order) -> Iterator[pa.Table]:
    """A unit's rows, with their numbers."""
    tables = _seeded(source, number, derive_seed("transform", order.seed, source.name, order.epoch, number, bits=32))
    for block in tables:
        table = numbered(as_table(block), first)
        yield table
        first += table.num_rows


def _seeded(source: Source, number: int, seed: int) -> Iterator[Any]:
    """A unit's blocks, with all global random generators seeded before the first."""
    while True:
        random.seed(seed)
        np.random.seed(seed)
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.manual_seed(seed)
        blocks = _blocks(source, number)
        head = next(blocks, None)
        if torch is not None or "torch" not in sys.modules:
            break
        # A transform has loaded torch, whose generator was not seeded: begin again.
    if head is not None:
        yield from chain([head], blocks)


def _blocks(source: Source, number: int) -> Iterator[Any]:
    branch, (_, index) = source.branch(number), source.units[number]
    where = f"datasets[{source.name!r}], {source.unit(number).name}"
    blocks = _readable(branch.leaf.read(index), where)
    if branch.transform is None:
        yield from blocks
        return
    try:
        yield from branch.transform(blocks)
    except DataError:
        raise
    except Exception as error:
        told = error.__cause__ or error  # Ray Data wraps what the user's function raised
        raise UserCodeError(type(told).__name__, f"a transform of {where}", "", traceback.format_exc()) from told


def _readable(blocks: Iterable[Any], where: str) -> Iterator[Any]:
    try:
        yield from blocks
    except Exception as error:
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
