"""What a member does for newcomers that follow it. `ray_dnn.engine.follow` has the theory of operation."""

from __future__ import annotations

import enum
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from ray_dnn.comm.line import Line, LineLostError
from ray_dnn.engine import codec, stream
from ray_dnn.engine.reports import Report, to_tree
from ray_dnn.engine.round import Round

if TYPE_CHECKING:
    from ray_dnn.engine.step import Engine, Position

START = struct.Struct("!bqq")  # kind, and how far the leader is now: commits and evaluations
_BEAT_S = 1.0  # most that a leader is silent
_VECTORS = 2  # that a leader may keep for one follower, beside what is left of a state

Pending = Callable[[], list[Report]]


class Kind(enum.IntEnum):
    """What a leader sends."""

    BEAT = 0  # nothing: it is there
    STATE = 1
    RESULT = 2
    EVALUATION = 3


class Parcel:
    """A tree on its way to a follower, as it was when the parcel was made.

    The memory of large tensors is read when its turn comes; `keep` copies what is left of it, before it changes.
    """

    def __init__(self, kind: Kind, tree: codec.Tree):
        self.kind = kind
        self.head, large = codec.take_apart(tree)
        self._left = deque(piece for tensor in large for piece in stream.pieces_of(codec.raw(tensor)))
        self._kept = False  # whether the pieces are copies
        self._lock = threading.Lock()  # guards the two above
        self._stage = bytearray(min(stream.PIECE_BYTES, self.size))

    @property
    def size(self) -> int:
        """Bytes that are left."""
        return sum(len(piece) for piece in self._left)

    def keep(self) -> int:
        """Copy what is left. From now on the tensors may change. Returns the bytes that are held."""
        with self._lock:
            if not self._kept:
                self._left = deque(np.frombuffer(piece, np.uint8).copy().data for piece in self._left)
                self._kept = True
            return self.size

    def memory(self) -> Iterator[stream.Pieces]:
        """The pieces one by one, each good until the next one is asked for."""
        while True:
            with self._lock:
                if not self._left:
                    return
                piece = self._left.popleft()
                if not self._kept:
                    staged = memoryview(self._stage)[: len(piece)]
                    np.copyto(np.frombuffer(staged, np.uint8), np.frombuffer(piece, np.uint8))
                    piece = staged
            yield [piece]


class _Follower:
    """One follower, as its leader sees it: what is to be sent to it, and a thread that does."""

    def __init__(self, line: Line, pending: Pending):
        self.pending = pending
        self.begun = False  # whether it has been given a state
        self.limit = 0  # bytes that may be kept for it
        self._line = line
        self._parcels: deque[Parcel] = deque()  # the first one may be on its way
        self._changed = threading.Condition()
        self._over = False  # once true, nothing is sent any more

    def put(self, parcel: Parcel) -> None:
        with self._changed:
            if not self._over:
                self._parcels.append(parcel)
                self._changed.notify_all()

    def keep(self) -> None:
        """What was put here is about to change. A follower for which too much would have to be kept is given up."""
        with self._changed:
            held = 0
            for parcel in list(self._parcels):
                held += parcel.keep()
                if held > self.limit:
                    self.end()
                    break

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._parcels.clear()
            self._line.cut()
            self._changed.notify_all()

    def _after(self, sent: Parcel | None) -> Parcel | None:
        """The next parcel; None where there is none for a while."""
        with self._changed:
            if sent is not None and self._parcels:
                self._parcels.popleft()
            if not self._parcels and not self._over:
                self._changed.wait(_BEAT_S)
            return self._parcels[0] if self._parcels else None

    def serve(self, position: Callable[[], Position]) -> None:
        """Send what is put, until the line is lost."""
        try:
            parcel = None
            while True:
                self._line.send([memoryview(START.pack(parcel.kind if parcel else Kind.BEAT, *position()))])
                if parcel is not None:
                    stream.send_parts(self._line.send, parcel.head, parcel.memory())
                parcel = self._after(parcel)
        except LineLostError:
            self.end()
        finally:
            self._line.close()


class Leader:
    """Those who follow this agent. Without any, nothing here costs anything.

    `begin`, `committing`, `committed` and `evaluated` are called by the compute thread, `accept` by any.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._position = engine.position  # for other threads
        self._followers: list[_Follower] = []
        self._lock = threading.Lock()  # guards the list

    def accept(self, connection: socket.socket, pending: Pending) -> None:
        """Lead the agent at the other end of a connection. ``pending``: reports that the driver may not have yet."""
        follower = _Follower(Line(connection), pending)
        with self._lock:
            self._followers.append(follower)

        def serve() -> None:
            follower.serve(lambda: self._position)
            with self._lock:
                self._followers.remove(follower)

        threading.Thread(target=serve, name="ray_dnn-leader", daemon=True).start()

    def _all(self) -> list[_Follower]:
        with self._lock:
            return list(self._followers)

    def begin(self) -> None:
        """The state is committed, and is not going to change before `committing` is called."""
        self._position = self._engine.position
        for follower in self._all():
            if not follower.begun:
                self._give_state(follower)

    def _give_state(self, follower: _Follower) -> None:
        engine = self._engine
        reports = [to_tree(report) for report in follower.pending()]
        parcel = Parcel(Kind.STATE, {"engine": engine.export(), "reports": reports})
        vector = sum(lane.nbytes for lane in engine.spare(engine.state.phase))
        follower.limit = parcel.size + _VECTORS * vector
        follower.begun = True
        if not engine.contributor.strategy.only_reads:
            parcel.keep()
        follower.put(parcel)

    def committing(self, round_: Round) -> None:
        """A result is complete and about to be applied. The state changes now, and soon the vector before this one."""
        for follower in self._all():
            follower.keep()

        def tree() -> codec.Tree:
            # Sums of buffers have no second memory as vectors have: the next exchange writes there.
            sums = [lane.clone() for lane in round_.buffer_sums]
            joined = self._engine.joined
            return {"round": round_.to_tree() | {"buffer_sums": sums}, "joined": asdict(joined) if joined else None}

        # Before it is applied here, so that others need not wait for a follower that applies it later.
        self._put(Kind.RESULT, tree)

    def committed(self) -> None:
        """It has been applied."""
        self._position = self._engine.position

    def evaluated(self, entry: dict[str, float]) -> None:
        """An evaluation was made."""
        self._position = self._engine.position
        self._put(Kind.EVALUATION, lambda: {"entry": entry})

    def _put(self, kind: Kind, tree: Callable[[], codec.Tree]) -> None:
        for follower in self._all():
            if follower.begun:
                follower.put(Parcel(kind, tree()))
