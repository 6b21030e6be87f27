"""One disturbed run of the soak: it follows the run's events, strikes at its agents, and looks at what comes of it.

The run's state is in the memory of its agents, so at least one agent that holds it is spared at any time. An agent
holds it from the first step that its generation commits. It is doomed from the moment that a fault strikes which it
does not survive, although the run may not know for a while. A fault that takes n holders is possible while more than n
are there that are not doomed, those that open orders may still take not counted.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from benchmarks.soak_faults import AGAIN, EARLY, KILL, KINDS, NEWCOMER, STEP, STOP, TWO, Claimed, Kind, Orders
from benchmarks.soak_look import Living, Size, everything
from ray_dnn import load_weights
from ray_dnn.errors import RayDnnError
from ray_dnn.events import (
    AgentGone,
    AgentStarted,
    Decided,
    Event,
    FirstStep,
    GenerationFormed,
    RunFailed,
    RunFinished,
    RunStarted,
)
from ray_dnn.testing import Fault
from ray_dnn.trainer import Handle, Trainer

_TICK_S = 0.01
_POSSIBLE_S = 6.0  # how long a kind that was drawn may wait until it is possible
_ORDER_S, _RARE_ORDER_S = 4.0, 12.0  # how long an order stands
_AGAIN_S = 0.05  # at most, from the news of a death to the next one
_LOOK_S = 1.0
_MOST_FALSE_STARTS = 2  # newcomers struck in a row: the driver waits longer after each
_WISHES_S = (4.0, 10.0)  # between two
_ANSWER_S = 5.0  # to a wish, when the run has ended
_HANGS_S, _HANGS_EACH_S = 60.0, 5.0  # without a committed step: and more for each agent, which must start first
_INTERRUPT_S = 30.0
_NOTICED_S = 30.0  # until an agent that was struck down is gone


@dataclass(frozen=True)
class Pace:
    """What strikes, and how often.

    Attributes:
        pause_s: least and most seconds between two faults.
        deaths: only what agents die of at once.
    """

    pause_s: tuple[float, float]
    deaths: bool


class Hung(Exception):
    """Nothing has happened for too long."""


@dataclass
class Strike:
    """A fault that has struck.

    Attributes:
        time: when, in seconds since the epoch.
        fatal: whether the victim does not survive it.
        gap_s: until a generation formed afterwards committed its first step; None where there was or need be none.
        noticed_s: until the driver formed that generation.
        story: how that generation came to its first step.
    """

    time: float
    kind: Kind
    victim: str
    where: str
    fatal: bool
    told: bool = False
    gap_s: float | None = None
    noticed_s: float = 0.0
    story: str = ""


@dataclass(frozen=True)
class Order:
    """An order that has not been carried out."""

    kind: Kind
    until: float


class DisturbedRun:
    """A run under way, and the faults in it.

    Attributes:
        strikes: those that have struck.
        events: so far.
        sizes: of agents at their first step and when they were last looked at, by name.
        unasked: agents that went although no fault had struck them, and why.
        started: agents.
        checkpoints: that were asked for, written, and read again.
        recoveries: generations formed after a loss or a broken connection.
        troubles: what must not happen.
    """

    def __init__(
        self,
        trainer: Trainer,
        orders: Orders,
        random: Random,
        agents: tuple[int, int],
        pace: Pace,
        tell: Callable[[Strike], None],
    ):
        self._orders, self._random, self._tell = orders, random, tell
        self._kinds = [k for k in KINDS if (trainer.audit or not k.audit) and (k.deadly or not pace.deaths)]
        self._pace = pace
        self._living: dict[str, Living] = {}
        self._generation: GenerationFormed | None = None  # the newest one
        self._formed: dict[int, GenerationFormed] = {}
        self._open: dict[int, Order] = {}
        self._given = 0  # orders
        self._drawn: tuple[Kind, float] | None = None  # the kind to come, and until when it may wait to be possible
        self._due = time.monotonic()
        self._again: str | None = None  # when this agent's death is known, the next one dies
        self._false_starts = 0  # newcomers struck since one has come to train
        self._struck: set[str] = set()
        self._agents = agents
        self._size = agents[1]  # that was last asked for
        self._wish_at = self._due + _WISHES_S[1]
        self._asking: list[threading.Thread] = []
        self._ledger = ""
        self._ledger_bytes = 0
        self._moved = time.monotonic()  # when the ledger last grew
        self._looked = time.monotonic()
        self.strikes: list[Strike] = []
        self.events: list[Event] = []
        self.sizes: dict[str, tuple[Size, Size]] = {}
        self.unasked: list[str] = []
        self.started = self.recoveries = self.checkpoints = 0
        self.troubles: list[str] = []
        orders.clear()
        self.handle: Handle = trainer._start({}, orders)
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        threading.Thread(target=self._follow, name="soak-events", daemon=True).start()

    def run(self, more: Callable[[], bool]) -> None:
        """Strike until the run ends, as long as there are to be ``more`` faults.

        Raises:
            Hung: no step was committed for too long.
        """
        while self._hear():
            self._take_claims()
            if self._formed and more():
                self._wish()
                if self._again is None:
                    self._strike()
            self._look()
        self._end_wishes()

    def close(self) -> None:
        """End the run, where it goes on. What is left to tell is told."""
        ending = threading.Thread(target=self.handle._interrupt, daemon=True)
        ending.start()
        ending.join(_INTERRUPT_S)
        if ending.is_alive():
            self.troubles.append(f"the run cannot be interrupted within {_INTERRUPT_S:g} s")
        for living in self._living.values():
            os.close(living.process)
        self._living.clear()
        for strike in self.strikes:
            self._told(strike)

    # -- what happens --------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        for event in self.handle.events():
            self._queue.put(event)
        self._queue.put(None)

    def _hear(self) -> bool:
        """Take in what has happened. Returns False when the run has ended."""
        with contextlib.suppress(queue.Empty):
            event = self._queue.get(timeout=_TICK_S)
            while event is not None:
                self.events.append(event)
                self._on(event)
                event = self._queue.get_nowait()
            return False
        return True

    def _on(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._ledger = f"{event.path}/ledger-{event.attempt:04d}.jsonl"
        elif isinstance(event, AgentStarted):
            self.started += 1
            with contextlib.suppress(ProcessLookupError):
                self._living[event.agent] = Living(event.agent, event.pid, os.pidfd_open(event.pid))
        elif isinstance(event, GenerationFormed):
            self._generation = self._formed[event.generation] = event
        elif isinstance(event, Decided):
            self.recoveries += event.kind == "recover"
        elif isinstance(event, FirstStep):
            self._on_first_step(event)
        elif isinstance(event, AgentGone):
            self._on_gone(event)

    def _on_first_step(self, event: FirstStep) -> None:
        formed = self._formed[event.generation]
        for living in self._those(formed.agents):
            living.holds = True
        if formed.joined:
            self._false_starts = 0
        for strike in self.strikes:
            waits = strike.kind.disrupts and strike.gap_s is None and strike.time < formed.time
            if waits and not (strike.fatal and strike.victim in formed.agents):
                strike.gap_s, strike.noticed_s = event.committed - strike.time, formed.time - strike.time
                strike.story = event.text()
                self._told(strike)

    def _on_gone(self, event: AgentGone) -> None:
        self._take_claims()
        living = self._living.pop(event.agent, None)
        if living is not None:
            os.close(living.process)
        planned = ("has ended", "not wanted any more", "left as planned")
        if event.agent not in self._struck and not any(words in event.reason for words in planned):
            self.unasked.append(f"{event.agent}: {event.reason}")
        if event.agent == self._again:
            self._again = None
            time.sleep(self._random.uniform(0.0, _AGAIN_S))
            if victims := self._spare(1):
                self._signal(AGAIN, self._random.choice(victims), signal.SIGKILL)

    def _those(self, names: list[str]) -> list[Living]:
        return [self._living[name] for name in names if name in self._living]

    # -- strikes -------------------------------------------------------------------------------------------------------

    def _spare(self, takes: int) -> list[Living]:
        """Holders of the state; [] where the run cannot do without so many of them."""
        holders = [a for a in self._living.values() if a.holds and a.doomed is None]
        left = len(holders) - takes - sum(order.kind.takes for order in self._open.values())
        return holders if left >= 1 else []

    def _newcomers(self) -> list[Living]:
        return [a for a in self._living.values() if not a.holds and a.doomed is None]

    def _possible(self, kind: Kind) -> bool:
        exclusive = any(order.kind.takes and order.kind.audit for order in self._open.values()) or any(
            strike.kind.takes and strike.kind.audit and strike.victim in self._living for strike in self.strikes
        )
        if exclusive:  # a wrong agent is found by majority: none of the others must go meanwhile
            return False
        if kind.takes and kind.audit and (self._open or any(a.doomed for a in self._living.values())):
            return False
        if kind is NEWCOMER or (not kind.takes and not kind.disrupts and kind.name != "slow"):
            return self._false_starts < _MOST_FALSE_STARTS and (kind is not NEWCOMER or bool(self._newcomers()))
        return len(self._spare(kind.takes)) >= kind.least

    def _strike(self) -> None:
        now = time.monotonic()
        for number, order in list(self._open.items()):
            if now > order.until and self._orders.withdraw(number):
                del self._open[number]
        if now < self._due:
            return
        if self._drawn is None or now > self._drawn[1]:
            [kind] = self._random.choices(self._kinds, [kind.weight for kind in self._kinds])
            self._drawn = kind, now + _POSSIBLE_S
        kind = self._drawn[0]
        if self._possible(kind):
            self._drawn = None
            self._due = now + self._random.uniform(*self._pace.pause_s)
            if kind.draw is not None:
                assert self._generation is not None
                self._order(kind, kind.draw(self._random, len(self._generation.agents)))
            else:
                self._strike_from_outside(kind)

    def _order(self, kind: Kind, fault: Fault) -> None:
        self._given += 1
        lasts = _ORDER_S if fault.at in STEP else _RARE_ORDER_S
        self._open[self._given] = Order(kind, time.monotonic() + lasts)
        self._orders.give(self._given, fault)

    def _strike_from_outside(self, kind: Kind) -> None:
        if kind is NEWCOMER:
            self._false_starts += 1
            self._signal(kind, self._random.choice(self._newcomers()), signal.SIGKILL)
            return
        victims = self._spare(kind.takes)
        for victim in self._random.sample(victims, 2 if kind is TWO else 1):
            self._signal(kind, victim, signal.SIGSTOP if kind is STOP else signal.SIGKILL)
            if kind is AGAIN:
                self._again = victim.name

    def _signal(self, kind: Kind, victim: Living, number: int) -> None:
        """Strike from outside."""
        assert kind in (KILL, STOP, TWO, AGAIN, NEWCOMER)
        now = time.time()
        if not victim.send(number):
            return  # it was on its way out
        victim.doomed = time.monotonic()
        ranks = self._generation.agents if self._generation else []
        where = f"rank {ranks.index(victim.name)} of {len(ranks)}" if victim.name in ranks else "not in any step yet"
        self._struck_by(Strike(now, kind, victim.name, where, fatal=True))

    def _take_claims(self) -> None:
        """See which orders agents have carried out."""
        for claimed in self._orders.claimed():
            kind = self._open.pop(claimed.number).kind
            victim = self._living.get(claimed.agent)
            fatal = kind.takes > 0 or claimed.phase in EARLY
            if fatal and victim is not None:
                victim.doomed = time.monotonic()
            if claimed.phase in EARLY:
                self._false_starts += 1
            self._struck_by(Strike(claimed.time, kind, claimed.agent, _where(claimed), fatal))

    def _struck_by(self, strike: Strike) -> None:
        self.strikes.append(strike)
        self._struck.add(strike.victim)
        if not strike.kind.disrupts:
            self._told(strike)

    def _told(self, strike: Strike) -> None:
        if not strike.told:
            strike.told = True
            self._tell(strike)

    # -- wishes --------------------------------------------------------------------------------------------------------

    def _wish(self) -> None:
        """Now and then ask for another number of agents, or for a checkpoint, as a user may at any time."""
        if time.monotonic() < self._wish_at:
            return
        self._wish_at = time.monotonic() + self._random.uniform(*_WISHES_S)
        if self._random.random() < 0.5:
            thread = threading.Thread(target=self._checkpoint, name="soak-checkpoint", daemon=True)
            self._asking.append(thread)
            thread.start()
        else:
            least, most = self._agents
            self._size = self._random.randint(max(2, least), most) if self._size == most else most
            self.handle.resize(self._size)

    def _checkpoint(self) -> None:
        try:
            load_weights(self.handle.checkpoint())
            self.checkpoints += 1
        except RayDnnError as error:
            if not any(isinstance(event, RunFinished | RunFailed) for event in self.events):
                self.troubles.append(f"a checkpoint was not written: {error}")

    def _end_wishes(self) -> None:
        for thread in self._asking:
            thread.join(_ANSWER_S)
            if thread.is_alive():
                self.troubles.append("a checkpoint was asked for, and the run has ended without an answer")

    # -- looking -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for living in self._living.values():
            if living.doomed is not None:
                if now - living.doomed > _NOTICED_S:
                    raise Hung(f"{living.name} was struck {_NOTICED_S:g} s ago, and is not gone")
            elif living.holds:
                with contextlib.suppress(OSError):
                    size = Size.of(living.pid)
                    self.sizes[living.name] = (self.sizes.get(living.name, (size,))[0], size)
        with contextlib.suppress(OSError):
            if self._ledger_bytes != (size_now := os.path.getsize(self._ledger)):
                self._ledger_bytes, self._moved = size_now, now
        hangs_s = _HANGS_S + _HANGS_EACH_S * self._agents[1]
        if now - self._moved > hangs_s:
            raise Hung(f"no step has been committed for {hangs_s:g} s")

    def dump(self) -> Iterator[str]:
        """All that is known, line by line."""
        for event in self.events[-60:]:
            yield f"{event.time:.3f} {event.text()}"
        yield from everything(self.handle, self._living.values(), self._orders.folder)


def _where(claimed: Claimed) -> str:
    return claimed.phase if claimed.phase in EARLY else f"{claimed.phase}, step {claimed.step}"
