"""What the fields of Ray Train's config classes mean here. What cannot be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from ray_dnn.agent import Striker
from ray_dnn.cluster import Places
from ray_dnn.config import TrainConfig
from ray_dnn.engine.numerics import environment
from ray_dnn.errors import ConfigError
from ray_dnn.network import PORTS, Network
from ray_dnn.placement import NODE
from ray_dnn.strategies import Strategy

_FAILURE_FIELDS = (
    "controller_failure_limit",
    "max_preemption_failures",
    "relax_collectives_on_preemption",
    "preemption_grace_s",
)


@dataclass(frozen=True)
class Limits:
    """What a ScalingConfig allows.

    Attributes:
        least, most: replicas.
        resources: of one agent.
        strategy, labels: where agents are placed.
    """

    least: int
    most: int
    resources: dict[str, float]
    strategy: str
    labels: Mapping[str, str] | Sequence[Mapping[str, str]]

    def places(self, run: RunConfig, config: TrainConfig, faults: Striker | None = None) -> Places:
        """What to ask the cluster for."""
        return Places(self.resources, self.strategy, self.labels, _runtime_env(run, config), faults)


def check_scaling(given: ScalingConfig, config: TrainConfig, replica_size: int, strategy: Strategy) -> Limits:
    """Read a ScalingConfig.

    ``elastic_resize_monitor_interval_s`` is the longest time until room in the cluster is noticed; here it is noticed
    at once.

    Raises:
        ConfigError: a field cannot be honoured.
    """
    scaling: Any = given  # Ray's type stubs lack the fields of its second version
    least, most = scaling.min_workers, scaling.max_workers
    shown = f"ScalingConfig(num_workers={scaling.num_workers})"
    if least < 1:
        raise ConfigError(f"{shown}: training inside the driver is not supported. Use at least 1.")
    if replica_size < 1 or least % replica_size or most % replica_size:
        raise ConfigError(f"{shown}: both numbers must be multiples of replica_size={replica_size}.")
    if least // replica_size > config.virtual_workers:
        raise ConfigError(
            f"{shown}: a job with virtual_workers={config.virtual_workers} has work for at most "
            f"{config.virtual_workers * replica_size} agents. Use fewer agents or more virtual workers."
        )
    if strategy.worker_state == "mirrored" and least // replica_size < 2:
        raise ConfigError(
            f"{shown}: {type(strategy).__name__} keeps mirrored worker states, which need a second agent to hold the "
            f"mirror. Use at least {2 * replica_size}."
        )
    if scaling.num_gpus_per_worker > 1:
        raise ConfigError(
            f"ScalingConfig(use_gpu=True, resources_per_worker={scaling.resources_per_worker}): an agent computes on "
            "one GPU. Use more agents, with at most 1 GPU each."
        )
    for name, why in (("use_tpu", "TPUs are"), ("topology", "TPUs are")):
        if getattr(scaling, name):
            value = getattr(scaling, name)
            raise ConfigError(f"ScalingConfig({name}={value!r}): {why} not supported yet. Leave it out.")
    placement, labels = str(scaling.placement_strategy), scaling.label_selector or {}
    selectors = labels if isinstance(labels, list) else [labels]
    if placement.startswith("STRICT") and any(NODE in selector for selector in selectors):
        raise ConfigError(
            f"ScalingConfig(placement_strategy={placement!r}, label_selector={labels!r}): both say which nodes are "
            f"meant. Leave {NODE} out, or use PACK or SPREAD."
        )
    resources = {key: float(amount) for key, amount in scaling._resources_per_worker_not_none.items() if amount}
    return Limits(least // replica_size, most // replica_size, resources, placement, labels)


def check_audit(given: ScalingConfig, config: TrainConfig, replica_size: int, strategy: Strategy) -> None:
    """Whether what agents compute can be compared.

    Raises:
        ConfigError: it cannot.
    """
    if not config.deterministic:
        raise ConfigError("Trainer(audit=…): needs TrainConfig(deterministic=True), for it compares bits.")
    if replica_size > 1:
        raise ConfigError(f"Trainer(audit=…): not supported with replica_size={replica_size}. Leave it out.")
    if strategy.worker_state == "mirrored":
        raise ConfigError(
            f"Trainer(audit=…): not supported with {type(strategy).__name__}, whose worker states are on two agents "
            "only. Leave it out."
        )
    scaling: Any = given
    if scaling.max_workers < 2:
        raise ConfigError(
            f"Trainer(audit=…): ScalingConfig(num_workers={given.num_workers}) gives nobody to compare with. Use at "
            "least 2 agents, 3 to find out who is wrong."
        )


def check_run(given: RunConfig, config: TrainConfig) -> None:
    """Read a RunConfig.

    Raises:
        ConfigError: a field cannot be honoured.
    """
    run: Any = given
    if run.callbacks:
        raise ConfigError("RunConfig(callbacks=…): not supported. Follow handle.events() instead.")
    if run.logging_config is not None and run.logging_config != LoggingConfig():
        raise ConfigError("RunConfig(logging_config=…): not supported. Configure the logger 'ray_dnn' instead.")
    keep, plain = run.checkpoint_config or CheckpointConfig(), CheckpointConfig()
    honoured = ("num_to_keep", "checkpoint_score_attribute", "checkpoint_score_order")
    for name in sorted({f.name for f in fields(CheckpointConfig)} - set(honoured)):
        if getattr(keep, name) != getattr(plain, name):
            raise ConfigError(
                f"CheckpointConfig({name}={getattr(keep, name)!r}): not supported. Leave it out; "
                "TrainConfig(checkpoint_every=…) says when checkpoints are written."
            )
    failure, default = run.failure_config or FailureConfig(), FailureConfig()
    for name in _FAILURE_FIELDS:
        value = getattr(failure, name, None)
        if value != getattr(default, name, None):
            raise ConfigError(
                f"FailureConfig({name}={value!r}): not supported. Leave it out; max_failures counts how often there "
                "may be fewer agents than the minimum."
            )
    if not isinstance(failure.max_failures, int) or failure.max_failures < -1:
        raise ConfigError(f"FailureConfig(max_failures={failure.max_failures!r}): must be -1 (no limit), 0 or more.")
    _runtime_env(given, config)


def _runtime_env(given: RunConfig, config: TrainConfig) -> dict[str, Any]:
    """The agents' runtime environment: the user's, with the variables of the numerics profile."""
    run: Any = given
    runtime_env = dict(run.worker_runtime_env or {})
    variables = dict(runtime_env.get("env_vars", {}))
    Network.of({PORTS: variables.get(PORTS, "")})
    needed = environment(config)
    for name in set(variables) & set(needed):
        if variables[name] != needed[name]:
            raise ConfigError(
                f"RunConfig(worker_runtime_env): env_vars has {name}={variables[name]!r}, but the job's numerics need "
                f"{needed[name]!r}. Leave it out; TrainConfig(num_threads, cpu_isa) set it."
            )
    return runtime_env | {"env_vars": variables | needed}
