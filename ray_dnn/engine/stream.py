"""Trees as a stream of pieces, straight from and into the memory of tensors.

First comes a head with everything that is small, then the memory of each large tensor in pieces of a megabyte, then a
checksum of all of it. Neither side holds more of the tree twice than the head. Who sends waits after each window of a
few pieces until they are on their way, so checksums are computed while bytes travel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from ray_dnn.engine import codec
from ray_dnn.errors import RayDnnError

Pieces = list[memoryview]
Move = Callable[[Pieces], None]  # sends these pieces, or fills them with what arrives

PIECE_BYTES = 2**20
_WINDOW_BYTES = 4 * PIECE_BYTES
_WORD = 8
_MODULUS = 2**64
_HEAD = struct.Struct("!qQ")  # length and checksum of the head
_END = struct.Struct("!Q")  # checksum of everything

# Odd, so that a changed bit changes the sum whatever its place; one for each word of a piece, and one between pieces.
_WEIGHTS = np.random.default_rng(0).integers(0, 2**63, PIECE_BYTES // _WORD + 1, np.int64) | 1
_BETWEEN = 0x9E3779B97F4A7C15


class WrongBytesError(RayDnnError):
    """A stream's bytes are not those that were sent. Never reaches the user."""


class Checksum:
    """A sum of pieces that is as fast as memory is read, and depends on the place of each word.

    Within a piece it is a multilinear hash of 64-bit words (Lemire and Kaser, "Strongly universal string hashing is
    fast", 2014) with fixed weights: made against accidents, not against enemies. One changed bit always changes it;
    anything else, such as two words or pieces that are swapped, goes unnoticed with a probability of about 2^-48.
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, piece: memoryview) -> None:
        """``piece``: at most `PIECE_BYTES`."""
        whole = len(piece) // _WORD
        words = np.frombuffer(piece, np.int64, whole)
        total = int(np.dot(words, _WEIGHTS[:whole]))
        rest = int.from_bytes(piece[whole * _WORD :], "little")
        self.value = (self.value * _BETWEEN + total + rest * int(_WEIGHTS[whole])) % _MODULUS


def pieces_of(memory: memoryview) -> Iterator[memoryview]:
    """Consecutive pieces, all of the same size but the last one."""
    for start in range(0, len(memory), PIECE_BYTES):
        yield memory[start : start + PIECE_BYTES]


def windows(tensors: Sequence[torch.Tensor]) -> Iterator[Pieces]:
    """The memory of tensors, in windows of a few pieces. Tensors of equal shapes and dtypes give equal windows."""
    window: Pieces = []
    size = 0
    for tensor in tensors:
        for piece in pieces_of(codec.raw(tensor)):
            window.append(piece)
            size += len(piece)
            if size >= _WINDOW_BYTES:
                yield window
                window, size = [], 0
    if window:
        yield window


def send(move: Move, tree: codec.Tree) -> None:
    """Send a tree."""
    head, large = codec.take_apart(tree)
    send_parts(move, head, windows(large))


def send_parts(move: Move, head: bytes, memory: Iterable[Pieces]) -> None:
    """Send a tree that was taken apart. ``memory``: of its large tensors, cut into pieces as `pieces_of` does."""
    total = Checksum()
    _add(total, memoryview(head))
    move([memoryview(_HEAD.pack(len(head), total.value))])
    move([memoryview(head)])
    for window in memory:
        move(window)
        for piece in window:
            total.add(piece)
    move([memoryview(_END.pack(total.value))])


def receive(move: Move, home: codec.Tree = None) -> codec.Tree:
    """Receive a tree. Tensors that ``home`` has too, at the same places, are overwritten and used.

    Raises:
        WrongBytesError: they are not what was sent; what was overwritten is of no use.
    """
    start = bytearray(_HEAD.size)
    move([memoryview(start)])
    length, expected = _HEAD.unpack(start)
    head = bytearray(length)
    move([memoryview(head)])
    total = Checksum()
    _add(total, memoryview(head))
    if total.value != expected:
        raise WrongBytesError("a head arrived with other bytes than it was sent")
    outline = codec.Outline(head)
    large = outline.memory(home)
    for window in windows(large):
        move(window)
        for piece in window:
            total.add(piece)
    end = bytearray(_END.size)
    move([memoryview(end)])
    if _END.unpack(end) != (total.value,):
        raise WrongBytesError("tensors arrived with other bytes than they were sent")
    return outline.put_together(large)


def fingerprint(tree: codec.Tree) -> int:
    """A checksum of a tree: of every value, every bit and the order of elements in memory. 64 bits, unsigned."""
    head, large = codec.take_apart(tree)
    total = Checksum()
    _add(total, memoryview(head))
    for tensor in large:
        _add(total, codec.raw(tensor))
    return total.value


def _add(total: Checksum, memory: memoryview) -> None:
    for piece in pieces_of(memory):
        total.add(piece)
