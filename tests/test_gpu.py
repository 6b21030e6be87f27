"""GPUs: the engine computes on another device than the host, and what a job learns is the same.

Without a GPU, a device that only behaves like one takes its place (see `tests.pretend`). As it is the CPU that computes
there too, runs on it must have the very bits of runs on the CPU.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from conftest import nothing_left
from jobs_for_tests import accuracy, assert_every_row_once, digest, features, loss, trainer
from ray.train import Result, ScalingConfig, TrainingFailedError
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import ray_dnn.agent
from ray_dnn import RayDnnError, Trainer
from ray_dnn.admission import Admission
from ray_dnn.engine.batches import placed
from ray_dnn.engine.contribute import guarded
from ray_dnn.engine.device import CPU, like, of_agent
from ray_dnn.errors import ConfigError, UserCodeError
from ray_dnn.events import AgentAdmitted, EventLog
from ray_dnn.faults import Kill
from ray_dnn.limits import Limits
from ray_dnn.portable import portable
from ray_dnn.testing import fit_resizing, read_events
from tests import zoo
from tests.followers import following
from tests.local import Run, assert_same, call, close, pretended, run
from tests.losses import disturb
from tests.test_faults_local import plain

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which torch can use")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here that torch can use")

# -- the engine, on the pretended device -------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> Iterator[None]:
    yield
    close()


@functools.cache
def on_cpu() -> Run:
    """The job that agents die in, undisturbed, where the CPU computes."""
    return disturb(plain, agents=1).run


def misuses() -> list[str]:
    """What is an error on a GPU, done on the device, in an agent. The errors."""
    there, here = torch.ones(3, device="pretend"), torch.ones(3)
    said = []
    for misuse in (
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.stack([there, here]),
        lambda: nn.functional.embedding(torch.tensor([1]), there.reshape(3, 1)),
        there.numpy,
        there.data_ptr,
    ):
        try:
            said.append(f"none: {misuse()}")
        except (RuntimeError, TypeError) as error:
            said.append(type(error).__name__)
    return said


def test_the_pretended_device_is_as_strict_as_a_gpu() -> None:
    assert call(pretended(zoo.adamw_mlp), misuses) == ["RuntimeError"] * 6


@pytest.mark.parametrize(
    "name",
    [
        "adamw_mlp",
        "microbatches",
        "tied_weights",
        "channels_last",
        "counting_buffers",
        "bf16_parameters",
        "moving_average",
        "gan",
        "optimizer_adam_fused",
        "optimizer_nadam",
        "mirrored_worker_states",
    ],
)
def test_a_job_on_the_device_has_the_bits_of_the_cpu_through_joins_and_leaves(name: str) -> None:
    there = run(partial(pretended, zoo.JOBS[name]), {0: 1, 2: 3, 3: 1, 5: 2})
    assert_same(run(zoo.JOBS[name], {0: 1}), there)


def test_a_death_on_the_device_changes_no_bit() -> None:
    disturbed = disturb(partial(pretended, plain), Kill("exchange-middle", step=3, rank=1), joins={1: 1})
    assert_same(on_cpu(), disturbed.run)


def test_a_newcomer_on_the_device_follows_to_the_same_bits() -> None:
    disturbed, driver = following(partial(pretended, plain))
    assert_same(on_cpu(), disturbed.run)
    assert driver.outcomes == {"agent-4": None}


# -- on a cluster, on the pretended device -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    """A Ray cluster of one node that says to have a GPU."""
    with nothing_left():
        ray.init(address="local", num_cpus=8, num_gpus=1, object_store_memory=200 * 2**20, include_dashboard=False)
        yield
        ray.shutdown()


class Pretending:
    """Has an agent that was given GPUs compute on the pretended device."""

    def arm(self, agent: ray_dnn.agent.Agent) -> None:
        from tests import pretend

        ray_dnn.agent.of_agent = lambda gpus: torch.device(pretend.NAME, 0) if gpus else CPU


@pytest.fixture
def _pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Limits.places
    monkeypatch.setattr(Limits, "places", lambda *args: dataclasses.replace(places(*args), faults=Pretending()))


def shared(agents: int) -> ScalingConfig:
    """So many agents at most, on one GPU."""
    resources = {"CPU": 1, "GPU": 1 / agents}
    return ScalingConfig(num_workers=(1, agents), use_gpu=True, resources_per_worker=resources)


JOB: dict[str, Any] = {"spec": {"evaluate": accuracy}, "config": {"evaluate_every": 5, "checkpoint_every": 4}}


def of_epochs(path: Path, epochs: int, scaling: ScalingConfig | None = None) -> Trainer:
    made = trainer(path, 1, JOB["spec"], JOB["config"] | {"epochs": epochs})
    return made if scaling is None else replace(made, scaling_config=scaling)


def accuracies(result: Result) -> list[float]:
    """Of the evaluations that every run of two epochs makes."""
    assert result.metrics_dataframe is not None
    return [row["validation/accuracy"] for _, row in result.metrics_dataframe.iterrows() if row["step"] != 7]


def everything(seen: Any) -> Any:
    """All that can be seen, but for the model, which goes on changing."""
    assert seen.model[0].weight.device.type != "cpu"
    return {name: value for name, value in vars(seen).items() if name != "model"}


@pytest.mark.usefixtures("one_gpu", "_pretending")
def test_agents_that_share_a_gpu_give_the_bits_of_one_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    alone = of_epochs(tmp_path / "cpu", 2).fit()
    half = fit_resizing(of_epochs(tmp_path / "gpu", 1, shared(2)), {0: 1, 3: 2})
    result = of_epochs(tmp_path / "gpu", 2, shared(2)).fit()  # goes on
    assert digest(result) == digest(alone) != digest(half)
    assert_every_row_once(result)
    assert accuracies(result) == accuracies(alone)
    admitted = [event for event in read_events(half, 1) if isinstance(event, AgentAdmitted)]
    assert len(admitted) >= 2  # more where one was replaced, as on a machine that is too busy
    assert {event.profile["device"] for event in admitted} == {"pretend:0"}
    again = of_epochs(tmp_path / "gpu", 2, shared(1)).replay(6, everything, ["0"])
    assert (again.same_bits, again.elsewhere) == (True, [])
    for seen in again.seen:
        (batch,) = seen["batches"]
        (micro,) = batch.microbatches
        assert {type(tensor) for tensor in [*micro.data.values(), *seen["activations"]["0"]]} == {torch.Tensor}
        assert features(micro.data).shape == (len(seen["row_ids"]), 4)


# -- where there is none -----------------------------------------------------------------------------------------------


@no_gpu
@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_that_torch_cannot_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailedError) as caught:
        of_epochs(tmp_path, 1, shared(2)).fit()
    assert isinstance(caught.value.__cause__, ConfigError)
    said = str(caught.value)
    assert f"torch {torch.__version__} cannot use it: " in said
    assert "leave use_gpu out" in said


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def on_real(path: Path, agents: int, **config: Any) -> Result:
    made = trainer(path, agents, config=config)
    return replace(made, scaling_config=replace(shared(agents), num_workers=agents)).fit()


@on_gpu
@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_and_two_agents_on_a_gpu_give_the_same_bits(tmp_path: Path, precision: str) -> None:
    results = [on_real(tmp_path / str(agents), agents, precision=precision) for agents in (1, 2)]
    assert digest(results[0]) == digest(results[1])
    for result in results:
        assert_every_row_once(result)


def undeterministic(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """With a median along a dimension, of which CUDA has no deterministic kernel that gives indices too."""
    return loss(model, batch) + 0 * model(features(batch)).median(dim=0).values.sum()


@on_gpu
@pytest.mark.usefixtures("one_gpu")
def test_an_operation_without_deterministic_kernel_is_refused_on_a_gpu_unless_bits_are_given_up(tmp_path: Path) -> None:
    job = replace(trainer(tmp_path, 1, {"loss": undeterministic}), scaling_config=shared(1))
    with pytest.raises(TrainingFailedError, match=r"median.*deterministic=False"):
        job.fit()
    result = replace(job, config=replace(job.config, deterministic=False)).fit()
    assert result.metrics is not None
    assert result.metrics["same_bits"] is False


# -- errors, and what is decided without any device --------------------------------------------------------------------


def test_an_operation_without_deterministic_kernel_is_refused_by_name() -> None:
    """On the CPU it is ``put_``."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        with pytest.raises(ConfigError, match=r"put_ in loss, agent a: .*deterministic=False"):
            guarded("loss", "agent a", lambda: torch.zeros(3).put_(torch.tensor([1]), torch.ones(1)))
    finally:
        torch.set_deterministic_debug_mode(before)


def test_running_out_of_memory_is_an_error_of_the_job_that_says_where() -> None:
    def loss() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    where = "agent agent-1, step 3, virtual worker 2, rows [1, 2]"
    with pytest.raises(UserCodeError, match="OutOfMemoryError in loss, agent agent-1, step 3") as caught:
        guarded("loss", where, loss)
    cause = caught.value.__cause__
    assert isinstance(cause, torch.OutOfMemoryError)
    assert "20.00 GiB" in str(portable(cause))


def test_only_an_agent_with_a_gpu_computes_on_it() -> None:
    assert of_agent(0) == CPU
    if not torch.cuda.is_available():
        with pytest.raises(RayDnnError, match="cannot use it"):
            of_agent(1)


def test_without_determinism_a_gpu_promises_nothing() -> None:
    for deterministic, device, same in ((False, "cuda:0", False), (False, "cpu", True), (True, "cuda:0", True)):
        built = SimpleNamespace(
            first=SimpleNamespace(suspects=(), digest="d"), state_digest="s", profile={"device": device}, seconds=0.0
        )
        replica: Any = SimpleNamespace(first=True, names=["agent-1"], built=[built])
        log = EventLog()
        admission = Admission(log, deterministic)
        assert admission.examine(replica) == ([replica], {})
        assert admission.exact is same


class Movable:
    """Something that is no container, and can be moved."""

    def __init__(self, where: torch.device = CPU):
        self.where = where

    def to(self, device: torch.device) -> "Movable":
        return Movable(device)


def test_all_of_a_batch_goes_to_the_device() -> None:
    meta = torch.device("meta")  # a device that is on every machine
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    batch = {"x": torch.ones(2), "more": [torch.ones(1), (torch.ones(3), "text")], "own": Movable(), "packed": packed}
    there = placed(batch, meta)
    tensors = [there["x"], there["more"][0], there["more"][1][0], there["packed"].data]
    assert {tensor.device for tensor in tensors} == {meta}
    assert there["more"][1][1] == "text"
    assert there["own"].where == meta
    assert there["packed"].batch_sizes.device == CPU  # as PyTorch wants it


def test_what_is_loaded_goes_where_ones_own_is() -> None:
    mine = {"a": torch.empty(1, device="meta"), "b": [torch.empty(1), torch.empty(1, device="meta")], "n": 1}
    there = like({"a": torch.ones(1), "b": [torch.ones(1), torch.ones(1), torch.ones(1)], "n": 2}, mine)
    assert [t.device.type for t in (there["a"], *there["b"])] == ["meta", "cpu", "meta", "cpu"]
    assert there["n"] == 2
