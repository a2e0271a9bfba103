"""A run on S3: a server on loopback, which answers with errors for a while."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_submit import SET

from search.records import Records
from trainer import checkpoint
from trainer.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Server:
    """Moto's S3; while `broken`, every request is answered with 503."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from pyarrow import fs
        from werkzeug.serving import make_server

        self.broken = False
        self.refused = 0
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{self.server.server_port}"
        store = fs.S3FileSystem(endpoint_override=where, scheme="http", region="us-east-1", allow_bucket_creation=True)
        store.create_dir("bucket")
        # Moto keeps what it has for the whole process: every server has a folder of its own.
        self.uri = f"s3://bucket/{uuid.uuid4().hex}?endpoint_override={where}&scheme=http&region=us-east-1"

    def answer(self, environment: dict[str, Any], start: Any) -> Any:
        if not self.broken:
            return self.moto(environment, start)
        self.refused += 1
        start("503 Service Unavailable", [("Content-Length", "0")])
        return [b""]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = Server()
    yield made
    made.server.shutdown()


def test_a_storage_that_is_away_is_waited_for_and_a_wrong_one_is_not(server):
    run = Storage(server.uri).at("a")
    server.broken = True
    threading.Timer(4, setattr, (server, "broken", False)).start()
    run.write_json("x/y.json", [1])
    assert server.refused
    assert run.read_json("x/y.json") == [1]
    assert run.names() == ["x"]
    run.delete("x")
    assert run.names() == []
    began = time.monotonic()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        Storage(server.uri.replace("bucket", "elsewhere")).write("a", b"")
    assert time.monotonic() - began < 20


def test_a_reader_sees_the_old_file_or_the_new_one_and_no_part_of_either(server):
    run, done = Storage(server.uri).at("b"), threading.Event()

    def content(number: int) -> bytes:
        return b"%d," % number * (200_000 if number % 2 else 2)

    def write() -> None:
        for number in itertools.count(1):
            if done.is_set():
                return
            run.write("x", content(number))
            time.sleep(0.03)

    run.write("x", content(0))
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [run.read("x") for _ in range(40)]
    finally:
        done.set()
        writer.join()
    assert [text == content(int(text.split(b",")[0])) for text in seen] == [True] * 40


@pytest.mark.faults
@pytest.mark.parametrize("runner", ["train", "reuse"])
def test_a_search_on_s3_is_killed_resumed_and_outlives_its_storage_s_absence(
    server, tmp_path, tmp_path_factory, runner
):
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path_factory.mktemp("r"))}
    command = (sys.executable, "-m", "search.cli")
    place = Storage(server.uri).at("s")
    # An epoch takes as long as what stands around it: so many that no trial has ended when the driver is killed.
    rungs = [1, 2, 6] if runner == "train" else [1, 20, 120]
    settings = [*SET, "--set", f"runner={runner}", "--set", f"train.epochs={rungs[-1]}"]
    settings += ["--set", "early_stopping.scheduler=none"]
    settings += ["--set", f"early_stopping.rungs={[epoch / rungs[-1] for epoch in rungs[:-1]]}"]

    def epochs() -> int:
        return sum(row.epoch for row in Records.load(place))

    def wait_for(count: int, process: "subprocess.Popen[bytes]") -> None:
        end = time.monotonic() + 150
        while epochs() < count:
            assert process.poll() is None, "ended before its time"
            assert time.monotonic() < end
            time.sleep(0.2)

    with subprocess.Popen(
        (*command, "run", "digits", "--name", "s", "--storage", server.uri, *settings), env=environment
    ) as first:
        wait_for(2, first)
        os.kill(first.pid, signal.SIGKILL)
    before = {row.trial: row for row in Records.load(place)}
    assert any(row.state == "running" for row in before.values()), [(row.state, row.epoch) for row in before.values()]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen((*command, "resume", place.uri), env=environment, stdout=log, stderr=log) as second,
    ):
        wait_for(sum(row.epoch for row in before.values()) + 1, second)
        server.broken = True
        time.sleep(30)  # the fault itself
        server.broken = False
        assert second.wait(200) == 0, (tmp_path / "log").read_text()
    assert server.refused
    rows = {row.trial: row for row in Records.load(place)}
    assert [row.state for row in rows.values()] == ["completed"] * 2
    for row in rows.values():
        assert [rung["epoch"] for rung in row.rungs] == rungs
        assert checkpoint.load(place.at(str(row.checkpoint))).meta["epoch"] == rungs[-1]
    for made in ("ranking.json", "report/index.html", "export/model_index.json", "samples.png", "study.journal"):
        assert place.exists(made), made
    assert not place.exists("lease.json")
    assert not Path("s3:").exists()
