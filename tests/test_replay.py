"""A past step of a run is run again: the same bits, and all that is in it can be looked at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_for_tests import build_model, features, trainer

from ray_dnn import load_weights
from ray_dnn.replay import Seen
from ray_dnn.testing import read_ledger

pytestmark = pytest.mark.usefixtures("cluster")

LONG: dict[str, Any] = {"epochs": 3, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of 21 steps, with checkpoints of the steps 5, 10, 15, 20 and 21."""
    path = tmp_path_factory.mktemp("ended")
    trainer(path, 2, config=LONG).fit()
    return path


def everything(seen: Seen) -> dict[str, Any]:
    """All that can be seen, and the gradient as it is computed from it."""
    model, (batch,) = seen.model, seen.batches
    model.zero_grad()
    (micro,) = batch.microbatches
    return vars(seen) | {"again": micro.data, "model": {n: p.detach().clone() for n, p in model.named_parameters()}}


def test_a_step_is_run_again_from_the_checkpoint_before(path: Path) -> None:
    job = trainer(path, (1, 4), config=LONG)
    before = sorted(p for p in path.rglob("*") if "replay-" not in str(p))
    again = job.replay(19, everything, ["0", "*.nothing", "4"])
    assert (again.began, again.same_bits, again.differences, again.elsewhere) == (15, True, [], [])
    line = read_ledger(str(path / "run")).lines[19]
    assert again.metrics == line.metrics
    assert [seen["worker"] for seen in again.seen] == [w for w, rows in enumerate(line.rows) if rows]
    for seen in again.seen:
        rows = seen["rows"]
        assert rows["row"].to_pylist() == seen["row_ids"].tolist()
        assert torch.equal(seen["again"]["y"], torch.from_numpy(rows["y"].to_numpy()))
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
    assert sorted(p for p in path.rglob("*") if "replay-" not in str(p)) == before
    after = load_weights(path / "run" / "checkpoint-0001-000000020")
    mine = load_weights(again.checkpoint)
    assert all(torch.equal(mine[name], after[name]) for name in after)
