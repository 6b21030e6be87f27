"""The soak: that it runs, strikes, and finds nothing."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.soak", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_random_faults_change_no_bit_and_no_row() -> None:
    done = soak("--faults", "5", "--steps", "150", "--job", "convnet", "--agents", "1..3", "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "digests: all equal; ledgers: all equal, every row exactly once an epoch" in done.stdout
    struck = re.search(r"^\| all \| (\d+) \|", done.stdout, re.MULTILINE)
    assert struck is not None
    assert int(struck[1]) >= 5
    assert "gone without a fault" not in done.stdout


def test_a_soak_that_could_lose_all_agents_is_refused() -> None:
    done = soak("--agents", "1")
    assert done.returncode == 2
    assert "'1' is not MIN..MAX with a MAX of 2 or more" in done.stderr
