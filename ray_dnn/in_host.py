"""Values with tensors on a device, for processes that have no such device."""

from __future__ import annotations

import io
from typing import Any

import ray.cloudpickle
import torch


def in_host(value: Any, device: torch.device) -> Any:
    """A value with all tensors that it holds on a device in host memory."""
    if device.type == "cpu":
        return value
    buffer = io.BytesIO()
    _ToHost(buffer).dump(value)  # type: ignore[no-untyped-call]
    return ray.cloudpickle.loads(buffer.getvalue())


class _ToHost(ray.cloudpickle.CloudPickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor) or obj.device.type == "cpu":
            return super().reducer_override(obj)  # type: ignore[no-untyped-call]
        host = obj.detach().cpu()
        if isinstance(obj, torch.nn.Parameter):
            return torch.nn.Parameter, (host, obj.requires_grad)
        return torch.Tensor.requires_grad_, (host, obj.requires_grad)
