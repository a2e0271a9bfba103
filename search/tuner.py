"""The search itself: Ray Tune with our searcher and scheduler, begun or rebuilt from the trials table."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.search import ConcurrencyLimiter
from rich.console import Console

from cluster import capacity
from cluster.capacity import Capacity, Placement
from cluster.leftovers import Leftovers
from evaluation.analysis import CUT_SHORT
from evaluation.rung import RungScorer
from search import began, trial
from search.budget import Budget
from search.config import SearchConfig
from search.disk import keep_what_is_asked_for
from search.driver_only import DriverOnly
from search.early_stopping import RungScheduler
from search.gauges import Gauges
from search.interrupt import Interrupt, resume_command
from search.records import ENDED, Records, Row
from search.searcher import HonestOptunaSearch
from search.watch import SearchView
from trainer.config import TrainConfig
from trainer.storage import Storage

JOURNAL = "study.journal"
ROOM_SECONDS = 5.0
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial's report has no score
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the training writes its own TensorBoard events
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # our record is what a search is resumed from
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # interrupt.py takes it
    "RAY_AIR_NEW_OUTPUT": "0",
}


def trials_left(config: SearchConfig, records: Records) -> int:
    """Trainings still to be started or finished; what is screened or reused counts in no budget."""
    return max(0, config.trials - sum(row.state in ENDED for row in records))


def why_over(config: SearchConfig, records: Records, ended: str | None) -> str | None:
    """Why a search has ended. ended: why nothing more was begun, which is the reason too where it cut the last ones."""
    cut = any((row.reason or "").startswith(CUT_SHORT) for row in records)
    return ended if trials_left(config, records) or (ended and cut) else f"all {config.trials} trials are done"


def tidy(run: Storage, records: Iterable[Row]) -> None:
    """Deletes what is not kept of trials that have ended: a driver may have died before it did, or may just have."""
    for row in records:
        with contextlib.suppress(OSError):
            keep_what_is_asked_for(run, row)


def mend_study(config: SearchConfig, run: Storage, records: Records, metric: str) -> None:
    """Writes the journal of a search that is over where it is lost, or lacks what came before its driver's death."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, JOURNAL)
        HonestOptunaSearch(config, metric, records, JournalStorage(JournalFileBackend(str(file))))
        whole = file.read_bytes()
    if not run.exists(JOURNAL) or run.read(JOURNAL).count(b"\n") < whole.count(b"\n"):
        run.write(JOURNAL, whole)


def search(
    config: SearchConfig,
    run: Storage,
    records: Records,
    scorer: RungScorer,
    placement: Placement,
    budget: Budget,
    interrupt: Interrupt,
    console: Console,
) -> str:
    """Runs the search to the end of its budget, shown as it comes on, and says why it ended.

    Raises KeyboardInterrupt where the user interrupted it: running trials stay `running` in the record.
    """
    train = config.train
    view = SearchView(console, records, scorer.metric, train.epochs, config.trials)
    ended = None
    try:
        # Optuna's journal is rebuilt from the record by every driver, and on a local disk, as it needs.
        with tempfile.TemporaryDirectory(prefix="ddpm-search-study-") as disk, view.shown():
            journal = Path(run.root if run.is_local else disk, JOURNAL)
            ended = _tune(config, run, records, scorer, placement, view, budget, interrupt, journal)
    finally:
        records.flush()
        budget.note(ended)
    console.print(view.summary())
    return ended


def _tune(
    config: SearchConfig,
    run: Storage,
    records: Records,
    scorer: RungScorer,
    placement: Placement,
    view: SearchView,
    budget: Budget,
    interrupt: Interrupt,
    journal: Path,
) -> str:
    metric = scorer.metric
    left = trials_left(config, records)
    os.environ |= TUNE_ENVIRONMENT
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for old in (journal, journal.with_name(f"{JOURNAL}.lock")):
        old.unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    old_rows = began.rows_of_other_spaces(run, records, config)
    searcher = HonestOptunaSearch(config, metric, records, storage, budget, old_rows)
    ended = searcher.over()
    tidy(run, records)
    if ended:  # a run that is resumed when there is nothing more to be done
        _copy_journal(run, journal)
        return ended
    limiter = ConcurrencyLimiter(searcher, max_concurrent=placement.at_once)  # as max_concurrent_trials makes it
    room = _Room(limiter, placement, config.train, view.console)
    leftovers = Leftovers(placement.worker) if config.runner == "train" else None
    watcher = _Watcher(run, records, journal, view.changed, budget, room, leftovers, Gauges(config.name, records))
    rungs = config.rung_epochs()
    if config.runner == "reuse":
        run_trial = trial.in_reused_process(run, rungs)
        resources = placement.worker
    else:
        run_trial = trial.in_ray_train(run, rungs, placement.worker)
        # Ray Train reserves the workers; the trial's own process waits, and must fit beside them on any node.
        resources = {"memory": 1}
    run_trial.__name__ = f"{config.name} trial"  # by which the Ray dashboard lists its processes
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, scorer=scorer), resources),
        tune_config=tune.TuneConfig(
            search_alg=limiter,
            scheduler=RungScheduler(config.early_stopping, metric, rungs, config.train.epochs, records, budget),
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
            stop=_Stop(interrupt, room, budget),
            verbose=0,
        ),
    )
    with interrupt.awaited():
        tuner.fit()
    if leftovers:
        leftovers.clear()  # the final stage wants their place
    ended = None if interrupt.requested else searcher.left()
    tidy(run, [records[key] for key in watcher.ended])  # once more: one that is stopped may write one checkpoint more
    if searcher.copied:
        _copy_journal(run, journal)
    else:
        mend_study(config, run, records, metric)
    if interrupt.requested:
        raise KeyboardInterrupt
    if not (why := why_over(config, records, ended)):
        raise RuntimeError(f"Ray Tune ended before the search in {run.uri}; {resume_command(run.uri)} goes on with it")
    return why


class _Room:
    """Nodes come and go: so many trials are begun as fit by now. Those that lost theirs wait, and it is said once."""

    def __init__(self, limiter: ConcurrencyLimiter, placement: Placement, train: TrainConfig, console: Console):
        self.limiter, self.worker, self.train, self.console = limiter, placement.worker, train, console
        self.fit = self.held = placement.at_once

    def look(self, cluster: Capacity) -> None:
        fit, self.fit = self.fit, cluster.trials_at_once(self.train.workers, self.worker)
        # Where none is left, Tune asks for the next one without looking up: that one waits.
        self.limiter.max_concurrent = max(1, self.fit)
        begun = len(self.limiter.live_trials)
        self.held = cluster.trials_at_once(self.train.min_workers or self.train.workers, self.worker)
        if self.fit != fit and begun > self.held:
            what = "GPUs" if "GPU" in self.worker else "CPUs"
            self.console.print(
                f"{begun - self.held} of {begun} trials wait: the cluster has {what} for {self.held or 'none'} by now; "
                "they go on when it has"
            )


def _copy_journal(run: Storage, journal: Path) -> None:
    if not run.is_local and journal.exists():
        run.write(JOURNAL, journal.read_bytes())


class _Stop(DriverOnly, Stopper):
    """Ends a search that the user interrupted, or whose budget is spent where no trial can come to a rung."""

    def __init__(self, interrupt: Interrupt, room: _Room, budget: Budget):
        self.interrupt, self.room, self.budget = interrupt, room, budget

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.interrupt.requested or (not self.room.held and self.budget.spent() is not None)


class _Watcher(DriverOnly, Callback):
    """Passes Tune's events on, and copies the study where the run is not on a local disk."""

    def __init__(
        self,
        run: Storage,
        records: Records,
        journal: Path,
        changed: Callable[[], None],
        budget: Budget,
        room: _Room,
        leftovers: Leftovers | None,
        gauges: Gauges,
    ):
        self.run, self.records, self.journal, self.changed, self.budget = run, records, journal, changed, budget
        self.room, self.leftovers, self.gauges, self.looked = room, leftovers, gauges, 0.0
        self.ended: set[str] = set()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self.looked > ROOM_SECONDS:
            self.looked = time.monotonic()
            self.room.look(capacity.read())
            if self.leftovers:
                self.leftovers.look()
            self.gauges.show()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.budget.tick()
        for one in trials:
            # Where a process cannot be reused, Tune fails the trial that was to have it, and tells nobody.
            if one.status == "ERROR" and one.trial_id in self.room.limiter.live_trials:
                key = one.config["trial"]
                self.records.update(key, reason="its process still stored what the trial before it left, and was lost")
                self.room.limiter.on_trial_complete(one.trial_id, error=True)
                self._ended(key)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.changed()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.changed()
        self.gauges.note(trial.config["trial"], result)

    def _ended(self, key: str) -> None:
        self.ended.add(key)
        tidy(self.run, [self.records[key]])
        self.changed()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial.config["trial"])
        with contextlib.suppress(OSError):  # the study is a copy of the record; the next one will do
            _copy_journal(self.run, self.journal)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial.config["trial"])
