"""Real searches on a real local Ray, through the command line, and what is left after a kill."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from search.records import Records
from trainer import checkpoint
from trainer.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]
COMMAND = (sys.executable, "-m", "search.cli")
# linear(1e-4, 0.001) leaves 0.62 bits a dimension of the image in x_T
SCREENED_POINT = "known_points+={family: linear, start: 1.0e-4, end: 0.001}"
SCREENED_FIRST = (
    "known_points=[{family: linear, start: 1.0e-4, end: 0.001}, {family: linear, start: 1.0e-4, end: 0.02}]"
)
SMALL = (
    "trials=3",
    "known_points=[{family: linear, start: 1.0e-4, end: 0.02}]",
    SCREENED_POINT,
    "train.model.channels=[8, 16]",
    "train.model.attention=[false, true]",
    "train.model.attention_head_dim=8",
    "train.model.norm_groups=4",
    "early_stopping.images=50",
    "early_stopping.sampler.steps=5",
    "early_stopping.sampler.block_size=50",
    "final.top=2",
    "final.images=200",
    "final.sampler.steps=5",
    "final.sampler.block_size=20",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One HOME for all, so that the judging classifier is trained once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def environment(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    # Ray's sockets want a short path
    return {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(tmp_path_factory.mktemp("r")), "COLUMNS": "200"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((*COMMAND, *arguments), env=environment, capture_output=True, text=True, timeout=380)


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@contextlib.contextmanager
def started(environment: dict[str, str], *arguments: str, out: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A command that runs meanwhile, and is killed where a test fails before its end; `out` has what it prints."""
    with (
        Path(out or os.devnull).open("w") as file,
        subprocess.Popen(
            (*COMMAND, *arguments), env=environment, text=True, stdout=file, stderr=subprocess.PIPE
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the command ended with {process.returncode} before its time"
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.2)


def actors_in_the_dashboard(environment: dict[str, str], printed: str) -> set[str]:
    """The names that it lists living actors by."""
    dashboard = re.search(r"Ray dashboard: +(\S+)", printed).group(1)
    token = Path(environment["HOME"], ".ray", "auth_token").read_text()
    request = urllib.request.Request(
        f"{dashboard}/api/v0/actors?detail=true", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.loads(answer.read())["data"]["result"]["result"]
    return {actor["repr_name"] for actor in found if actor["state"] == "ALIVE"}


def epochs_done(place: Storage) -> int:
    return sum(row.epoch for row in Records.load(place))


def test_a_search_with_two_workers_ends_with_a_ranked_and_exported_winner(environment, tmp_path):
    place = Storage(tmp_path / "pair")
    done = run(
        environment, "run", "digits", "--name", "pair", "--storage", str(tmp_path),
        *settings(*SMALL, "runner=train", "train.workers=2", "trials=1", "train.epochs=3", SCREENED_FIRST),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Ray dashboard:" in done.stdout
    assert f"tensorboard --logdir {place.uri}/tensorboard" in done.stdout

    rows = {row.trial: row for row in Records.load(place)}
    assert [row.state for row in rows.values() if row.source == "known"] == ["screened", "completed"]
    screened = next(row for row in rows.values() if row.state == "screened")
    assert "prior KL" in screened.reason
    assert screened.worker_seconds == 0
    assert not place.exists(f"train/{screened.trial}")

    ranking = place.read_json("ranking.json")
    assert ranking["score_name"] == "classifier score"
    assert ranking["held_out_accuracy"] >= 0.985
    winner = ranking["trials"][0]
    assert winner["rank"] == 1
    assert ranking["noise"]["frechet"] > ranking["real"]["frechet"]
    assert winner["score"]["ci"][0] < winner["score"]["mean"] < winner["score"]["ci"][1]
    shards = place.names(f"evaluation/{winner['trial']}")
    with np.load(io.BytesIO(place.read(f"evaluation/{winner['trial']}/{shards[0]}/0000000-100.npz"))) as shard:
        assert shard["probabilities"].shape == (100, 10)

    page = place.read("report/index.html").decode()
    assert winner["trial"] in page
    assert screened.reason.split(":")[0] in page
    scheduler = place.read_json("export/scheduler/scheduler_config.json")
    assert len(scheduler["trained_betas"]) == 1000
    assert place.exists("samples.png")
    events = [name for name in place.names(f"tensorboard/{winner['trial']}") if "tfevents" in name]
    assert events

    status = run(environment, "status", str(tmp_path / "pair"), "--json")
    assert {row["trial"] for row in json.loads(status.stdout)} == set(rows)
    again = run(environment, "run", "digits", "--name", "pair", "--storage", str(tmp_path))
    assert again.returncode == 2
    assert "holds another run" in again.stderr
    assert place.read_json("ranking.json") == ranking

    # Elsewhere, where no trial would fit: drawing wants one worker.
    place.write("config.yaml", place.read("config.yaml").replace(b"  workers: 2", b"  workers: 64"))
    elsewhere = run(environment, "evaluate", str(tmp_path / "pair"), "--images", "100")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert place.read_json("ranking.json")["images"] == 100


def test_a_killed_search_is_resumed_without_losing_a_trial_or_an_epoch(environment, tmp_path):
    place = Storage(tmp_path / "cut")
    arguments = ("run", "digits", "--name", "cut", "--storage", str(tmp_path))
    setup = settings(*SMALL, "train.epochs=9", "early_stopping.scheduler=none", "train.checkpoint_seconds=0.01")
    with started(environment, *arguments, *setup) as process:
        wait_for(lambda: place.exists("trials.parquet") and epochs_done(place) >= 2, process)
        os.kill(process.pid, signal.SIGKILL)
    before = {row.trial: row for row in Records.load(place)}
    assert any(row.state == "running" for row in before.values())
    saved = {trial: len(place.names(f"train/{trial}")) for trial in before}

    done = run(environment, "resume", str(tmp_path / "cut"))
    assert done.returncode == 0, done.stderr
    after = {row.trial: row for row in Records.load(place)}
    assert all(after[trial].params() == row.params() for trial, row in before.items())
    assert {row.state for row in after.values()} == {"completed", "screened"}
    assert sum(row.state == "completed" for row in after.values()) == 3
    assert sum(row.source == "known" for row in after.values()) == 2
    for row in after.values():
        if row.state == "completed":
            assert [rung["epoch"] for rung in row.rungs] == [1, 3, 9]
            assert all(rung["frechet"] is not None for rung in row.rungs)
            assert checkpoint.load(place.at(str(row.checkpoint))).meta["epoch"] == 9
    assert any(saved.values()), "the kill came before the first checkpoint: the test shows nothing"
    assert place.exists("ranking.json")
    assert pq.read_table(io.BytesIO(place.read("trials.parquet"))).num_rows == len(after)


@pytest.mark.faults
def test_the_best_are_confirmed_from_new_seeds_and_a_cut_confirmation_goes_on(environment, tmp_path):
    place = Storage(tmp_path / "sure")
    setup = settings(
        *SMALL, "train.epochs=2", "train.checkpoint_seconds=0.01",
        "known_points=[{family: linear, start: 1.0e-4, end: 0.02}]",
        "trials=2", "early_stopping.scheduler=none", "final.confirm.top=1", "final.images=100",
    )  # fmt: skip
    arguments = ("run", "digits", "--name", "sure", "--storage", str(tmp_path), *setup)
    again = Storage(tmp_path / "sure" / "confirm")
    with started(environment, *arguments) as process:
        wait_for(
            lambda: again.exists("trials.parquet") and any(r.state == "completed" for r in Records.load(again)), process
        )
        os.kill(process.pid, signal.SIGKILL)
    cut = [row.trial for row in Records.load(again) if row.state == "completed"]
    done = run(environment, "resume", str(tmp_path / "sure"))
    assert done.returncode == 0, done.stderr
    repeats = {row.trial: row for row in Records.load(again)}
    assert [row.state for row in repeats.values()] == ["completed"] * 3
    assert set(cut) < set(repeats), "the kill came too late: the test shows nothing"
    assert len({row.trial for row in Records.load(place)}) == 2  # the search is what it was

    ranking = place.read_json("ranking.json")
    winner, other = ranking["trials"]
    assert (winner["confirmed"], other["confirmed"]) == (True, False)
    assert winner["mean_of"] == list(repeats)
    assert [seed["seed"] for seed in winner["trainings"]] == [0, *(row.seed for row in repeats.values())]
    best = max(winner["trainings"], key=lambda seed: seed["score"])
    assert winner["best_training"] == best["trial"]
    card = place.read("export/README.md").decode()
    assert "of the configuration" in card
    assert f"Seed {best['seed']} ({best['trial']})" in card
    assert place.read_json("export/provenance.json")["trial"] == best["trial"]
    exported = run(
        environment, "export", str(tmp_path / "sure"), "--out", str(tmp_path / "raw"), "--trial", cut[0],
        "--weights", "raw",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert "as trained" in (tmp_path / "raw" / "README.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_keeps_what_is_done_and_says_how_to_go_on(environment, tmp_path, number):
    place = Storage(tmp_path / "stop")
    arguments = ("run", "digits", "--name", "stop", "--storage", str(tmp_path), *settings(*SMALL, "train.epochs=500"))
    with started(environment, *arguments, out=tmp_path / "out") as process:
        wait_for(
            lambda: place.exists("trials.parquet") and any(row.state == "running" for row in Records.load(place)),
            process,
        )
        printed = (tmp_path / "out").read_text()
        wait_for(lambda: "stop trial" in actors_in_the_dashboard(environment, printed), process)
        second = run(environment, "resume", str(tmp_path / "stop"))
        assert second.returncode == 2
        assert f"is being worked on by process {process.pid}" in second.stderr
        process.send_signal(number)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert errors.index("Stopping") < errors.index(f"ddpm-search resume {place.uri}")
    assert "Traceback" not in errors
    assert any(row.state == "running" for row in Records.load(place))
    assert not place.exists("lease.json")


OTHER_INCEPTION = """
import functools, sys
from evaluation import inception, reference
reference.Inception = functools.partial(inception.Inception, sha256=sys.argv.pop(1))
from search.cli import main
main()
"""


@pytest.mark.parametrize("runner", ["reuse", pytest.param("train", marks=pytest.mark.faults)])  # which takes long
def test_a_search_that_inception_judges_comes_to_its_end(environment, tmp_path, random_inception, runner):
    """Ray refuses functions above 95 MiB, which Inception with its statistics is."""
    weights, digest = random_inception
    sampler = "sampler={steps: 2, block_size: 8}"
    small = [value for value in SMALL if value.startswith("train.model")]
    small += [f"runner={runner}", "trials=1", "train.data.subset=60", "train.batch_size=12", "train.epochs=1"]
    small += ["early_stopping.images=8", f"early_stopping.{sampler}", f"final.inception_weights={weights}"]
    small += ["final.top=1", "final.images=24", "final.split_size=8", f"final.{sampler}"]
    command = (sys.executable, "-c", OTHER_INCEPTION, digest, "run", "digits", "--name", "judged")
    arguments = ("--storage", str(tmp_path), *settings(*small))
    done = subprocess.run((*command, *arguments), env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    assert "Extractor:      Inception V3 of 2015" in done.stdout
    assert (
        "Inception Score of 24 images in splits of 8; precision and recall at 12; extractor inception;" in done.stdout
    )
    (row,) = Records.load(Storage(tmp_path / "judged"))
    assert (row.state, row.epoch) == ("completed", 1)
    assert all(rung["frechet"] > 0 and rung["score"] >= 1 for rung in row.rungs)


def test_a_command_that_is_refused_late_leaves_its_name_free(environment, tmp_path):
    weights = ("--set", "final.extractor=inception", "--set", f"final.inception_weights={tmp_path}/none.pth")
    for wrong in (weights, ("--address", "127.0.0.1:1")):
        done = run(environment, "run", "digits", "--name", "again", "--storage", str(tmp_path), *wrong)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert not Storage(tmp_path / "again").names()


def test_the_winner_loads_where_only_diffusers_is(environment, tmp_path):
    """The export of a run, sampled by the command: the same seed draws the same images."""
    out = tmp_path / "training"
    small = [value for value in SMALL if not value.startswith(("trials", "known"))]
    done = run(environment, "train", "digits", "--out", str(out), *settings(*small, "train.epochs=2"))
    assert done.returncode == 0, done.stderr
    found = checkpoint.latest(Storage(out))
    assert found is not None
    from evaluation.config import SamplerConfig
    from evaluation.export import export_pipeline

    export_pipeline(found[1], tmp_path / "export", SamplerConfig(), "card", {})
    for name in ("a.npz", "b.npz"):
        drawn = run(
            environment,
            "sample",
            str(tmp_path / "export"),
            "--out",
            str(tmp_path / name),
            "--images",
            "3",
            "--steps",
            "3",
        )
        assert drawn.returncode == 0, drawn.stderr
    first, second = (np.load(tmp_path / name)["images"] for name in ("a.npz", "b.npz"))
    assert first.shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(first, second)
