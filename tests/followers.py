"""Runs in which newcomers follow members while these train, over the agents of `tests.local`.

A member is held in one step while newcomers connect to it, and in a later one until they have committed what it has; so
it is certain what they have followed when something strikes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from ray_dnn.faults import Fault
from tests import local, losses
from tests.local import TIMEOUT_S, Make, Process, Struck, Took
from tests.losses import Disturbed, Hold

OnTook = Callable[["Driver", str, Took], None]


def _nothing(driver: Driver, name: str, message: Took) -> None:
    pass


class Driver(losses.Driver):
    """Has newcomers follow.

    Attributes:
        took: called with the driver, an agent's name, and what it takes or what becomes of it.
        outcomes: how following went, by agent.
    """

    took: OnTook = staticmethod(_nothing)

    def __init__(self, make: Make, processes: list[Process], faults: Sequence[Fault], struck: losses.OnStruck):
        self._following: dict[str, Process] = {}
        self.outcomes: dict[str, str | None] = {}
        self.joins: Mapping[int, int] = {}
        super().__init__(make, processes, faults, struck)

    def follow(self, name: str, leader: str) -> None:
        """Have an agent follow a member."""
        self._following[name] = self.agents[name]
        self.agents[name].connection.send(("follow", (self._addresses[leader],)))

    def _hear(self, deadline: float) -> None:
        everybody = [*self._waiting.items(), *self._following.items()]
        ready = wait([process.connection for _, process in everybody], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{[name for name, _ in everybody]} did not answer")
        for name, process in everybody:
            if process.connection in ready and name in self._following:
                self._hear_follower(name, process)
            elif process.connection in ready and name in self._waiting:
                self._receive(name, process)

    def _hear_follower(self, name: str, process: Process) -> None:
        try:
            message = process.connection.recv()
        except (EOFError, ConnectionError):
            del self._following[name]
            self._gone(name)
            self.took(self, name, Took("gone", 0))
            return
        if isinstance(message, Struck):
            self.struck[message.index] = name
            self._on_struck(self, message.index)
        elif isinstance(message, Took):
            self.took(self, name, message)
        else:
            outcome, failure = message
            assert failure is None, failure
            del self._following[name]
            self.outcomes[name] = outcome
            self.took(self, name, Took("over", 0))

    def generation(self, *args: Any, **more: Any) -> losses.Generation:
        """As ever; newcomers that join after it stop following."""
        over = super().generation(*args, **more)
        if self.joins.get(len(self.generations)):
            for process in self._following.values():
                self.tell(process, "stop_following")
            deadline = time.monotonic() + TIMEOUT_S
            while self._following:
                self._hear(deadline)
        return over


def following(
    make: Make,
    *faults: Fault,
    leader: int = 0,
    reach: int = 3,
    late: bool = False,
    newcomers: int = 1,
    took: OnTook = _nothing,
    joins: int = 1,
) -> tuple[Disturbed, Driver]:
    """Run a job with three agents; newcomers follow one from step 1 on and join after step ``reach``.

    Args:
        leader: the rank of the member that is followed. It goes on from step 1 when the newcomers are connected, and
            from ``reach`` when they have committed what it has, or are gone.
        late: whether newcomers do not receive the state before their leader has got to ``reach``.
        took: called with what newcomers take.
        joins: the generation in which newcomers join.
    """
    holds = (Hold("computing", step=1, rank=leader), Hold("computing", step=reach, rank=leader))
    names = [f"agent-{4 + n}" for n in range(newcomers)]
    whom = f"agent-{leader + 1}"
    connected: set[str] = set()
    begun: set[str] = set()
    behind = set(names)

    def go_on(driver: Driver) -> None:
        held = driver.struck.get(1)
        if held is not None and (held != whom or not behind):  # another has its rank, if it is dead
            driver.go(held)

    def on_took(driver: Driver, name: str, message: Took) -> None:
        if name not in connected:
            connected.add(name)
            if len(connected) == newcomers:
                driver.go(whom)
        if message.kind == "begin":
            begun.add(name)
            if not late or 1 in driver.struck:
                driver.go(name)
        elif name in behind and (message.step >= reach or message.kind in ("gone", "over")):
            behind.remove(name)
            go_on(driver)
        took(driver, name, message)

    def on_struck(driver: Any, index: int) -> None:
        if index == 0:
            for name in names:
                driver.follow(name, whom)
        elif index == 1:
            for name in begun if late else ():
                driver.go(name)
            go_on(driver)

    job = make()
    with local.pool(job.config.isa, (*job.preload, "tests.followers")).borrow(3 + newcomers) as processes:
        driver = Driver(make, processes, (*holds, *faults), on_struck)
        driver.took, driver.joins = on_took, {joins: newcomers}
        return driver.train(3, driver.joins, {joins - 1: reach + 1}), driver
