import argparse
import hashlib
import math
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from feeding import feed
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import language_model as job
from jobs.language_model import File, Shape, Text
from ray_dnn import TrainConfig

SHAPE = Shape(layers=2, width=32, context=16)


def model_of(shape: Shape) -> job.LanguageModel:
    """A model none of whose weights is zero, so that everything it could look at has an influence."""
    torch.manual_seed(0)
    model = job.LanguageModel(shape)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def listed(name: str, size: int = 4) -> File:
    """A file that is nowhere."""
    return File(name, f"/nowhere/{name}", 0, size)


def write(folder: Path, *datas: bytes) -> list[File]:
    """Files with these bytes, in this order."""
    for number, data in enumerate(datas):
        (folder / f"{number:03}").write_bytes(data)
    return job.list_files([str(folder)])


def rows_of(folder: Path, text: bytes, context: int) -> job.Bytes:
    (folder / "a").write_bytes(text)
    made = Text(job.list_files([str(folder / "a")]), context)
    return made.rows(0, len(made))


def write_folder(folder: Path, files: int = 30) -> Path:
    """Files with some 12 kB of text in them that is easy to learn."""
    for number in range(files):
        lines = "".join(f"the {word} of file {number}\n" for word in ("beginning", "middle", "end") * 7)
        (folder / f"{number}.txt").write_text(lines)
    return folder


# -- the data --------------------------------------------------------------------------------------------------------


def test_the_split_is_by_sha256_of_the_name_and_nothing_else() -> None:
    files = [listed(f"folder/{n}.py") for n in range(400)]
    train, held_out = job.split(files)
    expected = {
        file.name for file in files if int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big") % 20 == 0
    }
    assert {file.name for file in held_out} == expected
    assert 10 <= len(expected) <= 30
    assert sorted(train + held_out) == sorted(files)
    assert job.split(files[::-1]) == (train, held_out)


def test_a_file_more_moves_no_other_to_the_other_side() -> None:
    files = [listed(f"{n}.py") for n in range(400)]
    _, before = job.split(files[:300])
    _, after = job.split(files)
    assert before
    assert set(before) == set(after) & set(files[:300])


@given(st.integers(2, 30))
def test_both_sides_of_a_split_have_a_file(files: int) -> None:
    train, held_out = job.split([listed(f"{n}") for n in range(files)])
    assert train
    assert held_out
    assert len(train) + len(held_out) == files


def test_of_a_single_file_the_end_is_held_out(tmp_path: Path) -> None:
    [train], [held_out] = job.split(write(tmp_path, bytes(range(200))))
    assert train.read(0, train.size) + held_out.read(0, held_out.size) == bytes(range(200))
    assert held_out.size == 10


def test_listing_leaves_out_what_is_hidden_generated_empty_or_unreadable(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", ".git/config", "a/__pycache__/c.pyc", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    files = [File(name, str(tmp_path / name), 0, len(name)) for name in ("a/c.txt", "b.txt")]
    assert job.list_files([str(tmp_path)]) == files
    with mock.patch("os.access", lambda path, mode: Path(path).name != "b.txt"):
        assert job.list_files([str(tmp_path)]) == files[:1]


def test_a_file_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    assert len(job.list_files([str(tmp_path), str(tmp_path / "a.txt"), str(tmp_path)])) == 1


def test_without_paths_the_standard_library_is_listed() -> None:
    files = {file.name: file for file in job.list_files([])}
    assert files["argparse.py"].read(0, 25) == b"# Author: Steven J. Bethard"[:25]
    assert all(name.endswith(".py") and "site-packages" not in name for name in files)
    assert sum(file.size for file in files.values()) > 10_000_000


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=5), st.integers(1, 12))
def test_rows_predict_every_byte_once_and_in_order(datas: list[bytes], context: int) -> None:
    joined = b"".join(b"\0" + data for data in datas)
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), *datas)
        if len(joined) <= context:
            with pytest.raises(ValueError, match="less than a context and one"):
                Text(files, context)
            return
        text = Text(files, context)
        rows = text.rows(0, len(text))
        each = [text.rows(number, number + 1) for number in range(len(text))]
    assert rows.shape == ((len(joined) - 1) // context, context + 1)
    predicted = rows[:, 1:].tobytes()
    assert predicted == joined[1 : 1 + len(predicted)]
    assert len(joined) - 1 - len(predicted) < context
    assert rows[:, 0].tobytes() == joined[:-1:context][: len(rows)]
    assert np.concatenate(each).tolist() == rows.tolist()


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5_000), st.integers(1, 1_000), st.integers(1, 2_000))
def test_units_hold_every_row_once_and_each_is_taken_from_everywhere(
    files: int, size: int, strips: int, unit_bytes: int
) -> None:
    with mock.patch.multiple(job, STRIPS=strips, UNIT_BYTES=unit_bytes, UNITS=50):
        text = Text([listed(str(number), size) for number in range(files)], 1)
        strip = text.strip
        units = [[range(at, min(at + strip, len(text))) for at in text.strips(unit)] for unit in range(text.units)]
        assert [sum(map(len, spans)) for spans in units] == [text.unit_rows(unit) for unit in range(text.units)]
    assert text.units <= 50
    assert sorted(row for spans in units for span in spans for row in span) == list(range(len(text)))
    for spans in units:
        ends = [0, *(span.stop for span in spans)]
        gaps = [span.start - end for span, end in zip(spans, ends, strict=False)]
        assert max([*gaps, len(text) - ends[-1]]) <= strip * (text.units - 1)


def test_a_file_may_be_larger_than_memory(tmp_path: Path) -> None:
    size, at = 1 << 40, (1 << 39) + 5
    with open(tmp_path / "large", "wb") as file:
        file.truncate(size)  # zeros that take no room
        file.seek(at)
        file.write(bytes(range(1, 256)))
    [train], [held_out] = job.split(job.list_files([str(tmp_path / "large")]))
    text = Text([train], 256)
    assert train.size + held_out.size == size
    assert len(text) == train.size // 256
    assert text.units == job.UNITS
    row = (at + 1) // 256  # a separator stands before the text
    assert text.rows(row, row + 2)[:, :-1].tobytes().strip(b"\0") == bytes(range(1, 256))
    for part, _ in zip(text.unit(text.units - 1), range(3), strict=False):
        assert 1 << 19 < part.nbytes < 1 << 21
    assert sum(map(text.unit_rows, range(text.units))) == len(text)


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    [file] = write(tmp_path, b"some text")
    (tmp_path / "000").write_bytes(b"some")
    assert file.read(1, 4) == b"ome"
    with pytest.raises(OSError, match=r"/000 has become shorter"):
        file.read(0, 5)


def test_spread_takes_rows_from_everywhere(tmp_path: Path) -> None:
    text = Text(write(tmp_path, bytes(range(1, 101))), 1)  # 100 rows, each a number and the one before it
    assert text.spread(10)[:, 1].tolist() == list(range(1, 101, 10))
    assert text.spread(1000).tolist() == text.rows(0, 100).tolist()
    assert text.spread(0).tolist() == [[0, 1]]
    assert all(len(text.spread(limit)) <= limit for limit in range(1, 101))


def test_collate_gives_the_bytes_of_any_slice_of_any_table(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, bytes(range(256)), context=7)
    column = pa.array([row.tobytes() for row in rows], pa.binary(8))
    chunked = pa.table({"bytes": pa.chunked_array([column[:3], column[3:]])})
    for begin, length in ((0, len(rows)), (1, 4), (5, 1)):
        batch = job.collate(chunked.slice(begin, length), torch.Generator())
        assert batch.dtype == torch.int64
        assert batch.tolist() == rows[begin : begin + length].tolist()


# -- the model -------------------------------------------------------------------------------------------------------


def test_a_later_byte_changes_no_earlier_logits() -> None:
    model = model_of(SHAPE)
    ids = torch.randint(256, (1, SHAPE.context))
    before = model(ids)
    for position in range(SHAPE.context):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % 256
        differs = (model(changed) != before).any(dim=-1)[0]
        assert not differs[:position].any()
        assert differs[position:].all(), "and it changes all that come after it"


def test_a_new_model_gives_every_byte_the_same_probability() -> None:
    batch = torch.randint(256, (3, SHAPE.context + 1))
    metrics = job.evaluate(job.LanguageModel(SHAPE), batch)
    assert metrics["bits_per_byte"].item() == pytest.approx(8.0, abs=1e-5)


def test_loss_is_the_mean_over_rows_of_next_byte_cross_entropy() -> None:
    model, batch = model_of(SHAPE), torch.randint(256, (3, SHAPE.context + 1))
    logs = model(batch[:, :-1]).log_softmax(-1)
    rows = [-sum(logs[r, t, batch[r, t + 1]] for t in range(SHAPE.context)) / SHAPE.context for r in range(3)]
    assert job.loss(model, batch).item() == pytest.approx(float(sum(rows).detach()) / 3, rel=1e-5)


def test_every_parameter_is_in_one_group_and_only_linear_layers_decay() -> None:
    model = job.LanguageModel(SHAPE)
    groups = job.build_optimizer(model, lr=0.01).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decay | rest == set(names.values())
    assert not decay & rest
    assert {name.split(".")[-2] for name in decay} == {"qkv", "out", "up", "down", "head"}
    assert [group["weight_decay"] > 0 for group in groups] == [True, False]


@pytest.mark.parametrize("steps", [2, 100])
def test_the_learning_rate_rises_and_falls(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = job.build_scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    top = rates.index(max(rates))
    assert rates[top] == 2.0
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_sample_is_the_prompt_and_as_many_bytes_as_asked_for() -> None:
    model = model_of(SHAPE)
    written = job.sample(model, b"def ", 20, SHAPE.context, seed=1)
    assert written.startswith(b"def ")
    assert len(written) == 24
    assert written == job.sample(model, b"def ", 20, SHAPE.context, seed=1)
    assert written != job.sample(model, b"def ", 20, SHAPE.context, seed=2)


# -- what it is compared with ----------------------------------------------------------------------------------------


def test_unigram_and_bigram_are_what_counting_by_hand_gives(tmp_path: Path) -> None:
    text = Text(write(tmp_path, b"abracadabra" * 3), 4)
    train, held_out = text.rows(0, len(text)), rows_of(tmp_path, b"cadabra!", context=4)
    learned = [(int(row[t]), int(row[t + 1])) for row in train for t in range(4)]
    asked = [(int(row[t]), int(row[t + 1])) for row in held_out for t in range(4)]

    def bits(count: int, total: int) -> float:
        return -math.log2((count + 1) / (total + 256))

    singles = [bits(sum(b == y for _, b in learned), len(learned)) for _, y in asked]
    doubles = [bits(learned.count((x, y)), sum(a == x for a, _ in learned)) for x, y in asked]
    counts = job.count_pairs(text, 1 << 20)
    assert job.unigram(counts, held_out) == pytest.approx(sum(singles) / len(singles))
    assert job.bigram(counts, held_out) == pytest.approx(sum(doubles) / len(doubles))


def test_xz_compresses_each_file_by_itself_and_no_more_than_it_is_asked_to(tmp_path: Path) -> None:
    noise, zeros = np.random.default_rng(0).bytes(4000), bytes(4000)
    files = write(tmp_path, zeros, noise, noise, noise)
    assert job.xz(files[:1], 1 << 20) < 0.3
    assert job.xz(files[1:3], 1 << 20) > 8
    assert job.xz(files, 4000) == job.xz(files[:1], 1 << 20), "one in four"
    assert job.xz(files[:1], 1000) == job.xz([files[0]._replace(stop=1000)], 1 << 20)


def test_the_report_says_where_it_compares_with_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Text(write(tmp_path, bytes(3 << 20)), 1024)
    result: Any = SimpleNamespace(metrics={"validation/bits_per_byte": 1.0, "weights_digest": "0"})
    made = job.Job(argparse.Namespace(sample=0), SHAPE, text, text, text.spread(1))
    job.report(made, job.baselines(made), result)
    assert "sample" not in capsys.readouterr().out
    monkeypatch.setattr(job, "COUNTED_BYTES", 2 << 20)
    monkeypatch.setattr(job, "PACKED_BYTES", 1 << 20)
    job.report(made, job.baselines(made), result)
    printed = capsys.readouterr().out
    assert "Frequencies are those in a sample of 2 MiB.\nxz was given a sample of 1 MiB.\n" in printed


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--agents", "0"], "'0' is neither MIN:MAX"),
        (["--agents", "3:2"], "'3:2' is neither MIN:MAX"),
        (["--agents", "1:"], "'1:' is neither MIN:MAX"),
        (["--agents", "1:9", "--virtual-workers", "8"], "9 are more than there are virtual workers, 8"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--batch", "many"], "'many' is not a whole number of at least 1"),
        (["--steps", "5", "--epochs", "1"], "not allowed with"),
        (["--lr", "nan"], "nan is not a finite number above 0"),
        (["--width", "40"], "40 is not a multiple of 32"),
        (["--seed", "-1"], "-1 is below 0"),
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["nowhere/at/all"], "nowhere/at/all: no such file or folder"),
        (["EMPTY"], "EMPTY: no text in it"),
        (["SHORT"], "bytes on one side of the split are less than a context and one, 257"),
    ],
)
def test_bad_input_gives_one_error_before_anything_starts(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "SHORT").write_text("a few words")
    with pytest.raises(SystemExit) as exit_:
        job.main([*arguments, "."] if arguments[0].startswith("-") else arguments)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert [line for line in printed.err.splitlines() if complaint in line] == printed.err.splitlines()[-1:]
    assert printed.out == ""


def test_help_names_the_sizes_and_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        job.main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*job.SIZES, "--agents", "--virtual-workers", "--storage", "--epochs"))


def test_a_size_is_what_it_says_unless_overridden(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path))
    tiny = job.parse([folder])
    assert (tiny.shape, tiny.steps) == (job.SIZES["tiny"].shape, job.SIZES["tiny"].steps)
    other = job.parse([folder, "--layers", "1", "--context", "32", "--batch", "10", "--epochs", "3"])
    assert other.shape == Shape(layers=1, width=tiny.shape.width, context=32)
    assert other.steps == 3 * math.ceil(len(other.train) / 10)


# -- on a cluster: the tests above start none ------------------------------------------------------------------------


def test_training_gets_every_row_of_many_files_once_an_epoch_bit_by_bit(cluster: None, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    text = Text(write(tmp_path, *(numbers.bytes(size) for size in numbers.integers(1, 40_000, 150))), 256)
    assert text.units == 3
    fed = feed(job.stream(text), TrainConfig(128, virtual_workers=2, epochs=1, shuffle_window=4096))
    assert fed.feed.schedule.rows == len(text), "known before anything is read"
    steps = []
    for tables in fed.steps():
        steps.append(np.concatenate([job.collate(table, torch.Generator()).numpy() for table in tables]))
    fed.feed.close()
    found, expected = np.concatenate(steps).astype(np.uint8), text.rows(0, len(text))
    assert found.tolist() != expected.tolist()
    assert sorted(map(bytes, found)) == sorted(map(bytes, expected))


def test_one_run_from_text_to_report(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    folder = write_folder(tmp_path / "text")
    flags = "--agents 2 --virtual-workers 4 --layers 1 --width 32 --context 32 --batch 8 --steps 30 --sample 20"
    result = job.main([*flags.split(), "--storage", str(tmp_path / "runs"), "--name", "run", str(folder)])
    printed = capsys.readouterr().out
    table = dict(re.findall(r"^  (\S.*?) +(\d+\.\d{3})$", printed, re.MULTILINE))
    assert list(table) == ["byte frequencies", "byte-pair frequencies", "xz, each file by itself", "this model"]
    assert result.metrics is not None
    assert float(table["this model"]) == pytest.approx(result.metrics["validation/bits_per_byte"], abs=5e-4)
    assert float(table["this model"]) < 7
    assert float(table["byte-pair frequencies"]) < float(table["byte frequencies"])
    assert printed.splitlines()[-1] == f"weights digest {result.metrics['weights_digest']}"
