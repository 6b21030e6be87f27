"""What a run leaves on storage, and what is not accepted when it is read."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.train import CheckpointConfig
from safetensors.torch import load_file
from storages import failing

from ray_dnn import checkpoint, load_weights, tensorfile
from ray_dnn.checkpoint import MANIFEST, WEIGHTS, Manifest, Place
from ray_dnn.checkpoints import Kept, retire
from ray_dnn.errors import CheckpointError, ConfigError
from ray_dnn.events import KINDS, Event, EventLog, GenerationFormed, RunFinished, RunStarted, Waiting, parse
from ray_dnn.ledger import Ledger
from ray_dnn.storage import EVENTS, RunFolder, read_lines
from ray_dnn.testing import read_events

LOCAL = pyarrow.fs.LocalFileSystem()
TENSORS = {"a": torch.randn(3, 4), "b": torch.arange(5), "half": torch.ones(2, dtype=torch.bfloat16)}
FILE = "model-00002-of-00003.safetensors"


def folder_in(path: Path, filesystem: Any = None) -> RunFolder:
    folder = RunFolder(str(path), "run", filesystem)
    folder.claim()
    return folder


@pytest.mark.parametrize("appends", [True, False], ids=["appending", "parts"])
def test_lines_are_read_as_they_were_written(tmp_path: Path, appends: bool) -> None:
    folder = folder_in(tmp_path, LOCAL if appends else failing(tmp_path / "away"))
    file = folder.append_file(EVENTS)
    for number in range(6):
        file.write(f"line {number}")
        if number % 2:
            file.flush()
    file.close()
    assert read_lines(folder.place, EVENTS) == [f"line {n}" for n in range(6)]
    assert (tmp_path / "run" / "events-0001.jsonl").exists() == appends


def test_lines_that_the_storage_refuses_are_kept_until_it_takes_them(tmp_path: Path) -> None:
    away = tmp_path / "away"
    folder = folder_in(tmp_path, failing(away))
    file = folder.append_file(EVENTS)
    away.touch()
    file.write("one")
    file.flush().result()
    assert file.failing_since is not None
    file.write("two")
    away.unlink()
    file.close()
    assert file.failing_since is None
    assert read_lines(folder.place, EVENTS) == ["one", "two"]


def test_a_line_that_was_torn_off_is_left_out(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    (tmp_path / "run" / "events-0001.jsonl").write_text('one\ntwo\n{"thr')
    assert read_lines(folder.place, EVENTS) == ["one", "two"]


def test_every_attempt_has_files_of_its_own(tmp_path: Path) -> None:
    for attempt in (1, 2):
        folder = folder_in(tmp_path)
        assert folder.attempt == attempt
        file = folder.append_file(EVENTS)
        file.write(f"attempt {attempt}")
        file.close()
    assert read_lines(folder.place, EVENTS) == ["attempt 2"]
    assert read_lines(folder.place, EVENTS, attempt=1) == ["attempt 1"]
    with pytest.raises(FileNotFoundError, match="holds no events of 3"):
        read_events(str(tmp_path / "run"), attempt=3)


def test_of_two_attempts_the_older_one_knows_of_the_newer(tmp_path: Path) -> None:
    older = folder_in(tmp_path)
    assert older.newer() is None
    newer = folder_in(tmp_path)
    assert (older.newer(), newer.newer()) == (2, None)


def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"RunConfig\(storage_path=.*cannot be used"):
        RunFolder(str(tmp_path / "file"), "run")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def written(path: Path, most: int = 1) -> Path:
    """A checkpoint of three files with a tensor each, or of fewer with more, and an index."""
    place = Place(LOCAL, str(path))
    path.mkdir()
    sizes = {name: tensor.nbytes for name, tensor in TENSORS.items()}
    parts = checkpoint.divide(WEIGHTS, sizes, most)
    files = {
        file: place.write(file, *tensorfile.chunks({n: TENSORS[n] for n in names})) for file, names in parts.items()
    }
    files |= {name: place.write(name, data) for name, data in checkpoint.index_of(sizes, parts).items()}
    manifest = Manifest(3, 1, {"seed": "0"}, files, [{"step": 3.0, "loss": float("nan")}], units={7: 5})
    place.write(MANIFEST, manifest.to_json())
    return path


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = written(tmp_path / "c")
    loaded = load_weights(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    manifest = Manifest.read(Place.of(path))
    assert (manifest.step, manifest.units) == (3, {7: 5})
    checkpoint.verify(Place.of(path), manifest)


def test_weights_that_were_loaded_are_tensors_like_any_others(tmp_path: Path) -> None:
    loaded = load_weights(written(tmp_path / "c", most=1 << 20))
    assert len({tensor.dtype for tensor in loaded.values()}) > 1  # in one file
    torch.save(loaded, tmp_path / "saved")
    for tensor in loaded.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_safetensors_and_transformers_read_the_weights(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=8, bos_token_id=0, eos_token_id=0, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    model = GPT2Model(config)
    weights = dict(model.named_parameters())
    sizes = {name: p.nbytes for name, p in weights.items()}
    parts = checkpoint.divide(WEIGHTS, sizes, most=1000)
    assert len(parts) > 1
    place = Place(LOCAL, str(tmp_path))
    for file, names in parts.items():
        place.write(file, *tensorfile.chunks({name: weights[name].detach() for name in names}))
        assert load_file(tmp_path / file).keys() == set(names)
    for file, data in checkpoint.index_of(sizes, parts).items():
        place.write(file, data)
    read = GPT2Model.from_pretrained(tmp_path, config=config)
    assert all(torch.equal(p, weights[name]) for name, p in read.named_parameters())


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_tensors_are_divided_over_files_in_order_and_none_is_too_large(sizes: list[int], most: int) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    parts = checkpoint.divide("stem", named, most)
    assert [name for names in parts.values() for name in names] == list(named)
    assert sorted(parts) == list(parts)
    for names in parts.values():
        assert len(names) == 1 or sum(named[name] for name in names) <= most
    for one, other in itertools.pairwise(parts.values()):
        assert sum(named[name] for name in [*one, other[0]]) > most


def flip(path: Path, name: str) -> None:
    data = bytearray((path / name).read_bytes())
    data[-1 if name == FILE else len(data) // 2] ^= 1
    (path / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / MANIFEST).unlink(), "it is no checkpoint, or never was completed"),
        (lambda p: (p / MANIFEST).write_text('{"form'), "is not what was written"),
        (lambda p: (p / MANIFEST).write_text('{"format": 99}'), "is not what was written"),
        (lambda p: flip(p, MANIFEST), "is not what was written"),
        (lambda p: (p / FILE).unlink(), f"{FILE} is missing, though the manifest names it"),
        (lambda p: flip(p, FILE), f"{FILE} has .* bytes that are not the"),
        (lambda p: (p / FILE).write_bytes(b""), f"{FILE} has 0 bytes that are not the"),
    ],
    ids=[
        "no manifest",
        "torn manifest",
        "other version",
        "a flipped bit of it",
        "no file",
        "a flipped bit",
        "truncated",
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    path = written(tmp_path / "c")
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(path)


SCORES = st.one_of(st.none(), st.floats(-5, 5))


@given(st.lists(SCORES, min_size=1, max_size=12), st.integers(1, 12), st.booleans(), st.booleans())
def test_the_newest_checkpoint_and_the_best_ones_stay(
    scores: list[float | None], most: int, by_score: bool, lowest: bool
) -> None:
    kept = [Kept(f"c{i}", i, {} if score is None else {"m": score}) for i, score in enumerate(scores)]
    order: Any = "min" if lowest else "max"
    keep = CheckpointConfig(most, "m", order) if by_score else CheckpointConfig(most)
    gone = retire(kept, keep)
    stay = [k for k in kept if k not in gone]
    assert len(stay) == min(most, len(kept))
    assert kept[-1] in stay
    sign = -1.0 if lowest else 1.0

    def worth(k: Kept) -> float:
        return (sign * k.metrics["m"] if "m" in k.metrics else float("-inf")) if by_score else k.step

    assert all(worth(g) <= worth(s) for g in gone for s in stay if s is not kept[-1])


def test_every_event_says_itself_in_words_and_survives_storage() -> None:
    values: dict[str, list[Any]] = {
        "str": ["x"],
        "str | None": ["x", None],
        "int": [3],
        "int | None": [3, None],
        "float": [1.5],
        "float | None": [1.5, None],
        "bool": [True],
        "list[str]": [["a", "b"]],
        "list[int]": [[0, 2]],
        "dict[str, object]": [{"k": 1}],
        "dict[str, float]": [{"m": 0.5}],
    }
    for kind in KINDS.values():
        for turn in (0, -1):
            fields = {name: values[str(annotation)][turn] for name, annotation in kind.__annotations__.items()}
            event = kind(**fields)
            assert event.text()
            assert list(parse([event.to_json()])) == [event]


@st.composite
def memberships(draw: st.DrawFn) -> list[Event]:
    """Generations, one after the other, with other events between them; perhaps in more than one attempt."""
    events: list[Event] = []
    names = (f"agent-{number}" for number in itertools.count(1))
    for attempt in range(draw(st.integers(1, 2))):
        events.append(RunStarted("run", "folder", attempt, {}))
        agents: list[str] = []
        for generation in range(1, draw(st.integers(1, 6))):
            gone = [name for name in agents if draw(st.booleans())]
            lost = [name for name in gone if draw(st.booleans())]
            joined = list(itertools.islice(names, draw(st.integers(0 if len(agents) > len(gone) else 1, 4))))
            agents = [name for name in agents if name not in gone] + joined
            sizes = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in agents]
            left = [name for name in gone if name not in lost]
            bounds = list(itertools.accumulate(sizes, initial=0))
            events.append(GenerationFormed(generation, generation, list(agents), joined, left, lost, bounds))
            events += [Waiting("for more")] if draw(st.booleans()) else []
    return events


@given(memberships(), st.data())
def test_who_takes_part_is_read_from_lines_that_say_only_what_changed(events: list[Event], data: st.DataObject) -> None:
    lines = [event.to_json() for event in events]
    assert list(parse(lines)) == events
    # A storage that failed in the middle has some lines twice.
    last = max(i for i, event in enumerate(events) if isinstance(event, RunStarted))
    first = data.draw(st.integers(last, len(lines)))
    until = data.draw(st.integers(first, len(lines)))
    formed = [e for e in parse([*lines[:until], *lines[first:]]) if isinstance(e, GenerationFormed)]
    if first > last:
        assert formed == [event for event in events if isinstance(event, GenerationFormed)]
    assert formed[-1:] == [event for event in events if isinstance(event, GenerationFormed)][-1:]


@pytest.mark.parametrize("count", [999, 1000, 1001, 2500])
def test_an_event_log_of_thousands_is_read_from_the_first_event_on_at_any_time(count: int) -> None:
    log = EventLog()
    early = log.follow()
    for number in range(count):
        log.add(Waiting(str(number)))
    assert [next(early) for _ in range(count // 2)] == list(itertools.islice(log.follow(), count // 2))
    log.add(RunFinished(1, "d", "r"))
    log.close()
    assert [e.what for e in log.follow() if isinstance(e, Waiting)] == [str(number) for number in range(count)]
    assert [e.what for e in early if isinstance(e, Waiting)] == [str(n) for n in range(count // 2, count)]


def test_the_words_of_an_event_name_some_of_thousands() -> None:
    names = [f"agent-{number}" for number in range(1000)]
    text = GenerationFormed(1, 0, names, names, [], [], list(range(1001))).text()
    assert text.endswith("joined: " + ", ".join(names[:8]) + " and 992 more")
    assert GenerationFormed(1, 0, names[:9], names[:9], [], [], list(range(10))).text().endswith("agent-7, agent-8")


def test_readers_of_the_event_log_see_everything_until_it_is_closed() -> None:
    log = EventLog()
    log.add(Waiting("one"))
    reader = log.follow()
    first = next(reader)
    assert isinstance(first, Waiting)
    log.add(RunFinished(1, "d", "r"))
    log.close()
    assert [type(e) for e in reader] == [RunFinished]
    assert [type(e) for e in log.follow()] == [Waiting, RunFinished]


def test_an_attempt_that_ended_before_it_wrote_anything_has_an_empty_ledger() -> None:
    assert Ledger([[]]).lines == []
    assert Ledger([]).lines == []
