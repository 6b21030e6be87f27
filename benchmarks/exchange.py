"""The exchange along the fixed tree against gloo's all_reduce, for equal bytes."""

import multiprocessing
import pickle
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist

from benchmarks.pairs import compare, milliseconds
from benchmarks.tables import Bar, Claim, Table, bar, spread
from ray_dnn.comm.exchange import TreeExchange
from ray_dnn.comm.listener import Listener
from ray_dnn.comm.mesh import Mesh
from ray_dnn.comm.shared import Links, SharedMemory
from ray_dnn.plan import Plan, lay

PAIRS = {1: 20, 8: 20, 64: 20, 256: 8}  # by MiB
RANKS = (2, 4)
SIDES = ("ray_dnn, one machine", "ray_dnn, sent", "gloo all_reduce")
SECRET = b"s" * 32

Times = dict[str, list[float]]  # by side


def _rank(rank: int, ranks: int, port: int, results: "Queue[tuple[int, Times]]") -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    listener = Listener("127.0.0.1", SECRET)
    store.set(f"address{rank}", pickle.dumps(listener.address))
    addresses = [pickle.loads(store.get(f"address{r}")) for r in range(ranks)]
    mesh = Mesh(1, rank, ranks)
    mesh.form(listener, SECRET, addresses)
    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=ranks)
    for size, pairs in PAIRS.items():
        memory = SharedMemory()
        mine, out = (memory.zeros(size * 2**18, torch.float32) for _ in range(2))
        mine.copy_(torch.randn(size * 2**18))
        calls = _calls(mesh, lay(1, ranks, [1.0] * ranks), memory, mine, out)
        times: Times = {side: [] for side in SIDES}
        for turn in range(pairs + 2):
            for side in SIDES[turn % 3 :] + SIDES[: turn % 3]:
                dist.barrier()
                begun = time.perf_counter()
                calls[side]()
                mesh.gather(b"done")
                times[side].append(time.perf_counter() - begun)
        if rank == 0:
            results.put((size, {side: found[2:] for side, found in times.items()}))
    dist.destroy_process_group()


def _calls(
    mesh: Mesh, plan: Plan, memory: SharedMemory, mine: torch.Tensor, out: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """One exchange, by side."""
    (node,), none, theirs = plan.cover(mesh.rank), [0] * mesh.size, mine.clone()
    near, far = TreeExchange(mesh, plan, links=Links(mesh, memory)), TreeExchange(mesh, plan)
    both = (partial(exchange.combine, b"", none, {node: [mine]}, [out]) for exchange in (near, far))
    return dict(zip(SIDES, (*both, partial(dist.all_reduce, theirs)), strict=True))


def run() -> Table:
    """The table."""
    context = multiprocessing.get_context("spawn")
    rows: list[tuple[str, ...]] = []
    claims: list[Claim] = []
    bars: list[Bar] = []
    for ranks in RANKS:
        results: Queue[tuple[int, Times]] = context.Queue()
        # The store listens in this process, so its port is free for sure; the ranks are its clients.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = [context.Process(target=_rank, args=(r, ranks, store.port, results)) for r in range(ranks)]
        for process in processes:
            process.start()
        for _ in PAIRS:
            size, times = results.get(timeout=300)
            what, theirs = f"{ranks} agents, {size} MiB", times[SIDES[-1]]
            for side in SIDES[:-1]:
                ratio = compare(times[side], theirs)
                both = [spread([1e3 * seconds for seconds in found], "ms") for found in (times[side], theirs)]
                rows.append((f"{what}, {side.split(', ')[1]}", *both, str(ratio), f"{ratio.bound:.2f}"))
                named, peer = f"exchange, {what}, {side.split(', ')[1]}", f"gloo all_reduce {milliseconds(theirs)}"
                brief = side == SIDES[0] and size > 1
                claims.append(Claim(named, milliseconds(times[side]), peer, str(ratio), ratio.median > 1, brief))
            bars += [bar(what, side, [1e3 * seconds for seconds in times[side]]) for side in SIDES]
        for process in processes:
            process.join()
    return Table(
        name="exchange",
        title="Exchange of gradients along the fixed tree, and gloo's all_reduce",
        header=("exchange", "ray_dnn", "gloo all_reduce", "ratio (middle half)", "95 % bound"),
        rows=tuple(rows),
        notes=(
            f"In turns, {', '.join(f'{pairs} times for {size} MiB' for size, pairs in PAIRS.items())}, after 2 that do "
            "not count, all ranks on one machine, one vector each; time on rank 0, from a barrier until all ranks are "
            "done. One machine: as agents on one machine do it, through shared memory. Sent: as agents on different "
            "machines do it, over TCP, here on the loopback device, as gloo.",
        ),
        claims=tuple(claims),
        bars=tuple(bars),
        unit="ms",
        log=True,
    )
