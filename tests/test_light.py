"""Agents start without torch's compiler, and whoever needs it gets it."""

import os
import subprocess
import sys

import pytest

from ray_dnn.config import TrainConfig
from ray_dnn.engine.numerics import environment

OPTIMIZE = """
import sys, torch
from ray_dnn.config import TrainConfig
from ray_dnn.engine import numerics
from ray_dnn.engine.light import postpone_compiler
postpone_compiler()
numerics.enforce(TrainConfig(batch_size=1, epochs=1))
assert torch.are_deterministic_algorithms_enabled()
model = torch.nn.Linear(3, 1)
for kind in (torch.optim.AdamW, torch.optim.SGD):
    optimizer = kind(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert not hasattr(sys.modules["torch._dynamo"], "__file__")  # as inspect.getmodule asks
assert "sympy" not in sys.modules, "the compiler was loaded"
"""
USES = {
    "compile": "torch.compile(model, backend='eager')(torch.ones(2, 3))",
    "submodule": "import torch._dynamo.config; torch._dynamo.config.verbose",
    "attribute": "torch._dynamo.reset()",
    "from": "from torch._dynamo import reset; reset()",
    "checkpoint": "from torch.utils.checkpoint import checkpoint as c; c(model, torch.ones(2, 3), use_reentrant=False)",
}


@pytest.mark.parametrize("use", USES)
def test_the_compiler_is_loaded_when_it_is_needed_and_not_before(use: str) -> None:
    code = f"{OPTIMIZE}\n{USES[use]}\nassert 'sympy' in sys.modules"
    variables = os.environ | environment(TrainConfig(batch_size=1, epochs=1))
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
