"""What Prometheus sees of a search, through Ray: trials by state, images a second, the scores of the newest rung."""

from collections import Counter
from typing import Any, get_args

from ray.util.metrics import Gauge

from search.driver_only import DriverOnly
from search.records import RUNG_METRICS, Records, State


class Gauges(DriverOnly):
    """Of one run, as the tag `run` says; set in the process that runs the search.

    Ray forgets what is not set again within some 10 s: `show` is to be called more often than that.
    """

    def __init__(self, run: str, records: Records):
        self.records, self.run = records, {"run": run}
        self.images_per_second: dict[str, float] = {}
        self.trials = Gauge("ddpm_search_trials", "Trials by state.", ("run", "state"))
        self.speed = Gauge("ddpm_search_images_per_second", "Of a running trial, at its newest rung.", ("run", "trial"))
        self.epoch = Gauge("ddpm_search_epoch", "Of a trial, at its newest rung.", ("run", "trial"))
        self.score = Gauge("ddpm_search_rung", "A trial's newest rung, by metric.", ("run", "trial", "metric"))

    def note(self, trial: str, result: dict[str, Any]) -> None:
        if "images_per_second" in result:
            self.images_per_second[trial] = result["images_per_second"]

    def show(self) -> None:
        states = Counter(row.state for row in self.records)
        for state in get_args(State):
            self.trials.set(states[state], self.run | {"state": state})
        for row in self.records:
            tags = self.run | {"trial": row.trial}
            if row.state == "running" and row.trial in self.images_per_second:
                self.speed.set(self.images_per_second[row.trial], tags)
            if row.rungs:
                self.epoch.set(row.rungs[-1]["epoch"], tags)
                for name in RUNG_METRICS:
                    if row.rungs[-1][name] is not None:
                        self.score.set(row.rungs[-1][name], tags | {"metric": name})
