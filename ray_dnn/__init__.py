"""Train PyTorch networks over an elastic set of agents on a Ray cluster, with the same bits whatever happens to it."""

from typing import TYPE_CHECKING, Any

from ray_dnn.checkpoint import load_weights
from ray_dnn.config import Loss, TrainConfig, TrainSpec
from ray_dnn.errors import RayDnnError
from ray_dnn.strategies import Batch, Combined, Contribution, DataParallel, Strategy

if TYPE_CHECKING:
    from ray_dnn.trainer import Handle, Trainer

__all__ = [
    "Batch",
    "Combined",
    "Contribution",
    "DataParallel",
    "Handle",
    "Loss",
    "RayDnnError",
    "Strategy",
    "TrainConfig",
    "TrainSpec",
    "Trainer",
    "load_weights",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the trainer when it is first asked for: agents never do, and start a second earlier without Ray Train."""
    if name in ("Handle", "Trainer"):
        from ray_dnn import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'ray_dnn' has no attribute {name!r}")
