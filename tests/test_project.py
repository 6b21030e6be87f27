"""What holds for the checkout as a whole: the cluster file, the pins, and what no file may contain."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster_file() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def pins() -> dict[str, str]:
    """Package name -> version. Every line of constraints.txt that is no comment has the form name==version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = {line: re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9A-Za-z.]+)", line) for line in lines if line[:1] != "#"}
    assert [line for line, match in matches.items() if not match] == []
    return {canonicalize_name(match[1]): match[2] for match in matches.values() if match}


def test_cluster_file_passes_rays_own_validation(cluster_file: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster_file))


def test_cluster_has_an_on_demand_head_and_up_to_eight_spot_workers(cluster_file: dict[str, Any]) -> None:
    types = cluster_file["available_node_types"]
    head = types.pop(cluster_file["head_node_type"])
    (worker,) = types.values()
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert (worker["min_workers"], worker["max_workers"], cluster_file["max_workers"]) == (0, 8, 8)


def test_cluster_head_starts_with_short_health_checks(cluster_file: dict[str, Any]) -> None:
    (start,) = (command for command in cluster_file["head_start_ray_commands"] if command.startswith("ray start"))
    (option,) = (word for word in shlex.split(start) if word.startswith("--system-config="))
    assert json.loads(option.partition("=")[2]) == {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 3,
    }


def test_cluster_runs_the_pinned_ray(cluster_file: dict[str, Any], pins: dict[str, str]) -> None:
    assert f":{pins['ray']}-" in cluster_file["docker"]["image"]


def test_every_dependency_is_pinned_to_a_version_it_allows(pins: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    requirements = [Requirement(line) for line in lines]
    assert [r.name for r in requirements if canonicalize_name(r.name) not in pins] == []
    assert [str(r) for r in requirements if pins[canonicalize_name(r.name)] not in r.specifier] == []


def files_of_the_project() -> list[Path]:
    """Every file that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_path_of_one_machine_or_a_package_registry() -> None:
    # Put together from pieces, so that this file does not contain what it looks for.
    paths = [str(ROOT) + "/", *("/" + folder + "/" for folder in ("work", "root", "Users"))]
    hosts = ["pypi" + ".org", "python" + "hosted", "npm" + "js"]
    path_pattern = r"(?<![\w.~$}-])(" + "|".join(map(re.escape, paths)) + ")"
    pattern = re.compile(f"{path_pattern}|(?i:{'|'.join(map(re.escape, hosts))})".encode())
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0].decode()}"
        for path in files_of_the_project()
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert found == []
