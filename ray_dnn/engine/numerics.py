"""The numerics profile: everything about a process that changes the bits of a computation.

Measured: 1, 2 and 4 threads, or AVX512 against AVX2 kernels, give other bits for the same training. So the profile is
part of the job. Variables are read when torch loads; therefore they are in the agent's environment from its start.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass

import torch

from ray_dnn.config import TrainConfig
from ray_dnn.engine.device import CPU, describe
from ray_dnn.errors import ConfigError

_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def environment(config: TrainConfig) -> dict[str, str]:
    """The variables that an agent's process must be started with."""
    threads = str(config.num_threads)
    fixed = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MKL_DYNAMIC": "FALSE",
        "OMP_DYNAMIC": "FALSE",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONHASHSEED": "0",
    }
    return fixed | (_AVX2 if config.isa == "avx2" and platform.machine() in ("x86_64", "AMD64") else {})


@dataclass(frozen=True)
class Profile:
    """What is in force on an agent. Agents whose profiles are equal are expected, and by admission proved, to agree."""

    torch: str
    machine: str
    cpu_capability: str
    threads: int
    mkl: bool
    mkldnn: bool
    deterministic: bool
    device: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def enforce(config: TrainConfig, device: torch.device = CPU) -> Profile:
    """Put the profile in force in the calling thread, the one that will compute, and say what came of it.

    Raises:
        ConfigError: the process was started with another environment.
    """
    for name, value in environment(config).items():
        if os.environ.get(name) != value:
            raise ConfigError(
                f"{name}={os.environ.get(name)!r} in an agent's environment, but the job's numerics need {value!r}. "
                "Do not set it in runtime_env."
            )
    torch.set_num_threads(config.num_threads)
    torch.set_flush_denormal(False)
    # As use_deterministic_algorithms, which would load the compiler to tell it too.
    torch.set_deterministic_debug_mode("error" if config.deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Attention in eval mode would take another path, which fails under autocast.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = config.deterministic
    return Profile(
        torch=torch.__version__,
        machine=platform.machine(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        mkl=torch.backends.mkl.is_available(),
        mkldnn=torch.backends.mkldnn.is_available(),
        deterministic=config.deterministic,
        device=describe(device),
    )


def without_kernel(error: Exception) -> str | None:
    """The operation that has no deterministic kernel where it was to be computed, if this is torch saying so."""
    found = re.match(r"(.+?) does not have a deterministic implementation", str(error))
    return found[1] if found and isinstance(error, RuntimeError) else None
