"""Train PyTorch networks over an elastic set of agents on a Ray cluster, with the same bits whatever happens to it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_dnn.checkpoint import load_weights
    from ray_dnn.config import Audit, Loss, TrainConfig, TrainSpec
    from ray_dnn.engine.looking import Seen
    from ray_dnn.errors import RayDnnError
    from ray_dnn.liveness import Patience
    from ray_dnn.replay import Replay
    from ray_dnn.strategies import Batch, Combined, Contribution, DataParallel, Strategy
    from ray_dnn.trainer import Handle, Trainer

__all__ = [
    "Audit",
    "Batch",
    "Combined",
    "Contribution",
    "DataParallel",
    "Handle",
    "Loss",
    "Patience",
    "RayDnnError",
    "Replay",
    "Seen",
    "Strategy",
    "TrainConfig",
    "TrainSpec",
    "Trainer",
    "load_weights",
]

__version__ = "0.1.0"

# Public name -> the module that it is loaded from when it is first asked for. Every process of a run imports this
# package, and most need little of it: an agent no Ray Train, a watcher not even torch, which take seconds to import.
_HOMES = {
    "Audit": "config",
    "Batch": "strategies",
    "Combined": "strategies",
    "Contribution": "strategies",
    "DataParallel": "strategies",
    "Handle": "trainer",
    "Loss": "config",
    "Patience": "liveness",
    "RayDnnError": "errors",
    "Replay": "replay",
    "Seen": "engine.looking",
    "Strategy": "strategies",
    "TrainConfig": "config",
    "TrainSpec": "config",
    "Trainer": "trainer",
    "load_weights": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_dnn' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"ray_dnn.{_HOMES[name]}"), name)
    globals()[name] = found  # the next time it is simply there
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
