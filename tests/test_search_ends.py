"""How real searches end on a real local Ray: nothing new to try, no time left, no room left, and before they begin."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from search import budget
from search.disk import keep_what_is_asked_for
from search.records import Records
from trainer import checkpoint
from trainer.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]
SETTINGS = (
    "train.data.labels=false",  # no classifier to be trained: trials are stopped by the grid loss
    "train.model={channels: [8, 16], attention: [false, true], attention_head_dim: 8, norm_groups: 4}",
    "train.epochs=9",
    "early_stopping.images=8",
    "early_stopping.sampler={steps: 2, block_size: 8}",
    "final.sampler={steps: 4, block_size: 8}",
)
ONE_POINT = "space={families: {cosine: {start: 0.1, end: 1, tau: 1}}, learning_rate: 0.003, dropout: 0.0}"


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory):
    """command(*arguments): the finished process, with a HOME of its own."""
    places = {"HOME": str(tmp_path_factory.mktemp("home")), "RAY_TMPDIR": str(tmp_path_factory.mktemp("r"))}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (sys.executable, "-m", "search.cli", *arguments),
            env={**os.environ, **places, "COLUMNS": "200"}, capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    return run


def settings(*more: str) -> list[str]:
    return [part for value in (*SETTINGS, *more) for part in ("--set", value)]


def test_a_space_that_holds_nothing_new_ends_the_search_and_a_resumed_one_at_once(command, tmp_path):
    place = Storage(tmp_path / "one")
    done = command(
        "run", "digits", "--name", "one", "--storage", str(tmp_path), *settings("known_points=[]", ONE_POINT)
    )
    assert done.returncode == 0, done.stderr
    assert "The search ended: the last 200 suggestions held nothing new to train." in done.stdout
    rows = list(Records.load(place))
    assert Counter(row.state for row in rows) == {"completed": 1, "reused": 200}
    assert checkpoint.names(place.at("train", rows[0].trial)) == [str(rows[0].checkpoint).rpartition("/")[2]]
    seconds = budget.read(place)["seconds"]

    resumed = command("resume", str(tmp_path / "one"))
    assert resumed.returncode == 0, resumed.stderr
    assert "held nothing new" in resumed.stdout
    assert list(Records.load(place)) == rows
    assert budget.read(place)["seconds"] > seconds


def test_a_full_disk_fails_the_trial_with_that_reason_and_what_is_there_stays_readable(command, disk):
    small = disk(3 * 2**20)
    done = command(
        "run", "digits", "--name", "full", "--storage", str(small),
        *settings("trials=3", "early_stopping.scheduler=none", "train.ema_decays=[0.9, 0.99]"),
    )  # fmt: skip
    place = Storage(small / "full")
    rows = list(Records.load(place))
    failed = [row for row in rows if row.state == "failed"]
    assert failed, done.stdout + done.stderr
    assert all("No space left" in str(row.reason) for row in failed)
    assert "No space left" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for row in rows:
        keep_what_is_asked_for(place, row)
        if row.checkpoint:
            checkpoint.load(place.at(row.checkpoint))
    assert command("status", place.uri).returncode == 0


def test_a_dry_run_measures_and_leaves_nothing(command, tmp_path):
    done = command("run", "digits", "--storage", str(tmp_path / "runs"), *settings(), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["trials"], plan["rungs"], plan["metric"]) == (12, [1, 3], "grid_loss")
    assert plan["measured"]["step_seconds"] > 0
    assert 0 < plan["forecast"]["expected"]["search"] < plan["forecast"]["at_most"]["search"]
    assert not (tmp_path / "runs").exists()
