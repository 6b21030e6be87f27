"""Where an agent computes: on the CPU, or on the GPU that Ray gave it.

On a GPU are the model, its optimizers' state, batches, and gradients until they are whole. Everything that agents
exchange, compare, checkpoint or copy to newcomers is in host memory, as where the CPU computes: contributions, the
combined vector, records, snapshots. So sums over virtual workers are the same additions, whatever computed the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ray_dnn.errors import ConfigError

CPU = torch.device("cpu")


def of_agent(gpus: int) -> torch.device:
    """The device of an agent that Ray gave so many GPUs, ready to be used.

    Raises:
        ConfigError: torch cannot use the GPU.
    """
    if not gpus:
        return CPU
    why = "it is built without CUDA"
    if torch.version.cuda or torch.version.hip:
        why = "torch.cuda.is_available() is False: nvidia-smi says whether there is a driver, and torch's warnings more"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"ScalingConfig(use_gpu=True): Ray gave this agent a GPU, but torch {torch.__version__} cannot use it: "
            f"{why}. Install a torch that is built for the GPUs on every node that has some, or leave use_gpu out."
        )
    torch.cuda.init()  # or nothing would be drawn from the seeds that are set before something else does it
    return torch.device("cuda", 0)


def describe(device: torch.device) -> str:
    """What may give other bits than another device: its kind, and the libraries that compute on it."""
    if device.type != "cuda":
        return str(device)
    kind = torch.cuda.get_device_properties(device)
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{kind.name}, capability {kind.major}.{kind.minor}, {kind.multi_processor_count} processors, {libraries}"


def move(model: nn.Module, device: torch.device) -> None:
    """As ``model.to(device)``, but a buffer that belongs to several modules goes on doing so."""
    if device == CPU:
        return
    before = list(_buffers(model))
    model.to(device)
    moved: dict[int, torch.Tensor | None] = {}
    for module, key, buffer in before:
        module._buffers[key] = moved.setdefault(id(buffer), module._buffers[key])


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        yield from ((module, key, buffer) for key, buffer in module.named_buffers(recurse=False))


def to_device(tree: Any, device: torch.device) -> Any:
    """The tensors of a tree in host memory, on a device. Where that is the CPU: the tree itself."""
    return tree if device == CPU else tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def like(tree: Any, mine: Any) -> Any:
    """The tensors of a tree on the devices where those at the same places of another tree are; others stay."""
    if isinstance(tree, torch.Tensor):
        return tree.to(mine.device) if isinstance(mine, torch.Tensor) else tree
    if isinstance(tree, dict):
        there = mine if isinstance(mine, Mapping) else {}
        return {key: like(value, there.get(key)) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        known = list(mine) if isinstance(mine, list | tuple) else []
        return type(tree)(like(value, other) for value, other in zip_longest(tree, known[: len(tree)]))
    return tree


def all_in_host(tree: Any) -> bool:
    """Whether a tree has tensors, all of them in host memory."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(tensor.device == CPU for tensor in tensors)
