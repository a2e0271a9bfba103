"""The search itself: Ray Tune with our searcher and scheduler, begun or rebuilt from the trials table."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune import Callback
from ray.tune.search import ConcurrencyLimiter

from cluster import capacity
from cluster.capacity import Placement
from evaluation.rung import RungScorer
from search import trial
from search.config import SearchConfig
from search.early_stopping import RungScheduler
from search.gauges import Gauges
from search.records import Live, Records
from search.searcher import HonestOptunaSearch
from trainer.storage import Storage

JOURNAL = "study.journal"
ROOM_SECONDS = 5.0
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial's report has no score
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the training writes its own TensorBoard events
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # our record is what a search is resumed from
    "RAY_AIR_NEW_OUTPUT": "0",
}
ENDED = ("completed", "stopped", "failed", "reused")


def trials_left(config: SearchConfig, records: Records) -> int:
    """Trainings still to be started or finished; screened configurations count in no budget."""
    return max(0, config.trials - sum(row.state in ENDED for row in records))


def search(
    config: SearchConfig,
    run: Storage,
    records: Records,
    metric: str,
    scorer: RungScorer,
    placement: Placement,
    changed: Callable[[], None],
) -> None:
    """Runs the search to the end of its budget. changed() is called in this process as trials come on.

    Raises KeyboardInterrupt where the user interrupted it: running trials stay `running` in the record.
    """
    left = trials_left(config, records)
    if not left:
        return
    os.environ |= TUNE_ENVIRONMENT
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = _fresh_journal(run)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    searcher = HonestOptunaSearch(config, metric, records, storage)
    limiter = ConcurrencyLimiter(searcher, max_concurrent=placement.at_once)  # as max_concurrent_trials makes it
    watcher = _Watcher(run, journal, changed, lambda: _make_room(limiter, config), Gauges(config.name, records))
    rungs = config.rung_epochs()
    if config.runner == "reuse":
        run_trial = trial.in_reused_process(run, scorer, rungs, config.report_seconds)
        resources = placement.worker
    else:
        run_trial = trial.in_ray_train(run, scorer, rungs, placement.worker, config.report_seconds)
        # Ray Train reserves the workers; the trial's own process waits, and must fit beside them on any node.
        resources = {"memory": 1}
    tuner = tune.Tuner(
        tune.with_resources(run_trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=limiter,
            scheduler=RungScheduler(config.early_stopping, metric, rungs, config.train.epochs, records),
            num_samples=left,
            reuse_actors=config.runner == "reuse",
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=run.root,
            storage_filesystem=run.fs,
            failure_config=tune.FailureConfig(max_failures=3),
            callbacks=[watcher],
            verbose=0,
        ),
    )
    tuner.fit()
    watcher.copy_journal()
    if trials_left(config, records):
        raise KeyboardInterrupt


def _make_room(limiter: ConcurrencyLimiter, config: SearchConfig) -> None:
    """Nodes come and go: so many trials are begun as fit by now; those that lost theirs wait for Ray Train."""
    with contextlib.suppress(ValueError):  # none fits: no other is begun in place of those that wait
        limiter.max_concurrent = capacity.read().place(config.train.workers, config.trials_per_gpu).at_once


def _fresh_journal(run: Storage) -> Path:
    """Where Optuna's journal is written: rebuilt from the record by every driver, and on a local disk, as it needs."""
    folder = Path(run.root) if run.is_local else Path(tempfile.mkdtemp(prefix="ddpm-search-study-"))
    for name in (JOURNAL, f"{JOURNAL}.lock"):
        (folder / name).unlink(missing_ok=True)
    return folder / JOURNAL


class _Watcher(Live, Callback):
    """Passes Tune's events on, and copies the study where the run is not on a local disk."""

    def __init__(
        self, run: Storage, journal: Path, changed: Callable[[], None], room: Callable[[], None], gauges: Gauges
    ):
        self.run, self.journal, self.changed, self.room, self.gauges = run, journal, changed, room, gauges
        self.looked = 0.0

    def copy_journal(self) -> None:
        if not self.run.is_local and self.journal.exists():
            self.run.write(JOURNAL, self.journal.read_bytes())

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self.looked > ROOM_SECONDS:
            self.looked = time.monotonic()
            self.room()
            self.gauges.show()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.changed()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.changed()
        self.gauges.note(trial.config["trial"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.changed()
        with contextlib.suppress(OSError):  # the study is a copy of the record; the next one will do
            self.copy_journal()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.changed()
