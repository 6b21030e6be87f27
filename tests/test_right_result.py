"""The bits are not only equal: they are what ordinary PyTorch computes in one process with whole batches.

Compared in float64, where any difference in the mathematics shows and rounding does not.
"""

from functools import partial

import pytest
import torch

from ray_dnn.engine import codec
from tests import plain, zoo
from tests.local import Make, call, run

# Each virtual worker normalises its own rows; with one worker these are the rows of the batch.
_PER_WORKER = ("batch_norm", "batch_norm_cumulative", "channels_last", "counting_buffers")
_WHOLE = (
    "adamw_mlp",
    "sgd_momentum",
    "parameter_groups",
    "clipping",
    "last_batch_of_one_row",
    "many_epochs",
    "small_windows",
    "microbatches",
    "nan_row_is_skipped",
    "transposed_parameters",
    "lstm",
    "tied_weights",
    "embedding_bag",
    "parametrizations",
    "frozen_parameters",
    "sometimes_unused_parameters",
    "constant_buffers",
    "moving_average",
    "gan",
    "graph_network",
    "groups_made_of_sets",
    "early_stopping",
    "rows_without_weight",
    "gradient_penalty",
)
_LISTED = [name for name in zoo.JOBS if name.startswith(("schedule_", "optimizer_"))]
CASES: dict[str, Make] = {
    **{name: zoo.JOBS[name] for name in (*_WHOLE, *_LISTED)},
    **{name: partial(zoo.with_workers, 1, zoo.JOBS[name]) for name in _PER_WORKER},
    **{
        f"channels_last_fused_{name}": partial(zoo.with_workers, 1, partial(zoo.channels_last_fused, name))
        for name in ("adam", "sgd", "adagrad")
    },
    **{f"language_model_{name}": partial(zoo.language_model, name, 0.0) for name in zoo.LANGUAGE_MODELS},
}


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_one_process_with_the_whole_batch(name: str) -> None:
    make = partial(zoo.of_dtype, torch.float64, CASES[name])
    expected = codec.decode(call(make(), plain.train, make))
    got = run(make, {0: 2})
    close_to = 1e-5 if name == "language_model_llama" else 1e-9  # Llama normalises in float32 whatever its precision
    for report, losses in zip(got.reports, expected["losses"], strict=True):
        mine = [report.metrics["loss" if len(losses) == 1 else f"{key}/loss"] for key in losses]
        assert mine == pytest.approx(list(losses.values()), rel=close_to, nan_ok=True)
    for tensor_name, tensor in expected["tensors"].items():
        torch.testing.assert_close(got.tensors[tensor_name], tensor, rtol=close_to, atol=close_to / 100, equal_nan=True)
