"""A quick start: torch's compiler is loaded only when something needs it.

PyTorch's optimizers import ``torch._dynamo`` when the first one is made, to tell the compiler to leave them alone. That
takes as long as importing torch itself, for a compiler that nobody calls. `postpone_compiler` puts a stand-in in its
place that has the two functions which optimizers call, and makes way for the real module as soon as anything else of
it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _StandIn(ModuleType):
    """``torch._dynamo``, as far as optimizers use it while nothing is compiled."""

    def disable(self, fn: Callable[..., Any] | None = None, recursive: bool = True, **more: Any) -> Any:
        """Without a compiler, a function that it must leave alone is the function itself."""
        return fn if fn is not None else lambda function: function

    def graph_break(self, *args: Any, **more: Any) -> None:
        """There is no graph to break."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # `inspect` and others ask all modules for `__file__`
            raise AttributeError(name)
        return getattr(_real(), name)


def _real() -> ModuleType:
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
    return importlib.import_module(_NAME)


def postpone_compiler() -> None:
    """Do not load the compiler before something needs it. Does nothing where it is loaded already."""
    if _NAME not in sys.modules:
        stand_in = sys.modules[_NAME] = _StandIn(_NAME)
        torch._dynamo = stand_in
