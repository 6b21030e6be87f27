"""Replica groups: models whose one replica spans several agents.

A model built inside a replica group asks `current_group` for its rank and size, keeps its part of the weights, and
marks each divided parameter with `mark_shard`. Groups reduce in a fixed order, so a replica's results do not depend on
timing.

`ColumnParallelLinear` and `RowParallelLinear` are the two halves of a tensor-parallel MLP (Shoeybi et al.,
"Megatron-LM", 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from ray_dnn.comm.mesh import Mesh
from ray_dnn.engine.codec import decode, encode
from ray_dnn.marks import Marks
from ray_dnn.phases import Phase


class ReplicaGroup:
    """The agents that together hold one replica.

    Attributes:
        rank, size: of this agent in its group.
    """

    def __init__(self, mesh: Mesh | None = None, marks: Marks | None = None):
        self._mesh = mesh
        self._marks = marks or Marks()
        self.rank = mesh.rank if mesh else 0
        self.size = mesh.size if mesh else 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the group, added in the order of ranks. Same shape and dtype; no gradient flows through it."""
        parts = self.all_gather(tensor)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor, by rank. Shapes may differ."""
        if self._mesh is None:
            return [tensor.detach()]
        with self._marks.during(Phase.GATHERING):
            return [decode(raw).to(tensor.device) for raw in self._mesh.gather_variable(encode(tensor.detach()))]

    def minimum(self, number: int) -> int:
        """The smallest of everybody's numbers."""
        if self._mesh is None:
            return number
        with self._marks.during(Phase.GATHERING):
            return min(int(raw) for raw in self._mesh.gather_variable(str(number).encode()))


_current = ReplicaGroup()  # of this process; set by the agent before the model is built


def current_group() -> ReplicaGroup:
    """The replica group of this agent; one of size 1 outside of replica groups."""
    return _current


def set_current_group(group: ReplicaGroup) -> None:
    """Used by the agent before it builds the model."""
    global _current
    _current = group


def mark_shard(parameter: nn.Parameter, dim: int) -> nn.Parameter:
    """Say that the full parameter is the concatenation of the group's parts along ``dim``."""
    parameter.ray_dnn_shard_dim = dim  # type: ignore[attr-defined]
    return parameter


def shard_dim(tensor: torch.Tensor) -> int | None:
    """The dimension along which a parameter is divided over its group, or None where everybody holds all of it."""
    return getattr(tensor, "ray_dnn_shard_dim", None)


def full(tensor: torch.Tensor, group: ReplicaGroup) -> torch.Tensor:
    """The full parameter, gathered from the group where it is divided."""
    dim = shard_dim(tensor)
    return tensor.detach() if dim is None else torch.cat(group.all_gather(tensor), dim)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, group: ReplicaGroup) -> torch.Tensor:
    """Scale gradients so that their 2-norm over the whole replica is at most ``max_norm``. Returns the norm before.

    The norm is taken of each parameter, then of these norms in order, as ``torch.nn.utils.clip_grad_norm_`` does.
    """
    gradients = [(p, p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    squares = torch.stack(
        [torch.linalg.vector_norm(g.to(torch.promote_types(g.dtype, torch.float32))) for _, g in gradients]
    )
    squares = squares.square()
    if group.size > 1:
        divided = torch.tensor([shard_dim(p) is not None for p, _ in gradients], device=squares.device)
        squares = torch.where(divided, group.all_reduce(squares), squares)
    norm = squares.sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
    return norm


class _CopyToGroup(torch.autograd.Function):
    """Forward: nothing. Backward: the sum over the group, for each rank used the input for its own part."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        return current_group().all_reduce(grads[0])


class _SumOverGroup(torch.autograd.Function):
    """Forward: the sum over the group. Backward: nothing, for every rank sees the same sum."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return current_group().all_reduce(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def _copy_to_group(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _CopyToGroup.apply(x)  # type: ignore[no-untyped-call]
    return result


def _sum_over_group(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _SumOverGroup.apply(x)  # type: ignore[no-untyped-call]
    return result


class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are divided over the group. x: (..., inputs) -> (..., outputs / group size)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        group = current_group()
        if outputs % group.size:
            raise ValueError(f"outputs={outputs} cannot be divided over a replica group of {group.size}")
        whole = nn.Linear(inputs, outputs)  # every rank draws the full weights, so that the draw is the same for all
        self.weight = mark_shard(nn.Parameter(whole.weight.detach().chunk(group.size)[group.rank].clone()), 0)
        self.bias = mark_shard(nn.Parameter(whole.bias.detach().chunk(group.size)[group.rank].clone()), 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(_copy_to_group(x), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are divided over the group. x: (..., inputs / group size) -> (..., outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        group = current_group()
        if inputs % group.size:
            raise ValueError(f"inputs={inputs} cannot be divided over a replica group of {group.size}")
        whole = nn.Linear(inputs, outputs)
        part = whole.weight.detach().chunk(group.size, dim=1)[group.rank]
        self.weight = mark_shard(nn.Parameter(part.clone()), 1)
        self.bias = nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _sum_over_group(functional.linear(x, self.weight)) + self.bias
