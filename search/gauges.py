"""What Prometheus sees of a search, through Ray: trials by state, images a second, the scores of the newest rung."""

from collections import Counter
from typing import Any, get_args

from ray.util.metrics import Gauge

from search.records import RUNG_METRICS, Live, Records, State


class Gauges(Live):
    """Of one run, as the tag `run` says; set in the process that runs the search."""

    def __init__(self, run: str, records: Records):
        self.records, self.run = records, {"run": run}
        self.trials = Gauge("ddpm_search_trials", "Trials by state.", ("run", "state"))
        self.speed = Gauge("ddpm_search_images_per_second", "Of a trial, at its newest rung.", ("run", "trial"))
        self.epoch = Gauge("ddpm_search_epoch", "Of a trial, at its newest rung.", ("run", "trial"))
        self.score = Gauge("ddpm_search_rung", "A trial's newest rung, by metric.", ("run", "trial", "metric"))

    def show_states(self) -> None:
        states = Counter(row.state for row in self.records)
        for state in get_args(State):
            self.trials.set(states[state], self.run | {"state": state})

    def show_result(self, trial: str, result: dict[str, Any]) -> None:
        tags = self.run | {"trial": trial}
        if "images_per_second" in result:
            self.speed.set(result["images_per_second"], tags)
        self.epoch.set(result.get("epoch", 0), tags)
        for name in RUNG_METRICS:
            if result.get(name) is not None:
                self.score.set(result[name], tags | {"metric": name})
