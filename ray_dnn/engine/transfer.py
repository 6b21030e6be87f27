"""Copying committed state from an agent that runs to one that joins."""

from __future__ import annotations

import hashlib
import struct

from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine import codec
from ray_dnn.engine.step import Engine
from ray_dnn.errors import ProtocolError

_HEAD = struct.Struct("!q32s")


def send_state(mesh: Mesh, engine: Engine, newcomers: tuple[int, ...]) -> None:
    """Send the committed state and the evaluations so far to newcomers, to all at once."""
    if not newcomers:
        return
    data = codec.encode({"state": engine.state.export(), "history": engine.history})
    head = _HEAD.pack(len(data), hashlib.sha256(data).digest())
    mesh.exchange({peer: [memoryview(head), memoryview(data)] for peer in newcomers}, {})


def receive_state(mesh: Mesh, engine: Engine, source: int) -> None:
    """Take over the state that ``source`` sends; nothing is changed until its digest is verified."""
    head = bytearray(_HEAD.size)
    mesh.exchange({}, {source: [memoryview(head)]})
    length, digest = _HEAD.unpack(head)
    data = bytearray(length)
    mesh.exchange({}, {source: [memoryview(data)]})
    if hashlib.sha256(data).digest() != digest:
        raise ProtocolError(f"the state that replica {source} sent arrived with other bytes")
    tree = codec.decode(data)
    engine.state.load(tree["state"])
    engine.states.clear()
    engine.history[:] = tree["history"]
