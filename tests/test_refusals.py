"""Bad input gets one clear error that names the value and the way out, before anything is started."""

from typing import Any

import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from torch import nn

from ray_dnn import DataParallel, Loss, Strategy, TrainConfig, Trainer, TrainSpec
from ray_dnn.engine.loss import as_sum
from ray_dnn.engine.state import TrainingState
from ray_dnn.errors import ConfigError


def build_model() -> nn.Module:
    return nn.Linear(2, 1)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).mean()


SPEC: dict[str, Any] = {"model": build_model, "optimizer": build_optimizer, "loss": loss}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "must be a whole number of at least 1"),
        ("batch_size", 2.5, "must be a whole number"),
        ("virtual_workers", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("steps", 5, "give exactly one of them"),
        ("epochs", None, "give exactly one of them"),
        ("precision", "fp8", "must be one of 'fp32', 'bf16', 'fp16'"),
        ("shuffle", "maybe", "must be one of 'auto', 'none', 'windowed', 'global'"),
        ("nonfinite", "hope", "must be one of 'stop', 'skip'"),
        ("cpu_isa", "sse", "must be one of"),
        ("clip_norm", 0.0, "must be a finite number above 0"),
        ("clip_norm", float("inf"), "must be a finite number above 0"),
        ("min_rows", 64, "must not be larger than batch_size=32"),
        ("num_threads", 0, "at least 1"),
    ],
)
def test_a_number_that_cannot_be_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig(**{"batch_size": 32, "epochs": 1} | {field: value})
    assert field in str(caught.value)


@pytest.mark.parametrize("field", ["model", "optimizer", "loss", "evaluate", "collate", "stop"])
def test_what_is_no_function_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"TrainSpec\({field}="):
        TrainSpec(**SPEC | {field: 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"datasets": {}}, "must have 'train'"),
        ({"datasets": {"train": 1, "validation": 1}}, "TrainSpec.evaluate is None"),
        ({"strategy": "ddp"}, "must be a ray_dnn.Strategy"),
        ({"load": "optimizer"}, "load='optimizer'"),
        ({"scaling_config": ScalingConfig(num_workers=0)}, "Use at least 1"),
        ({"scaling_config": ScalingConfig(num_workers=9)}, "work for at most 8 agents"),
        ({"scaling_config": ScalingConfig(use_gpu=True, resources_per_worker={"GPU": 2})}, "computes on one GPU"),
        ({"scaling_config": ScalingConfig(use_tpu=True)}, "use_tpu=True"),
        (
            {
                "scaling_config": ScalingConfig(
                    num_workers=2, placement_strategy="STRICT_PACK", label_selector={"ray.io/node-id": "5"}
                )
            },
            "both say which nodes are meant",
        ),
        ({"run_config": RunConfig(failure_config=FailureConfig(max_failures=-2))}, "max_failures=-2"),
        ({"patience": 5}, "patience=5"),
        ({"audit": "yes"}, "audit='yes'"),
        ({"run_config": RunConfig(worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "4"}})}, "OMP_NUM_THREADS='4'"),
        ({"run_config": RunConfig(worker_runtime_env={"env_vars": {"RAY_DNN_PORTS": "80"}})}, "RAY_DNN_PORTS='80'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_trainer_that_cannot_do_what_is_asked_says_so(arguments: dict[str, Any], message: str) -> None:
    given = {"spec": TrainSpec(**SPEC), "datasets": {"train": None}, "config": TrainConfig(32, epochs=1)}
    with pytest.raises(ConfigError, match=message):
        Trainer(**given | arguments)


def test_fields_of_ray_train_that_can_be_honoured_are() -> None:
    scaling = ScalingConfig(
        num_workers=(1, 2),
        resources_per_worker={"CPU": 2, "slot": 0.5, "memory": 0},
        placement_strategy="STRICT_SPREAD",
        accelerator_type="A100",
        label_selector=[{"zone": "a"}, {"zone": "!b"}],
    )
    run = RunConfig(worker_runtime_env={"env_vars": {"MINE": "1"}})
    job = Trainer(TrainSpec(**SPEC), {"train": None}, TrainConfig(32, epochs=1), DataParallel(), scaling, run)
    places = job._limits().places(run, job.config)
    assert places.resources == {"CPU": 2.0, "slot": 0.5, "accelerator_type:A100": 0.001}
    assert places.strategy == "STRICT_SPREAD"
    assert [places.selector(slot) for slot in range(places.slots)] == [{"zone": "a"}, {"zone": "!b"}]
    assert places.runtime_env["env_vars"]["MINE"] == "1"
    assert places.runtime_env["env_vars"]["ATEN_CPU_CAPABILITY"] == "avx2"


@pytest.mark.parametrize(
    ("resources", "asked"),
    [(None, {"GPU": 1.0}), ({"CPU": 2}, {"CPU": 2.0, "GPU": 1.0}), ({"GPU": 0.5}, {"GPU": 0.5})],
)
def test_gpus_are_asked_for_as_ray_train_does(resources: dict[str, float] | None, asked: dict[str, float]) -> None:
    scaling = ScalingConfig(num_workers=2, use_gpu=True, resources_per_worker=resources)
    job = Trainer(TrainSpec(**SPEC), {"train": None}, TrainConfig(32, epochs=1), scaling_config=scaling)
    places = job._limits().places(job.run_config, job.config)
    assert places.resources == asked
    assert places.runtime_env["env_vars"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(nn.Linear(2, 1))


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class KeepsMore(torch.optim.SGD):
    def state_dict(self) -> Any:
        return super().state_dict() | {"mine": 1}


def on_plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


class Stateless:
    """Extra state without the methods of one."""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": lambda: 3}, "must return a torch.nn.Module"),
        ({"model": Compiled}, "compiled by torch.compile"),
        ({"model": lambda: nn.Embedding(4, 2, sparse=True)}, "sparse gradients"),
        ({"model": lambda: nn.SyncBatchNorm(2)}, "SyncBatchNorm"),
        ({"model": lambda: nn.LazyLinear(2)}, "is lazy"),
        ({"optimizer": lambda m: torch.optim.LBFGS(m.parameters())}, "needs a closure"),
        ({"optimizer": lambda m: NeedsClosure(m.parameters(), lr=0.1)}, "needs a closure"),
        ({"optimizer": lambda m: KeepsMore(m.parameters(), lr=0.1)}, r"keeps \['mine'\]"),
        ({"optimizer": lambda m: torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "not parameters of the model"),
        ({"optimizer": lambda m: {"a": build_optimizer(m)}}, "the keys must be the same"),
        ({"optimizer": lambda m: 5}, "must return torch Optimizers"),
        ({"scheduler": on_plateau}, "ReduceLROnPlateau"),
        ({"extra_state": lambda m: {"ema": Stateless()}}, r"extra_state\['ema'\] has no state_dict"),
    ],
)
def test_what_is_not_proved_equal_is_refused_by_name(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingState(TrainSpec(**SPEC | spec), TrainConfig(32, epochs=1))


@pytest.mark.parametrize("value", [3.0, torch.ones(2), torch.tensor(1), Loss(torch.ones(2), 1.0)])
def test_a_loss_that_is_no_scalar_tensor_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="floating-point tensor with one element"):
        as_sum(value, 4, "loss")


def test_a_metric_cannot_take_the_name_of_the_loss() -> None:
    with pytest.raises(ConfigError, match="has the name 'loss'"):
        Loss(torch.ones(()), 1.0, {"loss": 1.0})


def test_the_exported_names_are_the_contract() -> None:
    import ray_dnn

    contract = ["Trainer", "TrainSpec", "TrainConfig", "Loss", "DataParallel", "Strategy", "load_weights"]
    assert all(getattr(ray_dnn, name) for name in contract)
    assert set(contract) <= set(ray_dnn.__all__)
    assert issubclass(DataParallel, Strategy)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ray_dnn.nonsense
