"""What the soak found: whether all runs learned the same from the same rows, and a table of it all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ray.train import Result

from benchmarks.soak_look import Size
from benchmarks.soak_run import DisturbedRun, Strike
from ray_dnn.ledger import Ledger
from ray_dnn.testing import read_ledger

_SLOWEST = 3  # recoveries that are told in full


def difference(result: Result, reference: Result) -> str | None:
    """How a run differs from the undisturbed one; None where it does not."""
    assert result.metrics is not None
    assert reference.metrics is not None
    one, other = (str(r.metrics["weights_digest"]) for r in (result, reference))
    if one != other:
        return f"weights {one[:16]} instead of {other[:16]}"
    mine, theirs = read_ledger(result), read_ledger(reference)
    for step, (line, right) in enumerate(zip(lines(mine), lines(theirs), strict=False)):
        if line != right:
            return f"ledger, step {step}: {line} instead of {right}"
    if len(mine.lines) != len(theirs.lines):
        return f"{len(mine.lines)} steps instead of {len(theirs.lines)}"
    if _evaluations(result) != _evaluations(reference):
        return "other evaluations"
    return uneven(mine)


def lines(ledger: Ledger) -> list[str]:
    """What is to be the same in every run, by step."""
    return [repr((line.step, line.rows, line.digests, line.metrics, line.skipped)) for line in ledger.lines]


def _evaluations(result: Result) -> Any:
    frame = result.metrics_dataframe
    return None if frame is None else frame.to_dict()


def uneven(ledger: Ledger) -> str | None:
    """Which epoch did not use every row exactly once; None where all did, the last one as far as it went."""
    counts: dict[int, list[int]] = {}
    for use in ledger.uses():  # raises where other rows were used than the job says
        counts.setdefault(use.epoch, []).extend(use.row_ids.tolist())
    rows, last = ledger.rows, max(counts)
    for epoch, used in counts.items():
        if len(set(used)) != len(used) or (epoch < last and len(used) != rows):
            return f"epoch {epoch} used {len(set(used))} of {rows} rows in {len(used)} places"
    return None


@dataclass
class Findings:
    """Of the whole soak.

    Attributes:
        driver: size of this process after the undisturbed runs, and at the end.
        troubles: what must not happen.
    """

    strikes: list[Strike] = field(default_factory=list)
    runs: int = 0
    recoveries: int = 0
    started: int = 0
    checkpoints: int = 0
    sizes: list[tuple[Size, Size]] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    driver: tuple[Size, Size] | None = None

    def add(self, run: DisturbedRun) -> None:
        """A run has ended."""
        self.runs += 1
        self.strikes += run.strikes
        self.recoveries += run.recoveries
        self.started += run.started
        self.checkpoints += run.checkpoints
        self.sizes += run.sizes.values()
        self.unasked += run.unasked

    def table(self) -> Iterator[str]:
        """All of it, line by line."""
        yield "| faults | times | noticed after: median | next new step after: median | 90 % | worst |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for name in dict.fromkeys(s.kind.name for s in sorted(self.strikes, key=lambda s: s.kind.name)):
            yield _row(name, [s for s in self.strikes if s.kind.name == name])
        yield _row("all", self.strikes)
        yield ""
        counts = f"{self.runs} runs, {self.recoveries} recoveries, {self.started} agents started"
        yield f"{counts}, {self.checkpoints} checkpoints asked for and written"
        recovered = [s for s in self.strikes if s.gap_s is not None]
        for strike in sorted(recovered, key=lambda s: s.gap_s or 0.0)[: -_SLOWEST - 1 : -1]:
            yield f"among the slowest: {strike.kind.name}, noticed after {strike.noticed_s:.2f} s: {strike.story}"
        for text in self.unasked:
            yield f"gone without a fault: {text}"
        if self.sizes:
            last, grown = [s[1] for s in self.sizes], [s[1].mib - s[0].mib for s in self.sizes]
            yield (
                f"{len(last)} agents when last looked at: {median(s.mib for s in last):.0f} MiB, at most "
                f"{max(s.mib for s in last):.0f}, {max(grown):+.0f} since the first look at most; "
                f"{median(s.descriptors for s in last):.0f} descriptors, at most {max(s.descriptors for s in last)}"
            )
        if self.driver:
            first, now = self.driver
            yield (
                f"driver: {first.mib:.0f} MiB and {first.descriptors} descriptors after the undisturbed runs, "
                f"{now.mib:.0f} MiB and {now.descriptors} descriptors at the end"
            )
        for trouble in self.troubles:
            yield f"WRONG: {trouble}"
        if not self.troubles:
            yield "digests: all equal; ledgers: all equal, every row exactly once an epoch"


def _row(name: str, strikes: Sequence[Strike]) -> str:
    gaps = sorted(s.gap_s for s in strikes if s.gap_s is not None)
    if not gaps:
        return f"| {name} | {len(strikes)} | – | – | – | – |"
    noticed = median(s.noticed_s for s in strikes if s.gap_s is not None)
    late = gaps[min(len(gaps) - 1, int(0.9 * len(gaps)))]
    return f"| {name} | {len(strikes)} | {noticed:.2f} s | {median(gaps):.2f} s | {late:.2f} s | {gaps[-1]:.2f} s |"
