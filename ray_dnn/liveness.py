"""Which agents hang: pure decisions from what the watchers saw.

An agent that is slow is waited for; an agent that will never go on is given up. The difference is seen from outside of
its process: a stopped process does nothing, a process that burns CPU or waits for a core is at work, and one that does
neither in a phase in which it should compute holds up all others. Times are counted by the watchers, which leave out
what is nobody's fault: the time in which they did not run themselves (what froze a watcher may have frozen its agents
too), and the time for which an agent waited for a core that others kept busy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from ray_dnn.errors import ConfigError
from ray_dnn.phases import UNTIL_READY, Patient, Phase, Status

_SLOWER = 5.0  # than it has been of late a watcher may be, before it is taken for silent


@dataclass(frozen=True)
class Patience:
    """How long agents are waited for, in seconds. ``math.inf`` waits for ever.

    Attributes:
        stopped_s: for a process that is stopped (SIGSTOP) to be continued.
        idle_s: for an agent that should compute, and neither computes nor waits for a core.
        busy_s: for one phase of a step, even though the agent burns CPU: an endless loop looks like that, and so does
            a step that is simply long. The time for which it waits for a core is not counted.
        silent_s: for any word from a node; longer for one that has been slow to answer.
        stalled_s: when all agents wait for each other and no byte moves between them.
        start_s: for a new agent to be ready: its model built or downloaded, its first contribution computed.
    """

    stopped_s: float = 0.2
    idle_s: float = 30.0
    busy_s: float = 600.0
    silent_s: float = 10.0
    stalled_s: float = 30.0
    start_s: float = 600.0

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ConfigError(
                    f"Patience({name}={value!r}): must be a number of seconds above 0. Use math.inf to wait for ever."
                )


@dataclass(frozen=True)
class Sight:
    """What a watcher sees of one agent.

    Attributes:
        name: of the agent.
        there: whether its process exists, and is no zombie.
        stopped: it was found stopped for too long, and is killed for it.
        starting_s: how long it has been watched before it was ready, without waiting for a core.
        still_s: how long its status has not changed (no phase entered, no byte exchanged), without waiting for a core.
        idle_s: for how much of that it used next to no CPU, waited for no disk and could not have run.
        status: what it said about itself; once it is dead, its last words.
    """

    name: str
    there: bool
    stopped: bool
    starting_s: float
    still_s: float
    idle_s: float
    status: Status


@dataclass(frozen=True)
class Verdict:
    """An agent hangs.

    Attributes:
        name: of the agent to be given up; None where nobody is to blame, and the generation must be formed anew.
        reason: in plain words.
        job: whether it may be the job's own fault: the agent did not come to the end of what it computes.
        waits: in a stall, the ranks that anybody waits for, once for everybody who does.
    """

    name: str | None
    reason: str
    job: bool = False
    waits: tuple[int, ...] = ()


def judge(
    sights: Sequence[Sight],
    generation: Collection[str],
    patience: Patience,
    told: Mapping[str, Sight] | None = None,
) -> list[Verdict]:
    """Who hangs.

    Args:
        sights: of all agents that are watched, members of the generation or not.
        generation: the names of those who take part now.
        told: how the members looked when the generation was last found stalled, by name. Who does not move although
            all were told to form a new one is to blame for the next time.
    """
    verdicts = [verdict for s in sights if (verdict := _fault(s, patience))]
    named = {verdict.name for verdict in verdicts}
    members = [s for s in sights if s.name in generation and s.name not in named]
    if members and len(members) == len(set(generation)):
        verdicts += _stalled(members, patience, told or {})
    return verdicts


def _fault(sight: Sight, patience: Patience) -> Verdict | None:
    """Why an agent must be given up for what it does itself, or None."""
    status = sight.status
    if sight.stopped:
        return Verdict(sight.name, f"has been stopped in {status.text()}")
    if not sight.there:
        return None  # Ray tells of deaths
    if status.phase in UNTIL_READY and sight.starting_s >= patience.start_s:
        return Verdict(sight.name, f"is not ready {sight.starting_s:.0f} s after its start: {status.text()}")
    if status.phase.patient is Patient.WAITING or status.phase in UNTIL_READY:
        return None
    if sight.still_s >= patience.busy_s:
        return Verdict(sight.name, f"has been in {status.text()} for {sight.still_s:.0f} s", job=True)
    if status.phase.patient is Patient.WORKING and sight.idle_s >= patience.idle_s:
        reason = f"idle for {sight.idle_s:.0f} s in {status.text()}, while the others wait"
        return Verdict(sight.name, reason, job=True)
    return None


def _stalled(members: list[Sight], patience: Patience, told: Mapping[str, Sight]) -> list[Verdict]:
    """Verdicts where all members wait for each other.

    All of them being ready is the driver's turn, and no stall; nor is it one while any waits to be told of rows.
    """
    if any(not s.there or s.status.phase.patient is not Patient.WAITING for s in members):
        return []
    if all(s.status.phase is Phase.READY for s in members) or any(s.status.phase is Phase.SUPPLY for s in members):
        return []
    deaf = [s for s in members if s.name in told and told[s.name].status == s.status]
    before = {s.name: told[s.name].still_s for s in deaf}  # what has been counted against them once already
    waited = min(s.still_s - before.get(s.name, 0.0) for s in members)
    if waited < patience.stalled_s:
        return []
    if deaf:
        text = "did not move when the generation was to be formed anew, in"
        return [Verdict(s.name, f"{text} {s.status.text()} for {s.still_s:.0f} s") for s in deaf]
    where = ", ".join(sorted({s.status.phase.value for s in members}))
    reason = f"all agents wait for each other ({where}), and nothing has moved for {waited:.0f} s"
    waits = tuple(rank for s in members for rank in s.status.waits_for())
    return [Verdict(None, reason, waits=waits)]


def silence_limit(slowest_s: float, patience: Patience) -> float:
    """How long a node may be silent that took up to ``slowest_s`` to answer of late.

    Where others keep all cores busy, a watcher that runs at Ray's low priority answers late, and ever later as the load
    grows (measured: after up to 7 s, with 12 busy loops and 5 busy agents on 2 cores).
    """
    return max(patience.silent_s, _SLOWER * slowest_s)
