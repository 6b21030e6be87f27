"""What decides what a job learns, in words: the same for the same job, and whatever differs is named."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_dnn import DataParallel, TrainConfig
from ray_dnn.identity import Identity, differences, of_job

CONFIG = TrainConfig(32, epochs=2)


def identity(config: TrainConfig = CONFIG, strategy: object = None, counts: tuple[int, ...] = (5, 7)) -> Identity:
    return of_job(config, strategy or DataParallel(), 1, len(counts), np.array(counts))


class Plain:
    """A strategy whose repr holds its address."""


def test_the_same_job_is_the_same_however_long_it_is_and_whatever_is_written_on_the_way() -> None:
    longer = replace(CONFIG, epochs=None, steps=9, checkpoint_every=3)
    assert differences(identity(), identity(longer)) == []
    assert differences(identity(strategy=Plain()), identity(strategy=Plain())) == []


def test_all_that_differs_is_named() -> None:
    other = replace(CONFIG, seed=5, clip_norm=1.0)
    assert differences(identity(), identity(other, counts=(5, 8))) == [
        "TrainConfig(seed): 0 then, 5 now",
        "TrainConfig(clip_norm): None then, 1.0 now",
        *differences({"datasets['train']": identity()["datasets['train']"]}, identity(counts=(5, 8))),
    ]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_rows_of_units_decide_the_order_so_they_are_compared(one: list[int], other: list[int]) -> None:
    assert (differences(identity(counts=tuple(one)), identity(counts=tuple(other))) == []) == (one == other)
