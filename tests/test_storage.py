"""What a run leaves on storage, and what is not accepted when it is read."""

from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch

from ray_dnn import checkpoint, load_weights
from ray_dnn.errors import CheckpointError, ConfigError
from ray_dnn.events import KINDS, EventLog, RunFinished, Waiting, parse
from ray_dnn.storage import EVENTS, RunFolder, read_lines

LOCAL = pyarrow.fs.LocalFileSystem()
WEIGHTS = {"a": torch.randn(3, 4), "b": torch.arange(5), "half": torch.ones(2, dtype=torch.bfloat16)}


class CannotAppend:
    """A filesystem that cannot append, as object stores cannot."""

    def __getattr__(self, name: str) -> Any:
        return getattr(LOCAL, name)

    def open_append_stream(self, path: str) -> Any:
        raise NotImplementedError("no appending here")


@pytest.mark.parametrize("filesystem", [LOCAL, CannotAppend()], ids=["appending", "parts"])
def test_lines_are_read_as_they_were_written(tmp_path: Path, filesystem: Any) -> None:
    folder = RunFolder(str(tmp_path), "run", filesystem)
    file = folder.append_file(EVENTS)
    for number in range(6):
        file.write(f"line {number}")
        if number % 2:
            file.flush()
    file.close()
    assert read_lines(LOCAL, folder.path, EVENTS) == [f"line {n}" for n in range(6)]


def test_every_attempt_has_files_of_its_own(tmp_path: Path) -> None:
    for attempt in (1, 2):
        folder = RunFolder(str(tmp_path), "run")
        assert folder.attempt == attempt
        file = folder.append_file(EVENTS)
        file.write(f"attempt {attempt}")
        file.close()
    assert read_lines(LOCAL, folder.path, EVENTS) == ["attempt 2"]
    assert read_lines(LOCAL, folder.path, EVENTS, attempt=1) == ["attempt 1"]


def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"RunConfig\(storage_path=.*cannot be used"):
        RunFolder(str(tmp_path / "file"), "run")


def written(path: Path) -> Path:
    files = {checkpoint.WEIGHTS: checkpoint.weights_to_bytes(WEIGHTS)}
    checkpoint.write(LOCAL, str(path), files, {"step": 3})
    return path


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    loaded = load_weights(written(tmp_path / "c"))
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    assert checkpoint.read_manifest(LOCAL, str(tmp_path / "c"))["step"] == 3


def flip(path: Path) -> None:
    data = bytearray((path / checkpoint.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / checkpoint.WEIGHTS).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / checkpoint.MANIFEST).unlink(), "no checkpoint, or one never completed"),
        (lambda p: (p / checkpoint.MANIFEST).write_text('{"form'), "is not JSON"),
        (lambda p: (p / checkpoint.MANIFEST).write_text('{"format": 99}'), "not a manifest of this version"),
        (lambda p: (p / checkpoint.WEIGHTS).unlink(), "is missing, though the manifest names it"),
        (flip, "bytes that are not the"),
        (lambda p: (p / checkpoint.WEIGHTS).write_bytes(b""), "has 0 bytes that are not the"),
    ],
    ids=["no manifest", "torn manifest", "other version", "no weights", "a flipped bit", "truncated"],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    path = written(tmp_path / "c")
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(path)


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
            assert parse(event.to_json()) == event


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
