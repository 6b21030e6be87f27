"""The exchange over connections with TLS, against plain ones."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.pairs import compare
from benchmarks.tables import Table, spread
from ray_dnn.comm.exchange import TreeExchange
from ray_dnn.comm.listener import Listener
from ray_dnn.comm.mesh import Mesh
from ray_dnn.comm.tls import Tls
from ray_dnn.network import TlsFiles
from ray_dnn.plan import lay
from tests.certificates import HOST, Authority

PAIRS = {1: 20, 8: 20, 64: 20, 256: 8}  # by MiB
FORMED = 20
SIDES = ("with TLS", "plain")
SECRET = b"s" * 32

Times = dict[str, list[float]]  # by side


def _measure(rank: int, files: TlsFiles, other: Connection) -> Iterator[tuple[str, Times]]:
    torch.set_num_threads(1)
    listeners = {"with TLS": Listener(HOST, SECRET, Tls(files)), "plain": Listener(HOST, SECRET)}
    mine = {side: listener.address for side, listener in listeners.items()}
    other.send(mine)
    theirs = other.recv()
    both = {side: [mine[side], theirs[side]][:: 1 - 2 * rank] for side in SIDES}  # by rank
    meshes: dict[str, Mesh] = {}
    formed: Times = {side: [] for side in SIDES}
    for turn in range(FORMED + 2):
        for side in SIDES[:: 1 - turn % 2 * 2]:
            if side in meshes:
                meshes[side].close()
            mesh = meshes[side] = Mesh(turn, rank, 2)
            _meet(other)
            begun = time.perf_counter()
            mesh.form(listeners[side], SECRET, both[side])
            mesh.gather(b"done")
            formed[side].append(time.perf_counter() - begun)
    yield "two agents connect", formed
    for size, pairs in PAIRS.items():
        yield f"exchange, 2 agents, {size} MiB", _exchange(meshes, size, pairs)
    for listener in listeners.values():
        listener.close()


def _exchange(meshes: dict[str, Mesh], size: int, pairs: int) -> Times:
    times: Times = {side: [] for side in SIDES}
    vector, out = torch.randn(size * 2**18), torch.zeros(size * 2**18)
    plan = lay(1, 2, [1.0, 1.0])
    exchanges = {side: TreeExchange(mesh, plan) for side, mesh in meshes.items()}
    for turn in range(pairs + 2):
        for side in SIDES[:: 1 - turn % 2 * 2]:
            mesh = meshes[side]
            (node,) = plan.cover(mesh.rank)
            mesh.gather(b"go")
            begun = time.perf_counter()
            exchanges[side].combine(b"", [0, 0], {node: [vector]}, [out])
            mesh.gather(b"done")
            times[side].append(time.perf_counter() - begun)
    return times


def _meet(other: Connection) -> None:
    other.send(None)
    other.recv()


def _rank(rank: int, files: TlsFiles, other: Connection, results: Connection) -> None:
    for what, times in _measure(rank, files, other):
        results.send((what, {side: found[2:] for side, found in times.items()}))
    results.send(None)


def run() -> Table:
    """The table."""
    context = multiprocessing.get_context("spawn")
    ends, results = context.Pipe(), [context.Pipe(duplex=False) for _ in range(2)]
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = Authority(Path(folder) / "authority").sign([HOST])
        processes = [context.Process(target=_rank, args=(r, files, ends[r], results[r][1])) for r in range(2)]
        for process in processes:
            process.start()
        while (found := results[0][0].recv()) is not None:
            what, times = found
            ours, plain = (times[side] for side in SIDES)
            ratio = compare(ours, plain)
            both = [spread([1e3 * seconds for seconds in one], "ms") for one in (ours, plain)]
            rows.append((what, *both, str(ratio), f"{ratio.bound:.2f}"))
        for process in processes:
            process.join()
    return Table(
        name="encryption",
        title="Connections with TLS, and plain ones",
        header=("measured", *SIDES, "ratio (middle half)", "95 % bound"),
        rows=tuple(rows),
        notes=(
            f"In turns, {', '.join(f'{pairs} times for {size} MiB' for size, pairs in PAIRS.items())} and {FORMED} "
            "times for connecting, after 2 that do not count. Two processes on one machine that send all they "
            "exchange, over the loopback device; time on one of them, until both are done. TLS 1.3, with a certificate "
            "of a P-256 key on both sides and the cipher that OpenSSL prefers.",
        ),
        unit="ms",
    )
