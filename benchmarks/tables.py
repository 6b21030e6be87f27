"""What a benchmark returns, and the Markdown that is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One line of the README.

    Attributes:
        what: was measured.
        ours, peer: medians with their units; the peer with its name.
        ratio: ours to the peer's, with its spread.
        worse: whether the peer is better, which docs/benchmarks.md then says.
    """

    what: str
    ours: str
    peer: str = "–"
    ratio: str = "–"
    worse: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar of a picture, in the unit of its table.

    Attributes:
        group: what was measured; bars of one group stand side by side.
        side: whose it is: "ray_dnn" or a peer.
        median, low, high: of the runs.
    """

    group: str
    side: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """The result of one benchmark.

    Attributes:
        name: as on the command line.
        title: in docs/benchmarks.md and of the picture.
        header, rows: with medians, lowest and highest values and the number of runs.
        notes: how it was measured, and whatever must be known to read it. A paragraph each.
        claims: its lines in the README.
        bars, unit: its picture, docs/images/<name>.svg; without bars there is none.
        log: whether the picture's axis is logarithmic.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    bars: tuple[Bar, ...] = ()
    unit: str = ""
    log: bool = False

    def markdown(self) -> str:
        """Header and rows."""
        return "\n".join(lines(self.header, self.rows))

    def to_json(self) -> dict[str, Any]:
        """As a tree that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Table:
        """The table that `to_json` was called on."""
        return cls(
            **tree
            | {
                "header": tuple(tree["header"]),
                "rows": tuple(tuple(row) for row in tree["rows"]),
                "notes": tuple(tree["notes"]),
                "claims": tuple(Claim(**claim) for claim in tree["claims"]),
                "bars": tuple(Bar(**bar) for bar in tree["bars"]),
            }
        )


def lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown, line by line."""
    yield f"| {' | '.join(header)} |"
    yield "| --- " * len(header) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def bar(group: str, side: str, values: Sequence[float]) -> Bar:
    """The bar of these runs."""
    return Bar(group, side, median(values), min(values), max(values))


def spread(values: Sequence[float], unit: str, digits: int = 1) -> str:
    """Median, lowest and highest, in words: "41.0 ms (38.2 to 50.1)"."""
    return f"{median(values):.{digits}f} {unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"
