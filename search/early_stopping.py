"""Which trials go on: successive halving or the median rule on explicit rungs, decided from the trials table."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from evaluation.rung import objective
from search.budget import Budget
from search.config import EarlyStoppingConfig
from search.driver_only import DriverOnly
from search.records import Records, Row

MEDIAN_TRIALS = 3  # as Ray's MedianStoppingRule
NAMED = re.compile(r"[A-Za-z_][\w.]*(\(\w+\))?: ")  # how a traceback says its error


def goes_on(value: float, earlier: list[float], reduction: float) -> bool:
    """Whether a trial passes a rung, as in ASHA (Li 2018, arXiv:1810.05934) and Ray Tune's version of it.

    `value` is its own, `earlier` those of the trials that reached the rung before; lower is better. The first to
    come always passes; a later one must be no worse than the best 1/reduction quantile of the earlier.
    """
    if not math.isfinite(value):
        return False
    finite = [v for v in earlier if math.isfinite(v)]
    return not finite or value <= float(np.percentile(finite, 100 / reduction))


def beats_median(values: list[float], others: list[list[float]]) -> bool:
    """Whether a trial passes a rung by the median stopping rule (Golovin 2017, doi:10.1145/3097983.3098043).

    `values` are its own at the rungs up to this one, `others` those of each trial that reached it; lower is better. It
    is stopped where its best is worse than the median of the others' running averages, once there are three of them.
    """
    if not math.isfinite(values[-1]):
        return False
    averages = [average for other in others if math.isfinite(average := float(np.mean(other)))]
    return len(averages) < MEDIAN_TRIALS or min(values) <= float(np.median(averages))


class RungScheduler(DriverOnly, FIFOScheduler):
    """Tune's scheduler for a search whose record is the authority.

    It keeps no state of its own: rungs live in the trials table, so a resumed search compares with every trial
    that ever came to a rung. Tune's own ASHA would start with empty rungs.
    """

    def __init__(
        self,
        config: EarlyStoppingConfig,
        metric: str,
        rungs: list[int],
        epochs: int,
        records: Records,
        budget: Budget | None = None,
    ):
        super().__init__()
        self.budget = budget
        self.config, self.metric_name, self.rungs, self.epochs, self.records = config, metric, rungs, epochs, records

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        key, epoch = trial.config["trial"], result.get("epoch")
        if epoch is None:
            row, failure = self.records[key], result.get("failure", "its process ended without a report")
            if row.state == "running":  # what breaks after the last report harms nothing
                seconds = max(row.worker_seconds, result.get("worker_seconds", 0.0))
                self.records.update(key, state="failed", reason=failure, worker_seconds=seconds)
            return TrialScheduler.STOP
        # Where a worker sees the run, and what its links lead to, is that node's own.
        path = result.get("checkpoint_path")
        path = f"train/{key}/{path.rpartition('/')[2]}" if path else None
        decided = self.records[key].rung(epoch) is not None  # a report that comes twice is compared once

        def decide(row: Row) -> dict[str, Any]:
            if epoch >= self.epochs:
                return {"state": "completed", "reason": None}
            if epoch in self.rungs and not decided and (reason := self._reason_to_stop(row, epoch)):
                return {"state": "stopped", "reason": reason}
            return {}

        row = self.records.report(key, result, path, decide)
        # The process of a completed one ends by itself: nothing of it is cut short by a stop.
        return TrialScheduler.STOP if row.state == "stopped" else TrialScheduler.CONTINUE

    def _reason_to_stop(self, row: Row, epoch: int) -> str | None:
        """Why a trial that has just been scored at a rung does not go on; None where it does."""
        if self.budget and (spent := self.budget.spent()):
            return spent
        if self.config.scheduler == "none":
            return None
        values = self._values(row, epoch)
        there = [(other, rung) for other in self.records if (rung := other.rung(epoch)) and other.trial != row.trial]
        earlier = [objective(rung, self.metric_name) for _, rung in there]
        if self.config.scheduler == "median":
            passes = beats_median(values, [self._values(other, epoch) for other, _ in there])
        else:
            passes = goes_on(values[-1], earlier, self.config.reduction)
        if passes:
            return None
        if not math.isfinite(values[-1]):
            return f"no finite {self.metric_name} at epoch {epoch}"
        better = sum(value < values[-1] for value in earlier)
        what = (
            f"{self.metric_name} {abs(values[-1]):.4g} at epoch {epoch} was {better + 1} of {len(earlier) + 1} so far"
        )
        return what + (", worse than the median" if self.config.scheduler == "median" else "")

    def _values(self, row: Row, epoch: int) -> list[float]:
        """What is to be small, at the rungs up to `epoch`."""
        return [objective(rung, self.metric_name) for rung in row.rungs if rung["epoch"] <= epoch]

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Notes why; whether the trial is tried again or has failed, the searcher is told."""
        file = Path(trial.local_path or "", "error.txt")
        lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
        said = [line.rstrip() for line in lines if line.strip()]
        # Not always the last line: CUDA's errors go on with hints.
        named = [line for line in said if NAMED.match(line)]
        reason = (named or said or ["its process ended with an error"])[-1].strip()
        if self.records[trial.config["trial"]].state == "running":
            self.records.update(trial.config["trial"], reason=reason[:300])
