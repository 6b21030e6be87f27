"""Which replica hosts which virtual workers. Pure: the same observations give the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ray_dnn.tree import Node, cover


@dataclass(frozen=True)
class Plan:
    """Virtual workers 0..V-1 laid over replicas as contiguous ranges, in the order of the replicas.

    Attributes:
        number: counts the plans of a run; every message of an exchange carries it.
        bounds: replica ``r`` hosts the workers ``bounds[r] .. bounds[r + 1]``. Length: replicas + 1; strictly rising.
    """

    number: int
    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bounds[0] != 0 or any(a >= b for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"bounds must rise strictly from 0, not {self.bounds}")

    @property
    def replicas(self) -> int:
        return len(self.bounds) - 1

    @property
    def workers(self) -> int:
        return self.bounds[-1]

    def hosted(self, replica: int) -> range:
        """The virtual workers of a replica."""
        return range(self.bounds[replica], self.bounds[replica + 1])

    def cover(self, replica: int) -> tuple[Node, ...]:
        """The subtrees that a replica folds on its own."""
        return cover(self.bounds[replica], self.bounds[replica + 1], self.workers)

    def host(self, worker: int) -> int:
        """The replica that hosts a virtual worker."""
        return next(r for r in range(self.replicas) if worker < self.bounds[r + 1])


def lay(number: int, workers: int, speeds: Sequence[float]) -> Plan:
    """Lay ``workers`` virtual workers over ``len(speeds)`` replicas in proportion to their speeds.

    Every replica gets at least one. Each gets its exact share rounded down or up (largest remainders first), unless
    the floor of one takes more from the others. ``speeds`` are contributions per second, in any common unit, above 0.
    """
    replicas = len(speeds)
    if not 1 <= replicas <= workers:
        raise ValueError(f"{workers} virtual workers cannot be laid over {replicas} replicas: each hosts at least one")
    if any(not speed > 0 for speed in speeds):
        raise ValueError(f"speeds must be above 0, not {list(speeds)}")
    # One for everybody; the rest by largest remainder of what each still lacks of its exact share.
    total = sum(speeds)
    lacking = [max(0.0, workers * speed / total - 1) for speed in speeds]
    spare, wanted = workers - replicas, sum(lacking)
    shares = [spare * lack / wanted if wanted else 0.0 for lack in lacking]
    counts = [1 + int(share) for share in shares]
    by_remainder = sorted(range(replicas), key=lambda r: (int(shares[r]) - shares[r], r))
    for r in by_remainder[: workers - sum(counts)]:
        counts[r] += 1
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return Plan(number, tuple(bounds))


def sizes(bounds: Sequence[int]) -> list[int]:
    """How many virtual workers each replica hosts."""
    return [stop - start for start, stop in pairwise(bounds)]


def step_s(bounds: Sequence[int], speeds: Sequence[float]) -> float:
    """Seconds that the slowest replica computes in a step."""
    return max(count / speed for count, speed in zip(sizes(bounds), speeds, strict=True))
