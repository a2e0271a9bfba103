"""Which trials go on: asynchronous successive halving on explicit rungs, decided from the trials table."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from evaluation.rung import objective
from search.config import EarlyStoppingConfig
from search.records import Live, Records


def goes_on(value: float, earlier: list[float], reduction: float) -> bool:
    """Whether a trial passes a rung, as in ASHA (Li 2018, arXiv:1810.05934) and Ray Tune's version of it.

    `value` is its own, `earlier` those of the trials that reached the rung before; lower is better. The first to
    come always passes; a later one must be no worse than the best 1/reduction quantile of the earlier.
    """
    if not math.isfinite(value):
        return False
    finite = [v for v in earlier if math.isfinite(v)]
    return not finite or value <= float(np.percentile(finite, 100 / reduction))


class RungScheduler(Live, FIFOScheduler):
    """Tune's scheduler for a search whose record is the authority.

    It keeps no state of its own: rungs live in the trials table, so a resumed search compares with every trial
    that ever came to a rung. Tune's own ASHA would start with empty rungs.
    """

    def __init__(self, config: EarlyStoppingConfig, metric: str, rungs: list[int], epochs: int, records: Records):
        super().__init__()
        self.config, self.metric_name, self.rungs, self.epochs, self.records = config, metric, rungs, epochs, records

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        key = trial.config["trial"]
        if failure := result.get("failure"):
            self.records.update(key, state="failed", reason=failure)
            return TrialScheduler.STOP
        epoch = result.get("epoch")
        if epoch is None:
            self.records.update(key, state="failed", reason="its process ended without a report")
            return TrialScheduler.STOP
        root = f"{self.records.run.root}/"
        path = result.get("checkpoint_path")
        decided = self.records[key].rung(epoch) is not None  # a report that comes twice is compared once
        row = self.records.report(key, result, path.removeprefix(root) if path else None)
        if epoch >= self.epochs:
            # Its process ends by itself: nothing of it is cut short by a stop.
            self.records.update(key, state="completed", reason=None)
        elif epoch in self.rungs and not decided and self.config.scheduler == "asha":
            rung = row.rung(epoch)
            assert rung is not None
            value = objective(rung, self.metric_name)
            others = [other.rung(epoch) for other in self.records if other.trial != key]
            earlier = [objective(other, self.metric_name) for other in others if other is not None]
            if not goes_on(value, earlier, self.config.reduction):
                better = sum(v < value for v in earlier)
                place = f"{better + 1} of {len(earlier) + 1}"
                what = f"{self.metric_name} {abs(value):.4g} at epoch {epoch} was {place} so far"
                reason = what if math.isfinite(value) else f"no finite {self.metric_name} at epoch {epoch}"
                self.records.update(key, state="stopped", reason=reason)
                return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Notes why; whether the trial is tried again or has failed, the searcher is told."""
        file = Path(trial.local_path or "", "error.txt")
        lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "its process ended with an error")
        self.records.update(trial.config["trial"], reason=last[:300])
