"""What is said of a whole search: each figure against a case whose truth is known."""

from typing import Any

import numpy as np
import pytest

from evaluation import analysis


def row(trial: str, state: str = "completed", **changes: Any) -> dict[str, Any]:
    base = {"trial": trial, "state": state, "epoch": 0, "worker_seconds": 0.0, "rungs": []}
    return base | {"family": "cosine", "learning_rate": 1e-3, "dropout": 0.1} | changes


def test_savings_are_the_epochs_left_of_stopped_trials_at_the_mean_cost_of_an_epoch():
    rows = [row("a", epoch=90, worker_seconds=1800.0), row("b", "stopped", epoch=10, worker_seconds=400.0)]
    rows += [row("c", "screened"), row("d", "failed")]
    # 1800 + 400 seconds over 90 + 10 epochs are 22 an epoch, and b left 80
    assert analysis.savings(rows, epochs=90) == (2200.0, 80 * 22.0)
    assert analysis.savings([], epochs=90) == (0.0, 0.0)


@pytest.mark.parametrize("reason", [f"{analysis.NOT_RESUMED}it is over", f"{analysis.SHARE_SPENT}hours was spent"])
def test_what_the_budget_stopped_was_not_saved_by_early_stopping(reason):
    rows = [row("a", epoch=90, worker_seconds=1800.0), row("b", "stopped", epoch=10, worker_seconds=200.0)]
    rows[1]["reason"] = reason
    assert analysis.savings(rows, epochs=90) == (2000.0, 0.0)


def test_what_a_failed_trial_took_is_spent_and_no_measure_of_an_epoch():
    rows = [row("a", epoch=90, worker_seconds=900.0), row("b", "stopped", epoch=10, worker_seconds=100.0)]
    rows.append(row("c", "failed", epoch=0, worker_seconds=500.0))
    assert analysis.savings(rows, epochs=90) == (1500.0, 80 * 10.0)


def test_workers_are_idle_for_what_is_not_training_of_the_time_of_the_search():
    # two at once from 0 to 100, one alone to 150: 150 s of 2 x 2 workers, of which 500 worker-seconds were training
    found = analysis.occupation([(0, 100), (0, 150)], workers=2, worker_seconds=500.0)
    assert found == analysis.Occupation(2, 150.0, pytest.approx(1 - 500 / 600))
    assert analysis.occupation([], 1, 0.0) is None
    # one after the other, with a pause that is a start-up, and one that is a night
    assert analysis.occupation([(0, 100), (110, 200)], 1, 190.0) == analysis.Occupation(1, 200.0, pytest.approx(0.05))
    night = analysis.occupation([(0, 100), (100 + 8 * 3600, 200 + 8 * 3600)], 1, 190.0)
    assert night == analysis.Occupation(1, 200.0, pytest.approx(0.05))


@pytest.mark.parametrize("higher", [True, False])
def test_pareto_front_is_what_no_other_point_beats_in_both(higher: bool):
    rng = np.random.default_rng(0)
    costs, values = rng.integers(0, 12, 60).astype(float), rng.integers(0, 12, 60).astype(float)
    sign = -1 if higher else 1

    def beaten(i: int) -> bool:
        no_worse = (costs <= costs[i]) & (sign * values <= sign * values[i])
        return bool((no_worse & ((costs < costs[i]) | (sign * values < sign * values[i]))).any())

    front = analysis.pareto(costs.tolist(), values.tolist(), higher)
    truth = {(costs[i], values[i]) for i in range(60) if not beaten(i)}
    assert [(costs[i], values[i]) for i in front] == sorted(truth)  # equal points once


def test_values_are_compared_at_one_epoch_that_most_trials_came_to():
    def rung(epoch: int, value: float | None) -> dict[str, Any]:
        return {"epoch": epoch, "frechet": value}

    def search(came_further: int) -> list[dict[str, Any]]:
        rows = [row(f"t{i}", rungs=[rung(1, 9.0 - i), *[rung(3, 5.0)] * (i < came_further)]) for i in range(8)]
        return [*rows, row("nothing finite", rungs=[rung(1, None)])]

    assert analysis.comparable_epoch(search(8), "frechet") == 3
    assert analysis.comparable_epoch(search(6), "frechet") == 3
    assert analysis.comparable_epoch(search(5), "frechet") == 1
    assert analysis.comparable_epoch(search(8)[-1:], "frechet") is None
    assert analysis.comparable_epoch([], "frechet") is None
    assert analysis.at_epoch(search(4), "frechet", 1) == {f"t{i}": 9.0 - i for i in range(8)}


SPACE = {
    "families": {
        "cosine": {"start": 0.0, "end": 1.0, "tau": {"low": 0.5, "high": 3.0, "log": True}},
        "linear": {"start": 1e-4, "end": 0.02, "tau": 1.0},
    },
    "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
    "dropout": None,
    "train": {"batch_size": [16, 32], "ema_decays": [[0.9]]},
}


def trials(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        own = {"learning_rate": 10 ** rng.uniform(-3, -2), "start": 0.0, "end": 1.0, "tau": rng.uniform(0.5, 3)}
        settings = {"batch_size": int(rng.choice([16, 32])), "ema_decays": [0.9]}
        rows.append(row(f"t{i}", family=str(rng.choice(["cosine", "linear"])), settings=settings, **own))
    return rows


def test_what_is_searched_is_what_varies():
    shared = {"learning_rate": SPACE["learning_rate"], "batch_size": ["16", "32"]}
    assert analysis.searched(SPACE, None) == shared | {"family": ["cosine", "linear"]}
    assert analysis.searched(SPACE, "cosine") == shared | {"tau": SPACE["families"]["cosine"]["tau"]}
    assert analysis.searched(SPACE, "linear") == shared


@pytest.mark.slow
def test_the_parameter_that_moves_the_result_is_found_and_no_other():
    rows = trials(40)
    by_rate = {r["trial"]: abs(np.log(r["learning_rate"] / 4e-3)) for r in rows}
    used, found = analysis.importances(rows, by_rate, SPACE, None)
    assert used == 40
    assert found[0].parameter == "learning_rate"
    assert [each.share > each.by_chance for each in found] == [True, False, False]
    assert 0.9 < sum(each.share for each in found) <= 1 + 1e-6  # the rest is of parameters together

    own = [r for r in rows if r["family"] == "cosine"]
    used, found = analysis.importances(rows, {r["trial"]: r["tau"] for r in rows}, SPACE, "cosine")
    assert used == len(own)
    assert {each.parameter for each in found if each.share > each.by_chance} == {"tau"}


def test_importance_is_refused_where_trials_are_too_few():
    rows = trials(analysis.MIN_TRIALS - 1)
    rows.append(row("outside the space", learning_rate=0.5, settings={"batch_size": 16}))
    rows.append(rows[0] | {"trial": "twice", "state": "reused"})
    values = {r["trial"]: float(i) for i, r in enumerate(rows)}
    assert analysis.importances(rows, values, SPACE, None) == (analysis.MIN_TRIALS - 1, [])
