"""What would make bits depend on who computed what is caught and named: hidden state, and state that nobody moves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_dnn.comm.mesh import Mesh
from ray_dnn.config import Loss
from ray_dnn.engine.probe import FirstContribution, first_contribution
from ray_dnn.engine.step import Engine
from ray_dnn.errors import ConfigError, HiddenStateError
from ray_dnn.parallel import ReplicaGroup
from ray_dnn.plan import lay
from tests import zoo
from tests.local import Job, contributor


def probe(job: Job) -> FirstContribution:
    return first_contribution(contributor(job), twice=True)


def train(job: Job) -> None:
    made = contributor(job)
    engine = Engine(made, None, ReplicaGroup(), first_contribution(made, twice=True).metrics)
    engine.states.start()
    mesh = Mesh(0, 0, 1)
    engine.enter(0, mesh, lay(0, job.config.virtual_workers, [1.0]), ("an agent",))
    while not engine.finished:
        engine.advance(0)
    mesh.close()


class Layers(nn.Module):
    """The MLP, with something done to it and to its input in every forward pass."""

    def __init__(self, prepare: Callable[[Any], None] = lambda self: None, change: Callable[..., Any] | None = None):
        super().__init__()
        self.layers = zoo.mlp()
        self.change = change
        prepare(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.change and self.training:
            x = self.change(self, x)
        return self.layers(x)


def layers(prepare: Callable[[Any], None] = lambda self: None, change: Callable[..., Any] | None = None) -> Job:
    return zoo.job(model=lambda: Layers(prepare, change))


# -- hidden state ----------------------------------------------------------------------------------------------------


def test_a_counter_on_a_module_is_named() -> None:
    def change(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls

    with pytest.raises(HiddenStateError, match=r"gradient\.layers.*Changed meanwhile: model\.calls"):
        probe(layers(lambda self: setattr(self, "calls", 0), change))


def test_a_counter_without_effect_is_a_warning() -> None:
    def change(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x

    assert probe(layers(lambda self: setattr(self, "calls", 0), change)).suspects == ("model.calls",)


_numpy = np.random.default_rng(0)
_python = random.Random(0)
_torch = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("_numpy", lambda: float(_numpy.random())),
        ("_python", lambda: _python.random()),
        ("_torch", lambda: torch.rand((), generator=_torch).item()),
    ],
)
def test_a_generator_of_ones_own_is_named(name: str, draw: Callable[[], float]) -> None:
    generators = {"_numpy": _numpy, "_python": _python, "_torch": _torch}
    generator = generators[name]

    def loss(model: nn.Module, batch: zoo.Rows) -> torch.Tensor:
        assert generator is not None
        return zoo.squared(model, batch) * (1 + draw())

    with pytest.raises(HiddenStateError, match="Changed meanwhile: generator in loss"):
        probe(zoo.job(loss=loss))


def test_a_global_generator_of_a_module_is_named() -> None:
    def loss(model: nn.Module, batch: zoo.Rows) -> torch.Tensor:
        return zoo.squared(model, batch) * (1 + _python.random())

    with pytest.raises(HiddenStateError, match="Changed meanwhile: the global _python in loss"):
        probe(zoo.job(loss=loss))


def test_a_generator_of_ones_own_in_collate_is_named() -> None:
    def collate(rows: Any, rng: torch.Generator) -> zoo.Rows:
        batch = zoo.tensors(rows, rng)
        return batch | {"x": batch["x"] * _numpy.normal()}

    with pytest.raises(HiddenStateError, match="Changed meanwhile: the global _numpy in collate"):
        probe(zoo.job(collate=collate))


def test_the_global_generators_are_seeded_and_not_reported() -> None:
    assert probe(zoo.global_randomness()).suspects == ()


def test_a_hidden_state_that_a_loss_closes_over_is_named() -> None:
    seen: list[float] = []

    def loss(model: nn.Module, batch: zoo.Rows) -> torch.Tensor:
        seen.append(1.0)
        return zoo.squared(model, batch) / len(seen)

    with pytest.raises(HiddenStateError, match="Changed meanwhile: seen in loss"):
        probe(zoo.job(loss=loss))


# -- state that nobody moves -----------------------------------------------------------------------------------------


def test_weights_changed_by_a_forward_pass_are_refused_by_name() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(11, 6, max_norm=1.0), nn.Linear(6, 11))

    with pytest.raises(ConfigError, match=r"loss changed the parameters 0\.weight while it computed"):
        probe(replace(zoo.embedding_bag(), spec=replace(zoo.embedding_bag().spec, model=model)))


def test_weights_clipped_by_a_forward_pass_are_refused_by_name() -> None:
    def change(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.layers[0].bias.clamp_(-0.1, 0.1)
        return x

    with pytest.raises(ConfigError, match=r"loss changed the parameters layers\.0\.bias while it computed"):
        probe(layers(change=change))


def test_weights_changed_behind_autograds_back_are_named() -> None:
    def change(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.layers[0].bias.data.clamp_(-0.1, 0.1)
        return x

    with pytest.raises(HiddenStateError, match=r"changed the committed state itself: parameters\.layers\.0\.bias\."):
        probe(layers(change=change))


def _cool(model: Any, extra: Any, step: int) -> None:
    model.temperature = 0.9**step


def _freeze_statistics(model: Any, extra: Any, step: int) -> None:
    model.eval()


def _unfreeze(model: Any, extra: Any, step: int) -> None:
    model.layers[0].weight.requires_grad_(step < 2)


@pytest.mark.parametrize(
    ("after_update", "named"),
    [
        (_cool, r"model\.temperature changed in after_update, step 0"),
        (_freeze_statistics, r"model\.training, layers\.training, .* changed in after_update, step 0"),
        (_unfreeze, r"layers\.0\.weight\.requires_grad changed in an update"),
    ],
)
def test_what_after_update_changes_beside_the_state_is_refused_by_name(after_update: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        train(zoo.job(model=Layers, after_update=after_update))


class Lookahead(torch.optim.SGD):
    def __init__(self, params: Any):
        super().__init__(params, lr=0.1)
        self.taken = 0

    def step(self, closure: Any = None) -> None:
        self.taken += 1
        super().step()


class Boxed(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        self.state[self.param_groups[0]["params"][1]]["box"] = object()


def test_an_attribute_that_an_optimizer_counts_in_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.taken changed in an update"):
        train(zoo.job(optimizer=lambda model: Lookahead(model.parameters())))


def test_optimizer_state_that_cannot_be_moved_is_refused_by_path_at_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"state\.optimizers\.optimizer\.state\.0\.bias\.box is a builtins\.object"):
        train(zoo.job(optimizer=lambda model: Boxed(model.parameters(), lr=0.1)))


def test_extra_state_that_cannot_be_moved_is_refused_by_path() -> None:
    class Extra:
        def state_dict(self) -> dict[str, Any]:
            return {"items": [1, {2}]}

        def load_state_dict(self, state: Any) -> None:
            pass

    with pytest.raises(ConfigError, match=r"extra_state\['mine'\]\.items\[1\] is a builtins\.set"):
        probe(zoo.job(extra_state=lambda model: {"mine": Extra()}))


# -- buffers ---------------------------------------------------------------------------------------------------------


def _minimum(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.least = torch.minimum(self.least, x.detach().amin())
    return x


def _grow(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.least = torch.zeros(len(x))
    return x


def _cache(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.register_buffer("cache", torch.zeros(2))
    return x


def _fill(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.later = torch.zeros(2)
    return x


def _replace_shared(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.layers[0].least = self.layers[0].least + 1
    return x


def _register(self: Any) -> None:
    self.register_buffer("least", torch.tensor(torch.inf))
    self.layers[0].register_buffer("least", self.least)
    self.register_buffer("later", None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_minimum, "least belongs to several modules"),
        (_replace_shared, "least belongs to several modules"),
        (_grow, "least belongs to several modules"),
        (_cache, "The buffers cache appeared"),
        (_fill, "The buffers later appeared"),
    ],
)
def test_buffers_that_cannot_be_combined_are_refused_by_name(change: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        probe(layers(_register, change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_minimum, "The buffer least went from infinity"),
        (_grow, r"The buffer least was torch\.float32 of shape \(\) and became torch\.float32 of shape \(2,\)"),
    ],
)
def test_buffers_that_have_no_mean_are_refused_by_name(change: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        probe(layers(lambda self: self.register_buffer("least", torch.tensor(torch.inf)), change))


# -- losses ----------------------------------------------------------------------------------------------------------


def test_a_complex_buffer_is_refused_by_name() -> None:
    def prepare(self: Any) -> None:
        self.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))

    with pytest.raises(ConfigError, match=r"The buffer phases is torch\.complex64"):
        contributor(layers(prepare))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"The weight of a contribution was -1\.0"):
        probe(zoo.job(loss=lambda model, batch: Loss(zoo.squared(model, batch), -1)))


def test_metrics_whose_names_change_are_refused_by_name() -> None:
    def loss(model: nn.Module, batch: zoo.Rows) -> Loss:
        rows = len(batch["y"])
        return Loss(zoo.squared(model, batch) * rows, rows, {"short": 1.0} if rows == 1 else {})

    with pytest.raises(ConfigError, match=r"reported the metrics \['loss', 'short'\], but \['loss'\]"):
        train(zoo.job(loss=loss))
