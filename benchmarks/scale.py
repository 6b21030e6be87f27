"""What a decision of the driver costs with up to 10,000 agents of which one dies every second, in simulation.

What Ray's calls and the sockets between so many agents cost is measured apart, on real ones.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks import small
from benchmarks.simulation import Simulation
from benchmarks.tables import Claim, Table
from ray_dnn.agent import Generation
from ray_dnn.comm.introduction import SECRET_BYTES, Address
from ray_dnn.comm.listener import Listener
from ray_dnn.comm.mesh import Mesh
from ray_dnn.loop import Loop
from ray_dnn.plan import lay


@dataclass(frozen=True)
class Size:
    """What is simulated.

    Attributes:
        agents, workers: of the job, the workers being virtual.
        every_s: an agent dies so often.
        seconds: for how long, in the cluster's time.
    """

    agents: int
    workers: int
    every_s: float
    seconds: float


SIZES = (
    Size(10, 10_000, 10.0, 3 * 3600),
    Size(100, 10_000, 1.0, 3 * 3600),
    Size(1_000, 10_000, 1.0, 3600),
    Size(10_000, 20_000, 1.0, 300),
)
ROUNDS, CALLS = 10, 1000
PEERS = (100, 1_000, 4_000)
EXCHANGES = 5
SLICE_BYTES = 4096  # that every two agents send each other in an exchange


@dataclass(frozen=True)
class Measured:
    """One size.

    Attributes:
        deaths: and newcomers who joined (``joined``).
        lost_s, joined_s: CPU of each turn of the driver's loop that formed a generation after a death, or for a
            newcomer.
        longest_s: CPU of the longest turn of all.
        load: CPU of the driver in a second of the cluster, without the time that Ray's calls take.
        calls: for each death, with all that followed it.
        event_bytes, ledger_bytes: for each death, for each step.
        mib: memory of the process, after a tenth of the time, the half, and the whole.
        collect_s: the longest collection of Python's garbage.
    """

    size: Size
    deaths: int
    joined: int
    lost_s: list[float]
    joined_s: list[float]
    longest_s: float
    load: float
    calls: float
    event_bytes: float
    ledger_bytes: float
    mib: tuple[float, float, float]
    collect_s: float


def measure(size: Size) -> Measured:
    """Simulate one size. In a process of its own, for its memory is measured."""
    mib: list[float] = []
    marks: list[tuple[int, int, int, float]] = []  # before the first death: calls, bytes of events, turns

    def look(simulation: Simulation) -> None:
        mib.append(_mib())
        if not marks:
            world = simulation.world
            marks.append((world.calls, simulation.folder.files["events"].bytes, len(world.costs), world.turns_s))

    least = max(1, size.agents // 4)
    simulation = Simulation(size.agents, size.workers, size.every_s, look, least=least)
    outcome = simulation.run(size.seconds)
    assert outcome.error is None, outcome.error
    world, files = simulation.world, simulation.folder.files
    calls, events, turns, turns_s = marks[0]
    costs = world.costs[turns:]
    return Measured(
        size=size,
        deaths=world.deaths,
        joined=sum(c.joined for c in costs),
        lost_s=[cost.seconds for cost in costs if cost.lost],
        joined_s=[cost.seconds for cost in costs if not cost.lost],
        longest_s=world.longest_s,
        load=(world.turns_s - turns_s) / size.seconds,
        calls=(world.calls - calls) / world.deaths,
        event_bytes=(files["events"].bytes - events) / world.deaths,
        ledger_bytes=files["ledger"].bytes / outcome.step,
        mib=(mib[len(mib) // 10], mib[len(mib) // 2], mib[-1]),
        collect_s=max(world.collect_s),
    )


def _mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# -- what is real ----------------------------------------------------------------------------------------------------


class Callee:
    """An actor that is called."""

    def run(self, told: Any, index: int, founding: bool) -> None:
        """Nothing."""


def call_s(agents: int) -> float:
    """Seconds of CPU that a process needs to tell an actor of a generation and to hear its answer."""
    told = ray.put(_generation(agents))
    actor = ray.remote(Callee).options(num_cpus=0, max_concurrency=16).remote()
    ray.get(actor.run.remote(told, 0, False))
    used = time.process_time()
    for _ in range(ROUNDS):
        _call(actor, told)
    spent = time.process_time() - used
    ray.kill(actor)
    return spent / (ROUNDS * CALLS)


def _call(actor: Any, told: Any) -> None:
    loop, left = Loop(), CALLS

    def done(_: Any, error: Exception | None) -> None:
        nonlocal left
        assert error is None
        left -= 1
        if not left:
            loop.end()

    for index in range(CALLS):
        loop.watch(actor.run.remote(told, index, False), done)
    loop.run()


def _generation(agents: int) -> Generation:
    names = tuple(f"agent-{number}" for number in range(agents, 2 * agents))
    addresses = tuple((f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}", 10_000 + n % 50_000) for n in range(agents))
    return Generation(1, lay(1, max(10_000, 2 * agents), [1.0] * agents), names, addresses)


def told_bytes(agents: int) -> int:
    """Of what all agents are told when a generation is formed."""
    return len(pickle.dumps(_generation(agents), protocol=pickle.HIGHEST_PROTOCOL))


@dataclass(frozen=True)
class Sockets:
    """What an agent spends on so many peers.

    Attributes:
        connect_s: CPU to connect to all of them and introduce itself.
        exchange_s: CPU of an exchange of few bytes with each.
    """

    peers: int
    connect_s: float
    exchange_s: float


def sockets(peers: int) -> Sockets:
    """Measure with real sockets; at their other ends nobody computes."""
    return Sockets(peers, _connect_s(peers), _exchange_s(peers))


def _connect_s(peers: int) -> float:
    """To one listener, which stands for all of them."""
    secret = os.urandom(SECRET_BYTES)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        address = other.submit(_listen, secret).result()
        listener = Listener("127.0.0.1", secret)
        mesh = Mesh(1, peers, peers + 1)
        used = time.thread_time()
        mesh.form(listener, secret, [address] * peers)
        spent = time.thread_time() - used
        mesh.close()
        listener.close()
    return spent


_listeners: list[Listener] = []


def _listen(secret: bytes) -> Address:
    _listeners.append(Listener("127.0.0.1", secret))
    return _listeners[-1].address


def _exchange_s(peers: int) -> float:
    """What peers send is there already, and what they are sent fits into their sockets."""
    mesh, others = Mesh(1, 0, peers + 1), []
    for peer in range(1, peers + 1):
        mine, other = socket.socketpair()
        mesh.attach(peer, mine)
        others.append(other)
    out, into = memoryview(bytes(SLICE_BYTES)), memoryview(bytearray(SLICE_BYTES))
    spent = []
    for _ in range(EXCHANGES):
        for other in others:
            other.sendall(out)
        used = time.thread_time()
        mesh.exchange({peer: [out] for peer in mesh.peers}, {peer: [into] for peer in mesh.peers})
        spent.append(time.thread_time() - used)
        for other in others:
            other.recv(SLICE_BYTES, socket.MSG_WAITALL)
    mesh.close()
    for other in others:
        other.close()
    return sorted(spent)[len(spent) // 2]


# -- the table -------------------------------------------------------------------------------------------------------


def run() -> Table:
    """The table."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as alone:
        measured = list(alone.map(measure, SIZES))
        meshes = list(alone.map(sockets, PEERS))
    with small.cluster():
        call = call_s(SIZES[-1].agents)
    largest = measured[-1]
    return Table(
        name="scale",
        title="The driver of up to 10,000 agents, simulated",
        header=(
            "agents, a death every",
            "simulated, deaths",
            "CPU of a decision after a death: median, 99 %, worst",
            "CPU of one that lets newcomers join",
            "the longest turn of the driver's loop",
            "the driver: CPU in a second",
            "calls for each death; at Ray's price",
            "bytes of events for each death",
            "memory of the driver after a tenth of the time, half, all",
        ),
        rows=tuple(_row(one, call) for one in measured),
        notes=_notes(measured, meshes, call),
        claims=(
            Claim(
                f"a decision of the driver after a death, {largest.size.agents:,} agents, simulated",
                f"{np.median(largest.lost_s):.2f} s of CPU (worst {max(largest.lost_s):.2f} s)",
            ),
        ),
    )


def _row(one: Measured, call: float) -> tuple[str, ...]:
    size = one.size
    return (
        f"{size.agents:,}, {size.every_s:g} s",
        f"{size.seconds / 60:.0f} min, {one.deaths:,}",
        _quantiles(one.lost_s),
        _quantiles(one.joined_s),
        f"{1e3 * one.longest_s:.0f} ms",
        f"{100 * one.load:.1f} % of a core",
        f"{one.calls:,.0f}; {one.calls * call:.2f} s",
        f"{one.event_bytes:,.0f}",
        f"{one.mib[0]:,.0f}, {one.mib[1]:,.0f}, {one.mib[2]:,.0f} MiB",
    )


def _quantiles(seconds: list[float]) -> str:
    return ", ".join(f"{1e3 * value:.1f}" for value in np.quantile(seconds, [0.5, 0.99, 1.0])) + " ms"


def _notes(measured: list[Measured], meshes: list[Sockets], call: float) -> tuple[str, ...]:
    workers = " to ".join(f"{workers:,}" for workers in sorted({one.size.workers for one in measured}))
    told = "; ".join(f"{one.size.agents:,} agents: {told_bytes(one.size.agents) / 1e3:,.1f} kB" for one in measured)
    per_peer = "; ".join(
        f"{mesh.peers:,} peers: {mesh.connect_s:.2f} s and {1e3 * mesh.exchange_s:.1f} ms" for mesh in meshes
    )
    ledger = ", ".join(f"{one.ledger_bytes / 1e3:,.0f} kB" for one in (measured[0], measured[-1]))
    return (
        f"Driver, fleet, guard, recorder and event log are the real ones, for jobs of {workers} virtual workers; "
        "agents, watchers, Ray's side of each call and the time are made up. Nobody computes, and sockets there are "
        "none. A step takes 0.5 s, a newcomer 2.8 s from its place to its first step. CPU is that of the driver's "
        "loop, without what making up the cluster takes, and without the collection of Python's garbage, which took "
        f"up to {max(one.collect_s for one in measured):.1f} s of a process that holds the made-up cluster too.",
        f"To tell a real actor of a generation and hear its answer costs {1e6 * call:.0f} µs of the driver's CPU "
        f"({ROUNDS * CALLS:,} calls to one actor, {CALLS:,} at a time; all threads of the process, most of it Ray's in "
        "C++). A decision calls every agent once, or twice where it has them stop for newcomers. So with thousands of "
        "agents it is the calls that take time, not the decisions.",
        f"What every agent is told when a generation is formed, with the names and addresses of all: {told}. From 64 "
        "agents on it is put into Ray's object store once and fetched once by each node.",
        f"A line of the ledger holds two numbers for each virtual worker: {ledger} a step at the smallest and the "
        "largest size.",
        f"Each agent has a connection to every other one. Of an agent's CPU, to connect and to exchange "
        f"{SLICE_BYTES:,} bytes with each peer took, on real sockets: {per_peer}.",
    )
