"""How the members of a new generation come to the same committed state.

Those who run have committed the same, but for one thing at most: an agent that died in the middle of an exchange may
have completed it with some and not with others. Whoever is behind receives what the others *combined* and applies it
itself; nobody who has state is ever given another's. Only newcomers copy state, and only after everybody else has
caught up, so that whoever dies meanwhile takes nothing with it. Most have done so before, while the others trained
(`ray_dnn.engine.follow`); here they prove that they have the same bits. The rest copy it now, and share out among those
who have it, so that no one machine must send it to all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ray_dnn.comm.mesh import GarbledError, Mesh
from ray_dnn.engine import codec, stream
from ray_dnn.engine.follow import Follower
from ray_dnn.engine.lead import Pending
from ray_dnn.engine.reports import Report, from_tree, to_tree
from ray_dnn.engine.step import Engine, Position
from ray_dnn.errors import AgentLostError, ProtocolError
from ray_dnn.phases import Phase

_SAID = struct.Struct("!qqq")  # what an agent has, and its position
_NOTHING, _HOLDS, _FOLLOWED = range(3)
_PROOF = struct.Struct("!?Q")  # whether a follower has got there, and a checksum of the state


@dataclass(frozen=True)
class Roles:
    """Who gives what to whom.

    Attributes:
        source: the replica that gives to those behind.
        behind: replicas that lack one commit or one evaluation.
        newcomers: replicas without state.
        holders: replicas that have all of it, once those behind have caught up: the others.
    """

    source: int
    behind: tuple[int, ...] = ()
    newcomers: tuple[int, ...] = ()
    holders: tuple[int, ...] = ()

    def source_of(self, newcomer: int) -> int:
        """Whom a newcomer copies from: the holders in turn, the one that had it first."""
        first = self.holders.index(self.source)
        return self.holders[(first + self.newcomers.index(newcomer)) % len(self.holders)]


def roles(positions: Sequence[Position | None]) -> Roles:
    """The roles of replicas at these positions; None: a newcomer.

    Raises:
        AgentLostError: nobody holds the state any more.
        ProtocolError: positions that cannot be.
    """
    there = [p for p in positions if p is not None]
    if not there:
        raise AgentLostError(
            "The last agent that held the state was lost before a newcomer had copied it. Start the run again under "
            "its name: it goes on from its last checkpoint. Allow more agents, or keep some on machines that stay."
        )
    newest = max(there)
    for position in there:
        lacks = newest.commits - position.commits, newest.evaluations - position.evaluations
        if lacks not in ((0, 0), (1, 0), (0, 1)):
            raise ProtocolError(f"agents of one run are at {positions}")
    return Roles(
        source=positions.index(newest),
        behind=tuple(r for r, p in enumerate(positions) if p is not None and p != newest),
        newcomers=tuple(r for r, p in enumerate(positions) if p is None),
        holders=tuple(r for r, p in enumerate(positions) if p is not None),
    )


def agree(
    mesh: Mesh,
    engine: Engine,
    holds: bool,
    pending: Pending,
    report: Callable[[Report], None],
    follower: Follower | None = None,
) -> None:
    """Bring all members of a mesh to the newest position.

    Args:
        holds: whether this agent has committed state; False for a newcomer.
        pending: this agent's reports that the driver may not have yet.
        report: takes reports that this agent owes the driver now too.
        follower: of a newcomer that has followed a member.
    """
    has = _HOLDS if holds else _FOLLOWED if follower is not None and follower.has_state else _NOTHING
    said = [_SAID.unpack(raw) for raw in mesh.gather(_SAID.pack(has, *engine.position))]
    positions = [Position(*position) if has == _HOLDS else None for has, *position in said]
    who = roles(positions)
    newest = max(p for p in positions if p is not None)
    step = newest.commits // len(engine.state.phases)
    if who.behind:
        engine.marks.enter(Phase.COPYING, step)
        _catch_up(mesh, engine, who, report)
        mesh.gather(b"\0")  # nobody lets a newcomer take its attention before all have caught up
    if who.newcomers:
        engine.marks.enter(Phase.COPYING, step)
        followed = [rank for rank, (has, *_) in enumerate(said) if has == _FOLLOWED]
        if followed:
            there = _followed(mesh, engine, who, followed, newest, follower)
            if mesh.rank in there and follower is not None:
                for made in follower.reports:
                    report(made)
            who = replace(who, newcomers=tuple(r for r in who.newcomers if r not in there))
        if follower is not None:
            follower.close()
        _copy(mesh, engine, who, pending, report)


def _followed(
    mesh: Mesh, engine: Engine, who: Roles, followed: list[int], newest: Position, follower: Follower | None
) -> set[int]:
    """Which of those who have followed others have got there, and have the same bits as a member that has them."""
    proof = 0
    reached = follower is not None and mesh.rank in followed and follower.reach(newest)
    if reached or mesh.rank in {who.source_of(rank) for rank in followed}:
        proof = stream.fingerprint(engine.export())
    proofs = [_PROOF.unpack(raw) for raw in mesh.gather(_PROOF.pack(reached, proof))]
    return {rank for rank in followed if proofs[rank] == (True, proofs[who.source_of(rank)][1])}


def _catch_up(mesh: Mesh, engine: Engine, who: Roles, report: Callable[[Report], None]) -> None:
    if mesh.rank == who.source:
        _send(mesh, who.behind, {"round": engine.last.to_tree() if engine.last else None, "history": engine.history})
    elif mesh.rank in who.behind:
        tree = _receive(mesh, who.source, {"round": engine.home_of_round()})
        if len(tree["history"]) > len(engine.history):
            report(engine.evaluated(tree["history"][-1]))
        elif (made := engine.commit(engine.round_of(tree["round"]))) is not None:
            report(made)


def _copy(
    mesh: Mesh,
    engine: Engine,
    who: Roles,
    pending: Pending,
    report: Callable[[Report], None],
) -> None:
    if mesh.rank in who.newcomers:
        tree = _receive(mesh, who.source_of(mesh.rank), {"engine": engine.home()})
        engine.load(tree["engine"])
        for made in tree["reports"]:
            report(from_tree(made))
    elif mine := [newcomer for newcomer in who.newcomers if who.source_of(newcomer) == mesh.rank]:
        _send(mesh, mine, {"engine": engine.export(), "reports": [to_tree(r) for r in pending()]})


def _send(mesh: Mesh, to: Sequence[int], tree: codec.Tree) -> None:
    stream.send(lambda pieces: mesh.exchange(dict.fromkeys(to, pieces), {}), tree)


def _receive(mesh: Mesh, source: int, home: codec.Tree) -> codec.Tree:
    """What ``source`` sends; nothing of it counts before its checksum is verified."""
    try:
        return stream.receive(lambda pieces: mesh.exchange({}, {source: pieces}), home)
    except stream.WrongBytesError as error:
        raise GarbledError(source, str(error)) from error
