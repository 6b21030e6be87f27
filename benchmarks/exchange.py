"""The exchange along the fixed tree against gloo's all_reduce, for equal bytes."""

import multiprocessing
import pickle
import time
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist

from benchmarks.pairs import compare, milliseconds
from benchmarks.tables import Bar, Claim, Table, bar, spread
from ray_dnn.comm.exchange import TreeExchange
from ray_dnn.comm.mesh import Listener, Mesh
from ray_dnn.plan import lay

SIZES_MIB = (1, 8, 64)
RANKS = (2, 4)
PAIRS = 20
SECRET = b"s" * 32


def _rank(rank: int, ranks: int, port: int, results: "Queue[tuple[int, list[float], list[float]]]") -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    listener = Listener("127.0.0.1", SECRET)
    store.set(f"address{rank}", pickle.dumps(listener.address))
    addresses = [pickle.loads(store.get(f"address{r}")) for r in range(ranks)]
    mesh = Mesh(1, rank, ranks)
    mesh.form(listener, SECRET, addresses)
    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=ranks)
    plan = lay(1, ranks, [1.0] * ranks)
    (node,) = plan.cover(rank)
    exchange = TreeExchange(mesh, plan)
    for size in SIZES_MIB:
        mine = torch.randn(size * 2**18)
        out, theirs = torch.empty_like(mine), mine.clone()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(PAIRS + 2):
            dist.barrier()
            begun = time.perf_counter()
            exchange.combine(b"", [0] * ranks, {node: [mine]}, [out])
            mesh.gather(b"done")
            times[0].append(time.perf_counter() - begun)
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(theirs)
            mesh.gather(b"done")
            times[1].append(time.perf_counter() - begun)
        if rank == 0:
            results.put((size, times[0][2:], times[1][2:]))
    dist.destroy_process_group()


def run() -> Table:
    """The table."""
    context = multiprocessing.get_context("spawn")
    rows: list[tuple[str, ...]] = []
    claims: list[Claim] = []
    bars: list[Bar] = []
    for ranks in RANKS:
        results: Queue[tuple[int, list[float], list[float]]] = context.Queue()
        # The store listens in this process, so its port is free for sure; the ranks are its clients.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = [context.Process(target=_rank, args=(r, ranks, store.port, results)) for r in range(ranks)]
        for process in processes:
            process.start()
        for _ in SIZES_MIB:
            size, ours, theirs = results.get(timeout=300)
            what, ratio = f"{ranks} agents, {size} MiB", compare(ours, theirs)
            both = [[1e3 * seconds for seconds in side] for side in (ours, theirs)]
            rows.append((what, *(spread(side, "ms") for side in both), str(ratio), f"{ratio.bound:.2f}"))
            peer = f"gloo all_reduce {milliseconds(theirs)}"
            claims.append(Claim(f"exchange, {what}", milliseconds(ours), peer, str(ratio), ratio.median > 1))
            bars += [bar(what, "ray_dnn", both[0]), bar(what, "gloo all_reduce", both[1])]
        for process in processes:
            process.join()
    return Table(
        name="exchange",
        title="Exchange of gradients along the fixed tree, and gloo's all_reduce",
        header=("exchange", "ray_dnn", "gloo all_reduce", "ratio (middle half)", "95 % bound"),
        rows=tuple(rows),
        notes=(
            f"{PAIRS} interleaved pairs after 2 that do not count, all ranks on one machine, one vector each; "
            "time on rank 0, from a barrier until all ranks are done.",
        ),
        claims=tuple(claims),
        bars=tuple(bars),
        unit="ms",
        log=True,
    )
