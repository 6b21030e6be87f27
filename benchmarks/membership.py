"""How long the others pause when agents join or leave, for models of several sizes.

The gap is the time from the last commit before a change to the first one after it; one step is a part of it. The pause
is what the gap has more than a usual step of a generation of that size.
"""

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from ray.train import RunConfig, ScalingConfig
from torch import nn

from benchmarks import small
from benchmarks.tables import Bar, Claim, Table, bar, spread
from ray_dnn import TrainConfig, Trainer, TrainSpec
from ray_dnn.events import Event, FirstStep, GenerationFormed, Progress
from ray_dnn.testing import read_events


class Size(NamedTuple):
    """A multilayer perceptron.

    Attributes:
        widths: of its layers.
        batch_size: rows in a step.
        changes: resizes up, and as many down.
    """

    widths: tuple[int, ...]
    batch_size: int
    changes: int

    def build(self) -> nn.Module:
        """The model."""
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((small.INPUTS, *self.widths, small.INPUTS)):
            layers += [nn.Linear(inputs, outputs), nn.GELU()]
        return nn.Sequential(*layers[:-1])

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum((i + 1) * o for i, o in itertools.pairwise((small.INPUTS, *self.widths, small.INPUTS)))


class Change(NamedTuple):
    """A change of membership. Seconds, one usual step included in the gap and not in the pause."""

    kind: str
    gap_s: float
    pause_s: float


SIZES = (Size((1024, 1024), 64, 4), Size((3072, 3072), 16, 4), Size((5000,) * 5, 2, 3))


def run() -> Table:
    """The table."""
    rows: list[tuple[str, ...]] = []
    claims: list[Claim] = []
    bars: list[Bar] = []
    with small.cluster():
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                changes = measured(_resized(size, folder))
            for kind in ("join", "leave"):
                these = [change for change in changes if change.kind == kind]
                words = f"{kind}, {size.parameters / 1e6:.1f} M parameters"
                pauses, gaps = [c.pause_s for c in these], [c.gap_s for c in these]
                rows.append((words, str(len(these)), spread(pauses, "s", 3), spread(gaps, "s", 3)))
                claims.append(Claim(f"pause of the others: {words}", f"{median(pauses):.3f} s", brief=kind == "join"))
                bars.append(bar(words, "ray_dnn", pauses))
    return Table(
        name="membership",
        title="How long the others pause when agents join or leave",
        header=("change of membership", "times", "pause of the others", "gap, one usual step included"),
        rows=tuple(rows),
        notes=(
            "Between 1 and 2 agents, multilayer perceptrons with AdamW. The gap: from the last commit before to the "
            "first one after. The pause: without a usual step.",
        ),
        claims=tuple(claims),
        bars=tuple(bars),
        unit="s",
    )


def measured(events: Iterable[Event]) -> list[Change]:
    """The changes of membership in an event log; the last generation's length is not known, it counts as a change."""
    formed = {e.generation: e for e in events if isinstance(e, GenerationFormed)}
    firsts = [e for e in events if isinstance(e, FirstStep)]
    usual: dict[int, list[float]] = defaultdict(list)  # seconds of a step, by the number of agents
    for first, following in itertools.pairwise(firsts):
        if steps := following.step - 1 - first.step:
            seconds = following.committed - following.gap_s - first.committed
            usual[len(formed[first.generation].agents)].append(seconds / steps)
    changes = []
    for first in firsts[1:]:
        now = formed[first.generation]
        step_s = median(usual[len(now.agents)])
        changes.append(Change("join" if now.joined else "leave", first.gap_s, first.gap_s - step_s))
    return changes


def _resized(size: Size, folder: str) -> list[Event]:
    handle = Trainer(
        TrainSpec(model=size.build, optimizer=small.build_optimizer, loss=small.loss),
        {"train": small.rows()},
        TrainConfig(batch_size=size.batch_size, virtual_workers=2, steps=1_000_000),
        scaling_config=ScalingConfig(num_workers=(1, 2)),
        run_config=RunConfig(name="run", storage_path=folder),
    ).start()
    changes, settled = 0, False
    for event in handle.events():
        if isinstance(event, GenerationFormed):
            settled = False
        elif isinstance(event, FirstStep):
            settled = True
        if settled and isinstance(event, Progress):
            if changes == 2 * size.changes:
                handle.stop()
                settled = False
                continue
            handle.resize(1 if event.agents == 2 else 2)
            changes, settled = changes + 1, False
    return list(read_events(handle.result().path))
