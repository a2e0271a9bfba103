"""A Tune trial that begins again after a crash."""

import pytest

from search import trial
from trainer import checkpoint, ray_worker
from trainer.config import TrainConfig
from trainer.storage import Storage

KEY = "t0000-linear"


@pytest.fixture
def began(tmp_path, monkeypatch):
    """Starts the trial of a run in which a checkpoint may have been written, and lists what happens in order."""
    happened = []
    monkeypatch.setattr(trial.tune, "report", lambda metrics: happened.append(metrics))
    monkeypatch.setattr(trial, "RungReportCallback", object)  # Ray's own, and only for a process of Tune's
    monkeypatch.setattr(ray_worker, "fit", lambda config, **settings: happened.append("fit"))
    run = Storage(tmp_path / "run")

    def begin(metrics=None):
        if metrics is not None:
            meta = {"metrics": metrics, "config": TrainConfig().model_dump(mode="json")}
            checkpoint.save(run.at("train", KEY, "checkpoint_000005"), {}, meta)
        start = trial.in_ray_train(run, scorer=None, rungs=[5], use_gpu=False, report_seconds=60.0)  # type: ignore[arg-type]
        start({"trial": KEY, "train": TrainConfig().model_dump(mode="json")})
        return happened

    return begin


def test_a_rung_that_was_written_and_perhaps_not_reported_is_reported_first(began, tmp_path):
    """Training goes on from there and never comes to that epoch again; where it was the last, there is no other."""
    metrics = {"epoch": 5, "rung": True, "frechet": 9.5, "worker_seconds": 3.0}
    path = str(tmp_path / "run" / "train" / KEY / "checkpoint_000005")
    assert began(metrics) == [metrics | {"checkpoint_path": path}, "fit"]


def test_a_new_trial_and_one_between_rungs_report_nothing_beforehand(began):
    assert began() == ["fit"]
    assert began({"epoch": 5, "rung": False, "worker_seconds": 3.0}) == ["fit", "fit"]
