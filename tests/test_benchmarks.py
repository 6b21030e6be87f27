"""What holds the benchmarks together: ratios, turns, kept results, and the pages and pictures made of them."""

import re
import threading
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import pages, results
from benchmarks.__main__ import NAMES
from benchmarks.goodput import Times, Useful, goodput, useful_of
from benchmarks.journal import Attempt
from benchmarks.pairs import compare
from benchmarks.tables import Claim, Table, bar, spread
from benchmarks.turns import Gate, Turns

SECONDS = st.floats(1e-4, 1e3)
PAIRS = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=25)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_loaded(name: str) -> None:
    """No test runs all of them, and what they are made of changes."""
    assert callable(import_module(f"benchmarks.{name}").run)


def table(name: str = "step", worse: bool = True) -> Table:
    return Table(
        name,
        f"Title of {name}",
        ("what", "ray_dnn", "peer"),
        (("one", "1.0 s", "2.0 s"), ("two", "3.0 s", "4.0 s")),
        ("A note.",),
        (
            Claim(f"{name}, told", "1.0 s", "Peer 2.0 s", "0.50"),
            Claim(f"{name}, long", "3 s", worse=worse, brief=False),
        ),
        (bar("one", "ray_dnn", [1.0, 1.5, 1.1]), bar("one", "Peer", [2.0, 2.5, 2.1]), bar("two", "ray_dnn", [3.0])),
        "s",
    )


def result(name: str = "step", machine: str = "small machine", worse: bool = True) -> results.Result:
    return results.Result(table(name, worse), machine, 0.1, "2026-01-02")


# -- goodput ---------------------------------------------------------------------------------------------------------


def test_goodput_is_the_rate_while_agents_die_against_the_rate_while_none_does() -> None:
    calm = [Useful(float(t), 10 * t) for t in range(11)]
    struck = [Useful(10.0 + t, 100 + 5 * t) for t in range(1, 21)]
    calm_again = [Useful(30.0 + t, 200 + 10 * t) for t in range(1, 11)]
    found = goodput("ours", [*calm, *struck, *calm_again], Times(0.0, 10.0, 30.0, 40.0))
    assert (found.calm, found.struck, found.share) == (10, 5, 0.5)


def test_rows_of_steps_done_again_or_dropped_are_not_useful() -> None:
    def attempts(group: int, step: int, committed: bool = True) -> list[Attempt]:
        return [Attempt(group * 100.0 + step, pid, group, step, committed, 2) for pid in (1, 2)]

    first = attempts(1, 0) + attempts(1, 1) + attempts(1, 2, committed=False)
    again = attempts(2, 1) + attempts(2, 2)
    assert [u.rows for u in useful_of(first + again, 4)] == [4, 8, 12, 16, 16, 16, 16, 16, 20, 24]


# -- ratios ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(PAIRS, st.randoms(), st.sampled_from([0.25, 2.0, 8.0]))
def test_a_ratio_lies_among_the_pairs_and_neither_order_nor_unit_changes_it(pairs, random, unit) -> None:
    ours, theirs = zip(*pairs, strict=True)
    ratio = compare(ours, theirs)
    quotients = [a / b for a, b in pairs]
    assert min(quotients) <= ratio.low <= ratio.median <= ratio.high <= max(quotients)
    assert ratio.median <= ratio.bound * (1 + 1e-12)
    assert ratio.bound <= max(quotients) * (1 + 1e-12)
    random.shuffle(pairs)
    assert compare(*zip(*pairs, strict=True)) == ratio
    assert compare([unit * a for a in ours], [unit * b for b in theirs]) == ratio
    assert compare([unit * a for a in ours], theirs).bound == pytest.approx(unit * ratio.bound)


def test_the_bound_is_above_the_true_median_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    above = [compare(rng.lognormal(0.0, 0.1, 20), np.ones(20)).bound >= 1.0 for _ in range(100)]
    assert 0.88 <= np.mean(above) <= 0.995


def test_a_spread_says_median_lowest_and_highest() -> None:
    assert spread([3.0, 1.0, 2.0], "ms") == "2.0 ms (1.0 to 3.0)"


# -- turns -----------------------------------------------------------------------------------------------------------


def test_agents_take_the_steps_of_their_turn_and_no_more(tmp_path: Path) -> None:
    turns = Turns(str(tmp_path), "job", 2)
    taken = [0, 0]

    def agent(number: int) -> None:
        gate = Gate(str(tmp_path), "job", 3)
        more = True
        while more:
            taken[number] += 1
            more = gate.step()

    threads = [threading.Thread(target=agent, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    assert turns.wait() > 0
    assert taken == [3, 3]
    turns.release(5)
    assert turns.wait() > 0
    assert taken == [8, 8]
    turns.release(0)
    for thread in threads:
        thread.join()
    assert taken == [8, 8]


# -- results, pages and pictures -------------------------------------------------------------------------------------


def test_every_benchmark_is_a_module_that_returns_a_table() -> None:
    for name in NAMES:
        spec = find_spec(f"benchmarks.{name}")
        assert spec is not None
        assert spec.origin is not None
        assert "\ndef run() -> Table:\n" in Path(spec.origin).read_text(), name


def test_results_are_kept_and_read_again(tmp_path: Path) -> None:
    kept = [result("exchange"), result("step")]
    for one in reversed(kept):
        one.write(tmp_path)
    assert results.read(["exchange", "missing", "step"], tmp_path) == kept


def test_the_machine_is_described_without_its_name() -> None:
    words = results.machine()
    assert re.search(r"\d+ cores \(.+\), \d+ GiB of memory, .*Linux .*Python 3.*torch .*ray ", words)


def test_the_readme_has_one_place_for_results_and_keeps_all_else() -> None:
    text = pages.README.read_text()
    assert len(pages.BLOCK.findall(text)) == 1
    block = pages.readme_block([result("step"), result("start")])
    replaced = pages.BLOCK.sub(lambda _: block, text)
    assert pages.BLOCK.sub("", replaced) == pages.BLOCK.sub("", text)
    assert pages.BLOCK.sub(lambda _: block, replaced) == replaced
    rows = [line for line in block.splitlines() if line.startswith("| st")]
    assert rows == ["| step, told | 1.0 s | Peer 2.0 s | 0.50 |", "| start, told | 1.0 s | Peer 2.0 s | 0.50 |"]


def test_the_page_says_how_and_where_and_what_is_worse() -> None:
    page = pages.docs_page([result("step"), result("start", worse=False)])
    worse = page.partition("## Where the peer is better")[2].partition("\n## ")[0]
    assert "step, long" in worse
    assert "start" not in worse
    assert page.count("small machine") == 1
    for name in ("step", "start"):
        assert f"## Title of {name}" in page
        assert f"(images/{name}.svg)" in page
        assert f'`make bench ARGS="{name}"`, 2026-01-02' in page
    assert "not measured by us" in page
    two = pages.docs_page([result("step"), result("start", machine="large machine", worse=False)])
    assert (two.count("small machine"), two.count("large machine")) == (1, 1)


def test_every_published_picture_is_of_a_benchmark_and_shown() -> None:
    for picture in pages.IMAGES.glob("*.svg"):
        assert picture.stem in NAMES
        assert f"(images/{picture.name})" in pages.DOCS.read_text()


@pytest.mark.parametrize("log", [False, True])
def test_a_picture_is_the_same_bytes_every_time(log: bool) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'bench'")
    from dataclasses import replace

    from benchmarks.charts import draw

    shown = replace(table(), log=log)
    data = draw(shown)
    assert data == draw(shown)
    assert ElementTree.fromstring(data).tag.endswith("svg")
    assert b"date" not in data.lower()
