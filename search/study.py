"""What Optuna is told of trials, and its study in memory, whose samplers see a bounded part of a long search."""

import copy
from collections.abc import Container
from itertools import compress
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.records import Row

BEST, LATEST = 50, 200  # TPE takes no more than the 25 best for good ones, and weighs the others down by their age
MOST = 300  # finished trials that are shown, before all but those are forgotten


def told(row: Row, metric: str) -> tuple[TrialState, float | None, dict[int, float]]:
    """(State, value, epoch → value at the rungs that have one) of a trial that has ended; only COMPLETE has a value.

    One that was completed and drew no finite images has none to tell, and is FAIL.
    """
    values = {rung["epoch"]: rung[metric] for rung in row.rungs if rung[metric] is not None}
    if row.state == "completed" and row.rungs and row.rungs[-1]["epoch"] in values:
        return TrialState.COMPLETE, values[row.rungs[-1]["epoch"]], values
    return TrialState.PRUNED if row.state == "stopped" and values else TrialState.FAIL, None, values


class ShortMemory(InMemoryStorage):
    """Of one study: shows the unfinished trials, the best and the latest.

    TPE's time grows with the trials it is shown: with 5,000 it would be half a second for one suggestion
    (benchmarks/simulate_scale.py).
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown = bytearray()  # a byte a trial, by its number

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = list(compress(super().get_all_trials(study_id, deepcopy=False), self._shown))
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        # TPE's note of a running trial's parameters for other processes, in which it is of all families at once: this
        # study has one process, and reading 500 such notes took a third of a suggestion.
        if not key.startswith("tpe:relative_params"):
            super().set_trial_system_attr(trial_id, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        finished = self.get_all_trials(study_id, False, (TrialState.COMPLETE, TrialState.PRUNED))
        if len(finished) > MOST:
            sign = -1 if self.get_study_directions(study_id)[0] == StudyDirection.MAXIMIZE else 1
            best = sorted(finished, key=lambda trial: _rank(trial, sign))[:BEST]
            kept = {trial.number for trial in (*best, *finished[-LATEST:])}
            for trial in finished:
                self._shown[trial.number] = trial.number in kept
        self._shown.append(True)
        return super().create_new_trial(study_id, template_trial)


def _rank(trial: FrozenTrial, sign: int) -> tuple[Any, ...]:
    """As TPE orders trials: completed by value, then pruned ones by (last step, value), then those without any."""
    if trial.state == TrialState.COMPLETE:
        return 0, 0, sign * (trial.value or 0.0)
    if trial.intermediate_values:
        step, value = max(trial.intermediate_values.items())
        return 1, -step, sign * value
    return 2, 0, 0.0
