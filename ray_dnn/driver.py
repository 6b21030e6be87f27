"""The driver: watches the agents and decides membership, plan, pause, stop and checkpoint. One thread, one loop.

A run is a sequence of generations. Inside a generation the agents go from step to step on their own; the driver only
collects their reports. To change anything, it sends a numbered decision; agents say in every exchange which decisions
they hold, and stop before the first step at which all hold it, so they all stop at the same step boundary. The driver
then forms the next generation: the present members without those that leave, and with the newcomers that are ready.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray_dnn import checkpoint
from ray_dnn.admission import Admission
from ray_dnn.agent import Command, Failed, Generation, Job, Stopped
from ray_dnn.cluster import Places
from ray_dnn.engine.step import StepReport
from ray_dnn.engine.worker_states import moves
from ray_dnn.errors import AgentLostError, ConfigError, ProtocolError, RayDnnError
from ray_dnn.events import (
    CheckpointWritten,
    Decided,
    EventLog,
    GenerationFormed,
    Paused,
    RunFailed,
    RunFinished,
    RunInterrupted,
)
from ray_dnn.fleet import GROWTH, Fleet, Replica, Stage, call_all
from ray_dnn.loop import Loop
from ray_dnn.membership import Decision, View, decide
from ray_dnn.plan import Plan, lay
from ray_dnn.recorder import Recorder
from ray_dnn.storage import RunFolder

_POLL_WAIT_S = 1.0  # an agent answers earlier when it has something to report
_POLL_PAUSE_S = 0.05  # between two polls, so that reports come in bunches
_CALL_TIMEOUT_S = 60.0
_ROOT_CAUSE_S = 5.0  # how long to wait for the reason why a connection closed
_MOST_FALSE_STARTS = 3  # newcomers in a row that died before they were ready


@dataclass(frozen=True)
class Size:
    """How many replicas: what the user allows, and a script that tests may give (replicas by step)."""

    minimum: int
    maximum: int
    script: dict[int, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a run ended."""

    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    weights_digest: str = ""
    checkpoint_path: str | None = None
    error: Exception | None = None
    cause: Exception | None = None


class Driver:
    """Runs a job to its end."""

    def __init__(self, job: Job, size: Size, places: Places, folder: RunFolder, log: EventLog):
        self._job, self._size, self._folder, self._log = job, size, folder, log
        self._loop = Loop()
        self._fleet = Fleet(
            self._loop, log, job, places, self._on_ready, self._on_failed, self._on_lost, placed=self._consider
        )
        self._admission = Admission(log, job.config.deterministic)
        self._recorder = Recorder(job, folder, log)
        self._target = size.maximum
        self._members: list[Replica] = []  # of the present generation, or of the last one between two
        self._plan: Plan | None = None
        self._generation = 0
        self._running = False  # whether a generation is under way
        self._stopped: dict[tuple[str, int], Stopped] = {}  # by (replica, rank): agents whose run() has returned
        self._decided = 0  # the newest decision
        self._pending: dict[int, Command] = {}  # decisions that are not carried out
        self._commands: list[tuple[str, Future[Any]]] = []  # what the user asked for, to be done at the next boundary
        self._false_starts = 0
        self._asking = threading.Lock()  # guards the two below, which the threads of the user share
        self._answers: list[Future[Any]] = []  # to all requests so far
        self._ended = False  # once true, no request is taken
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run to the end. Returns how it ended; never raises for a failure of the job."""
        try:
            self._fleet.ask(self._first_size(), "the run starts when its first agents have their places")
            self._loop.run()
        except Exception as error:
            self._fail(error)
        finally:
            self._close()
        return self.outcome

    def _first_size(self) -> int:
        return self._size.script.get(0, self._size.minimum)

    # -- what the user asks for (any thread) ---------------------------------------------------------------------------

    def request(self, kind: str, value: int = 0) -> Future[Any]:
        """Ask for "stop", "checkpoint" or "resize" at the next step boundary, or "interrupt" at once."""
        answer: Future[Any] = Future()
        with self._asking:
            if self._ended:
                answer.set_exception(RayDnnError("The run has ended; handle.result() has its result."))
                return answer
            self._answers.append(answer)
        self._loop.post(lambda: self._on_request(kind, value, answer))
        return answer

    def _on_request(self, kind: str, value: int, answer: Future[Any]) -> None:
        if kind == "interrupt":
            self.outcome.error = InterruptedError("the run was interrupted")
            self._log.add(RunInterrupted(self._recorder.steps))
            self._loop.end()
            answer.set_result(None)
        elif kind == "resize":
            self._target = value
            answer.set_result(None)
            self._consider()
        else:
            self._commands.append((kind, answer))
            if self._running:
                self._decide_pause(kind, "asked for by the user")

    # -- what agents do ------------------------------------------------------------------------------------------------

    def _on_ready(self, replica: Replica) -> None:
        self._false_starts = 0
        admitted, refused = self._admission.examine(replica)
        for name, error in refused.items():
            self._fleet.release(self._fleet.replicas[name], "refused")
            if not self._members:
                self._fail(error)
        if admitted:
            self._consider()

    def _on_failed(self, replica: Replica, failed: Failed) -> None:
        if failed.lost_peer is not None:
            # The peer's own message, or Ray's, will say why; this is only what follows from it.
            lost = f"the connection to {failed.lost_peer} closed: {failed.error}"
            self._loop.later(_ROOT_CAUSE_S, lambda: self._fail(AgentLostError(lost)))
            return
        self.outcome.cause = failed.cause
        self._fail(failed.error)

    def _on_lost(self, replica: Replica, reason: str) -> None:
        if replica.stage is Stage.MEMBER:
            self._fail(AgentLostError(f"{replica.name} died after step {self._recorder.steps}: {reason}"))
            return
        self._false_starts += 1
        if self._false_starts >= _MOST_FALSE_STARTS or not self._members:
            self._fail(AgentLostError(f"{replica.name} died before it was ready: {reason}"))
            return
        self._consider()

    # -- membership ----------------------------------------------------------------------------------------------------

    def _view(self) -> View:
        script = {step: count for step, count in self._size.script.items() if step <= self._recorder.steps}
        return View(
            minimum=self._size.minimum,
            maximum=self._size.maximum,
            workers=self._job.config.virtual_workers,
            target=self._target,
            members=tuple(r.name for r in self._members),
            ready=tuple(r.name for r in self._fleet.staged(Stage.READY) if not self._admission.waiting(r)),
            starting=len(self._fleet.staged(Stage.ASKED, Stage.STARTING, Stage.BUILDING)),
            exactly=script[max(script)] if script else None,
        )

    def _consider(self) -> None:
        """Look at the membership and act on it."""
        decision = decide(self._view())
        if decision.withdraw:
            for replica in self._fleet.staged(Stage.ASKED, Stage.STARTING, Stage.BUILDING)[-decision.withdraw :]:
                self._fleet.release(replica, "not wanted any more")
        for name in decision.dismiss:
            self._fleet.release(self._fleet.replicas[name], "not wanted any more")
        if decision.ask and not self._fleet.staged(Stage.ASKED):
            # One at a time: a request that cannot be met must not make an autoscaler start nodes for the others.
            self._fleet.ask(1, GROWTH)
        if decision.members is None or not decision.changed:
            return
        if self._running:
            self._decide_pause("regroup", decision.reason)
        else:
            self._form(decision)

    def _decide_pause(self, kind: str, reason: str, at_step: int = 0) -> None:
        """Have the agents stop at a step boundary."""
        if any(c.at_step == at_step for c in self._pending.values()):
            return  # they are going to stop there already
        self._decided += 1
        command = self._pending[self._decided] = Command(self._decided, at_step)
        self._log.add(Decided(command.number, kind, reason))
        for replica in self._members:
            for agent in replica.agents:
                agent.command.remote(command)

    # -- generations ---------------------------------------------------------------------------------------------------

    def _form(self, decision: Decision, finish: bool = False) -> None:
        """Begin the next generation with these members."""
        assert decision.members is not None
        before, plan_before = self._members, self._plan
        members = [self._fleet.replicas[name] for name in decision.members]
        staying = [r for r in members if r in before]
        if before and not staying:
            raise AgentLostError("All agents left at once; nobody holds the state.")
        self._generation += 1
        self._plan = plan = lay(self._generation, self._job.config.virtual_workers, self._recorder.speeds(members))
        if self._job.strategy.worker_state == "mirrored" and plan.replicas < 2:
            raise ConfigError(
                f"{type(self._job.strategy).__name__} keeps mirrored worker states, which need a second agent to hold "
                "the mirror. Use ScalingConfig(num_workers=(2, …)) or more."
            )
        for step, count in self._size.script.items():
            if step > self._recorder.steps and not any(c.at_step == step for c in self._pending.values()):
                self._decide_pause("regroup", f"{count} replicas from step {step} on", step)
        states = self._moved_states(before, plan_before, members, plan)
        newcomers = tuple(i for i, r in enumerate(members) if before and r not in before)
        self._members, self._stopped, self._running = members, {}, True
        for replica in members:
            replica.stage = Stage.MEMBER
        for index, replica in enumerate(members):
            for rank, agent in enumerate(replica.agents):
                hellos = [r.hellos[rank] for r in members]
                generation = Generation(
                    number=self._generation,
                    plan=plan,
                    replica=index,
                    names=tuple(r.names[rank] for r in members),
                    addresses=tuple(h.address for h in hellos if h),
                    source=members.index(staying[0]) if staying else 0,
                    newcomers=newcomers,
                    settled=self._decided,
                    commands=tuple(self._pending.values()),
                    worker_states=states.get((index, rank), {}),
                    finish=finish,
                )
                self._watch_run(replica, rank, agent.run.remote(generation))
        left = [r for r in before if r not in members]
        self._log.add(
            GenerationFormed(
                generation=self._generation,
                step=self._recorder.steps,
                agents=[name for r in members for name in r.names],
                joined=[name for r in members if r not in before for name in r.names],
                left=[name for r in left for name in r.names],
                bounds=list(plan.bounds),
            )
        )
        for replica in left:
            self._fleet.release(replica, "left as planned")
        self._poll(self._generation)
        if self._commands and not finish:
            self._decide_pause(self._commands[0][0], "asked for by the user")
        self._consider()

    def _moved_states(
        self, before: list[Replica], plan_before: Plan | None, members: list[Replica], plan: Plan
    ) -> dict[tuple[int, int], dict[int, bytes]]:
        """Worker states for those who become holders of them, by (replica, rank)."""
        kind = self._job.strategy.worker_state
        if kind == "none" or plan_before is None:
            return {}
        names_before, names = [r.name for r in before], [r.name for r in members]
        result: dict[tuple[int, int], dict[int, bytes]] = {}
        for (source, to), workers in moves(kind, plan_before, names_before, plan, names).items():
            calls = [agent.export_states.remote(tuple(workers)) for agent in before[source].agents]
            for rank, states in enumerate(call_all(calls, _CALL_TIMEOUT_S)):
                result.setdefault((to, rank), {}).update(states)
        return result

    def _watch_run(self, replica: Replica, rank: int, reference: Any) -> None:
        generation = self._generation

        def done(result: Stopped | Failed | None, error: Exception | None) -> None:
            if generation != self._generation or replica.stage is not Stage.MEMBER:
                return
            if error is not None:
                self._fleet.broken(replica, error)
            elif isinstance(result, Failed):
                self._on_failed(replica, result)
            elif result is not None:
                self._stopped[(replica.name, rank)] = result
                if len(self._stopped) == len(self._members) * self._job.replica_size:
                    self._on_boundary()

        self._loop.watch(reference, done)

    def _on_boundary(self) -> None:
        """All agents have stopped, at the same step."""
        stops = list(self._stopped.values())
        if len({(s.step, s.command, s.weights_digest) for s in stops}) > 1:
            raise ProtocolError(f"agents stopped at different places: {self._stopped}")
        self._drain_reports()
        if self._recorder.steps != stops[0].step:
            raise ProtocolError(f"agents stopped at step {stops[0].step}, their reports at {self._recorder.steps}")
        self._running = False
        command = stops[0].command
        if command is None:
            self._finish(stops)
            return
        self._log.add(Paused(self._generation, stops[0].step, command))
        self._pending = {n: c for n, c in self._pending.items() if c.at_step > stops[0].step}
        if self._serve_commands():
            same = Decision(tuple(r.name for r in self._members))
            self._form(same, finish=True)
            return
        decision = decide(self._view())
        if decision.members is not None:
            self._form(decision)
        else:
            self._consider()  # a script waits for the agents that it names

    def _serve_commands(self) -> bool:
        """Do what the user asked for at a boundary. Returns whether the run is to stop here."""
        stop = False
        commands, self._commands = self._commands, []
        for kind, answer in commands:
            if kind == "checkpoint":
                answer.set_result(self._write_checkpoint())
            else:
                stop = True
                answer.set_result(None)
        return stop

    # -- reports -------------------------------------------------------------------------------------------------------

    def _poll(self, generation: int) -> None:
        if generation != self._generation or not self._running:
            return
        reporter, *others = [agent for replica in self._members for agent in replica.agents]
        for agent in others:
            agent.acknowledge.remote(self._recorder.steps - 1)

        def done(reports: list[StepReport] | None, error: Exception | None) -> None:
            if error is None and generation == self._generation:
                self._record(reports or [])
                self._loop.later(_POLL_PAUSE_S, lambda: self._poll(generation))

        self._loop.watch(reporter.reports.remote(self._recorder.steps - 1, _POLL_WAIT_S), done)

    def _drain_reports(self) -> None:
        reporter = self._members[0].agents[0]
        (reports,) = call_all([reporter.reports.remote(self._recorder.steps - 1, 0.0)], _CALL_TIMEOUT_S)
        self._record(reports)

    def _record(self, reports: list[StepReport]) -> None:
        for report in reports:
            self._recorder.add(report, self._members)

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _finish(self, stops: list[Stopped]) -> None:
        for rank in range(self._job.replica_size):
            digests = {s.state_digest for (_, r), s in self._stopped.items() if r == rank}
            if len(digests) > 1 and self._admission.exact:
                raise ProtocolError(f"agents ended with different states: {self._stopped}")
        last = stops[0]
        if last.evaluation is not None:
            self._recorder.evaluated(last.step, last.evaluation)
        path = self._write_checkpoint()
        for kind, answer in self._commands:
            answer.set_result(path if kind == "checkpoint" else None)
        self._commands = []
        total = self._job.schedule.total_steps
        reason = "all steps done" if last.step >= total else "stopped"
        self._log.add(RunFinished(last.step, last.weights_digest, reason))
        self.outcome.weights_digest = last.weights_digest
        self.outcome.checkpoint_path = path
        self._loop.end()

    def _write_checkpoint(self) -> str:
        """Write the weights of the present step. Returns the checkpoint's path."""
        started = time.perf_counter()
        exports = call_all([a.export_weights.remote() for a in self._members[0].agents], _CALL_TIMEOUT_S * 10)
        export = exports[0]
        if isinstance(export, Failed):
            raise export.error
        step = self._recorder.steps
        path = f"{self._folder.path}/checkpoint-{self._folder.attempt:04d}-{step:09d}"
        about = {"step": step, "weights_digest": export.digest, "config": self._job.config.as_dict()}
        checkpoint.write(self._folder.filesystem, path, {checkpoint.WEIGHTS: export.data}, about)
        self._log.add(CheckpointWritten(step, path, time.perf_counter() - started))
        return path

    def _fail(self, error: Exception) -> None:
        if self.outcome.error is None:
            self.outcome.error = error
            self._log.add(RunFailed(self._recorder.steps, f"{type(error).__name__}: {error}"))
        self._loop.end()

    def _close(self) -> None:
        """Leave nothing behind."""
        with self._asking:
            self._ended = True
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(self.outcome.error or RayDnnError("The run has ended."))
        try:
            self._fleet.close("the run has ended")
        except Exception as error:
            self._fail(error)
        self.outcome.step = self._recorder.steps
        self.outcome.metrics = self._recorder.final(self._admission.exact)
        self.outcome.history = self._recorder.history
        self._recorder.close()
