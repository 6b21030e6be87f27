import gzip
import io
import re
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from jobs import image_classifier as job
from jobs.image_classifier import Images


def images_of(count: int, seed: int = 0) -> Images:
    """Images of noise over stripes, whose widths down and across are the class, so that they are easy to learn."""
    numbers = np.random.default_rng(seed)
    labels = numbers.integers(0, job.CLASSES, count, dtype=np.uint8)
    pixels = numbers.integers(0, 64, (count, job.SIDE, job.SIDE), dtype=np.uint8)
    at = np.arange(job.SIDE)
    for image, label in zip(pixels, labels, strict=True):
        down, across = (1, 2, 7)[label // 4], (1, 2, 4, 7)[label % 4]
        image += (96 * (at // down % 2)[:, None] + 95 * (at // across % 2)).astype(np.uint8)
    return Images(pixels, labels)


def idx(array: job.Bytes) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes(), compresslevel=1)


def packed(train: Images, test: Images) -> dict[str, bytes]:
    arrays = (train.pixels, train.labels, test.pixels, test.labels)
    return {name: idx(array) for name, array in zip(job.FILES, arrays, strict=True)}


def write_folder(folder: Path, train: int = 300, test: int = 100) -> Path:
    """The four files, small."""
    folder.mkdir()
    for name, data in packed(images_of(train), images_of(test, seed=1)).items():
        (folder / name).write_bytes(data)
    return folder


def stamps(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


# -- the files -------------------------------------------------------------------------------------------------------


def test_an_idx_file_gives_its_array() -> None:
    images = images_of(7)
    assert (job.read_idx("a", idx(images.pixels), 3) == images.pixels).all()
    assert (job.read_idx("a", idx(images.labels), 1) == images.labels).all()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (idx(images_of(7).pixels)[:-9], "it is not a whole gzip file"),
        (b"no gzip at all", "it is not a whole gzip file"),
        (gzip.compress(b""), "it starts with , but an IDX file of this kind with 00000803"),
        (idx(images_of(7).labels), "it starts with 00000801, but an IDX file of this kind with 00000803"),
        (gzip.compress(bytes([0, 0, 8, 3]) + bytes(11)), "an IDX file of this kind"),
        (gzip.compress(gzip.decompress(idx(images_of(7).pixels))[:-1]), "it holds 5,487 bytes of data, but says 5,488"),
        (gzip.compress(gzip.decompress(idx(images_of(7).pixels)) + b"!"), "it holds 5,489 bytes of data, but says"),
    ],
    # gzip writes the time of day into its header, so the bytes would name a test otherwise in every process.
    ids=["cut", "no gzip", "empty", "labels", "short header", "a byte too few", "a byte too many"],
)
def test_a_damaged_or_other_file_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as raised:
        job.read_idx("train-images-idx3-ubyte.gz", data, 3)
    assert str(raised.value).startswith("train-images-idx3-ubyte.gz: ")


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        (Images(images_of(7).pixels, images_of(6).labels), r"its shape is \(7, 28, 28\), not \(6, 28, 28\)"),
        (Images(images_of(7).pixels[:, 1:], images_of(7).labels), r"its shape is \(7, 27, 28\), not \(7, 28, 28\)"),
        (Images(images_of(0).pixels, images_of(0).labels), r"its shape is \(0, 28, 28\), not \(1, 28, 28\)"),
        (Images(images_of(7).pixels, images_of(7).labels + np.uint8(9)), "it has the label 18; the largest must be 9"),
    ],
)
def test_images_and_labels_must_go_together(train: Images, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        job.prepare(packed(train, images_of(3)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parquet_holds_the_rows_in_order_in_files_of_several_row_groups(tmp_path: Path) -> None:
    train, test = images_of(job.SHARD_ROWS + 1), images_of(10)
    folder = job.prepare(packed(train, test), tmp_path)
    files = sorted((folder / "train").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [job.SHARD_ROWS, 1]
    assert pq.read_metadata(files[0]).num_row_groups == job.SHARD_ROWS // job.GROUP_ROWS > 1
    for name, images in (("train", train), ("test", test)):
        read = job.as_images(pq.read_table(folder / name))
        assert (read.pixels == images.pixels).all()
        assert (read.labels == images.labels).all()


def test_parquet_is_written_once_for_the_same_files(tmp_path: Path) -> None:
    files = packed(images_of(20), images_of(10))
    folder = job.prepare(files, tmp_path)
    before = stamps(tmp_path)
    assert job.prepare(files, tmp_path) == folder
    assert stamps(tmp_path) == before
    assert job.prepare(packed(images_of(21), images_of(10)), tmp_path) != folder
    assert stamps(tmp_path).items() > before.items()


@pytest.mark.parametrize("damage", ["a flipped bit", "a file less", "a file more"])
def test_damaged_parquet_is_made_anew(damage: str, tmp_path: Path) -> None:
    files = packed(images_of(20), images_of(10))
    [shard] = (job.prepare(files, tmp_path) / "train").iterdir()
    whole = shard.read_bytes()
    match damage:
        case "a flipped bit":
            shard.write_bytes(bytes([*whole[:500], whole[500] ^ 1, *whole[501:]]))
        case "a file less":
            shard.unlink()
        case "a file more":
            shard.with_name("more.parquet").write_bytes(whole)
    folder = job.prepare(files, tmp_path)
    assert len(pq.read_table(folder / "train")) == 20
    assert shard.read_bytes() == whole


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = packed(images_of(20), images_of(10))
    write = pq.write_table

    def write_and_stop(table: pa.Table, path: Path, **options: object) -> None:
        write(table, path, **options)
        if path.parent.name == "test":  # the training images are written by now
            raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        job.prepare(files, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert job.is_whole(job.prepare(files, tmp_path))


def test_what_another_process_has_made_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = packed(images_of(20), images_of(10))
    write, found = job.write_shards, []

    def write_after_another(images: Images, folder: Path) -> None:
        if not found:
            monkeypatch.undo()
            found.append(job.prepare(files, tmp_path))
            found.append(stamps(tmp_path / found[0]))
        write(images, folder)

    monkeypatch.setattr(job, "write_shards", write_after_another)
    folder = job.prepare(files, tmp_path)
    assert found == [folder, stamps(tmp_path)]


def test_only_the_official_data_is_taken_from_where_nobody_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "DEBIAN", write_folder(tmp_path / "debian"))
    with pytest.raises(ValueError, match=r"holds other data than the official file, SHA-256 [0-9a-f]{64}; install"):
        job.find_files(None, tmp_path / "cache")


def test_what_is_downloaded_is_kept_if_it_is_the_official_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = packed(images_of(20), images_of(10))
    asked = []

    def serve(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(files[url.rpartition("/")[2]])

    monkeypatch.setattr(job, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(urllib.request, "urlopen", serve)
    with pytest.raises(ValueError, match="holds other data than the official file"):
        job.find_files(None, tmp_path / "cache")
    assert stamps(tmp_path) == {}
    known = {name: job.hashlib.sha256(gzip.decompress(data)).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(job, "FILES", known)
    asked.clear()
    assert job.find_files(None, tmp_path / "cache") == files
    assert job.find_files(None, tmp_path / "cache") == files
    assert asked == [job.OFFICIAL + name for name in files]
    assert all(url.startswith("https://") for url in asked)


# -- the data --------------------------------------------------------------------------------------------------------


def augmented(images: Images, seed: int) -> Images:
    np.random.seed(seed)
    return job.as_images(job.augment(job.as_table(images)))


def test_augmentation_is_a_function_of_the_images_and_numpys_seed() -> None:
    images = images_of(50)
    before = images.pixels.copy()
    once, again, other = augmented(images, 1), augmented(images, 1), augmented(images, 2)
    assert (once.pixels == again.pixels).all()
    assert (once.pixels != other.pixels).any(axis=(1, 2)).mean() > 0.9
    assert (images.pixels == before).all()


def test_augmentation_keeps_what_a_table_is() -> None:
    rows = job.as_table(images_of(50))
    changed = job.augment(rows)
    assert changed.schema == rows.schema
    assert changed["label"] == rows["label"]
    assert len(changed) == 50
    assert len(job.augment(rows.slice(0, 0))) == 0


def test_images_are_shifted_mirrored_and_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.arange(1, 1 + job.SIDE**2).reshape(job.SIDE, job.SIDE) % 255 + 1  # no pixel is 0
    pixels = np.repeat(picture[None].astype(np.uint8), 400, axis=0)
    changed = augmented(Images(pixels, np.zeros(400, np.uint8)), 0).pixels
    erased = (changed[:, 2:-2, 2:-2] == 0).sum(axis=(1, 2))
    assert 0.3 < (erased > 0).mean() < 0.6
    assert erased.max() <= job.ERASED**2
    monkeypatch.setattr(job, "rectangles", lambda count: np.zeros((count, job.SIDE, job.SIDE), bool))
    around = np.pad(pixels[0], job.SHIFT)
    reach = range(2 * job.SHIFT + 1)
    moved = [around[y : y + job.SIDE, x : x + job.SIDE] for y in reach for x in reach]
    possible = {image.tobytes() for place in moved for image in (place, place[:, ::-1])}
    changed = augmented(Images(pixels, np.zeros(400, np.uint8)), 0).pixels
    assert {image.tobytes() for image in changed} == possible, "each of them, and nothing else"


def test_collate_gives_the_images_of_any_slice_of_any_table() -> None:
    images = images_of(12)
    whole = job.as_table(images)
    chunked = pa.concat_tables([whole.slice(0, 5), whole.slice(5)])
    for begin, length in ((0, 12), (1, 4), (3, 7), (8, 1)):
        pixels, labels = job.collate(chunked.slice(begin, length), torch.Generator())
        assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert pixels.shape == (length, job.SIDE, job.SIDE, 1)
        assert labels.tolist() == images.labels[begin : begin + length].tolist()
        back = (pixels[..., 0] * job.DEVIATION + job.MEAN) * 255
        assert np.allclose(back, images.pixels[begin : begin + length], atol=1e-3)


def test_rows_of_one_piece_are_seen_as_images_without_a_copy() -> None:
    rows = job.as_table(images_of(5))
    assert np.shares_memory(job.as_images(rows).pixels, job.as_images(rows.slice(2)).pixels)


# -- the model -------------------------------------------------------------------------------------------------------


def test_the_model_gives_ten_logits_for_each_image() -> None:
    model = job.Classifier((4, 8, 16))
    pixels, labels = job.collate(job.as_table(images_of(6)), torch.Generator())
    assert model(pixels).shape == (6, job.CLASSES)
    job.loss(model, (pixels, labels)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_accuracy_is_the_share_of_labels_that_are_found() -> None:
    class Says(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(job.CLASSES)[images[:, 0, 0, 0].long()]

    images = torch.zeros(4, 1, 1, 1)
    images[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert job.evaluate(Says(), (images, torch.tensor([1, 2, 3, 9])))["accuracy"].item() == 0.75


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = job.Classifier((4, 8, 16))
    decay, rest = job.build_optimizer(model, lr=0.1).param_groups
    assert {p.ndim for p in rest["params"]} == {1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert (decay["weight_decay"] > 0, rest["weight_decay"]) == (True, 0)


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_the_learning_rate_rises_once_and_ends_near_zero(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = job.build_scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert max(rates) == 1
    assert steps < 100 or rates[-1] < 0.01


# -- what it is compared with ----------------------------------------------------------------------------------------


def test_the_simple_classifiers_find_what_is_easy_and_nothing_in_noise() -> None:
    train, test = images_of(3_000), images_of(200, seed=1)
    assert job.nearest_mean(train, test) > 0.95
    assert job.linear(train, test) > 0.9
    noise = Images(test.pixels, np.random.default_rng(2).permutation(test.labels))
    assert job.nearest_mean(train, noise) < 0.3
    assert job.linear(train, noise) < 0.3


def test_the_nearest_mean_is_never_that_of_a_class_without_images() -> None:
    dark = Images(np.zeros((4, job.SIDE, job.SIDE), np.uint8), np.array([3, 3, 3, 3], np.uint8))
    bright = Images(dark.pixels + np.uint8(200), dark.labels)
    assert job.nearest_mean(bright, dark) == 1


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--agents", "0"], "'0' is neither MIN:MAX"),
        (["--agents", "3:2"], "'3:2' is neither MIN:MAX"),
        (["--agents", "1:9", "--virtual-workers", "8"], "9 are more than there are virtual workers, 8"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--batch", "many"], "'many' is not a whole number of at least 1"),
        (["--batch", "1"], "1 is below 2, which batch normalisation needs"),
        (["--steps", "5", "--epochs", "1"], "not allowed with"),
        (["--lr", "nan"], "nan is not a finite number above 0"),
        (["--seed", "-1"], "-1 is below 0"),
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["--data", "nowhere"], "nowhere/train-images-idx3-ubyte.gz: No such file or directory; --data must name"),
        (["--data", "SHORT"], "t10k-labels-idx1-ubyte.gz: it is not a whole gzip file"),
        (["--data", "GOOD", "--cache", "SHORT/t10k-labels-idx1-ubyte.gz"], "name a folder that can be written"),
        ([], "Fashion-MNIST is not on this machine and https://"),
    ],
)
def test_bad_input_gives_one_error_before_anything_starts(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def offline(url: str, timeout: float) -> None:
        raise urllib.request.URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    write_folder(tmp_path / "GOOD", 20, 10)
    file = write_folder(tmp_path / "SHORT", 20, 10) / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(SystemExit) as exit_:
        job.main(arguments)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert [line for line in printed.err.splitlines() if complaint in line] == printed.err.splitlines()[-1:]


def test_help_names_the_sizes_and_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        job.main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*job.SIZES, "--agents", "--virtual-workers", "--cache", "--epochs"))


def test_a_size_is_what_it_says_unless_overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = str(write_folder(tmp_path / "data", 100, 20))
    small = job.parse(["--data", folder])
    assert (small.widths, small.flags.lr) == (job.SIZES["small"].widths, job.SIZES["small"].lr)
    assert small.folder.parent == tmp_path / "home" / "ray_dnn" / "fashion-mnist"
    other = job.parse(["--data", folder, "--size", "tiny", "--batch", "30", "--epochs", "3"])
    assert other.widths == job.SIZES["tiny"].widths
    assert other.steps == 3 * 4
    assert job.parse(["--data", folder, "--steps", "7"]).steps == 7


def test_one_run_from_files_to_report(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "data", 600, 100)
    flags = ["--size", "tiny", "--batch", "40", "--steps", "30", "--lr", "0.05"]
    places = {"--data": folder, "--cache": tmp_path / "cache", "--storage": tmp_path / "runs"}
    flags += [str(word) for pair in places.items() for word in pair]
    alone = job.main([*flags, "--name", "alone", "--agents", "1"])
    capsys.readouterr()
    result = job.main([*flags, "--name", "run", "--agents", "2"])
    printed = capsys.readouterr().out
    table = dict(re.findall(r"^  (\S.*?) +(\d+\.\d{2})$", printed, re.MULTILINE))
    assert list(table) == ["nearest mean image", "least squares on pixels", "this model"]
    assert result.metrics is not None
    assert float(table["this model"]) == pytest.approx(100 * result.metrics["test/accuracy"], abs=5e-3)
    assert float(table["this model"]) > 50
    assert "\n1,200 rows in " in printed
    assert printed.splitlines()[-1] == f"weights digest {result.metrics['weights_digest']}"
    assert alone.metrics is not None
    assert alone.metrics["weights_digest"] == result.metrics["weights_digest"]
