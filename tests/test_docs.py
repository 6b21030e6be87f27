"""The documentation is true: its code runs, its commands and links lead somewhere, and it names all that is public."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import typer
from click import Command
from conftest import our_processes, wait_for_exit
from ray.scripts.scripts import cli as ray_cli
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback

import ray_dnn
from jobs import image_classifier, language_model
from ray_dnn import Audit, Patience, TrainConfig, Trainer, TrainSpec, errors, testing
from ray_dnn.cli import app
from ray_dnn.engine.numerics import environment
from ray_dnn.errors import ConfigError
from ray_dnn.events import KINDS
from ray_dnn.network import PORTS
from ray_dnn.phases import Phase
from ray_dnn.plan import lay, step_s

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of the page that it starts at (from 1), and its text."""

    language: str
    line: int
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    every = [Block(m[1], text[: m.start(2)].count("\n") + 1, m[2]) for m in found]
    return [block for block in every if block.language == language]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_code_of_a_page_runs_as_one_script(page: Path, tmp_path: Path) -> None:
    """As on a laptop: the script starts Ray by itself."""
    script = tmp_path / "page.py"
    lines: list[str] = []
    for block in blocks(page, "python"):
        lines += [""] * (block.line - 1 - len(lines))  # so that the line numbers of a traceback are the page's
        lines += block.text.splitlines()
    script.write_text("\n".join(lines) + "\n")
    before = set(our_processes())
    ran = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},  # nothing of the tests is there
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, f"{name_of(page)} failed; page.py has the page's line numbers.\n{ran.stdout[-6000:]}"
    assert not wait_for_exit(before, seconds=10)


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "bash"):
        for line in block.text.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name_of)
def test_commands_name_targets_scripts_and_flags_that_exist(page: Path) -> None:
    for words in commands(page):
        check_command(words)


def check_command(words: list[str]) -> None:
    match words:
        case ["make", target, *variables]:
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            for variable in variables:
                name, _, value = variable.partition("=")
                assert name == "ARGS"
                check_flags(shlex.split(value))
        case ["python", "jobs/language_model.py", *flags]:
            check_flags(flags)
        case ["python", "jobs/image_classifier.py", *flags]:
            image_classifier.build_parser().parse_args(flags)
        case ["ray-dnn", *words]:
            check_ours(words)
        case ["ray", "exec", "cluster.yaml", remote]:
            folder, _, command = remote.partition(" && ")
            mounted = re.findall(r"^  (~/\S+): \.$", (ROOT / "cluster.yaml").read_text(), re.MULTILINE)
            assert folder == f"cd {mounted[0]}"
            check_command(shlex.split(command))
        case ["export", "RAY_AUTH_MODE=token"]:
            pass
        case ["ray", *rest]:
            check_ray(ray_cli, rest)
        case _:
            pytest.fail(f"do not know how to check {words}")


def check_flags(flags: list[str]) -> None:
    """Flags of the language model. Its parser ends the test with SystemExit where one is wrong."""
    if flags == ["--help"]:
        assert "--help" in language_model.build_parser().format_help()
    else:
        language_model.build_parser().parse_args(flags)


def check_ours(words: list[str]) -> None:
    """A command of ours: its options exist, and what follows them is a script's command."""
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    given = command.make_context(words[0], list(words[1:])).params
    check_command(["python", str(given["script"]), *given["arguments"]])


def check_ray(command: Command, words: list[str]) -> None:
    """A command of Ray's, by what its own parser declares."""
    while subcommands := getattr(command, "commands", None):
        command, words = subcommands[words[0]], words[1:]
    if "--" in words:
        at = words.index("--")
        check_command(words[at + 1 :])
        words = words[:at]
    assert {word for word in words if word.startswith("-")} <= {name for p in command.params for name in p.opts}
    assert all((ROOT / word).exists() for word in words if word.endswith(".yaml"))


# -- references --------------------------------------------------------------------------------------------------------


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.is_relative_to(ROOT) or not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tests_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for file, test in re.findall(r"\b(test_\w+\.py)::(\w+)", text):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file
    named = re.findall(r"(?<![\w/])((?:ray_dnn|tests|jobs|docs)/[\w/]+\.\w+)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


# -- completeness ------------------------------------------------------------------------------------------------------


def code_spans(text: str) -> str:
    return "\n".join(re.findall(r"`[^`\n]+`", text))


def missing(names: Iterator[str] | list[str], *pages: str) -> list[str]:
    """The names that no piece of code in the prose of these pages holds."""
    spans = "\n".join(code_spans(prose(ROOT / page)) for page in pages)
    return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", spans)]


def test_everything_public_is_mentioned() -> None:
    everywhere = [name_of(page) for page in PAGES]
    assert missing(ray_dnn.__all__, *everywhere) == []
    handle = [name for name, _ in inspect.getmembers(ray_dnn.Handle, inspect.isfunction) if name[0] != "_"]
    assert missing(handle, "docs/tutorial.md") == []
    assert missing(testing.__all__, "docs/tutorial.md", "docs/operations.md") == []


@pytest.mark.parametrize("kind", [Trainer, TrainSpec, TrainConfig])
def test_every_field_of_a_job_is_in_the_tables(kind: Any) -> None:
    assert missing([f.name for f in fields(kind)], "docs/tutorial.md") == []


@pytest.mark.parametrize("kind", [Patience, Audit])
def test_every_limit_is_in_the_tables_with_its_default(kind: Any) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    told = {name: float(default) for name, default in rows}
    assert told.items() >= {f.name: float(f.default) for f in fields(kind)}.items()


def test_every_phase_that_a_fault_can_strike_at_is_in_the_table() -> None:
    told = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE)
    assert {phase.value for phase in Phase} - set(told) == {"ready", "gathering"}  # which are nobody's turn


def test_every_event_error_and_variable_is_in_the_tables() -> None:
    assert missing(list(KINDS), "docs/operations.md") == []
    kinds = [name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert missing(kinds, "docs/operations.md") == []
    variables = [*environment(TrainConfig(batch_size=1, epochs=1, cpu_isa="avx2")), "RAY_DNN_LOG_LEVEL", PORTS]
    assert missing(variables, "docs/operations.md") == []
    assert missing(list(environment(TrainConfig(batch_size=1, epochs=1))), "docs/guarantees.md") == []


# -- what Ray Train's configurations mean ------------------------------------------------------------------------------

CONFIGS = {kind.__name__: kind for kind in (ScalingConfig, RunConfig, FailureConfig, CheckpointConfig)}


@dataclass(frozen=True)
class Verdict:
    """A line of the tables: what becomes of a value of a field."""

    field: str
    example: str
    verdict: str


def verdicts() -> list[Verdict]:
    found: list[Verdict] = []
    rows = re.findall(r"^\| (?:`(\w+)` )?\| `(\w+\(.*\))` \| (.*) \|$", (ROOT / "docs/operations.md").read_text(), re.M)
    for field, example, verdict in rows:
        found.append(Verdict(field or found[-1].field, example, verdict))
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_rays_configurations_has_a_verdict(kind: str) -> None:
    told = {v.field for v in verdicts() if v.example.startswith(kind) or kind not in v.example}
    assert {f.name for f in fields(CONFIGS[kind])} <= told


@pytest.mark.parametrize("line", verdicts(), ids=lambda line: line.example)
def test_the_verdict_on_a_value_is_true(line: Verdict) -> None:
    names = CONFIGS | {"LoggingConfig": LoggingConfig, "UserCallback": UserCallback, "pyarrow": pyarrow}
    if line.verdict.startswith("refused by Ray"):
        with pytest.raises((DeprecationWarning, ValueError)):
            eval(line.example, names)
        return
    given = eval(line.example, names)
    match given:
        case ScalingConfig():
            configs: dict[str, Any] = {"scaling_config": given}
        case RunConfig():
            configs = {"run_config": given}
        case FailureConfig():
            configs = {"run_config": RunConfig(failure_config=given)}
        case CheckpointConfig():
            configs = {"run_config": RunConfig(checkpoint_config=given)}
    job = TrainSpec(model=dict, optimizer=dict, loss=dict)  # never called

    def make() -> Trainer:
        return Trainer(job, {"train": None}, TrainConfig(batch_size=8, epochs=1), **configs)

    if line.verdict.startswith("refused"):
        with pytest.raises(ConfigError, match=line.field):
            make()
    else:
        assert re.match("honoured|see below", line.verdict)
        make()


def test_the_divisions_in_the_table_are_those_that_are_laid() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| `virtual_workers=(\d+)` \| ([\d, ]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert rows
    speeds = [3.0, 3.0, 1.0, 1.0]
    for workers, counts, times in rows:
        bounds = lay(0, int(workers), speeds).bounds
        assert [b - a for a, b in pairwise(bounds)] == [int(count) for count in counts.split(",")]
        assert f"{step_s(bounds, speeds) / (int(workers) / sum(speeds)):.2f}" == times
