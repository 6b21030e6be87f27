"""Pictures of tables, as SVG: the same bytes for the same table, readable on light and on dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.tables import Bar, Table

_PAPER, _INK, _LINES = "#f4f4f1", "#24292f", "#c9c9c4"
_OURS = ("#1f5fa8", "#5b95d1", "#9cc3e8")
_THEIRS = ("#c8641b", "#e39a5b", "#f0c8a0")
_THICK = 0.8  # of a group of bars; 1 is the distance between groups
_STYLE = {
    "svg.hashsalt": "ray_dnn",  # else the names of clip paths are random
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # which matplotlib brings along
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINES,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(table: Table) -> bytes:
    """The bars of a table: medians, with a line from the lowest to the highest value."""
    groups = list(dict.fromkeys(bar.group for bar in table.bars))
    sides = list(dict.fromkeys(bar.side for bar in table.bars))
    colors = _colors(sides)
    width = _THICK / len(sides)
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(groups) * (len(sides) + 1)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
        for side in sides:
            bars = [bar for bar in table.bars if bar.side == side]
            places = [groups.index(bar.group) + (sides.index(side) + 0.5) * width - _THICK / 2 for bar in bars]
            _bars(axes, places, bars, width, colors[side], table.log)
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        _frame(axes, table)
        if len(sides) > 1:
            figure.legend(loc="outside lower center", ncols=min(3, len(sides)), frameon=False)
        data = io.BytesIO()
        figure.savefig(data, format="svg", facecolor=_PAPER, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return data.getvalue()


def _bars(axes: Axes, places: Sequence[float], bars: Sequence[Bar], width: float, color: str, log: bool) -> None:
    medians = [bar.median for bar in bars]
    spread = [[bar.median - bar.low for bar in bars], [bar.high - bar.median for bar in bars]]
    whiskers = {"ecolor": _INK, "elinewidth": 1.0, "capsize": 2.5}
    label = bars[0].side
    if log:  # which has no zero for a bar to begin at
        axes.errorbar(medians, places, xerr=spread, fmt="o", ms=8, color=color, label=label, **whiskers)
    else:
        axes.barh(places, medians, height=0.9 * width, xerr=spread, color=color, label=label, error_kw=whiskers)
    for place, bar in zip(places, bars, strict=True):
        at = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{bar.median:.3g}", (bar.high, place), **at)


def _frame(axes: Axes, table: Table) -> None:
    axes.set_title(table.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(table.unit)
    axes.set_facecolor(_PAPER)
    axes.margins(x=0.08)
    if table.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", color=_LINES, linewidth=0.7)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.tick_params(length=0)


def _colors(sides: Sequence[str]) -> dict[str, str]:
    """Blue is ours, orange the peers'."""
    colors = {}
    for mine, palette in ((True, _OURS), (False, _THEIRS)):
        own = [side for side in sides if side.startswith("ray_dnn") is mine]
        colors |= {side: palette[index % len(palette)] for index, side in enumerate(own)}
    return colors
