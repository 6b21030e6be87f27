"""How a newcomer comes to the state of the others while they go on training.

Theory of operation
-------------------
A newcomer that copied the state at a boundary would hold up the others for as long as the copy takes. So it follows a
member first, its *leader*, like a learner in Raft (Ongaro, "Consensus: Bridging Theory and Practice", 2014, section
4.2.1), over a connection of its own:

1. Before the leader computes its next contributions it makes a parcel of its state: everything small, and references to
   the memory of large tensors. A thread of its own sends it piece by piece while the leader computes. Contributions
   only read the state; before the leader commits the next result, it copies what has not been sent. (A strategy that
   does not say `only_reads` may change parameters and put them back, so all is copied at once.)
2. From then on the leader sends each result, with its vector, the moment before it applies it, and each evaluation. The
   newcomer commits them itself, like an agent that catches up: the same bits, at about the same time.
3. When the newcomer is at most one commit behind, it tells the driver, and only then the driver has the others stop for
   it. There, in `ray_dnn.engine.transfer.agree`, it commits what is still on its way, and proves by a checksum of its
   whole state that it has the bits of a member. Only then is it one that holds the state.

Whatever goes wrong on the way, the newcomer has no state that counts, and the worst that happens is that it copies the
state at the boundary as if it had never followed anybody. The others notice nothing of it:

* The leader never waits for a follower. What it keeps for one is bounded by a state and two vectors; where that is not
  enough the follower is too slow, and the connection is cut.
* A thread that sends holds no lock that the leader's compute thread wants for longer than one piece is copied.
* A connection on which no byte moves for some seconds is given up; a leader that has nothing to send says so every
  second. In `agree` the others wait for the newcomer's last results at most for as long.
* States of virtual workers do not take part. They move when the next generation settles.

A follower that has committed a result which no survivor has (its leader died right after the exchange) is ahead of
them. They compute it again, and it copies their state.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from ray_dnn.comm.introduction import Address, socket_to
from ray_dnn.comm.line import Line
from ray_dnn.comm.tls import Tls
from ray_dnn.engine import codec, stream
from ray_dnn.engine.lead import START, Kind
from ray_dnn.engine.reports import Joined, Report, from_tree
from ray_dnn.engine.step import Engine, Position
from ray_dnn.errors import ProtocolError
from ray_dnn.phases import Phase

CHANNEL = 2  # on which leaders are reached
_NEAR = 1  # commits
_BEATS = 3  # of a leader, instead of the results that the others have


class Follower:
    """A newcomer, while it follows.

    Attributes:
        outcome: None when it is close behind its leader; or why it does not follow any more, in plain words.
        reports: that the driver may not have yet: of the leader, then its own.
        has_state: whether its state is one that a leader had: false before, and after anything went wrong.
    """

    def __init__(self, engine: Engine, leader: Address, secret: bytes, tls: Tls | None = None):
        self.outcome: Future[str | None] = Future()
        self.reports: list[Report] = []
        self.has_state = False
        self._engine = engine
        self._leader, self._secret, self._tls = leader, secret, tls
        self._line: Line | None = None  # until it connects
        self._copied = False  # whether it has ever had a state
        self._stopped = False  # whether `stop` or `cut` was called
        self._lock = threading.Lock()  # guards the three above
        self._near = False  # whether it is close behind its leader, as of what the leader said last

    # -- from any thread ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Have `run` return: at once where it has no state yet, else when it has committed what has begun to arrive."""
        with self._lock:
            self._stopped = True
            if self._line is not None:
                if self._copied:
                    self._line.interrupt()
                else:
                    self._line.cut()

    def cut(self) -> None:
        """Receive nothing any more."""
        with self._lock:
            self._stopped = True
            if self._line is not None:
                self._line.cut()

    # -- on the compute thread ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Follow until `stop`, or until something goes wrong."""
        self._engine.marks.enter(Phase.FOLLOWING)
        try:
            line = self._connect()
            while line.wait():
                self._next(line)
                if self._near:
                    self._say(None)
            self._say("it was told to stop")
        except Exception as error:  # nothing that happens here may harm the job
            self._say(f"{type(error).__name__}: {error}")
            if self._line is not None:
                self._line.close()
        self._engine.marks.enter(Phase.READY)

    def reach(self, target: Position) -> bool:
        """Commit what is missing to be there. False where that cannot be."""
        beats = 0
        try:
            while self.has_state and self._engine.position < target and self._line is not None and beats <= _BEATS:
                beats += self._next(self._line) == Kind.BEAT
        except Exception:  # as in `run`
            return False
        return self.has_state and self._engine.position == target

    def close(self) -> None:
        """It is over: a member now, or a newcomer like any other."""
        self.cut()
        self.has_state = False
        if self._line is not None:
            self._line.close()

    def _connect(self) -> Line:
        line = Line(socket_to(self._leader, self._tls), self._engine.marks.moved)
        with self._lock:
            self._line = line
            if self._stopped:
                line.cut()
        line.open(self._leader, self._secret, CHANNEL)
        return line

    def _say(self, how: str | None) -> None:
        """How it went, as far as it has not been said."""
        if not self.outcome.done():
            self.outcome.set_result(how)

    def _next(self, line: Line) -> Kind:
        """Take what comes next."""
        start = bytearray(START.size)
        line.fill([memoryview(start)])
        number, *there = START.unpack(start)
        kind = Kind(number)
        if kind is not Kind.BEAT:
            self._take(line, kind)
        self._near = self.has_state and Position(*there).commits - self._engine.position.commits <= _NEAR
        return kind

    def _take(self, line: Line, kind: Kind) -> None:
        engine = self._engine
        if kind is Kind.STATE:
            tree = stream.receive(line.fill, {"engine": engine.home()})
            engine.load(tree["engine"])
            self.reports = [from_tree(report) for report in tree["reports"]]
            with self._lock:
                self.has_state = self._copied = True
                if self._stopped:
                    line.interrupt()
        elif not self.has_state:
            raise ProtocolError(f"a leader sent {kind.name} before a state")
        elif kind is Kind.RESULT:
            self._commit(stream.receive(line.fill, {"round": engine.home_of_round()}))
        else:
            self.reports.append(engine.evaluated(stream.receive(line.fill)["entry"]))
        engine.marks.enter(Phase.FOLLOWING, engine.state.step)

    def _commit(self, tree: codec.Tree) -> None:
        """Apply a result. In the middle of it there is no state."""
        engine = self._engine
        self.has_state = False
        engine.joined = Joined(**tree["joined"]) if tree["joined"] else None  # of those who made it
        with engine.marks.unarmed():
            made = engine.commit(engine.round_of(tree["round"]))
        self.has_state = True
        self.reports += [made] if made is not None else []
