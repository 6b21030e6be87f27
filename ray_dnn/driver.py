"""The driver: watches the agents and decides membership, plan, pause, stop and checkpoint. One thread, one loop.

Theory of operation
-------------------
A run is a sequence of generations. Inside a generation the agents go from step to step on their own; the driver only
collects their reports. A generation ends in one of two ways:

* **At a boundary.** To change anything, the driver sends a numbered decision; agents say in every exchange which
  decisions they hold, and stop before the first step at which all hold it, so they all stop at the same step. The
  driver does what it wanted and forms the next generation, without those that leave and with the newcomers.
* **By a loss.** An agent died, hangs or computes wrongly, or a connection broke. The driver forms the next generation
  of those who are left, wherever they are: being told of it, they leave the old one in the middle of what they do,
  agree on the newest step that any of them has committed, and go on from there.

Whatever is under way when a generation ends that way (a pause, a checkpoint) is dropped and begun again: an answer that
belongs to a generation that is over (`Underway.end`) is not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train import CheckpointConfig

from ray_dnn.admission import Admission
from ray_dnn.agent import Command, Convicted, Failed, Job, Left, Stopped
from ray_dnn.balance import Balance, Hopeless, Stragglers
from ray_dnn.checkpoints import Checkpoints, Kept
from ray_dnn.cluster import Places
from ray_dnn.draining import LEAVE_S, Draining
from ray_dnn.engine.reports import Report
from ray_dnn.errors import AgentLostError, ConfigError, ProtocolError, RayDnnError
from ray_dnn.events import (
    AgentsSlow,
    Decided,
    EventLog,
    GenerationFormed,
    NodeDraining,
    Paused,
    RunFailed,
    RunFinished,
    RunInterrupted,
    Waiting,
)
from ray_dnn.feed.feed import Feed, Hears
from ray_dnn.feed.source import Source
from ray_dnn.feed.supply import News
from ray_dnn.fleet import Fleet, Replica, Stage
from ray_dnn.following import Followings
from ray_dnn.guard import Guard
from ray_dnn.identity import Identity, of_agents
from ray_dnn.ledger import LedgerHead
from ray_dnn.liveness import Patience, Verdict
from ray_dnn.loop import Loop
from ray_dnn.membership import Decision, Resources, Script, View, decide, to_give_up
from ray_dnn.plan import Plan, lay
from ray_dnn.recorder import Recorder
from ray_dnn.requests import Request, Requests
from ray_dnn.resume import check_same
from ray_dnn.sampler import rows_of_job
from ray_dnn.setbacks import Setbacks
from ray_dnn.sharing import Neighbours
from ray_dnn.storage import RunFolder
from ray_dnn.underway import Underway

_HEARTBEAT_S = 1.0  # agents keep the reports of so long; one that hears nothing for ten minutes ends itself
_HEARTBEATS = 500  # at a time: of more replicas each has its turn later, for calls take the driver's time
_ROOT_CAUSE_S = 0.3  # how long to wait for the reason why a connection closed
_WAITING_MAX_S = 60.0
_FENCE_S = 15.0  # between two looks whether the run was started again
_COMPLETE = "complete a checkpoint"  # a request of its own
_SHORTLY_S = 0.1
_SLOW_NODE_S = 600.0  # in which no agent is started where one was slow beyond sense
_ENDING = "its node is going to end"
_LAST_S = 25.0  # that the checkpoint of an interrupted run may take


@dataclass(frozen=True)
class Size:
    """How many replicas, and how often there may be too few.

    Attributes:
        minimum, maximum: that the user allows.
        max_failures: falls below the minimum that the run survives; below 0: any number.
        script: replicas by step, exactly (for tests).
    """

    minimum: int
    maximum: int
    max_failures: int = 0
    script: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Past:
    """What there is of a run before it starts.

    Attributes:
        identity: what the job is, as far as the driver knows.
        kept: checkpoints.
        keep: how many of them.
        elsewhere: whether it may go on on machines of another kind.
    """

    identity: Identity = field(default_factory=dict)
    kept: Sequence[Kept] = ()
    keep: CheckpointConfig = field(default_factory=CheckpointConfig)
    elsewhere: bool = False


@dataclass
class Outcome:
    """How an attempt of a run ended.

    Attributes:
        checkpoint_path: of the last one, where it came to its end.
        kept: checkpoints.
        again: None, or: another attempt should follow, with so many falls below the minimum allowed.
        seen: what the user's ``look`` returned, in order.
        error, cause: why it failed.
    """

    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    weights_digest: str = ""
    checkpoint_path: str | None = None
    kept: list[Kept] = field(default_factory=list)
    again: int | None = None
    seen: list[Any] = field(default_factory=list)
    error: Exception | None = None
    cause: Exception | None = None


class Driver:
    """Runs a job to its end."""

    def __init__(
        self,
        job: Job,
        sources: Mapping[str, Source],
        size: Size,
        places: Places,
        patience: Patience,
        folder: RunFolder,
        log: EventLog,
        past: Past,
    ):
        self._job, self._size, self._log, self._past = job, size, log, past
        self._loop = Loop()
        train = sources["train"]
        order, schedule = rows_of_job(job.config, train.rows, train.held, job.strategy.local_batches)
        if schedule.total_steps is not None and schedule.total_steps < job.first_step:
            raise ConfigError(
                f"{folder.path} holds a checkpoint of step {job.first_step}, and the job as it is now has "
                f"{schedule.total_steps} steps. Give it at least as many, or another name."
            )
        counted = job.resume.manifest.units if job.resume is not None else {}
        self._feed = Feed(sources, order, schedule, self._hears(), job.first_rows, counted)
        self._guard = Guard(self._loop, patience, self._on_verdict, self._on_stalled)
        self._fleet = Fleet(self._loop, log, job, places, patience, self._guard, self)
        self._admission = Admission(log, job.config.deterministic)
        self._followings = Followings(self._loop, log, self._consider)
        self._draining = Draining(self._loop.post, self._on_draining)
        self._neighbours = Neighbours(self._loop.post, self._on_neighbour)
        self._each = {key: amount * job.replica_size for key, amount in places.resources.items()}  # of a replica
        self._room_for: int | None = None  # replicas that may be there, for another run cannot start
        self._ending: set[str] = set()  # nodes that end so soon that nobody should be there
        head = LedgerHead(order, schedule, len(train.units), train.counts is not None, job.first_step)
        self._recorder = Recorder(job, folder, log, head)
        if train.counts is not None:
            self._recorder.counted(dict(enumerate(train.counts.tolist())))
        elif counted:
            self._recorder.counted(counted)
        self._checkpoints = Checkpoints(
            self._loop, log, folder, job, self._recorder, job.config.checkpoint_every, past.keep, self
        )
        self._checkpoints.kept = list(past.kept)
        self.requests = Requests(lambda request: self._loop.post(lambda: self._on_request(request)))
        self._target = size.maximum
        self._script = Script(size.script)
        self._unheard: list[Replica] = []  # who should hear the heartbeat next, the last ones first
        self._considering = False  # whether the membership will be looked at once more has been heard
        self._members: list[Replica] = []  # who holds the state: of the present generation, or of the last one
        self._lost: list[str] = []  # agents, since the present generation was formed
        self._node = ray.get_runtime_context().get_node_id()  # of this process
        self._founders: set[str] = set()  # of the first generation: the state as built is the state of the run
        self._generation = 0  # the number of the newest one
        self._now: Underway | None = None  # the newest one, until it is over
        self._waiting = False  # whether members wait for more, and there is no generation
        self._falls = 0  # how often they had to, for others were lost
        self._finishing = False  # whether the user asked to stop, and the next generation is the last
        self._paused = False  # whether all members have stopped at the same step, and wait
        self._interrupted = False  # whether the user asked to end soon
        self._decided = 0  # the newest decision
        self._pending: dict[int, Command] = {}  # decisions that are not carried out
        self._commands: list[Request] = []  # what the user asked for, to be done at the next boundary
        self._setbacks = Setbacks(size.minimum, size.max_failures)
        self._balance, self._stragglers = Balance(), Stragglers()
        self._slow: set[str] = set()  # members that are to be replaced, for they are slow beyond sense
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run to the end. Returns how it ended; never raises for a failure of the job."""
        try:
            self._feed.start()
            self._draining.start()
            if self._size.minimum < self._size.maximum:  # else there is nothing to give up
                self._neighbours.start()
            self._fleet.ask(self._first_size(), "the run starts when its first agents have their places")
            self._heartbeat()
            self._watch_fence()
            self._loop.run()
        except Exception as error:
            self._fail(error)
        finally:
            self._close()
        return self.outcome

    def _hears(self) -> Hears:
        """What the feed says, from its threads."""
        post = self._loop.post
        return Hears(
            news=lambda news: post(lambda: self._on_rows(news)),
            counted=lambda rows: post(lambda: self._recorder.counted(rows)),
            says=lambda what: post(lambda: self._log.add(Waiting(what))),
            failed=lambda error: post(lambda: self._on_feed_failed(error)),
        )

    def _on_rows(self, news: News) -> None:
        """There are more rows, or more is known about them."""
        self._recorder.schedule = self._feed.schedule
        for replica in self._fleet.replicas.values():
            _supply(replica, news)

    def _on_feed_failed(self, error: Exception) -> None:
        self.outcome.cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
        self._fail(error)

    def on_opened(self, replica: Replica) -> None:
        """A replica's agents are there, and know nothing yet."""
        _supply(replica, self._feed.news())
        if not replica.nodes.isdisjoint(self._draining.nodes):
            self._fleet.release(replica, _ENDING, wanted=True)
            self._consider()

    def _first_size(self) -> int:
        return self._script.size or self._size.minimum

    def _heartbeat(self) -> None:
        """Tell agents, in turn, that they are wanted, and which reports are known."""
        if not self._unheard:
            self._unheard = list(reversed(self._fleet.replicas.values()))
        for replica in self._unheard[-_HEARTBEATS:]:
            for agent in replica.agents if replica.stage is not Stage.GONE else ():
                agent.acknowledge.remote(self._recorder.serial - 1)
        del self._unheard[-_HEARTBEATS:]
        self._loop.later(_HEARTBEAT_S, self._heartbeat)

    def _watch_fence(self) -> None:
        self._checkpoints.watch_fence()
        self._loop.later(_FENCE_S, self._watch_fence)

    @property
    def _running(self) -> bool:
        """Whether agents take steps."""
        return self._now is not None and self._now.running

    @property
    def _begun(self) -> bool:
        """Whether there is more to lose than what this attempt began with."""
        return self._recorder.steps > self._recorder.first_step

    # -- what the user asks for ----------------------------------------------------------------------------------------

    def _on_request(self, request: Request) -> None:
        if request.kind == "interrupt":
            self._on_interrupt()
            request.answer.set_result(None)
        elif request.kind == "resize":
            self._target = request.value
            request.answer.set_result(None)
            self._consider()
        elif request.kind == "checkpoint":
            self._checkpoints.want(request.answer.set_result)
        else:
            self._commands.append(request)
            if self._running:
                self._decide_pause(request.kind, "asked for by the user")

    def _on_interrupt(self) -> None:
        """End: with a checkpoint if there is something to keep, at once when asked again."""
        if self._interrupted or not self._running or not self._begun:
            self._end_interrupted()
            return
        self._interrupted = True
        self._log.add(Waiting("a last checkpoint, before the run is interrupted; once more ends it at once"))
        self._checkpoints.want(lambda _: self._end_interrupted())
        self._loop.later(_LAST_S, self._end_interrupted)

    def _end_interrupted(self) -> None:
        if self.outcome.error is None:
            self.outcome.error = InterruptedError("the run was interrupted")
            self._log.add(RunInterrupted(self._recorder.steps))
        self._loop.end()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def order_snapshot(self, every: int, at_step: int, reason: str) -> tuple[int, list[Replica]] | None:
        """See `ray_dnn.checkpoints.Owner`."""
        if self._now is None or not (self._running or self._paused):
            return None
        self._decided += 1
        if self._paused:
            self._now.ask([agent.snapshot.remote(self._decided) for agent in self._now.agents], lambda _: None)
        else:
            self._log.add(Decided(self._decided, "checkpoint", reason))
            self._now.command(Command(self._decided, at_step, snapshot=every))
        return self._decided, list(self._members)

    def order_pause(self) -> None:
        """See `ray_dnn.checkpoints.Owner`."""
        if any(request.kind == _COMPLETE for request in self._commands):
            return
        self._commands.append(Request(_COMPLETE))
        if self._running:
            self._decide_pause("pause", "agents are lost so often that no checkpoint is completed")

    def on_reports(self, reports: list[Report]) -> None:
        """See `ray_dnn.checkpoints.Owner`."""
        self._record(reports)

    def on_storage_lost(self, error: Exception) -> None:
        """See `ray_dnn.checkpoints.Owner`."""
        self._fail(error)

    # -- what happens to agents ----------------------------------------------------------------------------------------

    def on_placed(self) -> None:
        """Some replicas got their places, or gave them up."""
        self._consider()

    def _on_draining(self, node: str, left: float | None) -> None:
        """A node is going to end, in so many seconds if that is known."""
        self._fleet.avoid([node])
        there = [r for r in self._fleet.replicas.values() if node in r.nodes]
        if not there and node != self._node:
            return
        self._log.add(NodeDraining(node, [r.name for r in there], left))
        for replica in there:
            if replica not in self._members:
                self._fleet.release(replica, _ENDING, wanted=True)
        lasting = len(self._members) - len(self._members_on(self._draining.nodes))
        if lasting < self._view().minimum or node == self._node:
            self._checkpoints.want(lambda _: None)  # others may not be there in time
        self._consider()
        if left is not None:
            self._watch_end(node)

    def _watch_end(self, node: str) -> None:
        """Have those leave who are still there shortly before a node ends."""
        left = self._draining.ends_in(node) - self._leave_s  # which may change meanwhile
        if left > 0:
            self._loop.later(max(left, _SHORTLY_S), lambda: self._watch_end(node))
        else:
            self._ending.add(node)
            self._consider()

    @property
    def _leave_s(self) -> float:
        """How long before its node ends an agent leaves: it may have to finish a step, and to write a checkpoint."""
        return LEAVE_S + 2 * self._recorder.step_s

    def _on_neighbour(self, needs: Resources | None, free: Resources) -> None:
        """Another run cannot start: make room for it, if what is there beyond the minimum is enough."""
        if needs is None:
            self._room_for = None
        elif self._room_for is None or len(self._members) <= self._room_for:  # those that were given up have left
            surplus = len(self._members) - self._view().minimum
            count = to_give_up(needs, free, self._each, surplus)
            if count or self._room_for is None:  # and what is free is for that run
                self._room_for = max(1, len(self._members)) - count
                if count:
                    room = f"makes room for it with {count} of its {len(self._members)} replicas"
                    self._log.add(Waiting(f"another run cannot start: this one {room}"))
        self._consider()

    def _members_on(self, nodes: Collection[str]) -> frozenset[str]:
        """Members with an agent on one of these nodes."""
        return frozenset(r.name for r in self._members if not r.nodes.isdisjoint(nodes)) if nodes else frozenset()

    def on_ready(self, replica: Replica) -> None:
        """A replica is built."""
        for built in replica.built:
            assert built is not None
            self._identify(built.identity)
        admitted, refused = self._admission.examine(replica)
        self._fleet.referenced = self._fleet.referenced or not self._admission.waiting(replica)
        for name, error in refused.items():
            self._fleet.release(self._fleet.replicas[name], "refused")
            if not self._members and len(self._fleet.replicas) < self._view().minimum:
                self._fail(error)  # the run cannot start without it
        if admitted and not self._considering:
            self._considering = True
            self._loop.post(self._consider)  # once for all that have become ready meanwhile, be it thousands

    def _identify(self, identity: Identity) -> None:
        """Now it is known all that the job is."""
        whole = self._past.identity | identity
        self._checkpoints.identify(whole)
        resume = self._job.resume
        if resume is not None and self._job.config.deterministic:
            here = of_agents(whole) if self._past.elsewhere else {}
            check_same(resume.place.path, resume.manifest, {n: said for n, said in whole.items() if n not in here})

    def on_failed(self, replica: Replica, failed: Failed) -> None:
        """An agent's call raised: the job's fault, not the agent's."""
        self.outcome.cause = failed.cause
        self._seen(failed.seen)
        for report in failed.reports:
            self._recorder.add(report)
        self._fail(failed.error)

    def _seen(self, seen: Mapping[tuple[int, int, int], Any]) -> None:
        self.outcome.seen = [seen[place] for place in sorted(seen)]

    def on_lost(self, replica: Replica, reason: str) -> None:
        """A replica's agent died, or did not start in time."""
        if replica in self._members:
            self._lose([replica], reason)
            return
        self._fleet.release(replica, reason, wanted=True)
        self._on_false_start(f"{replica.name} was lost before it took part: {reason}")
        self._consider()

    def _on_verdict(self, verdict: Verdict) -> None:
        """The guard has given an agent up."""
        assert verdict.name is not None
        replica = self._fleet.replica_of(verdict.name)
        if replica is None:
            return
        self._guard.kill(verdict.name)
        if verdict.job and replica in self._members and self._running:
            end = self._setbacks.hung(self._recorder.steps, verdict.name, verdict.reason)
            if end is not None:
                self._fail(AgentLostError(end))
                return
        self.on_lost(replica, verdict.reason)

    def _on_stalled(self, verdict: Verdict) -> None:
        """All wait for each other: some connection has fallen silent."""
        if self._running:
            for rank in verdict.waits:
                if rank < len(self._members):
                    self._setbacks.accuse(self._members[rank].name)
            self._on_broken(verdict.reason, None)

    def _lose(self, replicas: Sequence[Replica], reason: str) -> None:
        """Go on without these members."""
        lost = [replica for replica in replicas if replica in self._members]
        for replica in lost:
            self._members.remove(replica)
            self._lost += replica.names
            self._fleet.release(replica, reason, wanted=True)
            if not replica.proven:
                self._on_false_start(f"{replica.name} was lost before it had committed a step: {reason}")
        if lost:
            self._recover(f"{', '.join(r.name for r in lost)} lost")

    def _on_false_start(self, what: str) -> None:
        """A newcomer was of no use: ask for the next one later and later, and in the end not any more."""
        end = self._setbacks.false_start(what, len(self._members), time.monotonic())
        if end is not None:
            self._fail(AgentLostError(end))
        else:
            self._loop.later(self._setbacks.wait_s(time.monotonic()), self._consider)

    def _recover(self, reason: str) -> None:
        """The present generation cannot go on. Form the next one of those who are there, or wait for more."""
        if self.outcome.error is not None:
            return
        if self._now is not None:
            self._now.end()
        self._paused = False
        self._checkpoints.interrupted()
        end = self._setbacks.left(len(self._members), self._recorder.steps if self._begun else 0, reason)
        if end is not None:
            self.outcome.again = None if self._members else self._setbacks.left_to_fail
            self._fail(AgentLostError(end))
            return
        enough = len(self._members) >= self._size.minimum
        decision = decide(self._view(quickly=enough and bool(self._members)))
        if decision.members:
            self._decide_anew(reason)
            self._setbacks.go_on(time.monotonic())
            self._form(decision, self._finishing)
            self._loop.later(self._setbacks.wait_s(time.monotonic()), self._consider)
            return
        self._waiting = True
        self._falls += 1
        fall = self._falls

        def left(reports: list[Report]) -> None:
            self._record(reports)
            self._still_below(fall, 0.0)

        if self._members and self._now is not None:
            self._now.leave(self._members, left)
        else:
            left([])
        self._consider()

    def _decide_anew(self, reason: str) -> None:
        self._decided += 1
        self._log.add(Decided(self._decided, "recover", reason))

    def _still_below(self, fall: int, after: float) -> None:
        """Say what the run waits for, again and again, while there are too few."""
        if fall != self._falls or not self._waiting:
            return
        there = f"{len(self._members)} of at least {self._view().minimum} replicas are there"
        holding = f", holding the state after step {self._recorder.steps} in memory" if self._members else ""
        self._log.add(Waiting(f"{there}{holding}; replacements are being started"))
        again = min(max(2.0, after * 2), _WAITING_MAX_S)
        self._loop.later(again, lambda: self._still_below(fall, again))

    # -- membership ----------------------------------------------------------------------------------------------------

    def _view(self, quickly: bool = False) -> View:
        """What is there. ``quickly``: only that some are lost; whom the others would wait for, and who should leave,
        is for the next time."""
        minimum, maximum, target = self._script.limits(self._size.minimum, self._size.maximum, self._target)
        none: frozenset[str] = frozenset()
        built = self._fleet.staged(Stage.READY)
        admitted = [r for r in built if not self._admission.waiting(r)]
        # Members that train are not held up by newcomers that could have come closer to their state before.
        ready = [r.name for r in admitted if not self._members or self._waiting or self._followings.may_join(r)]
        return View(
            minimum=minimum,
            maximum=maximum,
            workers=self._job.config.virtual_workers,
            target=maximum if quickly else min(target, self._room_for or target),
            members=tuple(r.name for r in self._members),
            ready=() if quickly else tuple(ready),
            starting=len(self._fleet.starting) + len(built) - len(ready),
            leaving=none if quickly else self._members_on(self._ending),
            expiring=none if quickly else self._members_on(self._draining.nodes),
            slow=none if quickly else frozenset(r.name for r in self._members if r.name in self._slow),
            one_by_one=self._job.strategy.worker_state == "mirrored",
            careful=self._setbacks.careful,
        )

    def _consider(self) -> None:
        """Look at the membership and act on it."""
        self._considering = False
        self._have_followed()
        view = self._view()
        decision = decide(view)
        if decision.withdraw:
            for replica in self._fleet.starting[-decision.withdraw :]:
                self._fleet.release(replica, "not wanted any more")
        for name in decision.dismiss:
            self._fleet.release(self._fleet.replicas[name], "not wanted any more")
        if decision.ask and not self._setbacks.wait_s(time.monotonic()):
            self._fleet.grow(decision.ask)
        elif not decision.ask:
            self._fleet.tidy()
        if decision.stop and self._running:
            self._stop_for_lack()
        elif decision.stop and self._waiting and self._paused and view.ready:
            self._hand_on()
        if decision.members is None or not decision.changed:
            return
        if self._running:
            self._decide_pause("regroup", decision.reason)
        elif not self._members or self._waiting:
            self._form(decision, self._finishing)

    def _stop_for_lack(self) -> None:
        """Members' nodes end, and without them there are too few: write what there is, and wait for others."""
        if not any(request.kind == _COMPLETE for request in self._commands):
            self._commands.append(Request(_COMPLETE))
            self._decide_pause("pause", "nodes end, and too few agents would be left")

    def _hand_on(self) -> None:
        """The only agent that the job has work for must go, and there is another: that goes on from the checkpoint."""
        self.outcome.again = self._setbacks.spare
        self.outcome.error = AgentLostError("the node of the only agent ends")
        self._loop.end()

    def _have_followed(self) -> None:
        """Have newcomers follow members that train."""
        newcomers = [r for r in self._fleet.staged(Stage.READY) if not self._admission.waiting(r)]
        # Before the first step is known, founders that are lost are replaced by newcomers that are as they were built.
        self._followings.look(newcomers, self._members if self._running and self._begun else [])

    def _decide_pause(self, kind: str, reason: str, at_step: int = 0) -> None:
        """Have the agents stop at a step boundary."""
        if any(c.at_step == at_step for c in self._pending.values()):
            return  # they are going to stop there already
        self._decided += 1
        command = self._pending[self._decided] = Command(self._decided, at_step)
        self._log.add(Decided(command.number, kind, reason))
        if self._now is not None:
            self._now.command(command)

    # -- generations ---------------------------------------------------------------------------------------------------

    def _form(self, decision: Decision, finish: bool = False) -> None:
        """Begin the next generation with these members."""
        assert decision.members
        before = self._members
        members = [self._fleet.replicas[name] for name in decision.members]
        if not before:
            self._founders = {r.name for r in members}
        plan = lay(self._generation + 1, self._job.config.virtual_workers, self._recorder.speeds(members))
        if self._job.strategy.worker_state == "mirrored" and plan.replicas < 2:
            raise ConfigError(
                f"{type(self._job.strategy).__name__} keeps mirrored worker states, which need a second agent to hold "
                "the mirror. Use ScalingConfig(num_workers=(2, …)) or more."
            )
        if self._now is not None:
            self._now.end()
        self._paused = False
        self._checkpoints.interrupted()
        self._generation += 1
        now = self._now = Underway(self._loop, self._fleet, self, self._generation, members, plan)
        self._members, self._waiting = members, False
        self._setbacks.formed(len(members))
        self._balance.begin(changed=members != before or bool(self._lost))
        self._script.formed(len(members))
        self._tell(before, plan)
        # Decisions without a step are carried out by this generation, or made again below.
        self._pending = {n: c for n, c in self._pending.items() if c.at_step}
        for step, count in self._script.coming.items():
            self._decide_pause("regroup", f"{count} replicas from step {step} on", step)
        now.begin(self._founders, self._decided, tuple(self._pending.values()), finish)
        for replica in _without(before, members):
            self._fleet.release(replica, "slow beyond sense" if replica.name in self._slow else "left as planned")
        self._slow &= {r.name for r in members}
        now.poll(lambda: self._recorder.serial, self._record)
        if self._commands and not finish:
            self._decide_pause(self._commands[0].kind, "asked for by the user")
        self._checkpoints.look()
        self._consider()

    def _tell(self, before: list[Replica], plan: Plan) -> None:
        """Let the guard and the user know of a new generation."""
        names = [name for r in self._members for name in r.names]
        self._guard.in_generation(names)
        self._log.add(
            GenerationFormed(
                generation=self._generation,
                step=self._recorder.steps,
                agents=names,
                joined=[name for r in _without(self._members, before) for name in r.names],
                left=[name for r in _without(before, self._members) for name in r.names],
                lost=self._lost,
                bounds=list(plan.bounds),
            )
        )
        self._lost = []

    # -- how generations end -------------------------------------------------------------------------------------------

    def on_left(self, replica: Replica, left: Left) -> None:
        """An agent lost a connection. Ray, the guard or the peer itself will mostly say why; else it just broke."""
        assert self._now is not None
        peer = self._fleet.replica_of(left.peer) if left.peer else replica
        if peer is not None:
            self._setbacks.accuse(peer.name)
        how = "garbled what it carried" if left.garbled else "broke"
        what = f"a connection between {replica.name} and {left.peer or 'an agent of the same replica'} {how}"
        useless = replica if left.group else None
        self._now.later(0.0 if left.garbled else _ROOT_CAUSE_S, lambda: self._on_broken(what, useless))

    def _on_broken(self, what: str, useless: Replica | None) -> None:
        blamed = self._setbacks.broke({r.name: r.proven for r in self._members})
        if useless is not None:
            self._lose([useless], what)
        elif blamed is not None:
            self._lose([self._fleet.replicas[blamed]], "connections to it break again and again")
        else:
            self._recover(what)

    def on_convicted(self, convicted: Convicted) -> None:
        """Some agents compute wrongly."""
        if convicted.late:
            self._admission.exact = False
        replicas = [r for r in self._members if set(r.names) & set(convicted.names)]
        self._lose(replicas, f"computes wrongly: {convicted.reason}")

    def on_boundary(self, stops: dict[tuple[str, int], Stopped]) -> None:
        """All agents have stopped, at the same step."""
        assert self._now is not None
        reports = self._now.agents[0].reports.remote(self._recorder.serial, 0.0)
        self._now.ask([reports], lambda got: self._at_boundary(stops, got[0]))

    def _at_boundary(self, stops: dict[tuple[str, int], Stopped], reports: list[Report]) -> None:
        self._record(reports)
        stop = next(iter(stops.values()))
        if self._recorder.steps != stop.step:
            raise ProtocolError(f"agents stopped at step {stop.step}, their reports at {self._recorder.steps}")
        self._paused = True
        if stop.command is None:
            self._finish(stops)
            return
        self._log.add(Paused(self._generation, stop.step, stop.command))
        self._pending = {n: c for n, c in self._pending.items() if c.at_step > stop.step}
        self._script.arrived(stop.step)
        self._serve()

    def _serve(self) -> None:
        """Do what the user asked for, one thing after the other; then form the next generation."""
        if self._commands:
            if self._commands[0].kind == "stop":
                self._finishing = True
                self._served()
            else:
                paused = self._generation
                # Where the pause is cut short by a loss, it is asked for again in another generation.
                self._checkpoints.want(
                    lambda _: self._served() if self._paused and self._generation == paused else None
                )
            return
        if self._finishing:
            self._form(Decision(tuple(r.name for r in self._members)), finish=True)
            return
        decision = decide(self._view())
        if decision.members:
            self._form(decision)
        elif decision.stop and self._checkpoints.newest_step != self._recorder.steps:
            self._commands.append(Request(_COMPLETE))
            self._serve()
        else:  # a script waits for the agents that it names; or nodes end, and replacements are not there yet
            self._waiting = True
            self._falls += 1
            self._still_below(self._falls, 0.0)
            self._consider()

    def _served(self) -> None:
        self._commands.pop(0).answer.set_result(None)
        self._serve()

    # -- reports and ends ----------------------------------------------------------------------------------------------

    def _record(self, reports: list[Report]) -> None:
        waited = self._setbacks.wait_s(time.monotonic())
        self._learn(reports)
        if waited and self._running and not self._setbacks.wait_s(time.monotonic()):
            self._consider()
        self._have_followed()

    def _learn(self, reports: list[Report]) -> None:
        known = self._recorder.steps
        for report in reports:
            if self._recorder.add(report):
                by = {*getattr(report, "members", ())}
                new = [r for r in self._members if not r.proven and not by.isdisjoint(r.names)]
                for replica in new:
                    replica.proven = True
                newest = getattr(report, "generation", 0) == self._generation
                self._setbacks.committed(proven=bool(new), newest=newest)
        if self._recorder.steps > known:
            self._feed.committed(self._recorder.steps)
            self._checkpoints.stepped()
            self._look_at_speeds()

    def _look_at_speeds(self) -> None:
        """Lay a new plan where members have become slower or faster than the present one was laid for; replace those
        that are slow beyond sense."""
        if self._now is None or not self._running or self._recorder.generation != self._generation:
            return
        now, plan, speeds = time.monotonic(), self._now.plan, self._recorder.speeds(self._members)
        hopeless = self._stragglers.look(plan.workers, [r.name for r in self._members], speeds, now)
        if hopeless is not None and not hopeless.names <= self._slow:
            self._replace_slow(hopeless)
        wanted = self._balance.look(plan, speeds, now)
        if wanted is not None:
            self._decide_pause("rebalance", wanted)

    def _replace_slow(self, hopeless: Hopeless) -> None:
        self._log.add(AgentsSlow(sorted(hopeless.names), hopeless.times))
        self._slow |= hopeless.names
        slow = [replica for replica in self._members if replica.name in hopeless.names]
        self._fleet.avoid({node for replica in slow for node in replica.nodes}, _SLOW_NODE_S)

    def _finish(self, stops: dict[tuple[str, int], Stopped]) -> None:
        for rank in range(self._job.replica_size):
            digests = {s.state_digest for (_, r), s in stops.items() if r == rank}
            if len(digests) > 1 and self._admission.exact:
                raise ProtocolError(f"agents ended with different states: {stops}")
        last = next(iter(stops.values()))
        self._seen({place: seen for stop in stops.values() for place, seen in stop.seen.items()})
        self._checkpoints.take_last(last.weights_digest, lambda path: self._finished(last, path))

    def _finished(self, last: Stopped, path: str) -> None:
        for request in self._commands:
            request.answer.set_result(None)
        self._commands = []
        reason = "all steps done" if last.step == self._feed.schedule.total_steps else "stopped"
        self._log.add(RunFinished(last.step, last.weights_digest, reason))
        self.outcome.weights_digest = last.weights_digest
        self.outcome.checkpoint_path = path
        self._loop.end()

    def _fail(self, error: Exception) -> None:
        if self._now is not None:
            self._now.end()
        if self.outcome.error is None:
            self.outcome.error = error
            self._log.add(RunFailed(self._recorder.steps, f"{type(error).__name__}: {error}"))
        self._loop.end()

    def _close(self) -> None:
        """Leave nothing behind."""
        self.requests.close(self.outcome.error or RayDnnError("The run has ended."))
        try:
            self._draining.close()
            self._neighbours.close()
            self._checkpoints.close()
            self._feed.close()
            self._guard.close()
            self._fleet.close("the run has ended")
        except Exception as error:
            self._fail(error)
        self.outcome.step = self._recorder.steps
        self.outcome.metrics = self._recorder.final(self._admission.exact)
        self.outcome.history = self._recorder.history
        self.outcome.kept = list(self._checkpoints.kept)
        self._recorder.close()


def _without(some: Sequence[Replica], others: Sequence[Replica]) -> list[Replica]:
    gone = set(others)
    return [replica for replica in some if replica not in gone]


def _supply(replica: Replica, news: News) -> None:
    for agent in replica.agents:
        agent.supply.remote(news)
