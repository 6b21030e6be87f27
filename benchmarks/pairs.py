"""Interleaved pairs: both sides see the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

RESAMPLES = 4_000


@dataclass(frozen=True)
class Ratio:
    """Ours to theirs, over pairs.

    Attributes:
        median, low, high: of the pairs' ratios; low and high bound their middle half.
        bound: with 95 % confidence the median is not above it: the 95th percentile of the medians of bootstrap
            resamples of the pairs.
    """

    median: float
    low: float
    high: float
    bound: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratios of pairs, all times above 0. The same pairs give the same answer, in any order."""
    ratios = np.sort(np.array([a / b for a, b in zip(ours, theirs, strict=True)]))
    count = len(ratios)
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))  # pairs of each resample, by index
    medians = np.median(ratios[drawn], axis=1)
    low, high = ratios[count // 4], ratios[-1 - count // 4]
    return Ratio(float(np.median(ratios)), float(low), float(high), float(np.quantile(medians, 0.95)))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, in words."""
    return f"{median(seconds) * 1e3:.1f} ms"
