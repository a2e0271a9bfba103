"""The trials table: what it holds, that a reader always sees a whole one, and what repeated reports change."""

import dataclasses
import io
import json
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from search import records as trials_table
from search.config import UserError
from search.config_file import load
from search.records import FILE, SMALL, DamagedError, Records
from search.runs import CONFIG, open_run, read_run, storage_at
from trainer.storage import Storage

# DESIGN.md, section 6; `source` is ours: which rows are known points, so that a resumed search tries none twice.
COLUMNS = [
    "trial", "source", "family", "start", "end", "tau", "learning_rate", "dropout", "settings", "seed",
    "state", "reason",
    "same_as", "epoch", "rungs", "worker_seconds", "checkpoint",
]  # fmt: skip


def metrics(epoch: int, frechet: float | None = 1.0, seconds: float | None = None, **more):
    seconds = 10.0 * epoch if seconds is None else seconds
    return {"epoch": epoch, "rung": True, "frechet": frechet, "score": 2.0, "grid_loss": 0.1,
            "worker_seconds": seconds} | more  # fmt: skip


def test_the_table_has_the_columns_of_the_design(records, row):
    records.add(row())
    table = pq.read_table(io.BytesIO(records.run.read(FILE)))
    assert table.column_names == COLUMNS
    rungs = table.schema.field("rungs").type.value_type
    assert [rungs.field(i).name for i in range(rungs.num_fields)] == ["epoch", "frechet", "score", "grid_loss"]


def test_rows_come_back_as_they_were(records, row, rung):
    rows = [
        row("t0000-linear", source="known", family="linear", start=1e-4, end=0.02, seed=2**40,
            settings={"batch_size": 32, "model.channels": [16, 32]}),
        row("t0001-cosine", state="screened", reason="prior KL must be below 0.01 – “quoted”, 漢字"),
        row("t0002-cosine", state="stopped", epoch=5, rungs=[rung(2, 9.5), rung(5, None, None, 0.25)],
            worker_seconds=math.pi, checkpoint="train/t0002-cosine/checkpoint_000005"),
    ]  # fmt: skip
    for one in rows:
        records.add(one)
    again = Records.load(records.run)
    assert list(again) == rows
    assert [again[one.trial] for one in rows] == rows


def test_a_table_of_another_version_is_read(records, row):
    records.add(row())
    table = pq.read_table(io.BytesIO(records.run.read(FILE))).drop_columns(["settings", "same_as"])
    table = table.append_column("of_a_later_one", [["x"]])
    pq.write_table(table, f"{records.run.root}/{FILE}")
    assert list(Records.load(records.run)) == [row()]


def test_a_bit_that_flipped_is_never_a_value_and_always_said_as_damage(records, row):
    """Of pages; what a flip makes of the table's description may be read as another version's."""
    for index in range(20):
        records.add(row(f"t{index:04d}-cosine", worker_seconds=float(index)))
    whole, before, rng = records.run.read(FILE), list(records), np.random.default_rng(0)
    description = int.from_bytes(whole[-8:-4], "little") + 8
    said = 0
    for place in rng.choice(8 * len(whole), 300, replace=False).tolist():
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        records.run.write(FILE, bytes(content))
        try:
            found = list(Records.load(records.run))
        except DamagedError:
            said += 1
        else:
            assert found == before or place // 8 >= len(whole) - description
    assert said > 100


def test_a_run_without_a_table_has_no_rows(tmp_path):
    assert list(Records.load(Storage(tmp_path))) == []


def test_every_change_is_on_disk_when_the_call_returns(records, row):
    records.add(row())
    records.update("t0000-cosine", reason="one")
    assert Records.load(records.run)["t0000-cosine"].reason == "one"
    records.report("t0000-cosine", metrics(1), None)
    assert Records.load(records.run)["t0000-cosine"].epoch == 1


def test_a_long_table_has_new_rows_at_once_and_changes_soon(records, row, monkeypatch):
    """Writing it takes longer, so not every change is written by itself; the last one is, by nothing but time."""
    for index in range(SMALL + 1):
        records._rows[f"t{index:04d}"] = row(f"t{index:04d}")
    records.add(row("t9999"))
    assert len(Records.load(records.run)) == SMALL + 2
    writes = []
    write = Storage.write
    monkeypatch.setattr(Storage, "write", lambda self, *file: (writes.append(file[0]), write(self, *file)))
    for index in range(SMALL):
        records.update(f"t{index:04d}", epoch=3)
    assert len(writes) < SMALL / 4
    end = time.monotonic() + 20
    while time.monotonic() < end and [row.epoch for row in Records.load(records.run)].count(3) < SMALL:
        time.sleep(0.01)
    assert list(Records.load(records.run)) == list(records)


@pytest.mark.parametrize("asked", [False, True], ids=["soon", "at the end"])
def test_what_the_storage_refused_of_a_long_table_is_written_when_it_is_back(records, row, monkeypatch, asked):
    monkeypatch.setattr(trials_table, "MOST_PAUSE_SECONDS", 60.0 if asked else 0.05, raising=False)
    for index in range(SMALL + 1):
        records._rows[f"t{index:04d}"] = row(f"t{index:04d}")
    records.add(row("t9999"))
    write, away, refused = Storage.write, threading.Event(), threading.Event()

    def at_times(self: Storage, path: str, content: bytes) -> None:
        if away.is_set():
            refused.set()
            raise OSError(28, "No space left on device")
        write(self, path, content)

    monkeypatch.setattr(Storage, "write", at_times)
    away.set()
    records._pause_over = time.monotonic() + 0.05
    records.update("t9999", state="completed")
    assert refused.wait(20)
    away.clear()
    if asked:
        records.flush()
    end = time.monotonic() + 10
    while time.monotonic() < end and Records.load(records.run)["t9999"].state != "completed":
        time.sleep(0.01)
    assert Records.load(records.run)["t9999"].state == "completed"


def test_a_change_that_comes_while_another_is_being_written_is_written_too(records, row, monkeypatch):
    """The write of a new row, in between, has put off the next one."""
    monkeypatch.setattr(trials_table, "PAUSE", 1e6)
    for index in range(SMALL + 1):
        records._rows[f"t{index:04d}"] = row(f"t{index:04d}")
    monkeypatch.setattr(trials_table, "MOST_PAUSE_SECONDS", 0.1)
    records.add(row("t9998"))
    records.update("t0000", epoch=3)  # to be written in a tenth of a second
    monkeypatch.setattr(trials_table, "MOST_PAUSE_SECONDS", 1.0)
    records.add(row("t9999"))
    records.update("t0001", epoch=3)  # to be written in a second
    write, begun, go_on = Storage.write, threading.Event(), threading.Event()

    def slow(self: Storage, path: str, content: bytes) -> None:
        begun.set()
        assert go_on.wait(20)
        write(self, path, content)

    monkeypatch.setattr(Storage, "write", slow)
    assert begun.wait(20)
    records.update("t0002", epoch=3)
    go_on.set()
    end = time.monotonic() + 5
    while time.monotonic() < end and Records.load(records.run)["t0002"].epoch < 3:
        time.sleep(0.01)
    assert list(Records.load(records.run)) == list(records)


def test_a_repeated_epoch_changes_nothing(records, row):
    records.add(row())
    records.report("t0000-cosine", metrics(5), "checkpoint_000005")
    before = records.report("t0000-cosine", metrics(10), "checkpoint_000010")
    assert records.report("t0000-cosine", metrics(10, frechet=0.5), "checkpoint_000010") == before
    # an earlier one, trained again from the checkpoint before
    assert records.report("t0000-cosine", metrics(5, frechet=0.5), "checkpoint_000005") == before


def test_a_skipped_epoch_harms_nothing_and_one_that_comes_late_is_put_in_its_place(records, row):
    records.add(row())
    records.report("t0000-cosine", metrics(10), "checkpoint_000010")
    late = records.report("t0000-cosine", metrics(5), "checkpoint_000005")
    assert [rung["epoch"] for rung in late.rungs] == [5, 10]
    assert (late.epoch, late.checkpoint, late.worker_seconds) == (10, "checkpoint_000010", 100.0)
    assert late.rung(7) is None


def test_a_report_off_the_rungs_is_no_rung(records, row):
    records.add(row())
    noted = records.report("t0000-cosine", metrics(3, rung=False), "checkpoint_000003")
    assert (noted.epoch, noted.rungs, noted.checkpoint) == (3, [], "checkpoint_000003")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_score_that_is_not_finite_is_none(records, row, value):
    records.add(row())
    records.report("t0000-cosine", metrics(1, frechet=value), None)
    assert records["t0000-cosine"].rungs == [{"epoch": 1, "frechet": None, "score": 2.0, "grid_loss": 0.1}]
    json.dumps([dataclasses.asdict(one) for one in records], allow_nan=False)


READER = """
import sys
from search.records import Records
from trainer.storage import Storage
run, seen = Storage(sys.argv[1]), set()
print("ready", flush=True)
while len(seen) < 8:
    rows = list(Records.load(run))
    assert len(rows) == 30, len(rows)
    generations = {row.epoch for row in rows}
    assert max(generations) - min(generations) <= 1, generations  # rows change one after another
    seen.add((min(generations), max(generations)))
print("whole", flush=True)
"""


@pytest.mark.timeout(60)
def test_a_reader_in_another_process_always_sees_a_whole_table(records, row):
    for index in range(30):
        records.add(row(f"t{index:04d}-cosine"))
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, records.run.root], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        generation, end = 0, time.monotonic() + 40
        while reader.poll() is None and time.monotonic() < end:
            generation += 1
            for index in range(30):
                records.update(f"t{index:04d}-cosine", epoch=generation)
        out, err = reader.communicate(timeout=10)
        assert (reader.returncode, out) == (0, "whole\n"), err
    finally:
        reader.kill()


def test_a_run_is_opened_with_its_configuration_and_rows(tmp_path, records, row):
    config = load("digits")
    records.add(row())
    records.run.write(CONFIG, json.dumps(config.model_dump(mode="json")).encode())
    opened, run, rows = open_run(str(tmp_path / "run"))
    assert (opened, run.root, list(rows)) == (config, records.run.root, list(records))


def test_the_status_of_a_run_of_another_version_can_be_read(tmp_path, records):
    tree = load("digits").model_dump(mode="json") | {"of_another_version": 1}
    records.run.write(CONFIG, yaml.safe_dump(tree).encode())
    assert read_run(str(tmp_path / "run"))[0] == tree
    with pytest.raises(UserError, match="unknown key 'of_another_version'"):
        open_run(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (None, b"", "no run at"),
        (CONFIG, b"a: 1", "is not a run's"),
        (CONFIG, b"- 1", "is not a run's"),
        (CONFIG, b"a: [", "damaged"),
        (FILE, b"not parquet", "damaged"),
    ],
)
def test_what_is_no_run_or_a_damaged_one_is_said(tmp_path, file, content, says):
    run = Storage(tmp_path)
    if file is not None:
        run.write(CONFIG, json.dumps(load("digits").model_dump(mode="json")).encode())
        run.write(file, content)
    with pytest.raises(UserError, match=says):
        read_run(str(tmp_path))


@pytest.mark.parametrize("address", ["nosuch://bucket/x", "~nobody-here/x"])
def test_an_address_that_is_no_place_is_refused(address):
    with pytest.raises(UserError, match=f"{address} is no place.*give a folder"):
        storage_at(address)
