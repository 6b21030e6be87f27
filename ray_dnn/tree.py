"""The one binary tree along which every sum runs.

A tree over the leaves 0..n-1 splits at the largest power of two below n::

    n = 6                      0..6
                          ┌─────┴─────┐
                        0..4         4..6
                      ┌───┴───┐     ┌──┴──┐
                    0..2     2..4   4     5
                    ┌┴┐      ┌┴┐
                    0 1      2 3

The tree depends on n alone. An agent that hosts the leaves a..b folds the largest subtrees that lie inside a..b (its
*cover*); whoever holds all covers folds the rest. Each addition of the tree is done once, with the same operands on the
same sides, whatever the ranges were: so the sum has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """A subtree: the leaves ``start`` (included) to ``stop`` (excluded)."""

    start: int
    stop: int

    @property
    def is_leaf(self) -> bool:
        return self.stop - self.start == 1

    def children(self) -> tuple[Node, Node]:
        """Left and right half. The left one is a perfect tree."""
        size = self.stop - self.start
        if size < 2:
            raise ValueError(f"{self} is a leaf and has no children")
        split = self.start + (1 << ((size - 1).bit_length() - 1))
        return Node(self.start, split), Node(split, self.stop)


def cover(start: int, stop: int, leaves: int) -> tuple[Node, ...]:
    """The largest subtrees of the tree over ``leaves`` that lie inside ``start..stop``, from left to right."""
    if not 0 <= start <= stop <= leaves:
        raise ValueError(f"range {start}..{stop} does not lie inside 0..{leaves}")
    return tuple(_cover(Node(0, leaves), start, stop))


def _cover(node: Node, start: int, stop: int) -> Iterator[Node]:
    if stop <= node.start or node.stop <= start:
        return
    if start <= node.start and node.stop <= stop:
        yield node
        return
    for child in node.children():
        yield from _cover(child, start, stop)


def completed(worker: int, top: Node) -> tuple[Node, list[Node]]:
    """The largest subtree inside of ``top`` whose last leaf is ``worker``, and the parts of it to the left.

    The parts in the order in which they are added: the smallest first.
    """
    node = top
    lefts: list[Node] = []
    while node.stop - 1 != worker:  # down to the subtree
        left, right = node.children()
        node = left if worker < left.stop else right
    largest = node
    while not node.is_leaf:
        left, node = node.children()
        lefts.append(left)
    return largest, lefts[::-1]


def fold(node: Node, known: Callable[[Node], T | None], add: Callable[[T, T], T]) -> T:
    """The value of ``node``: what ``known`` says, or the sum of its children, left operand first.

    ``known`` is asked in the order of the tree, left to right and top down; it must answer for every leaf reached.
    """
    value = known(node)
    if value is not None:
        return value
    left, right = node.children()
    left_value = fold(left, known, add)
    return add(left_value, fold(right, known, add))
