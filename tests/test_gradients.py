"""Gradients are handed over while backward runs, and what is combined has the same bits as if they were not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ray_dnn import Batch, Contribution
from ray_dnn.engine.codec import tensor_bytes
from ray_dnn.engine.contribute import Contributor
from ray_dnn.errors import ConfigError
from ray_dnn.strategies import DataParallel
from tests import zoo
from tests.local import Make, contributor


@dataclass(frozen=True)
class Doubled(DataParallel):
    """Changes the sums of the strategy that it builds on."""

    def contribute(
        self, state: Any, worker_state: Any, batches: Sequence[Batch], rng: torch.Generator
    ) -> tuple[Contribution, Any]:
        given, worker_state = super().contribute(state, worker_state, batches, rng)
        sums = {name: None if t is None else 2 * t for name, t in given.sums.items()}
        return Contribution(sums, given.weight, given.metrics), worker_state


def handed(made: Contributor) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """A contribution by name, the names in the order in which they were ready, and those ready while computing."""
    leaf = made.new_leaf(made.state.phase)
    names: list[str] = []
    during: list[str] = []

    def ready(name: str) -> None:
        names.append(name)
        during.extend([name] if made.state._handing._sums is not None else [])

    made.contribute(0, None, leaf, ready=ready)
    assert sorted(names) == sorted(leaf.slots)
    assert all(p.grad is None for p in made.state.parameters.values())
    return leaf.slots, names, during


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(tensor_bytes(one[name]) == tensor_bytes(other[name]) for name in one)


JOBS = {
    "mlp": zoo.adamw_mlp,
    "microbatches": zoo.microbatches,
    "bf16_parameters": zoo.bf16_parameters,
    "fp16_overflows": zoo.fp16_overflows,
    "unused": zoo.sometimes_unused_parameters,
    "tied": zoo.tied_weights,
}


@pytest.mark.parametrize("make", JOBS.values(), ids=JOBS)
def test_gradients_are_handed_over_during_backward_in_its_order(make: Make) -> None:
    made = contributor(make())
    counted, _, early = handed(made)  # the first contribution counts, and hands over afterwards
    assert not early
    again, names, during = handed(made)
    assert during
    assert names[: len(during)] == during
    assert_same(counted, again)


def test_a_gradient_that_comes_in_parts_waits_for_the_last_one() -> None:
    made = contributor(zoo.recomputed_layers())
    counted, _, _ = handed(made)
    again, _, during = handed(made)
    assert not {"1.weight", "1.bias"} & set(during)
    assert "3.weight" in during
    assert_same(counted, again)


def test_a_gradient_that_comes_in_parts_later_on_is_refused_by_name() -> None:
    job = zoo.recomputed_layers()
    spec_loss = job.spec.loss
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        plain = (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean()  # type: ignore[operator]
        return plain if calls == 1 else spec_loss(model, batch)

    made = contributor(replace(job, spec=replace(job.spec, loss=loss)))
    handed(made)
    with pytest.raises(ConfigError, match=r"gradient of 1\..*two parts.*calls backward"):
        handed(made)


def test_a_strategy_that_changes_the_sums_gets_them_all() -> None:
    job = zoo.adamw_mlp()
    plain, doubled = contributor(job), contributor(replace(job, strategy=Doubled()))
    handed(plain)
    handed(doubled)
    (one, _, _), (two, _, during) = handed(plain), handed(doubled)
    assert not during
    assert_same({name: 2 * tensor for name, tensor in one.items()}, two)


@pytest.mark.parametrize("make", [zoo.adamw_mlp, partial(zoo.with_workers, 1, zoo.gan)], ids=["mlp", "gan"])
def test_what_the_loss_leaves_in_other_gradients_is_not_handed_over(make: Make) -> None:
    made = contributor(make())
    for phase in made.state.phases:
        made.state.phase = phase
        handed(made)
        again, names, _ = handed(made)
        assert set(names) == set(made.state.trainable()) == set(again)
