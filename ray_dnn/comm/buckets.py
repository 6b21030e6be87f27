"""How vectors are cut for an exchange, and in which order their parts are added. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_dnn.tree import Node

CHUNK = 2**15  # elements that are folded at once, so that sums in between stay in the cache
_ALIGN = 16  # slices start at multiples of so many elements: 64 bytes in float32
_SMALLEST, _LARGEST = 2**20, 2**22  # elements of a bucket; a vector is cut into about eight


class Bucket(NamedTuple):
    """A stretch of a lane. Replica ``r`` folds the slice ``bounds[r] .. bounds[r + 1]``."""

    lane: int
    bounds: tuple[int, ...]


def slice_bounds(length: int, parts: int) -> list[int]:
    """Where the slices of a stretch begin and end: ``parts + 1`` offsets, aligned, as even as alignment allows."""
    blocks = -(-length // _ALIGN)
    return [min(length, (blocks * p // parts) * _ALIGN) for p in range(parts)] + [length]


def cut(lengths: Sequence[int], parts: int) -> list[Bucket]:
    """The buckets of lanes of these lengths, in the order in which they leave: from the end to the start."""
    buckets = []
    for lane, length in enumerate(lengths):
        size = max(_SMALLEST, min(_LARGEST, -(-length // 8 // _ALIGN) * _ALIGN))
        for start in range(0, length, size):
            bounds = slice_bounds(min(size, length - start), parts)
            buckets.append(Bucket(lane, tuple(start + bound for bound in bounds)))
    return buckets[::-1]


def additions(root: Node, known: Sequence[Node]) -> list[tuple[int, int, int]]:
    """How the values of some nodes add up to that of the root: ``(left, right, into)``, in order.

    Operands are numbered: first the known nodes as they come, behind them the sums, of which the first is the result.
    A sum's memory is used again when it has been added to another.
    """
    found: list[tuple[int, int, int]] = []

    def add_up(node: Node, into: int) -> int:
        if node in known:
            return known.index(node)
        left, right = node.children()
        one = add_up(left, into)
        other = add_up(right, into + 1)
        found.append((one, other, into))
        return into

    add_up(root, len(known))
    return found
