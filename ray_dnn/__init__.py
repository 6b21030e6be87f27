"""Train PyTorch networks over an elastic set of agents on a Ray cluster, with the same bits whatever happens to it."""

from ray_dnn.checkpoint import load_weights
from ray_dnn.config import Loss, TrainConfig, TrainSpec
from ray_dnn.errors import RayDnnError
from ray_dnn.strategies import Batch, Combined, Contribution, DataParallel, Strategy
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
