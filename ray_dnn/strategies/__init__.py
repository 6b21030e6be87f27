"""What virtual workers compute and what is done with the combined result."""

from ray_dnn.strategies.base import Batch, Combined, Contribution, Micro, Strategy
from ray_dnn.strategies.data_parallel import DataParallel

__all__ = ["Batch", "Combined", "Contribution", "DataParallel", "Micro", "Strategy"]
