"""Randomness that depends on the place in the job alone."""

from __future__ import annotations

import random

import numpy as np
import torch

from ray_dnn.sampler import derive_seed


def seed_everything(*place: int | str) -> None:
    """Seed the global generators of Python, NumPy and torch for one place in the job: (seed, step, worker, ...)."""
    seed = derive_seed(*place)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: it takes down the stack for each kind of device that is not there, about a millisecond.
    torch.default_generator.manual_seed(seed % 2**63)
    if torch.cuda.is_initialized():  # in an agent that computes on a GPU
        torch.cuda.manual_seed_all(seed % 2**63)


def generator(*place: int | str) -> torch.Generator:
    """A generator of its own for one place in the job."""
    return torch.Generator().manual_seed(derive_seed(*place) % 2**63)
