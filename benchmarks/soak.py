"""``python -m benchmarks.soak``: random faults on a real cluster, until one of them changes a bit or stops a run.

    python -m benchmarks.soak --faults 300
    python -m benchmarks.soak --minutes 30 --job convnet --seed 7
    python -m benchmarks.soak --minutes 10 --job many --agents 24..32 --deaths --every 2..5

It starts a Ray cluster of its own, trains each job undisturbed on one agent, and then over and over on up to four,
while faults of every kind strike about every two seconds. Each of these runs must end with the weights of the
undisturbed one, with its evaluations, and with its ledger, in which every row is used exactly once an epoch. What went
wrong is printed, its run's folder is kept, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ray.train import Result

    from benchmarks.soak_jobs import Job
    from benchmarks.soak_run import Strike

_MOST_FAILED = 3  # runs, before it is pointless to go on
_EXIT_S = 15.0  # for Ray's processes to end
_AGENT_GIB = 0.5

Number = TypeVar("Number", int, float)


def _arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description="Random faults on a real Ray cluster.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--faults", type=int, default=60, help="how many are to strike (default: 60)")
    length.add_argument("--minutes", type=float, help="how long they are to strike, instead")
    parser.add_argument(
        "--job",
        choices=("language", "convnet", "both", "many"),
        default="both",
        help="(default: both of the first two)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--agents", type=_span, default=(1, 4), metavar="MIN..MAX", help="(default: 1..4)")
    parser.add_argument("--steps", type=int, default=600, help="of each run (default: 600)")
    parser.add_argument("--deaths", action="store_true", help="only faults that agents die of at once")
    parser.add_argument(
        "--every",
        type=_seconds,
        default=(0.5, 2.5),
        metavar="MIN..MAX",
        help="seconds between faults (default: 0.5..2.5)",
    )
    found = parser.parse_args(given)
    needed, there = found.agents[1] * _AGENT_GIB, _available_gib()
    if needed > there:
        parser.error(f"{found.agents[1]} agents take about {needed:.0f} GiB of memory, and {there:.0f} are available")
    return found


def _available_gib() -> float:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


def _seconds(text: str) -> tuple[float, float]:
    span = _from_to(text, float)
    if span is None or span[0] < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN..MAX in seconds")
    return span


def _span(text: str) -> tuple[int, int]:
    span = _from_to(text, int)
    if span is None or span[0] < 1 or span[1] < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN..MAX with a MAX of 2 or more")
    return span


def _from_to(text: str, number: Callable[[str], Number]) -> tuple[Number, Number] | None:
    """MIN..MAX, or one number for both; None where it is neither."""
    least, _, most = text.partition("..")
    try:
        span = number(least), number(most or least)
    except ValueError:
        return None
    return span if span[0] <= span[1] else None


def _say(text: str) -> None:
    print(text, file=sys.__stdout__, flush=True)


class Soak:
    """The undisturbed runs, then the others."""

    def __init__(self, given: argparse.Namespace, folder: Path):
        # Ray reads its environment when it is imported, which these modules do.
        from benchmarks.soak_faults import Orders
        from benchmarks.soak_jobs import JOBS
        from benchmarks.soak_look import Size
        from benchmarks.soak_report import Findings

        self._given, self._folder = given, folder
        names = ["language", "convnet"] if given.job == "both" else [given.job]
        self._jobs: list[Job] = [JOBS[name](given.steps) for name in names]
        self._orders = Orders(folder / "orders")
        self._orders.folder.mkdir()
        self._began = time.time()
        self._failed = 0
        self._found = Findings()
        self._references = {job.name: self._undisturbed(job) for job in self._jobs}
        self._first_size = Size.of("self")

    def run(self) -> bool:
        """Returns whether all went well."""
        from benchmarks.soak_look import Size

        self._began = time.time()
        number = 0
        while self._more(0) and self._failed < _MOST_FAILED:
            self._disturbed(number, self._jobs[number % len(self._jobs)])
            number += 1
        self._found.driver = (self._first_size, Size.of("self"))
        _say("")
        for line in self._found.table():
            _say(line)
        return not self._found.troubles

    def _more(self, struck: int) -> bool:
        """Whether there are to be more faults. ``struck``: by those of the present run."""
        if self._given.minutes is not None:
            return time.time() - self._began < 60 * self._given.minutes
        return len(self._found.strikes) + struck < self._given.faults

    def _undisturbed(self, job: Job) -> Result:
        begun = time.time()
        result = job.trainer(self._given.steps, (1, 1), False, str(self._folder), f"{job.name}-undisturbed").fit()
        assert result.metrics is not None
        digest = result.metrics["weights_digest"][:16]
        seconds = time.time() - begun
        _say(f"{job.name}, undisturbed: {self._given.steps} steps in {seconds:.1f} s, weights {digest}")
        return result

    def _disturbed(self, number: int, job: Job) -> None:
        from ray.train import TrainingFailedError

        from benchmarks.soak_report import difference
        from benchmarks.soak_run import DisturbedRun, Hung, Pace

        audit = self._given.agents[1] >= 3 and number // len(self._jobs) % 2 == 1 and not self._given.deaths
        name = f"{job.name}-{number}"
        _say(f"{name}, seed {self._given.seed}.{number}{', audited' if audit else ''}:")
        trainer = job.trainer(self._given.steps, self._given.agents, audit, str(self._folder), name)
        random = Random(f"{self._given.seed}.{number}")
        pace = Pace(self._given.every, self._given.deaths)
        run = DisturbedRun(trainer, self._orders, random, self._given.agents, pace, self._tell)
        try:
            run.run(lambda: self._more(len(run.strikes)))
            if wrong := difference(run.handle.result(), self._references[job.name]):
                run.troubles.append(wrong)
        except TrainingFailedError as error:
            run.troubles.append(str(error))
        except Hung as error:
            run.troubles.append(str(error))
            for line in run.dump():
                _say(line)
            faulthandler.dump_traceback(sys.__stdout__)
        finally:
            run.close()
        self._found.add(run)
        self._failed += bool(run.troubles)
        for trouble in run.troubles:
            self._found.troubles.append(f"{name}: {trouble}; its folder is {self._folder / name}")
            _say(self._found.troubles[-1])
        if not run.troubles:
            shutil.rmtree(self._folder / name)

    def _tell(self, strike: Strike) -> None:
        gap = f"{strike.gap_s:.2f} s (noticed {strike.noticed_s:.2f} s)" if strike.gap_s is not None else "–"
        seconds = strike.time - self._began
        _say(f"  {seconds:7.2f} s  {strike.kind.name:24} {strike.victim:10} {strike.where:32} {gap}")


@contextlib.contextmanager
def _cluster(agents: int) -> Iterator[Path]:
    """A Ray cluster of one node with room for so many agents, gone without a trace afterwards. Yields a folder for
    runs, kept where one is in it."""
    ray_folder = tempfile.mkdtemp(prefix="rs-", dir="/tmp")  # short: Ray puts Unix sockets below it
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ |= {
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_MODE": "disabled",  # unset, ray.init() would write a token into the home directory
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a run that does not end must not start a cluster when this one has ended
        "RAY_prestart_worker_first_driver": "0",
    }
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=max(16, agents + 8),
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        with open(folder / "ray.txt", "w") as file, contextlib.redirect_stdout(file):  # Ray's words on each death
            yield folder
    finally:
        ray.shutdown()
        left = _end_what_is_left(ray_folder)
        shutil.rmtree(ray_folder, ignore_errors=True)
        if left:
            raise SystemExit(f"left processes behind: {left}")


def _end_what_is_left(ray_folder: str) -> dict[int, str]:
    """Processes that were started with this folder and do not end by themselves. They are killed."""
    until = time.monotonic() + _EXIT_S
    while (left := _processes(f"RAY_TMPDIR={ray_folder}".encode())) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def _processes(marker: bytes) -> dict[int, str]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if marker in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return found


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    given = _arguments(arguments)
    logging.getLogger("ray_dnn").addHandler(logging.NullHandler())
    with _cluster(given.agents[1]) as folder:
        try:
            good = Soak(given, folder).run()
        except KeyboardInterrupt:
            shutil.rmtree(folder)
            raise
        if good:
            shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
