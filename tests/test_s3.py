"""Runs on object storage: a server that speaks the S3 protocol, and does what such servers do on bad days."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from jobs_for_tests import ROWS, accuracy, digest, trainer
from moto.server import DomainDispatcherApplication, create_backend_app
from ray.train import CheckpointConfig, Result, RunConfig
from werkzeug.serving import WSGIRequestHandler, make_server

from ray_dnn import load_weights
from ray_dnn.checkpoint import Manifest, Place, read_file
from ray_dnn.errors import ConfigError
from ray_dnn.events import RunResumed
from ray_dnn.storage import RunFolder
from ray_dnn.testing import read_events, read_ledger

BAD_KEY = "nobody"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>InvalidAccessKeyId</Code><Message>There is no such key.</Message></Error>"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Moody:
    """Passes requests on to an application, but for some.

    Attributes:
        throttle: every so many requests that write are answered by 503; 0: none.
        drop: of every so many that write, the connection is closed instead of an answer; 0: none.
        multiparts: uploads in several parts that were begun.
    """

    def __init__(self, application: Application):
        self._application = application
        self._writes = itertools.count(1)
        self.throttle = self.drop = self.multiparts = 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if BAD_KEY in environ.get("HTTP_AUTHORIZATION", ""):
            start("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(DENIED)))])
            return [DENIED]
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            self.multiparts += environ["QUERY_STRING"].startswith("uploads")
            number = next(self._writes)
            if self.drop and number % self.drop == 0:
                environ["werkzeug.socket"].close()
                raise ConnectionError("dropped by the test")
            if self.throttle and number % self.throttle == 0:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
                return [SLOW_DOWN]
        return self._application(environ, start)


class Quiet(WSGIRequestHandler):
    """Says nothing."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def moody() -> Iterator[tuple[Moody, int]]:
    """A server, and its port."""
    application = Moody(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield application, server.server_port
    server.shutdown()
    thread.join()


def filesystem(port: int, key: str = "somebody", buckets: bool = True) -> pyarrow.fs.FileSystem:
    return pyarrow.fs.S3FileSystem(
        access_key=key,
        secret_key="secret",
        region="us-east-1",
        scheme="http",
        endpoint_override=f"127.0.0.1:{port}",
        allow_bucket_creation=buckets,
    )


@pytest.fixture(scope="module")
def bucket(moody: tuple[Moody, int]) -> Place:
    found = filesystem(moody[1])
    found.create_dir("bucket")
    return Place(found, "bucket")


@pytest.fixture
def trouble(moody: tuple[Moody, int]) -> Iterator[Moody]:
    """The server, for a while in a bad mood."""
    application = moody[0]
    application.multiparts = 0
    yield application
    application.throttle = application.drop = 0


def test_large_files_are_written_in_parts_and_come_back(bucket: Place, trouble: Moody) -> None:
    data = bytes(range(256)) * (25 << 12)  # 25 MiB
    trouble.throttle, trouble.drop = 3, 5
    file = bucket.write("large", data)
    assert trouble.multiparts == 1
    assert bytes(read_file(bucket, Manifest(0, 1, {}, {"large": file}), "large").numpy()) == data


def test_a_bucket_that_is_not_there_and_a_key_that_nobody_knows_are_refused(moody: tuple[Moody, int]) -> None:
    with pytest.raises(ConfigError, match=r"storage_path='bucket/runs'\): .*cannot be used"):
        RunFolder("bucket/runs", "run", filesystem(moody[1], BAD_KEY))
    strict = filesystem(moody[1], buckets=False)
    with pytest.raises(ConfigError, match=r"storage_path='elsewhere/runs'\): .*cannot be used"):
        RunFolder("elsewhere/runs", "run", strict)


@pytest.mark.usefixtures("cluster")
def test_a_run_on_a_busy_object_store_goes_on_there(tmp_path: Path, bucket: Place, trouble: Moody) -> None:
    job: dict[str, Any] = {"evaluate": accuracy}
    run = RunConfig(
        name="run",
        storage_path="bucket/runs",
        storage_filesystem=bucket.filesystem,
        checkpoint_config=CheckpointConfig(num_to_keep=2),
    )
    trouble.throttle, trouble.drop = 11, 17

    def train(agents: int, **config: Any) -> Result:
        return replace(trainer(tmp_path, agents, job, {"checkpoint_every": 3} | config), run_config=run).fit()

    train(2, epochs=None, steps=8)
    result = train(1)
    assert [event.step for event in read_events(result) if isinstance(event, RunResumed)] == [8]
    assert digest(result) == digest(trainer(tmp_path / "undisturbed", 1, job).fit())
    ledger = read_ledger(result)
    assert [ledger.counts(epoch).tolist() for epoch in (0, 1)] == [[1] * ROWS] * 2
    assert load_weights(result.checkpoint)
    names = [info.base_name for info in bucket.filesystem.get_file_info(pyarrow.fs.FileSelector("bucket/runs/run"))]
    assert sum(name.startswith("checkpoint-") for name in names) == 2
