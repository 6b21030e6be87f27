"""The driver's side of the watch over hung agents: a watcher on every node where there are agents, asked all the time.

Everything here happens in the driver's loop. A watcher always owes an answer (`Watcher.look`, which takes a fraction of
a second); a node whose watcher owes one for too long is silent, and its agents are given up with it. Silence is counted
in the loop's own short ticks, and judged after what has arrived: a driver that was frozen itself hears of nobody
for a while, which is nobody's silence.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dnn.liveness import Patience, Sight, Verdict, judge, silence_limit
from ray_dnn.loop import Loop
from ray_dnn.watcher import Watcher

_LOOK_S = 1.0  # that a watcher takes for an answer when there is nothing new
_TICK_S = 0.5
_TICK_MAX_S = 1.0  # most that one tick counts, however late it comes
_FADING = 0.98  # with every answer, of how slow earlier ones were
_AGAIN_S = 1.0  # before a watcher that died is started again; then ever more rarely
_AGAIN_MAX_S = 60.0
_UNSEEN_S = 5.0  # before an agent that cannot be watched is worth a word; a dead one is gone by then
_SPARE_S = 5.0  # that a watcher stays when there is nobody to watch: others may come
_END_S = 5.0  # that the end of watchers is waited for
_CALLS = 3  # at the same time in a watcher: one looks, the others are short

_logger = logging.getLogger("ray_dnn")


@dataclass(eq=False)
class _Agent:
    """An agent, from `Guard.watch` to `Guard.forget`."""

    name: str
    node: _Node
    identity: tuple[int, int, int]  # pid, start and status descriptor of its process
    sight: Sight | None = None  # the last one; None until there is one, and always if it cannot be seen
    judged: bool = False  # once true, no verdict on it is given any more
    killed: bool = False  # whether its watcher was told to end it: calls to a watcher may overtake each other


@dataclass(eq=False)
class _Node:
    """A node with agents on it, or one that had some."""

    node_id: str
    agents: dict[str, _Agent] = field(default_factory=dict)  # that are watched there, by name
    watcher: Any = None  # an actor; None where there is none at present
    looking: bool = False  # whether the watcher owes an answer
    heard: bool = False  # whether the present watcher has ever answered: until then it is starting
    silent_s: float = 0.0  # how long it has owed one
    slowest_s: float = 0.0  # that it took to answer of late
    deaths: int = 0  # of watchers in a row, none of which answered


class Guard:
    """Watches agents on all nodes and tells which ones hang, each once.

    Args:
        on_verdict: called in the loop when an agent must be given up.
        on_stalled: called when the generation must be formed anew and nobody is to blame.
        clock: the present time in seconds; it never goes back.
    """

    def __init__(
        self,
        loop: Loop,
        patience: Patience,
        on_verdict: Callable[[Verdict], None],
        on_stalled: Callable[[Verdict], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._loop, self._patience, self._clock = loop, patience, clock
        self._on_verdict, self._on_stalled = on_verdict, on_stalled
        self._look_s = min(_LOOK_S, patience.silent_s / 4)
        self._agents: dict[str, _Agent] = {}
        self._nodes: dict[str, _Node] = {}
        self._generation: frozenset[str] = frozenset()
        self._told: dict[str, Sight] = {}  # how the members looked when the generation was last found stalled
        self._closed = False  # once true, nothing is started or told any more
        self._ticked: float | None = None  # when the last tick was; None before the first one is due

    def watch(self, name: str, node_id: str, pid: int, started: int, status_fd: int) -> None:
        """Begin to watch an agent that has just been heard of. The numbers are those of `Watcher.watch`."""
        node = self._nodes.setdefault(node_id, _Node(node_id))
        self._agents[name] = node.agents[name] = _Agent(name, node, (pid, started, status_fd))
        node.silent_s = 0.0
        if self._ticked is None:
            self._tick_later()
        if node.watcher is None:
            self._start(node)
        else:
            self._show(self._agents[name])
            self._look(node)

    def forget(self, name: str) -> None:
        """Stop watching an agent. A name that is not watched is no error."""
        self._told.pop(name, None)
        agent = self._agents.pop(name, None)
        if agent is None:
            return
        del agent.node.agents[name]
        if agent.node.watcher is not None:
            agent.node.watcher.forget.remote(name, agent.killed)
            if not agent.node.agents:
                self._loop.later(_SPARE_S, lambda: self._spare(agent.node))
        else:
            self._drop(agent.node)

    def kill(self, name: str) -> None:
        """End an agent's process, also a stopped one; nothing happens where it is not watched."""
        agent = self._agents.get(name)
        if agent is not None and agent.node.watcher is not None:
            agent.killed = True
            agent.node.watcher.kill.remote(name)

    def in_generation(self, names: Collection[str]) -> None:
        """Who takes part now. They are found stalled when all of them wait for each other."""
        self._generation = frozenset(names)

    def last_words(self, name: str) -> str | None:
        """Where a watched agent was when it was last seen, in words; None where that is not known."""
        agent = self._agents.get(name)
        return agent.sight.status.text() if agent is not None and agent.sight is not None else None

    def close(self) -> None:
        """End the watchers and wait until Ray has seen them dead. Nothing is told any more."""
        self._closed = True
        watchers = [node.watcher for node in self._nodes.values() if node.watcher is not None]
        for node in self._nodes.values():
            self._end(node)
        if last := [watcher.hurry.remote() for watcher in watchers]:
            ray.wait(last, num_returns=len(last), timeout=_END_S)  # one on a silent node may take longer

    # -- watchers ----------------------------------------------------------------------------------------------------

    def _start(self, node: _Node) -> None:
        """Start a watcher on a node that has none, if there is still anybody to watch."""
        if self._closed or node.watcher is not None or not node.agents:
            return
        node.watcher = (
            ray.remote(Watcher)
            .options(
                num_cpus=0,
                max_restarts=0,
                max_concurrency=_CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            )
            .remote(self._patience)
        )
        node.looking, node.heard, node.silent_s = False, False, 0.0
        node.watcher.hurry.remote()
        for agent in node.agents.values():
            self._show(agent)
        self._look(node)

    def _end(self, node: _Node) -> None:
        if node.watcher is not None:
            ray.kill(node.watcher)
            node.watcher = None

    def _spare(self, node: _Node) -> None:
        """End a watcher that has nobody to watch: as long as it runs, no autoscaler takes the node away."""
        if not node.agents:
            self._end(node)
            node.looking = False
            self._drop(node)

    def _drop(self, node: _Node) -> None:
        """Forget a node, if nothing is left there."""
        if not node.agents and node.watcher is None and self._nodes.get(node.node_id) is node:
            del self._nodes[node.node_id]

    def _show(self, agent: _Agent) -> None:
        """Tell a watcher of an agent."""

        def shown(seen: bool | None, error: Exception | None) -> None:
            if error is None and not seen:
                self._loop.later(_UNSEEN_S, lambda: self._unseen(agent))

        self._loop.watch(agent.node.watcher.watch.remote(agent.name, *agent.identity), shown)

    def _unseen(self, agent: _Agent) -> None:
        if self._agents.get(agent.name) is agent and not self._closed:
            _logger.warning(
                "%s (pid %d on node %s) cannot be watched: its process is hidden from others on its node, as in a "
                "container of its own. If it hangs, nobody will see it.",
                agent.name,
                agent.identity[0],
                agent.node.node_id,
            )

    def _look(self, node: _Node) -> None:
        """Ask a node's watcher what it sees, and again whenever it has answered, while there is somebody to watch."""
        if self._closed or node.looking or node.watcher is None or not node.agents:
            return
        watcher = node.watcher
        node.looking = True

        def looked(sights: tuple[Sight, ...] | None, error: Exception | None) -> None:
            if node.watcher is not watcher:
                return  # given up meanwhile
            if node.heard:
                node.slowest_s = max(node.silent_s, node.slowest_s * _FADING)
            node.looking, node.silent_s = False, 0.0
            if error is not None:
                self._lost(node, error)
                return
            if not node.heard:
                _logger.debug("node %s is watched", node.node_id)
            node.heard, node.deaths = True, 0
            self._look(node)  # first of all: it makes the watcher kill whom it found stopped
            self._seen(sights or ())

        self._loop.watch(watcher.look.remote(self._look_s), looked)

    def _lost(self, node: _Node, error: Exception) -> None:
        """A watcher died: killed by a shortage of memory, or with its whole node, of which Ray tells the driver."""
        self._end(node)
        if not node.agents:
            self._drop(node)
            return
        again = min(_AGAIN_S * 2**node.deaths, _AGAIN_MAX_S)
        node.deaths += 1
        _logger.warning("the watcher on node %s is gone, a new one starts in %.0f s: %s", node.node_id, again, error)
        self._loop.later(again, lambda: self._start(node))

    # -- verdicts ----------------------------------------------------------------------------------------------------

    def _seen(self, sights: tuple[Sight, ...]) -> None:
        """What those do themselves who were seen just now. Whether all wait for each other is looked at in the ticks:
        thousands of nodes answer every second."""
        watched = [sight for sight in sights if sight.name in self._agents]
        for sight in watched:
            self._agents[sight.name].sight = sight
        for verdict in judge(watched, (), self._patience):
            self._give_up(verdict)

    def _judge_all(self) -> None:
        known = [agent.sight for agent in self._agents.values() if agent.sight is not None]
        for verdict in judge(known, self._generation, self._patience, self._told):
            if verdict.name is not None:
                self._give_up(verdict)
            elif not self._closed:
                self._told = {sight.name: sight for sight in known if sight.name in self._generation}
                self._on_stalled(verdict)

    def _give_up(self, verdict: Verdict) -> None:
        agent = self._agents.get(verdict.name or "")
        if agent is not None and not agent.judged and not self._closed:
            agent.judged = True
            self._on_verdict(verdict)

    # -- silence -----------------------------------------------------------------------------------------------------

    def _tick_later(self) -> None:
        self._ticked = self._clock()
        self._loop.later(_TICK_S, self._tick)

    def _tick(self) -> None:
        if self._closed or self._ticked is None:
            return
        passed_s = min(self._clock() - self._ticked, _TICK_MAX_S)
        for node in self._nodes.values():
            if node.looking:
                node.silent_s += passed_s
        self._loop.post(self._judge_all)  # behind all answers that have arrived
        self._loop.post(self._judge_silence)
        self._tick_later()

    def _judge_silence(self) -> None:
        for node in list(self._nodes.values()):
            usual = silence_limit(node.slowest_s, self._patience)
            limit = usual if node.heard else self._patience.start_s
            if not node.looking or node.silent_s < limit:
                continue
            self._end(node)  # should only the watcher hang, the next agents there get another one
            node.looking = False
            for agent in list(node.agents.values()):
                reason = f"nothing was heard from node {node.node_id} for {node.silent_s:.0f} s"
                self._give_up(Verdict(agent.name, reason))
