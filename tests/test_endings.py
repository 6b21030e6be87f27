"""However a script ends, it ends its agents and leaves no process behind."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import our_processes, wait_for_exit

from ray_dnn.events import RunInterrupted
from ray_dnn.testing import read_events, read_ledger

SCRIPT = Path(__file__).parent / "endless.py"


@pytest.fixture
def training(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """The endless script, once it reports progress."""
    arguments = [sys.executable, str(SCRIPT), str(tmp_path), *request.param]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored; a script in a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    yield process
    process.kill()
    process.stdout.close()
    process.wait()


@pytest.mark.parametrize(
    ("training", "number", "code"),
    [([], signal.SIGTERM, 128 + signal.SIGTERM), (["init"], signal.SIGINT, 1)],
    ids=["SIGTERM, Ray started by fit()", "Ctrl-C, Ray started by the script"],
    indirect=["training"],
)
def test_a_signal_ends_the_run_and_leaves_nothing(
    training: subprocess.Popen[str], number: int, code: int, tmp_path: Path
) -> None:
    training.send_signal(number)
    rest, _ = training.communicate(timeout=60)
    assert training.returncode == code, rest
    assert "is gone: the run has ended" in rest
    assert not wait_for_exit(set(), seconds=20), our_processes()
    assert [e for e in read_events(str(tmp_path / "run")) if isinstance(e, RunInterrupted)]
    assert read_ledger(str(tmp_path / "run")).lines
