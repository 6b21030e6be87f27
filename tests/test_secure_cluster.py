"""On a cluster that uses TLS and a token all goes as without, and strangers come to nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from certificates import Authority
from conftest import our_processes, wait_for_exit
from jobs_for_tests import accuracy, assert_every_row_once, digest, trainer
from secure import CONFIG

from ray_dnn.network import AUTHORITY, CERTIFICATE, KEY, PORTS, USE_TLS

TESTS = Path(__file__).parent


@pytest.mark.usefixtures("cluster")
def test_a_run_over_tls_with_a_death_on_the_way_gives_the_same_bits_and_lets_nobody_in(tmp_path: Path) -> None:
    undisturbed = trainer(tmp_path / "plain", 1, {"evaluate": accuracy}, CONFIG).fit()
    files = Authority(tmp_path / "authority").sign([ray.util.get_node_ip_address(), "127.0.0.1"])
    first = 20_000 + os.getpid() % 400 * 20  # of its own, for the ports in the range are taken for agents
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        USE_TLS: "1",
        CERTIFICATE: files.certificate,
        KEY: files.key,
        AUTHORITY: files.authority,
        PORTS: f"{first}-{first + 19}",
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
    }
    before = set(our_processes())
    ran = subprocess.run(
        [sys.executable, TESTS / "secure.py", tmp_path],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["digest"] == digest(undisturbed)
    assert_every_row_once(found["path"], 4)
    assert found["agents"] == 2
    assert found["elsewhere"] == []
    assert all("cut off" in answer for answer in found["answers"]), found["answers"]
    assert not wait_for_exit(before, seconds=10)
