"""State where nobody would look for it when an agent joins: found by comparing, refused by name.

What a job learns from is committed state: parameters, buffers, optimizer state and groups, schedules, extra state. If
an update changes anything else, agents that join later do not have it, and their bits would differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ray_dnn.errors import ConfigError

# What torch.optim keeps to warn and to check once.
_TORCH_OWN = {"_opt_called", "_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused"}


def of_updates(
    parameters: Mapping[str, nn.Parameter], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, object]:
    """What no update may change: which parameters are trained, and the optimizers' own attributes."""
    found: dict[str, object] = {f"{name}.requires_grad": p.requires_grad for name, p in parameters.items()}
    for key, optimizer in optimizers.items():
        found[f"the parameters of {key}"] = tuple(len(group["params"]) for group in optimizer.param_groups)
        found |= {f"{key}.{name}": value for name, value in _plain(vars(optimizer)).items() if name not in _TORCH_OWN}
    return found


def of_modules(model: nn.Module) -> dict[str, object]:
    """The plain attributes of all modules: numbers, flags, strings, and tensors that are no buffers."""
    return {
        f"{path or 'model'}.{name}": value
        for path, module in model.named_modules()
        for name, value in _plain(vars(module)).items()
    }


def refuse_changes(before: Mapping[str, object], after: Mapping[str, object], when: str) -> None:
    """Compare what one of the functions above found at two times.

    Raises:
        ConfigError: something differs. Names it.
    """
    if before == after:
        return
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    raise ConfigError(
        f"{', '.join(names[:3])} changed in {when}. It is neither parameter, buffer, optimizer state nor extra state, "
        "so agents that join later would not have it. Make it one of these."
    )


def _plain(attributes: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in attributes.items():
        if value is None or isinstance(value, bool | int | str):
            found[name] = value
        elif isinstance(value, float):
            found[name] = repr(value)  # NaN equals itself
        elif isinstance(value, torch.Tensor):
            found[name] = (id(value), value._version)
    return found
