"""A past step of a run is run again: the same bits, and all that is in it can be looked at."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from jobs_for_tests import build_model, features, loss, trainer
from ray.train import TrainingFailedError
from strategies_for_tests import ErrorFeedback
from torch import nn

from ray_dnn import Seen, load_weights
from ray_dnn.checkpoint import MANIFEST, Manifest, Place
from ray_dnn.engine.looking import Watch, WatchedContributor
from ray_dnn.errors import ConfigError
from ray_dnn.replay import Summary
from ray_dnn.testing import read_ledger
from tests import zoo
from tests.local import contributor

pytestmark = pytest.mark.usefixtures("cluster")

LONG: dict[str, Any] = {"epochs": 3, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of 21 steps, with checkpoints of the steps 5, 10, 15, 20 and 21."""
    path = tmp_path_factory.mktemp("ended")
    trainer(path, 2, config=LONG).fit()
    return path


def files(path: Path) -> list[Path]:
    """All but those of replays."""
    return sorted(p for p in path.rglob("*") if "replay-" not in str(p))


def everything(seen: Seen) -> dict[str, Any]:
    """All that can be seen, and the gradient as it is computed from it."""
    model, (batch,) = seen.model, seen.batches
    model.zero_grad()
    (micro,) = batch.microbatches
    return vars(seen) | {"again": micro.data, "model": {n: p.detach().clone() for n, p in model.named_parameters()}}


def test_a_step_is_run_again_from_the_checkpoint_before(path: Path) -> None:
    job = trainer(path, (1, 4), config=LONG)
    before = files(path)
    again = job.replay(19, everything, ["0", "*.nothing", "4"])
    assert (again.began, again.same_bits, again.differences, again.elsewhere) == (15, True, [], [])
    line = read_ledger(str(path / "run")).lines[19]
    assert again.metrics == line.metrics
    assert [seen["worker"] for seen in again.seen] == [w for w, rows in enumerate(line.rows) if rows]
    for seen in again.seen:
        rows = seen["rows"]
        assert rows["row"].to_pylist() == seen["row_ids"].tolist()
        assert seen["again"]["y"].tolist() == rows["y"].to_pylist()
        (first,), (last,) = seen["activations"]["0"], seen["activations"]["4"]
        weight, bias = seen["model"]["0.weight"], seen["model"]["0.bias"]
        assert torch.allclose(first, torch.nn.functional.linear(features(seen["again"]), weight, bias))
        logits = torch.nn.functional.cross_entropy(last, seen["again"]["y"])
        assert seen["metrics"]["loss"] == pytest.approx(float(logits))
        assert seen["gradients"].keys() == dict(build_model().named_parameters()).keys()
        # Of the last layer it can be told from what the model returned.
        wanted = (torch.softmax(last, 1) - torch.nn.functional.one_hot(seen["again"]["y"], 2)).mean(0)
        assert torch.allclose(seen["gradients"]["4.bias"], wanted, atol=1e-6)
    # Nothing of the run has changed.
    assert files(path) == before
    after = load_weights(path / "run" / "checkpoint-0001-000000020")
    mine = load_weights(again.checkpoint)
    assert all(torch.equal(mine[name], after[name]) for name in after)


def copied(path: Path, to: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(path / "run", to / "run", ignore=shutil.ignore_patterns("replay-*")))


def change(run: Path, step: int, edit: Callable[[dict[str, Any]], None]) -> None:
    """Have the ledger say something else of a step."""
    ledger = run / "ledger-0001.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    edit(next(line for line in lines if line.get("step") == step))
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def move_elsewhere(run: Path) -> None:
    """Have all checkpoints say that they were made on another machine."""
    for manifest in run.glob(f"*/{MANIFEST}"):
        read = Manifest.read(Place.of(manifest.parent))
        job = read.job | {"the agents' cpu_capability": "SVE256"}
        manifest.write_bytes(replace(read, job=job).to_json())


def test_without_a_usable_checkpoint_before_it_is_run_again_from_the_beginning(path: Path, tmp_path: Path) -> None:
    run = copied(path, tmp_path)
    (run / "checkpoint-0001-000000005" / "state.head").write_bytes(b"")
    again = trainer(tmp_path, 1, config=LONG).replay(6)
    assert (again.began, again.same_bits) == (0, True)
    line = read_ledger(str(path / "run")).lines[6]
    assert all(isinstance(seen, Summary) for seen in again.seen)
    assert sum(seen.metrics["loss"] * len(seen.row_ids) for seen in again.seen) / sum(line.rows) == pytest.approx(
        line.metrics["loss"], rel=1e-5
    )
    assert all(seen.norm > 0 and seen.largest in dict(build_model().named_parameters()) for seen in again.seen)
    assert "step 6, run again from the beginning: the same bits" in again.text()


def test_what_differs_from_the_record_is_said(path: Path, tmp_path: Path) -> None:
    run = copied(path, tmp_path)
    change(run, 18, lambda line: line["metrics"].update(loss=line["metrics"]["loss"] * (1 + 1e-6)))
    change(run, 17, lambda line: line["digests"].__setitem__(0, 1))
    kept = run / "checkpoint-0001-000000020"
    read = Manifest.read(Place.of(kept))
    wrong = read.files | {"model.safetensors": read.files["state.head"]}
    (kept / MANIFEST).write_bytes(replace(read, files=wrong).to_json())
    again = trainer(tmp_path, 1, config=LONG).replay(19)
    assert not again.same_bits
    rows, loss, weights = again.differences
    assert rows.startswith("step 17, the numbers of rows")
    assert loss.startswith("step 18, loss")
    assert "model.safetensors is another" in weights
    assert "it differs from what is on record" in again.text()


def test_on_another_kind_of_machine_it_is_the_same_within_the_tolerance(path: Path, tmp_path: Path) -> None:
    run = copied(path, tmp_path)
    move_elsewhere(run)
    change(run, 12, lambda line: line["metrics"].update(loss=line["metrics"]["loss"] * (1 + 1e-5)))
    job = trainer(tmp_path, 1, config=LONG)
    again = job.replay(14)
    assert (again.same_bits, again.differences) == (False, [])
    assert again.elsewhere == ["the agents' cpu_capability: SVE256 then, AVX2 now"]
    assert "the same to a relative 0.001, on another kind of machine" in again.text()
    change(run, 12, lambda line: line["metrics"].update(loss=line["metrics"]["loss"] * 1.01))
    (wrong,) = job.replay(14).differences
    assert wrong.startswith("step 12, loss")
    # To go on with training there is another matter.
    with pytest.raises(TrainingFailedError, match="cpu_capability"):
        job.fit()


@pytest.mark.parametrize(
    ("step", "config", "name", "match"),
    [
        (22, {}, "run", r"replay\(22\): .* has the steps 0 to 20 on record"),
        (-1, {}, "run", r"replay\(-1\)"),
        (3, {"seed": 1}, "run", r"another job.*seed\): 0 then, 1 now"),
        (3, {}, "other", "has no step on record"),
    ],
    ids=["too late", "below 0", "another job", "no run"],
)
def test_what_cannot_be_run_again_is_refused(
    path: Path, step: int, config: dict[str, Any], name: str, match: str
) -> None:
    job = trainer(path, 1, config=LONG | config)
    job = replace(job, run_config=replace(job.run_config, name=name))
    before = sorted(path.rglob("*"))
    with pytest.raises(ConfigError, match=match):
        job.replay(step)
    assert sorted(path.rglob("*")) == before


def fails(seen: Seen) -> None:
    raise ArithmeticError(f"of worker {seen.worker}")


def test_what_look_raises_is_the_users(path: Path) -> None:
    with pytest.raises(TrainingFailedError) as caught:
        trainer(path, 1, config=LONG).replay(20, fails)
    assert isinstance(caught.value.__cause__, ArithmeticError)


def poisoned(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Not a number for the row 150."""
    return loss(model, batch) * torch.where((batch["row"] == 150).any(), float("nan"), 1.0)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_the_step_that_a_run_failed_in_can_be_looked_at(tmp_path: Path, nonfinite: str) -> None:
    job = trainer(tmp_path, 1, {"loss": poisoned}, {"nonfinite": nonfinite, "steps": 7, "epochs": None})
    if nonfinite == "stop":
        with pytest.raises(TrainingFailedError, match="NonFiniteError"):
            job.fit()
    else:
        job.fit()
    lines = read_ledger(str(tmp_path / "run")).lines
    step = len(lines) if nonfinite == "stop" else next(line.step for line in lines if line.skipped)
    again = job.replay(step)
    assert len(again.seen) == 5  # each once, though contributions are computed once more to find the wrong one
    (wrong,) = [seen for seen in again.seen if math.isnan(seen.metrics["loss"])]
    assert 150 in wrong.row_ids
    assert again.differences == []
    if nonfinite == "stop":
        assert again.error is not None
        assert again.error.startswith("NonFiniteError")
        assert again.checkpoint is None
    else:
        assert again.error is None


def test_states_of_virtual_workers_are_taken_from_the_checkpoint(tmp_path: Path) -> None:
    job = trainer(tmp_path, 2, config={"checkpoint_every": 5}, strategy=ErrorFeedback())
    job.fit()
    again = job.replay(11)
    assert (again.began, again.same_bits) == (10, True)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import ray
from jobs_for_tests import trainer

ray.init(address={address!r}, log_to_driver=False)
try:
    trainer(Path(sys.argv[1]), 2, config={{"epochs": 3, "checkpoint_every": 5}}).fit()
    print("never reached")
except Exception:
    print("trained after all")
    raise
"""


def test_the_command_runs_the_script_that_trained(path: Path, tmp_path: Path) -> None:
    script, look = tmp_path / "train.py", tmp_path / "look.py"
    address = ray.get_runtime_context().gcs_address
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), address=address))
    look.write_text("def bias(seen):\n    return {'bias': seen.gradients['4.bias'], 'out': seen.activations['4']}\n")

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "ray_dnn", "replay", *words], capture_output=True, text=True)

    plain = command("18", str(script), str(path))
    assert plain.returncode == 0, plain.stderr
    assert "step 18, run again from the checkpoint of step 15: the same bits as on record" in plain.stdout
    assert "virtual worker 4" in plain.stdout
    assert "never reached" not in plain.stdout
    assert "trained after all" not in plain.stdout
    told = command("--json", "--look", f"{look}:bias", "--activations", "4", "18", str(script), str(path))
    found = json.loads(told.stdout)
    assert (found["same_bits"], len(found["seen"])) == (True, 5)
    assert all(len(seen["bias"]) == 2 and len(seen["out"][0][0]) == 2 for seen in found["seen"])
    late = command("99", str(script), str(path))
    assert (late.returncode, "steps 0 to 20" in late.stderr) == (2, True)


@pytest.mark.parametrize(
    "name", ["adamw_mlp", "gan", "language_model_bert", "recomputed_layers", "lstm", "bf16_autocast"]
)
def test_to_be_looked_at_changes_no_bit(name: str) -> None:
    job = zoo.JOBS[name]()
    plain, seen = contributor(job), []
    watched = contributor(job)
    watched = WatchedContributor(watched.state, job.strategy, watched.source, Watch(seen.append, 0, ("*",)))
    for phase in plain.state.phases:
        plain.state.phase = watched.state.phase = phase
        for worker in range(2):
            one, other = plain.new_leaf(phase), watched.new_leaf(phase)
            plain.contribute(worker, plain.strategy.init_worker(plain.state, worker), one)
            watched.contribute(worker, plain.strategy.init_worker(watched.state, worker), other)
            assert all(torch.equal(a, b) for a, b in zip(one.vector, other.vector, strict=True))
    assert [(s.phase, s.worker) for s in seen] == [(phase, worker) for phase in plain.state.phases for worker in (0, 1)]
    assert all(s.activations for s in seen)
