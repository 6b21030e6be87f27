"""What decides what a job learns, in words: kept with each checkpoint, so that only the same job goes on from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_dnn.config import TrainConfig
    from ray_dnn.engine.state import TrainingState
    from ray_dnn.sampler import Rows

# How long a job is, and what is looked at or written on the way, changes nothing of the way.
_FREE = ("epochs", "steps", "evaluate_every", "checkpoint_every")

_AGENTS = "the agents' "

Identity = dict[str, str]  # by name, for people: TrainConfig(seed), the model, …


def of_job(config: TrainConfig, strategy: object, replica_size: int, units: int, counts: Rows | None) -> Identity:
    """What the driver knows.

    Args:
        units, counts: of the training set: how many, and the rows of each, where they are known beforehand.
    """
    numbers = {f"TrainConfig({name})": repr(value) for name, value in config.as_dict().items() if name not in _FREE}
    rows = "" if counts is None else f", {int(counts.sum())} rows, {_digest([counts.astype('<i8').tobytes()])}"
    return numbers | {
        "strategy": re.sub(r" at 0x[0-9a-f]+", "", repr(strategy)),  # of one without a repr of its own
        "replica_size": str(replica_size),
        "datasets['train']": f"{units} units{rows}",
    }


def of_state(state: TrainingState, profile: Mapping[str, object]) -> Identity:
    """What an agent knows, before the first step."""
    shapes = [f"{name} {list(p.shape)} {p.dtype}\n".encode() for name, p in state.parameters.items()]
    buffers = [f"{name}\n".encode() for name in state.buffers.floats + state.buffers.others]
    said = {"the model": f"{sum(p.numel() for p in state.parameters.values())} parameters, {_digest(shapes + buffers)}"}
    for key, optimizer in state.optimizers.items():
        groups = [
            {k: v for k, v in group.items() if isinstance(v, int | float | str | tuple | None)}
            for group in optimizer.param_groups
        ]
        said[f"the optimizer {key!r}"] = f"{type(optimizer).__name__} {json.dumps(groups, default=str)}"
    for key, scheduler in state.schedulers.items():
        said[f"the scheduler of {key!r}"] = type(scheduler).__name__
    return said | {f"{_AGENTS}{name}": str(value) for name, value in profile.items()}


def of_agents(identity: Identity) -> Identity:
    """What of it is of the machines that agents run on."""
    return {name: said for name, said in identity.items() if name.startswith(_AGENTS)}


def differences(old: Identity, new: Identity) -> list[str]:
    """What is not the same, in words. Names that only one of the two has do not count."""
    return [f"{name}: {old[name]} then, {new[name]} now" for name in old if name in new and old[name] != new[name]]


def _digest(parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]
