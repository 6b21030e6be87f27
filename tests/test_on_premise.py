"""The cluster file for machines that are there already, used as its first lines say, on hosts in namespaces."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.silence_runs import used, where
from tests.hosts import HOME, PATHS, ROOT, Host, Site, site, wait_for

FILE = Path("docs/clusters/on-premise.yaml")
CHECKOUT = ("ray_dnn", "jobs", "docs/clusters", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
PYTHON = f"python3.{sys.version_info.minor}"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
FLAGS = "--virtual-workers 8 --layers 1 --width 32 --context 32 --batch 16 --steps 400 --sample 0"
MINUTE = 60.0


@pytest.fixture
def premises(tmp_path: Path) -> Iterator[Site]:
    """A laptop and four machines, one of which cannot be reached."""
    with site(tmp_path, "laptop", "head", "one", "two", "late", ssh=True) as made:
        furnish(made)
        made["late"].cut()
        yield made


def furnish(made: Site) -> None:
    """Give hosts what the file wants of machines: Python 3.11, and a package index that has all they need.

    There is no index; instead, the environments that are going to be made see the packages of this one.
    """
    checkout, programs = made.folder / "checkout", made.folder / "programs"
    for name in CHECKOUT:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    programs.mkdir()
    (programs / "python3.11").symlink_to(Path(sys.base_prefix) / "bin" / PYTHON)
    for host in made.hosts.values():
        home = host.tmp / "home"
        shutil.copy(made.folder / "key", home / ".ssh" / "id_ed25519")
        (home / ".bash_profile").write_text(
            f"export PATH={programs}:{PATHS} PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 "
            "RAY_USAGE_STATS_ENABLED=0 AUTOSCALER_UPDATE_INTERVAL_S=1\n"
        )
        packages = home / "ray-dnn-env" / "lib" / PYTHON / "site-packages"
        packages.mkdir(parents=True)
        (packages / "shared.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")
        for name, module in (("ray", "ray.scripts.scripts"), ("pip", "pip._internal.cli.main")):
            script = home / "ray-dnn-env" / "bin" / name  # pip writes none for what it finds installed
            script.parent.mkdir(exist_ok=True)
            script.write_text(
                f"#!{HOME}/ray-dnn-env/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
            )
            script.chmod(0o755)


def edited(made: Site) -> dict[str, Any]:
    """The file, its lines marked EDIT edited and nothing else."""
    cluster: dict[str, Any] = yaml.safe_load((ROOT / FILE).read_text())
    cluster["provider"]["head_ip"] = made["head"].address
    cluster["provider"]["worker_ips"] = [made[name].address for name in ("one", "two", "late")]
    cluster["auth"]["ssh_user"] = "root"
    return cluster


def from_checkout(laptop: Host, *words: str) -> tuple[str, ...]:
    return "env", f"--chdir={laptop.site.folder / 'checkout'}", *words


def submit(made: Site, name: str, agents: str) -> tuple[str, ...]:
    """The command that trains."""
    address = ("--address", "http://127.0.0.1:8265", "--working-dir", ".")
    where = ("--agents", agents, "--storage", str(made.folder / "runs"), "--name", name, str(made.folder / "text"))
    job = ("python", "jobs/language_model.py", *FLAGS.split(), *where)
    return from_checkout(made["laptop"], "ray", "job", "submit", *address, "--", *job)


def status(head: Host) -> str:
    """What the cluster is, in Ray's words."""
    return head.run(f"{HOME}/ray-dnn-env/bin/ray", "status", env=TOKEN)


def bring_up(made: Site) -> None:
    """Follow the file's first lines, up to a job."""
    laptop = made["laptop"]
    (made.folder / "checkout" / FILE).write_text(yaml.safe_dump(edited(made)))
    write_text(made.folder / "text")
    laptop.run("ray", "get-auth-token", "--generate", env=TOKEN)
    laptop.run(*from_checkout(laptop, "ray", "up", "--yes", str(FILE)), env=TOKEN, timeout=2 * MINUTE)
    laptop.popen(*from_checkout(laptop, "ray", "dashboard", str(FILE)), env=TOKEN)
    wait_for("port 8265", lambda: "8265" in laptop.run("ss", "--listening", "--tcp", "--numeric"), MINUTE)
    # Each look is a second's work for the processor that they all start on.
    wait_for("workers", lambda: " 3 local.cluster.node" in status(made["head"]), 4 * MINUTE, pause_s=3.0)


@pytest.mark.timeout(900)  # most of it for a machine that is busy with other things
def test_a_run_on_machines_one_of_which_is_cut_off_and_one_of_which_comes_late(premises: Site) -> None:
    laptop, run, alone = premises["laptop"], premises.folder / "runs" / "run", premises.folder / "runs" / "alone"
    bring_up(premises)
    for name in ("one", "two"):  # three agents are on one of them, so no step is done before all that follows
        premises[name].delay(0.2)

    with (premises.folder / "job.log").open("w") as log:
        job = laptop.popen(*submit(premises, "run", "3:8"), env=TOKEN, stdout=log, stderr=log)
    try:
        wait_for("agents", lambda: sorted(where(run)) == sorted(["head", "one", "two"] * 2), 2 * MINUTE, pause_s=0.3)
        premises["one"].cut()
        wait_for("loss of a host", lambda: "one" not in where(run), MINUTE, pause_s=0.3)
        premises["late"].mend()
        wait_for("host that comes late", lambda: "late" in where(run), 2 * MINUTE, pause_s=0.3)
        for name in ("one", "two"):
            premises[name].delay(0)
        assert job.wait(2 * MINUTE) == 0
    except (TimeoutError, AssertionError, subprocess.TimeoutExpired) as error:
        error.add_note((premises.folder / "job.log").read_text()[-5000:])
        raise

    printed = laptop.run(*submit(premises, "alone", "1"), env=TOKEN, timeout=2 * MINUTE)
    digests = [text[text.index("weights digest") :].split()[2] for text in (printed, Path(log.name).read_text())]
    assert digests[0] == digests[1]
    assert used(run) == used(alone)

    laptop.run(*from_checkout(laptop, "ray", "down", "--yes", str(FILE)), env=TOKEN, timeout=MINUTE)
    for host in premises.hosts.values():
        wait_for(f"end of Ray on {host.name}", lambda host=host: not host.pids("/raylet"), MINUTE)


def write_text(folder: Path) -> None:
    """Some 40 kB in 30 files."""
    folder.mkdir()
    for number in range(30):
        text = "".join(f"the {word} of file {number}\n" for word in ("beginning", "middle", "end") * 20)
        (folder / f"{number}.txt").write_text(text)
