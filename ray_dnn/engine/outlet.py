"""Where a contribution is handed over, name by name: while it is computed, or when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ray_dnn.errors import ConfigError

Ready = Callable[[str], None]


class Outlet:
    """Takes one contribution into the slots of a vector.

    Attributes:
        given: the names that were given.
    """

    def __init__(self, slots: Mapping[str, torch.Tensor], ready: Ready | None):
        self._slots = slots
        self._ready = ready  # told of each name when its slot will not change any more
        self.given: set[str] = set()

    def give(self, name: str, tensor: torch.Tensor | None) -> None:
        """Copy a tensor to its slot; None becomes zeros.

        Raises:
            ConfigError: there was another one before.
        """
        if name in self.given:
            raise ConfigError(
                f"The gradient of {name} arrived in two parts, though in the job's first contribution it came at once. "
                "An autograd function that calls backward itself, for a layer that is used twice, does that. Use the "
                "function in the first contribution already, or torch.utils.checkpoint(…, use_reentrant=False)."
            )
        self.given.add(name)
        slot = self._slots[name]
        if tensor is None:
            slot.zero_()
        else:
            slot.copy_(tensor)
        if self._ready is not None:
            self._ready(name)

    def close(self) -> None:
        """All that was not given is zero."""
        for name in self._slots:
            if name not in self.given:
                self.give(name, None)
