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

from jobs import language_model

ROOT = Path(__file__).parent.parent


CLUSTERS = [Path("cluster.yaml"), Path("docs/clusters/gcp.yaml"), Path("docs/clusters/on-premise.yaml")]


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return loaded


@pytest.fixture
def cluster_file() -> dict[str, Any]:
    return load(Path("cluster.yaml"))


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    return load(Path("docs/clusters/kubernetes.yaml"))


@pytest.fixture
def pins() -> dict[str, str]:
    """Package name -> version. Every line of constraints.txt that is no comment has the form name==version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = {line: re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9A-Za-z.]+)", line) for line in lines if line[:1] != "#"}
    assert [line for line, match in matches.items() if not match] == []
    return {canonicalize_name(match[1]): match[2] for match in matches.values() if match}


@pytest.mark.parametrize("path", CLUSTERS, ids=str)
def test_cluster_files_pass_rays_own_validation(path: Path) -> None:
    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize("path", CLUSTERS[:2], ids=str)
def test_cloud_clusters_have_an_on_demand_head_and_up_to_eight_spot_workers(path: Path) -> None:
    cluster = load(path)
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    (worker,) = types.values()
    assert "spot" not in str(head["node_config"]).lower()
    assert "spot" in str(worker["node_config"]).lower()
    assert (worker["min_workers"], worker["max_workers"], cluster["max_workers"]) == (0, 8, 8)


HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.mark.parametrize("path", CLUSTERS, ids=str)
def test_cluster_heads_start_with_short_health_checks(path: Path) -> None:
    (start,) = (command for command in load(path)["head_start_ray_commands"] if "ray start" in command)
    (option,) = (word for word in shlex.split(start) if word.startswith("--system-config="))
    assert json.loads(option.partition("=")[2]) == HEALTH_CHECKS


def test_all_clusters_run_alike(cluster_file: dict[str, Any], kubernetes: dict[str, Any]) -> None:
    """What every process sees is the same on each kind of cluster."""
    variables = {
        word for option in cluster_file["docker"]["run_options"] for word in re.findall(r"RAY_\w+=\w+", option)
    }
    for path in CLUSTERS[1:]:
        assert variables <= set(re.findall(r"RAY_\w+=\w+", (ROOT / path).read_text()))
    spec = kubernetes["spec"]["rayClusterSpec"]
    assert json.loads(spec["headGroupSpec"]["rayStartParams"]["system-config"]) == HEALTH_CHECKS
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert variables <= {f"{entry['name']}={entry.get('value')}" for entry in container["env"]}


def test_clusters_run_the_pinned_ray(kubernetes: dict[str, Any], pins: dict[str, str]) -> None:
    for path in CLUSTERS[:2]:
        assert f":{pins['ray']}-" in load(path)["docker"]["image"]
    assert kubernetes["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    assert f"rayproject/ray:{pins['ray']}-" in (ROOT / "docs/clusters/kubernetes.yaml").read_text()


def test_the_kubernetes_job_exists(kubernetes: dict[str, Any]) -> None:
    assert (kubernetes["apiVersion"], kubernetes["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(kubernetes["spec"]["entrypoint"].partition(" && ")[2])
    assert words[:2] == ["python", "jobs/language_model.py"]
    language_model.build_parser().parse_args(words[2:])


def test_every_dependency_is_pinned_to_a_version_it_allows(pins: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    requirements = [r for r in map(Requirement, lines) if canonicalize_name(r.name) != project["name"]]
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
