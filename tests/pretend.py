"""A device that is no device: its tensors lie and are computed in host memory, but behave as if they were on a GPU.

They cannot be mixed with those of the host, nor be read by address or by NumPy, and backward runs on a thread of its
own. As it is the CPU that computes, a job must end with the very bits that it has on the CPU: whatever is forgotten to
be moved raises, and whatever is moved wrongly shows.

To import this module makes the device known to torch. That must be before anything runs backward in the process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.tensor  # which the first tensor of the device would have torch import, in every agent
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "pretend"

# What takes tensors of both.
_MOVES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
# Those that make tensors out of nothing. Everything else is made of these, or of other tensors.
_FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "scalar_tensor",
    "arange.start_step",
    "full",
    "randn",
    "rand",
    "randperm",
    "eye",
)


class PretendTensor(torch.Tensor):
    """A tensor on the device. ``host``: where its elements really are."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    def data_ptr(self) -> int:
        raise RuntimeError(f"an address on {NAME} was asked for")

    def tolist(self) -> Any:
        return self.host.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made: torch.Tensor = PretendTensor(self.host.clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        return memo.setdefault(id(self), made)  # type: ignore[no-any-return]

    def __repr__(self, *args: Any, **more: Any) -> str:
        return f"PretendTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        name = func._schema.name
        if name not in _MOVES:
            _refuse_mixing(func, (args, given))
        target = given.get("device")
        to_host = target is not None and torch.device(target).type != NAME
        if target is not None:
            given["device"] = torch.device("cpu")
        found = func(*tree_map(_host, args), **tree_map(_host, given))
        if name == "aten::_to_copy" and to_host:
            return found
        made = tree_map_only(torch.Tensor, PretendTensor, found)
        return return_and_correct_aliasing(func, args, dict(kwargs or {}), made)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, PretendTensor) else value


def _refuse_mixing(func: Any, given: Any) -> None:
    """As a GPU: a single number may come from the host."""
    for leaf in tree_leaves(given):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendTensor) and leaf.dim():
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, {NAME}, but one is on the host")


class _Module:
    """``torch.pretend``."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        """Numbers are drawn from the host's generator."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _made(op: Any) -> Any:
    def make(*args: Any, **more: Any) -> torch.Tensor:
        return PretendTensor(op(*args, **more | {"device": torch.device("cpu")}))

    return make


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _host(target).copy_(_host(source))
    return target


def _register() -> torch.library.Library:
    """Make the device known to torch. Modules swap their parameters when they are moved to it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        library.impl(name, _made(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return library


_library = _register()  # its kernels live as long as it does
