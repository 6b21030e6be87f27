"""An agent's part in checkpoints: a snapshot between two steps, written from the side; and the way back.

A checkpoint is divided into parts, one file each, in a way that depends on the job alone. Each part is copied by two
agents, so that one of them may die before it is written. The copy is all that training waits for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ray_dnn import checkpoint, tensorfile
from ray_dnn.checkpoint import WEIGHTS, File, Manifest, Place
from ray_dnn.engine import codec
from ray_dnn.engine.reports import Report
from ray_dnn.engine.step import Engine
from ray_dnn.engine.worker_states import holders
from ray_dnn.errors import ConfigError
from ray_dnn.parallel import ReplicaGroup
from ray_dnn.phases import Phase


@dataclass(frozen=True)
class Taken:
    """A snapshot that an agent has.

    Attributes:
        step, history: of the state.
        replicas: that share it, of which this agent's is ``replica``.
        index: a file that belongs to the checkpoint beside the parts, by name.
        reports: that the driver may not have yet.
    """

    step: int
    history: list[dict[str, float]]
    replicas: int
    replica: int
    index: dict[str, bytes]
    reports: list[Report]


@dataclass
class _Part:
    """One file.

    Attributes:
        holders: replicas that copy it; the first one writes it, if it can.
    """

    name: str
    holders: tuple[int, ...]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    data: bytes = b""

    def copied(self, memory: dict[tuple[str, str], torch.Tensor]) -> _Part:
        """A copy that is not going to change. ``memory``: that it may use."""
        tensors = {}
        for name, tensor in self.tensors.items():
            mine = memory.pop((self.name, name), None)
            if mine is None or mine.shape != tensor.shape or mine.dtype != tensor.dtype:
                mine = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensors[name] = mine.copy_(tensor)
        return _Part(self.name, self.holders, tensors, self.data)

    def chunks(self) -> list[memoryview]:
        return [memoryview(self.data)] if self.data else tensorfile.chunks(self.tensors)


@dataclass
class _Snapshot:
    taken: Taken
    parts: list[_Part]
    writers: int = 0  # that read it just now


class Saver:
    """An agent's snapshots."""

    def __init__(self, engine: Engine, group: ReplicaGroup):
        self._engine, self._group = engine, group
        self._snapshots: dict[int, _Snapshot] = {}  # by number
        self._dropped = 0  # numbers up to this one are not wanted
        self._memory: dict[tuple[str, str], torch.Tensor] = {}  # of former snapshots, by part and tensor
        self._changed = threading.Condition()  # guards the three above

    def has(self, number: int) -> bool:
        """Whether a snapshot has been taken, or is not wanted any more."""
        with self._changed:
            return number in self._snapshots or number <= self._dropped

    def take(self, number: int, reports: list[Report]) -> None:
        """Take a snapshot of the committed state, on the compute thread, between two steps.

        ``reports``: that the driver may not have yet.
        """
        engine = self._engine
        with engine.marks.during(Phase.SAVING), self._changed:
            mesh, plan = engine.mesh, engine.plan
            parts, index = _parts(engine, self._group)
            mine = [part.copied(self._memory) for part in parts if mesh.rank in part.holders]
            self._memory.clear()  # what is left is of another division
            taken = Taken(
                engine.state.step, [dict(h) for h in engine.history], plan.replicas, mesh.rank, index, reports
            )
            self._snapshots[number] = _Snapshot(taken, mine)
            self._changed.notify_all()

    def taken(self, number: int) -> Taken | None:
        """Wait for a snapshot. None: it is not wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.has(number))
            found = self._snapshots.get(number)
        return found.taken if found else None

    def write(self, number: int, writer: int, place: Place) -> dict[str, File]:
        """Write the parts that are up to a replica: this agent's own, or one that cannot do it any more.

        Raises:
            OSError: the storage refuses.
        """
        return {name: place.write(name, *chunks) for name, chunks in self._files(number, writer)}

    def hand_over(self, number: int, writer: int) -> dict[str, bytes]:
        """The parts that are up to a replica, as bytes."""
        return {name: b"".join(chunks) for name, chunks in self._files(number, writer)}

    def _files(self, number: int, writer: int) -> Iterator[tuple[str, list[memoryview]]]:
        with self._changed:
            snapshot = self._snapshots[number]
            snapshot.writers += 1
        try:
            for part in snapshot.parts:
                if part.holders[0] == writer:
                    yield part.name, part.chunks()
        finally:
            with self._changed:
                snapshot.writers -= 1

    def drop(self, number: int) -> None:
        """This snapshot and those before are not wanted any more."""
        with self._changed:
            self._dropped = max(self._dropped, number)
            for old in [n for n in self._snapshots if n <= number]:
                snapshot = self._snapshots.pop(old)
                if not snapshot.writers:
                    self._memory |= {(p.name, name): t for p in snapshot.parts for name, t in p.tensors.items()}
            self._changed.notify_all()


def _parts(engine: Engine, group: ReplicaGroup) -> tuple[list[_Part], dict[str, bytes]]:
    """All parts that agents of this rank have, and the index of the weights. Shares memory with the state."""
    weights = engine.state.weights(group)
    tree = engine.export()
    state = tree["state"] = dict(tree["state"])
    if group.size == 1:  # else the parameters are parts of the weights only
        del state["parameters"]
        state["buffers"] = {name: tensor for name, tensor in state["buffers"].items() if name not in weights}
    head, large = codec.take_apart(tree)
    stem = _stem(group)
    parts, index = _divided(WEIGHTS, weights) if group.rank == 0 else ([], {})
    parts += _divided(stem, {str(at): tensor for at, tensor in enumerate(large)})[0]
    parts.append(_Part(f"{stem}.head", (), data=head))
    replicas = engine.plan.replicas
    for at, part in enumerate(parts):
        part.holders = tuple(dict.fromkeys((at % replicas, (at + 1) % replicas)))
    kind = engine.states.kind
    for worker, data in engine.states.export().items():
        parts.append(_Part(_of_worker(worker, group), holders(engine.plan, worker, kind)[:2], data=data))
    return parts, index


def _stem(group: ReplicaGroup) -> str:
    return "state" if group.size == 1 else f"state_rank{group.rank}"


def _of_worker(worker: int, group: ReplicaGroup) -> str:
    return f"worker-{worker:05}.bin" if group.size == 1 else f"worker_rank{group.rank}-{worker:05}.bin"


def _divided(stem: str, tensors: dict[str, torch.Tensor]) -> tuple[list[_Part], dict[str, bytes]]:
    if not tensors:
        return [], {}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = checkpoint.divide(stem, sizes)
    parts = [_Part(file, (), {name: tensors[name] for name in names}) for file, names in files.items()]
    return parts, checkpoint.index_of(sizes, files)


# -- the way back ------------------------------------------------------------------------------------------------------


def restore(engine: Engine, group: ReplicaGroup, place: Place, manifest: Manifest) -> None:
    """Load a checkpoint of the same job.

    Raises:
        CheckpointError: a file is not what the manifest says.
    """
    stem = _stem(group)
    outline = codec.Outline(_bytes(place, manifest, f"{stem}.head"))
    large = outline.memory(engine.export())
    for name, tensor in checkpoint.read_tensors(place, manifest, stem):
        large[int(name)].copy_(tensor)
    tree = outline.put_together(large)
    if group.size == 1:
        weights = dict(checkpoint.read_tensors(place, manifest, WEIGHTS))
        tree["state"]["parameters"] = {name: weights.pop(name) for name in engine.state.parameters}
        tree["state"]["buffers"] |= weights
    engine.load(tree)
    if engine.states.kind != "none":
        workers = range(engine.state.config.virtual_workers)
        engine.states.restore({w: _bytes(place, manifest, _of_worker(w, group)) for w in workers})


def _bytes(place: Place, manifest: Manifest, name: str) -> bytes:
    return checkpoint.read_file(place, manifest, name).numpy().tobytes()


def load_weights_into(model: nn.Module, place: Place, manifest: Manifest) -> None:
    """Begin with the weights of a checkpoint.

    Raises:
        ConfigError: there are others than the model has.
        CheckpointError: a file is not what the manifest says.
    """
    weights = dict(checkpoint.read_tensors(place, manifest, WEIGHTS))
    into = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    wrong = sorted(set(weights) ^ set(into)) + [n for n in weights if n in into and weights[n].shape != into[n].shape]
    if wrong:
        raise ConfigError(
            f"start_from: {place.path} does not hold the weights of this model: {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''} differ."
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(weights[name])
