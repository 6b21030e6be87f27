"""The README's block and docs/benchmarks.md, made of results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.results import Result
from benchmarks.tables import Claim, lines

ROOT = Path(__file__).parent.parent
README, DOCS, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
BLOCK = re.compile(r"<!-- bench -->\n.*?<!-- /bench -->", re.DOTALL)

_HEADER = ("measured", "ray_dnn", "peer", "ours to the peer's (middle half)")
_MORE = "How each was measured, and where a peer is better: [docs/benchmarks.md](docs/benchmarks.md)."
_OPENING = """# Benchmarks

`make bench` makes this page of what it measures. To change it, run that.

Every figure is a median, followed by the lowest and the highest value in parentheses. What is compared with a peer ran
on the same machine in the same session, in turns, with the same model, rows and numerics, and the peer with the
settings that its own documentation recommends. A ratio is ours divided by the peer's, so below 1 ours is better. It is
taken for each pair of turns, and given as the median of the pairs with the range of their middle half. The 95 % bound
is what that median does not exceed with 95 % confidence: the 95th percentile of the medians of bootstrap resamples of
the pairs."""
_OTHERS = """## Published by others, not measured here

EasyScale (Li et al., "EasyScale: Elastic Training with Consistent Accuracy and Improved Utilization on GPUs", SC 2023)
keeps the bits of training too while workers come and go, on GPUs. The paper gives the cost of that as 0 to 7 %, and as
52 % for VGG19. Quoted as published, for reference: other hardware, other models, and not measured by us."""


def readme_block(results: Sequence[Result]) -> str:
    """What stands between the README's markers, with them."""
    rows = [_row(claim) for result in results for claim in result.table.claims if claim.brief]
    return "\n".join(["<!-- bench -->", *lines(_HEADER, rows), "", _MORE, "<!-- /bench -->"])


def _row(claim: Claim) -> tuple[str, ...]:
    return claim.what, claim.ours, claim.peer, claim.ratio


def docs_page(results: Sequence[Result]) -> str:
    """docs/benchmarks.md."""
    machines = list(dict.fromkeys(result.machine for result in results))
    parts = [_OPENING]
    if len(machines) == 1:
        parts.append(f"Measured on one {machines[0]}.")
    parts += _worse(results)
    for result in results:
        parts += _section(result, alone=len(machines) == 1)
    return "\n\n".join([*parts, _OTHERS]) + "\n"


def _worse(results: Sequence[Result]) -> Iterator[str]:
    rows = [_row(claim) for result in results for claim in result.table.claims if claim.worse]
    yield "## Where the peer is better"
    yield "\n".join(lines(_HEADER, rows)) if rows else "In none of the medians below."


def _section(result: Result, alone: bool) -> Iterator[str]:
    table = result.table
    yield f"## {table.title}"
    yield table.markdown()
    if table.bars:
        yield f"![{table.title}](images/{table.name}.svg)"
    yield from table.notes
    where = "" if alone else f", on one {result.machine}"
    yield f"`{result.command}`, {result.day}{where}; load in the minute before: {result.load:g}."


def write(results: Sequence[Result]) -> None:
    """Replace the README's block, docs/benchmarks.md and the pictures."""
    from benchmarks.charts import draw  # needs matplotlib, which the rest does not

    IMAGES.mkdir(exist_ok=True)
    for result in results:
        if result.table.bars:
            (IMAGES / f"{result.table.name}.svg").write_bytes(draw(result.table))
    DOCS.write_text(docs_page(results))
    README.write_text(BLOCK.sub(lambda _: readme_block(results), README.read_text()))
