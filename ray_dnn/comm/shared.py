"""Memory that agents on one machine read from each other, so that nothing has to be sent between them.

Theory of operation
-------------------
What an agent gives to an exchange lies in memfds of its own, one a tensor. Their numbers travel with the messages of
the exchange; a peer on the same machine opens them below ``/proc`` and maps them read-only. Only bytes that announce
what is ready still go over the connections, so a wait ends, and a death shows, just as it does between machines.

Nobody can write into another's memory: whoever dies, stops or wakes up late leaves the others' memory as it is. What a
dead agent has announced stays readable for those who have mapped it. The size of a memfd is sealed, so a reader never
meets a hole.

Whether two agents can do this is tried out, not guessed: each shows a memfd with a random token in it, and says to each
other whether it could read that one's. Agents on two machines, in two containers or of two users cannot, and send.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import warnings
import weakref

import torch

from ray_dnn.comm.mesh import Mesh, PeerLostError

NOWHERE = -1  # instead of a descriptor: not in shared memory
_NAME = "ray_dnn-vector"
_TOKEN_BYTES = 16
_IDENTITY = struct.Struct(f"!qq{_TOKEN_BYTES}s")  # pid, descriptor of the memfd with the token, token
_NOBODY = _IDENTITY.pack(0, NOWHERE, bytes(_TOKEN_BYTES))
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """Tensors of this agent that others may read, and those of others that this agent has mapped.

    Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._open: list[int] = []  # descriptors; closed with this object
        self._descriptors: dict[int, int] = {}  # of tensors, by address
        weakref.finalize(self, _close_all, self._open)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._shown = self._memfd(_TOKEN_BYTES)
        os.pwrite(self._shown, self._token, 0)
        self._mapped: dict[bytes, dict[int, torch.Tensor]] = {}  # whole memfds of others, by token and descriptor

    def zeros(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros. Shape: (length,). Its memory stays this object's for good."""
        if not length:
            return torch.zeros(0, dtype=dtype)
        size = length * dtype.itemsize
        descriptor = self._memfd(size)
        tensor = torch.frombuffer(mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), dtype=dtype)
        self._descriptors[tensor.data_ptr()] = descriptor
        return tensor

    def _memfd(self, size: int) -> int:
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._open.append(descriptor)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return descriptor

    def descriptor(self, tensor: torch.Tensor) -> int:
        """What a peer opens to read a tensor that `zeros` made; `NOWHERE` for any other."""
        return self._descriptors.get(tensor.data_ptr(), NOWHERE) if len(tensor) else NOWHERE

    @property
    def identity(self) -> bytes:
        """What peers need to try whether they can read this memory."""
        return _IDENTITY.pack(os.getpid(), self._shown, self._token)

    def meet(self, identity: bytes) -> dict[int, torch.Tensor] | None:
        """Try to read a peer's memory. What was mapped of it so far, by descriptor; None where it cannot be read."""
        pid, shown, token = _IDENTITY.unpack(identity)
        if token not in self._mapped:
            if _token(pid, shown) != token:
                return None
            self._mapped[token] = {}
        return self._mapped[token]

    def forget(self, kept: set[bytes]) -> None:
        """Unmap what was mapped of all peers but those with these identities."""
        tokens = {_IDENTITY.unpack(identity)[2] for identity in kept}
        self._mapped = {token: tensors for token, tensors in self._mapped.items() if token in tokens}


class Links:
    """What the members of a mesh read from each other directly.

    Attributes:
        reads: the peers whose memory this member reads.
        read_by: the peers that read this member's memory; nothing has to be sent to them.
    """

    def __init__(self, mesh: Mesh, memory: SharedMemory | None = None):
        """Try it out with all members of a mesh; all of them must do this at the same time.

        Where checksums travel with the bytes, everything is sent.
        """
        self._memory = memory
        self._pids: dict[int, int] = {}
        self._tensors: dict[int, dict[int, torch.Tensor]] = {}  # by peer and descriptor
        self.reads: frozenset[int] = frozenset()
        self.read_by: frozenset[int] = frozenset()
        if mesh.size == 1:
            return
        mine = _NOBODY if memory is None or mesh.checked else memory.identity
        identities = mesh.gather(mine)
        for peer in mesh.peers:
            if memory is not None and mine != _NOBODY and identities[peer] != _NOBODY:
                self._pids[peer] = _IDENTITY.unpack(identities[peer])[0]
                if (mapped := memory.meet(identities[peer])) is not None:
                    self._tensors[peer] = mapped
        if memory is not None:
            memory.forget({identities[peer] for peer in self._tensors})
        self.reads = frozenset(self._tensors)
        said = mesh.gather(bytes(rank in self.reads for rank in range(mesh.size)))
        self.read_by = frozenset(peer for peer in mesh.peers if said[peer][mesh.rank])

    def descriptor(self, tensor: torch.Tensor) -> int:
        """What a peer opens to read a tensor of this member."""
        return NOWHERE if self._memory is None else self._memory.descriptor(tensor)

    def view(self, peer: int, descriptor: int, dtype: torch.dtype) -> torch.Tensor:
        """All of a tensor of a peer. It must not be written to.

        Raises:
            PeerLostError: it is not there any more.
        """
        mapped = self._tensors[peer]
        if descriptor not in mapped:
            mapped[descriptor] = _map(peer, self._pids[peer], descriptor, dtype)
        return mapped[descriptor]


def _token(pid: int, descriptor: int) -> bytes | None:
    """What is in the memfd that a process shows; None where it has none, or cannot be looked at.

    A peer on another machine, or in another container, has a number that may be some other process's here, whose
    descriptor may be anything: a pipe, a device. So it is opened only if it has the name of ours.
    """
    path = f"/proc/{pid}/fd/{descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME} "):
            return None
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.pread(opened, _TOKEN_BYTES, 0)
    finally:
        os.close(opened)


def _map(peer: int, pid: int, descriptor: int, dtype: torch.dtype) -> torch.Tensor:
    try:
        opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PeerLostError(peer, f"its memory cannot be read: {error}") from error
    try:
        memory = mmap.mmap(opened, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    finally:
        os.close(opened)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once of what the docstring of `view` says
        return torch.frombuffer(memory, dtype=dtype)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
