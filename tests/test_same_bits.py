"""The promise: the same bits for any number of agents and any joins and leaves; and they are the right ones."""

import functools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import zoo
from tests.local import Run, assert_same, close, run

_CHEAP = [name for name in zoo.JOBS if name.startswith(("schedule_", "optimizer_", "channels_last_fused_"))]
_FULL = [name for name in zoo.JOBS if name not in _CHEAP]
SIZES = (2, 3, 4, 5, 8)
SCRIPTS = ({0: 1, 2: 4, 3: 2, 5: 5, 7: 1, 8: 3}, {0: 3, 1: 3, 2: 1, 3: 8, 4: 6, 5: 6})


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> Iterator[None]:
    yield
    close()


@functools.cache
def alone(name: str) -> Run:
    """The job on one agent."""
    return run(zoo.JOBS[name], {0: 1})


@pytest.mark.parametrize("name", _FULL)
def test_any_number_of_agents_computes_the_same_bits(name: str) -> None:
    workers = zoo.JOBS[name]().config.virtual_workers
    for replicas in sorted({min(size, workers) for size in SIZES}):
        assert_same(alone(name), run(zoo.JOBS[name], {0: replicas}))


@pytest.mark.parametrize("name", _FULL)
@pytest.mark.parametrize("script", SCRIPTS, ids=("from_one", "from_three"))
def test_joins_and_leaves_change_no_bit(name: str, script: dict[int, int]) -> None:
    assert_same(alone(name), run(zoo.JOBS[name], script))


@pytest.mark.parametrize("name", _CHEAP)
def test_optimizers_and_schedules_move_with_every_bit(name: str) -> None:
    assert_same(alone(name), run(zoo.JOBS[name], {0: 2, 2: 3, 3: 1, 5: 3, 6: 3}))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.sampled_from(["adamw_mlp", "moving_average", "counting_buffers", "mirrored_worker_states"]),
    st.dictionaries(st.integers(1, 9), st.integers(1, 8), max_size=5),
    st.integers(1, 8),
)
def test_any_script_computes_the_same_bits(name: str, later: dict[int, int], first: int) -> None:
    assert_same(alone(name), run(zoo.JOBS[name], {0: first} | later))
