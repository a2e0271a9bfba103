"""What is kept on disk, and what a disk that is really full leaves behind: small file systems are mounted for it."""

import errno
import os
import sys
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.error import TuneError

from search import cli
from search.config import UserError
from search.config_file import load
from search.disk import full_disk_said, keep_what_is_asked_for
from search.records import Records
from search.searcher import HonestOptunaSearch
from trainer import checkpoint, data, local
from trainer.storage import Storage

SMALL = [
    "train.model={channels: [8, 16], attention: [false, true], attention_head_dim: 8, norm_groups: 4}",
    "train.data.subset=64",
    "train.batch_size=32",
]


def fill(folder: Path, left: int = 0) -> None:
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - left)))


def train(folder: Path, epochs: int, rungs: list[int]) -> list[int]:
    """The epochs that were reported."""
    config = load("digits", [*SMALL, f"train.epochs={epochs}"]).train
    reported: list[int] = []
    place = Storage(folder)
    images = data.load(config.data).train
    report = lambda metrics, _: reported.append(metrics["epoch"])  # noqa: E731
    local.fit(config, images, place.at("train"), place.at("events"), torch.device("cpu"), report, rungs=rungs)
    return reported


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"state": "stopped", "checkpoint": "train/t0/checkpoint_000000010"}, ["checkpoint_000000010"]),
        ({"state": "completed", "checkpoint": "train/t0/checkpoint_000000020"}, ["checkpoint_000000020"]),
        ({"state": "failed", "checkpoint": None}, []),
        ({"state": "running", "checkpoint": "train/t0/checkpoint_000000010"}, "all"),
        ({"state": "stopped", "checkpoint": "train/t0/checkpoint_000000099"}, "all"),  # a record that is amiss
    ],
)
def test_of_an_ended_trial_only_what_ranking_and_export_take_is_kept(tmp_path, row, changes, left):
    names = ["checkpoint_000000010", "checkpoint_000000020", "checkpoint_000000030"]
    run = Storage(tmp_path)
    for name in names:
        run.write(f"train/t0/{name}/state.pt", b"x")
    run.write("train/t0/snapshot.json", b"{}")
    run.write("train/t1/checkpoint_000000010/state.pt", b"x")
    keep_what_is_asked_for(run, row("t0", **changes))
    assert checkpoint.names(run.at("train/t0")) == (names if left == "all" else left)
    assert run.exists("train/t0/snapshot.json")
    assert run.exists("train/t1/checkpoint_000000010/state.pt")


@pytest.mark.slow
def test_a_full_disk_ends_a_training_with_that_reason_and_leaves_its_checkpoints_whole(disk):
    folder = disk(8 * 2**20)
    assert train(folder, 1, []) == [1]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    fill(folder, left=5 * size // 2)
    with pytest.raises(OSError, match="No space left") as full:
        train(folder, 6, [1, 2, 3, 4, 5])
    assert full.value.errno == errno.ENOSPC
    found = checkpoint.latest(Storage(folder / "train"))
    assert found is not None
    assert found[1].meta["epoch"] == 2
    assert not list(folder.rglob("*.tmp"))


def test_a_full_disk_leaves_the_trials_table_as_it_was(disk, row):
    folder = disk(2**20)
    records = Records(Storage(folder))
    records.add(row())
    fill(folder)
    with pytest.raises(OSError, match="No space left") as full:
        records.add(row("t0001-cosine"))
    assert full.value.errno == errno.ENOSPC
    assert list(Records.load(Storage(folder))) == [row()]


def test_a_full_disk_under_the_study_keeps_nothing_from_those_that_equal_a_trial_that_has_ended(disk, tmp_path, row):
    """The journal is a copy: a search goes on without a line of it, and its next driver writes it anew."""
    folder = disk(2**20)
    starts = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3)
    points = ", ".join(f"{{family: cosine, start: {start}, end: 1}}" for start in starts)
    config = load("digits", [f"known_points=[{points}]"])
    records = Records(Storage(tmp_path / "run"))
    storage = JournalStorage(JournalFileBackend(f"{folder}/study.journal"))
    search = HonestOptunaSearch(config, "frechet", records, storage)
    began = [search.suggest(f"id{number}")["trial"] for number in range(8)]  # the eighth point is the seventh again
    fill(folder)
    report = {"epoch": 36, "rung": True, "frechet": 4.0, "worker_seconds": 1.0}
    for number in range(8):
        if number == 7:
            (folder / "filler").unlink()
        records.report(began[number], report, None, lambda row: {"state": "completed"})
        search.on_trial_complete(f"id{number}")
    assert [one.value for one in search._ot_study.trials] == 9 * [4.0]
    assert not search.copied
    whole = JournalStorage(JournalFileBackend(f"{folder}/anew.journal"))
    HonestOptunaSearch(config, "frechet", records, whole)
    assert len(optuna.load_study(study_name=config.name, storage=whole).trials) == 9


def test_a_disk_that_fills_up_within_tune_is_said_with_the_way_on(disk, row):
    run = Storage(disk(2**20))
    fill(Path(run.root))

    def work(error: Exception) -> None:
        with full_disk_said(run):
            try:
                Records(run).add(row())
            except OSError as full:
                raise error from full

    with pytest.raises(UserError, match="No space left") as said:
        work(TuneError("as Tune does"))
    assert f"ddpm-search resume {run.uri}" in str(said.value)
    (Path(run.root) / "filler").unlink()
    with pytest.raises(TuneError, match="something else"), full_disk_said(run):
        raise TuneError("something else")


def test_a_run_on_a_full_disk_says_so(disk, capsys, monkeypatch):
    folder = disk(2**20)
    fill(folder)
    monkeypatch.setattr(sys, "argv", ["ddpm-search", "run", "digits", "--storage", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "cannot be written" in capsys.readouterr().err
