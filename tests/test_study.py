"""The bounded study: what samplers are shown of a long search."""

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from search.study import BEST, LATEST, MOST, ShortMemory


def study_with(storage: InMemoryStorage, values: list[float], direction: str = "minimize") -> optuna.Study:
    """Completed trials of these values, x their place."""
    study = optuna.create_study(storage=storage, direction=direction, sampler=optuna.samplers.TPESampler(seed=0))
    x = FloatDistribution(0, 1e6)
    for place, value in enumerate(values):
        study.add_trial(create_trial(value=value, params={"x": place}, distributions={"x": x}))
    return study


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_best_the_latest_and_the_unfinished_are_shown(direction):
    sign = 1 if direction == "minimize" else -1
    study = study_with(ShortMemory(), [sign * float(n) for n in range(5)], direction)
    running = [study.ask().number for _ in range(3)]
    for n in range(5, MOST + 30):
        study.add_trial(create_trial(value=sign * float(n), params={}, distributions={}))
    shown = {trial.number for trial in study.trials}
    assert set(range(5)) <= shown  # the best, though the oldest
    assert set(running) <= shown
    assert {trial.number for trial in study.get_trials(states=(TrialState.RUNNING,))} == set(running)
    newest = MOST + 30 + len(running) - 1
    assert set(range(newest - LATEST, newest + 1)) <= shown
    assert len(shown) <= MOST + 1 + len(running)
    assert len([n for n in shown if n < newest - LATEST - 30]) <= BEST + len(running)


def test_a_short_search_is_suggested_the_same_as_by_optuna_s_own_storage():
    values = [float((7 * n) % 31) for n in range(40)]
    both = [study_with(storage(), values) for storage in (ShortMemory, InMemoryStorage)]
    ours, theirs = ([study.ask().suggest_float("x", 0, 1e6) for _ in range(5)] for study in both)
    assert ours == theirs


def test_pruned_trials_are_kept_as_tpe_ranks_them():
    """By the last step first, then the value; those without any go before all others."""
    study = optuna.create_study(storage=ShortMemory())

    def add(**trial):
        study.add_trial(create_trial(params={}, distributions={}, **trial))

    for _ in range(MOST - LATEST - 2):
        add(state=TrialState.PRUNED)
    add(state=TrialState.PRUNED, value=9.0, intermediate_values={1: 1.0, 3: 9.0})
    add(state=TrialState.PRUNED, value=1.0, intermediate_values={1: 1.0})
    for _ in range(BEST - 1):
        add(state=TrialState.PRUNED, value=2.0, intermediate_values={1: 2.0})
    for _ in range(LATEST + 10):
        add(state=TrialState.PRUNED, value=8.0, intermediate_values={1: 8.0})
    old = study.trials[:BEST]
    assert {9.0, 1.0} <= {trial.value for trial in old}
    assert all(trial.intermediate_values for trial in old)
