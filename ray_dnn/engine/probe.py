"""The job's first contribution: computed by every newcomer, and twice by the first agent.

Its digest is the admission test: whoever gets other bits computes otherwise. Computed a second time, after another
contribution, it exposes state that the job keeps outside of its model: a counter, a generator of its own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ray_dnn.engine import codec
from ray_dnn.engine.contribute import Contributor
from ray_dnn.engine.device import CPU
from ray_dnn.errors import HiddenStateError

_INTERNAL = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


@dataclass(frozen=True)
class FirstContribution:
    """What an agent got for the job's first contribution.

    Attributes:
        digest: of every bit of it, over all phases.
        parts: digests by name of gradient, buffer, metric, to say what differs.
        metrics: the names of the metrics, by phase.
        suspects: state outside of the model that changed while bits stayed equal; a warning.
    """

    digest: str
    parts: dict[str, str]
    metrics: dict[str, list[str]]
    suspects: tuple[str, ...] = ()


def first_contribution(contributor: Contributor, twice: bool) -> FirstContribution:
    """Compute the job's first contribution from the state as built.

    Raises:
        HiddenStateError: with ``twice``, the second time gave other bits. Names what differs and what may be the cause.
    """
    state = contributor.state
    parts: dict[str, str] = {}
    metrics: dict[str, list[str]] = {}
    suspects: list[str] = []
    for phase in state.phases:
        state.phase = phase
        before = dict(_outside(contributor))
        committed = codec.leaf_digests(state.export()) if twice else {}
        given, tree = contributor.first()
        if twice:
            suspects += _again(contributor, tree, before, committed)
        metrics[phase] = sorted(given.metrics)
        parts |= {f"{phase}: {path}": codec.digest(value) for path, value in _flat(tree)}
    state.phase = state.phases[0]
    text = "\n".join(f"{name} {digest}" for name, digest in parts.items())
    return FirstContribution(hashlib.sha256(text.encode()).hexdigest(), parts, metrics, tuple(dict.fromkeys(suspects)))


def _again(contributor: Contributor, tree: codec.Tree, before: dict[str, str], committed: dict[str, str]) -> list[str]:
    """Compute another contribution, then the first one again; compare. Returns outside state that changed."""
    other = min(1, contributor.state.config.virtual_workers - 1)
    contributor.first(other)
    _, second = contributor.first()
    after = dict(_outside(contributor))
    changed = [name for name in after if before.get(name) != after[name]]
    moved = [
        path for path, digest in codec.leaf_digests(contributor.state.export()).items() if digest != committed[path]
    ]
    if moved:
        raise HiddenStateError(
            f"Computing a contribution changed the committed state itself: {', '.join(moved[:3])}. Only the agent that "
            "computed it would know of that. Change parameters in after_update."
        )
    difference = codec.first_difference(tree, second)
    state = contributor.state
    if difference is None or (state.device != CPU and not state.config.deterministic):
        return changed  # kernels of a GPU may themselves give other bits each time
    hint = f"Changed meanwhile: {', '.join(changed)}." if changed else "Nothing that could be inspected changed."
    raise HiddenStateError(
        f"The first contribution, computed a second time, had other bits in {difference}. The job keeps state outside "
        "of its model's parameters and buffers, so its result would depend on which agent computes what. "
        f"{hint} Make it a buffer, derive it from the batch, or draw random numbers from torch's, NumPy's or Python's "
        "global generator, which are seeded for each contribution."
    )


def difference(one: FirstContribution, other: FirstContribution) -> str:
    """The names of the first parts at which two agents' first contributions differ."""
    names = [n for n in one.parts if other.parts.get(n) != one.parts[n]]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _flat(tree: codec.Tree) -> Iterator[tuple[str, Any]]:
    for kind, values in tree.items():
        if isinstance(values, dict):
            yield from ((f"{kind} {name}", value) for name, value in values.items())
        else:
            yield kind, values


def _outside(contributor: Contributor) -> Iterator[tuple[str, str]]:
    """Everything outside of parameters and buffers that can be inspected, as (name, fingerprint)."""
    for path, module in contributor.state.model.named_modules():
        for name, value in vars(module).items():
            if name not in _INTERNAL and not name.endswith("_hooks"):
                yield from _fingerprint(f"{path or 'model'}.{name}", value)
        yield from _of_function(type(module).forward, f"{path or 'model'}.forward")
    spec = contributor.state.spec
    for name in ("collate", "model"):
        if getattr(spec, name):
            yield from _of_function(getattr(spec, name), name)
    for loss in contributor.state.losses.values():
        yield from _of_function(loss, "loss")


def _of_function(function: Callable[..., Any], where: str) -> Iterator[tuple[str, str]]:
    """Globals that a function names, and what it closes over."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        for name, value in vars(function).items() if hasattr(function, "__dict__") else ():
            yield from _fingerprint(f"{where}.{name}", value)
        return
    for name in code.co_names:
        if name in function.__globals__:
            yield from _fingerprint(f"the global {name} in {where}", function.__globals__[name])
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield from _fingerprint(f"{name} in {where}", cell.cell_contents)
        except ValueError:
            continue  # a cell that is not filled yet


def _fingerprint(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool | int | float | str | bytes):
        yield name, repr(value)
    elif isinstance(value, torch.Generator):
        yield name, codec.digest(value.get_state())
    elif isinstance(value, np.random.Generator):
        yield name, repr(value.bit_generator.state)
    elif isinstance(value, np.random.RandomState | random.Random):
        state = value.get_state() if isinstance(value, np.random.RandomState) else value.getstate()
        yield name, hashlib.sha256(repr(state).encode()).hexdigest()
    elif isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        yield name, codec.digest(value)
    elif isinstance(value, list | tuple | set | dict) and len(value) <= 10_000:
        yield name, hashlib.sha256(_plain(value).encode()).hexdigest()


def _plain(value: Any) -> str:
    """A container's text without addresses: only numbers and strings, and how many items there are."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_plain(k)}:{_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_plain, value)) + "]"
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__
