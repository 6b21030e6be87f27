"""Interleaved pairs: both sides see the same noise."""

from collections.abc import Sequence
from statistics import median


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the ratios of pairs, with the range of the middle half."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{median(ratios):.2f} ({low:.2f} to {high:.2f})"


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, in words."""
    return f"{median(seconds) * 1e3:.1f} ms"
