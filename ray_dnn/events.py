"""The event log: a typed, append-only record of a run. Progress, reports and tests are made from it."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any

_PACKED = 1000  # events together
_NAMED = 8  # in words, of many


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        time: when, in seconds since the epoch.
    """

    time: float = field(default_factory=time.time, kw_only=True)

    def text(self) -> str:
        """The event in plain words."""
        raise NotImplementedError

    def to_json(self) -> str:
        return json.dumps({"event": type(self).__name__} | asdict(self))


@dataclass(frozen=True)
class RunStarted(Event):
    name: str
    path: str
    attempt: int
    job: dict[str, object]

    def text(self) -> str:
        return f"run {self.name} (attempt {self.attempt}) is recorded in {self.path}"


@dataclass(frozen=True)
class Waiting(Event):
    what: str

    def text(self) -> str:
        return f"waiting: {self.what}"


@dataclass(frozen=True)
class AgentStarted(Event):
    agent: str
    host: str
    pid: int
    node: str

    def text(self) -> str:
        return f"{self.agent} started on {self.host}, pid {self.pid}"


@dataclass(frozen=True)
class AgentAdmitted(Event):
    agent: str
    seconds: float
    profile: dict[str, object]
    same_bits: bool

    def text(self) -> str:
        how = "same bits" if self.same_bits else "OTHER BITS, admitted because deterministic=False"
        return f"{self.agent} is ready after {self.seconds:.1f} s ({how})"


@dataclass(frozen=True)
class AgentRefused(Event):
    agent: str
    host: str
    reason: str

    def text(self) -> str:
        return f"{self.agent} on {self.host} was refused: {self.reason}"


@dataclass(frozen=True)
class AgentFollowed(Event):
    """A newcomer has followed a member while it trained.

    Attributes:
        agent, leader: their names; of replicas, where these are of several agents.
        seconds: that it took.
        failed: why it did not come close; None where it did, and is going to join.
    """

    agent: str
    leader: str
    seconds: float
    failed: str | None

    def text(self) -> str:
        if self.failed is not None:
            return f"{self.agent} could not follow {self.leader}: {self.failed}"
        return f"{self.agent} has nearly the state of {self.leader} after {self.seconds:.2f} s"


@dataclass(frozen=True)
class AgentGone(Event):
    agent: str
    reason: str

    def text(self) -> str:
        return f"{self.agent} is gone: {self.reason}"


@dataclass(frozen=True)
class HiddenStateSuspected(Event):
    names: list[str]

    def text(self) -> str:
        return (
            f"state outside of the model changed while it computed: {', '.join(self.names)}. The first contributions "
            "had equal bits all the same; make sure that results do not depend on it"
        )


@dataclass(frozen=True)
class Decided(Event):
    number: int
    kind: str
    reason: str

    def text(self) -> str:
        return f"decision {self.number}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class GenerationFormed(Event):
    """The next generation. ``bounds``: as of a `Plan`.

    Its line in a log says how it differs from the one before, not who takes part: of thousands of agents whose
    membership changes every second, that would be hundreds of megabytes an hour. `parse` knows.
    """

    generation: int
    step: int
    agents: list[str]
    joined: list[str]
    left: list[str]
    lost: list[str]
    bounds: list[int]

    def text(self) -> str:
        parts = [f"generation {self.generation} from step {self.step}: {_agents(len(self.agents))}"]
        parts += [f"joined: {in_words(self.joined)}"] if self.joined else []
        parts += [f"left: {in_words(self.left)}"] if self.left else []
        parts += [f"lost: {in_words(self.lost)}"] if self.lost else []
        return "; ".join(parts)

    def to_json(self) -> str:
        line = {"event": type(self).__name__} | vars(self)
        del line["agents"], line["bounds"]
        sizes = (stop - start for start, stop in pairwise(self.bounds))
        return json.dumps(line | {"shares": [(size, len(list(same))) for size, same in groupby(sizes)]})


@dataclass(frozen=True)
class NodeDraining(Event):
    """A node is going to end. ``left_s``: seconds until then; None: nobody knows."""

    node: str
    agents: list[str]
    left_s: float | None

    def text(self) -> str:
        when = "" if self.left_s is None else f" in {self.left_s:.0f} s"
        who = in_words(self.agents) or "the driver"
        return f"node {self.node[:12]} is going to end{when}, and {who} with it; replacements are asked for"


@dataclass(frozen=True)
class AgentsSlow(Event):
    """Some are so slow that the others are better off without them. ``times``: as fast would steps be."""

    agents: list[str]
    times: float

    def text(self) -> str:
        who = in_words(self.agents)
        return f"{who} slow beyond sense: without, steps are {self.times:.1f} times as fast; replacements are asked for"


@dataclass(frozen=True)
class Paused(Event):
    generation: int
    step: int
    decision: int

    def text(self) -> str:
        return f"generation {self.generation} stopped before step {self.step} for decision {self.decision}"


@dataclass(frozen=True)
class FirstStep(Event):
    """A generation has committed its first step. Times in seconds since the epoch, as the reporting agent's clock says.

    Attributes:
        gap_s: since the step before.
        called: when the agent was told of the generation.
        left: when it had left the one before.
        formed: when it was connected to all others.
        agreed: when all had the same state.
        committed: when the step was committed.
    """

    generation: int
    step: int
    gap_s: float
    called: float
    left: float
    formed: float
    agreed: float
    committed: float

    def text(self) -> str:
        after = f", {self.gap_s:.2f} s after the step before" if self.gap_s else ""
        parts = (
            ("left the old one", self.left - self.called),
            ("connected", self.formed - self.left),
            ("agreed on the state", self.agreed - self.formed),
            ("computed", self.committed - self.agreed),
        )
        times = ", ".join(f"{what} in {seconds:.3f} s" for what, seconds in parts)
        return f"generation {self.generation} committed its first step, {self.step}{after} ({times})"


@dataclass(frozen=True)
class Progress(Event):
    """How far a run is. ``waited``: the share of time in which rows were waited for. None: not known yet."""

    step: int
    steps: int | None
    epoch: int
    loss: float
    rows_per_s: float
    agents: int
    left_s: float | None
    waited: float = 0.0

    def text(self) -> str:
        parts = [
            f"step {self.step}" if self.steps is None else f"step {self.step}/{self.steps}",
            f"epoch {self.epoch}",
            f"loss {self.loss:.4f}",
            f"{self.rows_per_s:,.0f} rows/s",
            _agents(self.agents),
        ]
        if self.waited >= 0.01:
            parts.append(f"{self.waited:.0%} waiting for rows")
        if self.left_s is not None:
            parts.append(f"{self.left_s / 60:.1f} min left" if self.left_s >= 90 else f"{self.left_s:.0f} s left")
        return "  ".join(parts)


@dataclass(frozen=True)
class StepSkipped(Event):
    step: int
    reason: str

    def text(self) -> str:
        return f"step {self.step} left the weights as they were: {self.reason}"


@dataclass(frozen=True)
class Evaluated(Event):
    step: int
    metrics: dict[str, float]

    def text(self) -> str:
        return f"after step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in self.metrics.items())


@dataclass(frozen=True)
class CheckpointWritten(Event):
    step: int
    path: str
    seconds: float

    def text(self) -> str:
        return f"checkpoint of step {self.step} written to {self.path} in {self.seconds:.2f} s"


@dataclass(frozen=True)
class CheckpointFailed(Event):
    step: int
    reason: str
    again_s: float

    def text(self) -> str:
        return f"checkpoint of step {self.step} failed: {self.reason}; training goes on, next try in {self.again_s:g} s"


@dataclass(frozen=True)
class CheckpointsLate(Event):
    step: int
    now: int

    def text(self) -> str:
        return (
            f"the checkpoint of step {self.step} was complete only at step {self.now}: storage is slower than "
            "checkpoint_every asks for, so some checkpoints are left out"
        )


@dataclass(frozen=True)
class CheckpointStays(Event):
    """One that is not to be kept could not be deleted."""

    checkpoint: str
    reason: str

    def text(self) -> str:
        return f"{self.checkpoint} could not be deleted, which is tried again with the next one: {self.reason}"


@dataclass(frozen=True)
class CheckpointDamaged(Event):
    path: str
    reason: str

    def text(self) -> str:
        return f"a checkpoint cannot be used: {self.reason}"


@dataclass(frozen=True)
class RunResumed(Event):
    step: int
    path: str
    attempt: int

    def text(self) -> str:
        return f"goes on after step {self.step}, from the checkpoint of attempt {self.attempt} in {self.path}"


@dataclass(frozen=True)
class RunFinished(Event):
    step: int
    weights_digest: str
    reason: str

    def text(self) -> str:
        return f"finished after step {self.step} ({self.reason}), weights {self.weights_digest[:16]}"


@dataclass(frozen=True)
class RunInterrupted(Event):
    step: int

    def text(self) -> str:
        return f"interrupted after {self.step} steps; the agents are being ended"


@dataclass(frozen=True)
class RunFailed(Event):
    step: int
    error: str

    def text(self) -> str:
        return f"failed at step {self.step}: {self.error}"


def _agents(count: int) -> str:
    return "1 agent" if count == 1 else f"{count} agents"


def in_words(names: Sequence[str]) -> str:
    """Names, but not thousands of them."""
    more = len(names) - _NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:_NAMED])} and {more} more"


KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """The events that the lines of a log hold, from its first one on."""
    agents: list[str] = []
    newest = 0  # generation
    for line in lines:
        fields = json.loads(line)
        kind = KINDS[fields.pop("event")]
        if kind is RunStarted:
            agents, newest = [], 0
        elif kind is GenerationFormed:
            if fields["generation"] <= newest:
                continue  # it was written twice, for the storage had failed in between
            agents, newest = _next(agents, fields), fields["generation"]
        yield kind(**fields)


def _next(agents: list[str], fields: dict[str, Any]) -> list[str]:
    """Complete the fields of a `GenerationFormed` that follows one of these agents. Returns its agents."""
    gone = {*fields["left"], *fields["lost"]}
    fields["agents"] = [name for name in agents if name not in gone] + fields["joined"]
    sizes = [size for size, times in fields.pop("shares") for _ in range(times)]
    fields["bounds"] = list(accumulate(sizes, initial=0))
    return list(fields["agents"])


class EventLog:
    """All events so far, for any number of readers in any thread.

    They are kept as the lines that they are in a file, most of them packed: a run that goes on for days while agents
    die has millions.
    """

    def __init__(self, sinks: tuple[Callable[[Event], None], ...] = ()):
        self._sinks = sinks
        self._changed = threading.Condition()  # guards the three below
        self._packed: list[bytes] = []  # the older ones, so many lines each
        self._lines: list[str] = []  # the others
        self._closed = False  # once true, nothing is added any more

    def add(self, event: Event) -> None:
        for sink in self._sinks:
            sink(event)
        line = event.to_json()
        with self._changed:
            self._lines.append(line)
            if len(self._lines) == _PACKED:
                self._packed.append(zlib.compress("\n".join(self._lines).encode()))
                self._lines = []
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def follow(self) -> Iterator[Event]:
        """All events from the first one on, as they come, until the run has ended."""
        return parse(self._follow())

    def _follow(self) -> Iterator[str]:
        at = 0
        while True:
            number, first = divmod(at, _PACKED)
            with self._changed:
                while at == len(self._packed) * _PACKED + len(self._lines) and not self._closed:
                    self._changed.wait()
                packed = self._packed[number] if number < len(self._packed) else None
                fresh = self._lines[first:] if packed is None else []
            if packed is not None:
                fresh = zlib.decompress(packed).decode().split("\n")[first:]
            if not fresh:
                return
            yield from fresh
            at += len(fresh)
