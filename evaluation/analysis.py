"""What the trials table says of a search as a whole: cost, savings, idle time, trade-offs, what mattered. Pure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from evaluation.config import Metric

Row = dict[str, Any]  # one row of trials.parquet
Span = tuple[float, float]  # Unix seconds, from and to

NOT_RESUMED, SHARE_SPENT = "not resumed: ", "the search's share of budget."
CUT_SHORT = (NOT_RESUMED, SHARE_SPENT)  # how the reason of a trial begins that was stopped, but not for being weak
PAUSE_SECONDS = 900.0  # without any trial at work: then the search itself was interrupted
COMPARABLE_SHARE = 0.75  # of the trials that were measured at all
MIN_TRIALS = 16  # measured at one epoch, for importance
MAX_TRIALS = 100  # a forest over more takes minutes; these are then drawn at random
SHUFFLES = 19  # a real effect exceeds all of them, chance does so once in 20 times
TREES = 16


def deciding_metric(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What trials are stopped by; where that is `auto`, the first that was measured. config: as in config.yaml."""
    metric = str(config["early_stopping"]["metric"])
    if metric != "auto":
        return metric
    return (measured(rows) or ["frechet"])[0]


def measured(rows: Sequence[Row]) -> list[str]:
    """The metrics that any trial has at any rung."""
    rungs = [rung for row in rows for rung in row["rungs"]]
    return [name for name in get_args(Metric) if any(rung[name] is not None for rung in rungs)]


def stopped_early(rows: Iterable[Row]) -> list[Row]:
    """Those that were stopped for being weak, and not by the budget or since they were not resumed."""
    return [r for r in rows if r["state"] == "stopped" and not (r.get("reason") or "").startswith(CUT_SHORT)]


def savings(rows: Iterable[Row], epochs: int) -> tuple[float, float]:
    """Worker-seconds spent, and those that stopping early saved: epochs left times the mean cost of an epoch.

    Nothing is saved on those that were cut for another reason, and a failed one, whose last epochs were not reported,
    is spent but no measure of an epoch.
    """
    rows = list(rows)
    spent = sum(row["worker_seconds"] for row in rows)
    measured = [row for row in rows if row["worker_seconds"] and row["state"] != "failed"]
    done = sum(row["epoch"] for row in measured)
    left = sum(max(0, epochs - row["epoch"]) for row in stopped_early(rows))
    return spent, left * sum(row["worker_seconds"] for row in measured) / done if done else 0.0


@dataclass(frozen=True)
class Occupation:
    """How busy a search kept its workers: `at_once` trials at most, over `seconds`, `idle` the share not training."""

    at_once: int
    seconds: float
    idle: float


def occupation(spans: Iterable[Span], workers: int, worker_seconds: float) -> Occupation | None:
    """From the times at which trials were at work, each of `workers` workers; None where nothing is known.

    A pause of more than PAUSE_SECONDS without any trial is an interrupted search, and not counted.
    """
    changes = sorted((time, change) for span in spans for time, change in zip(span, (1, -1), strict=True))
    at_once = running = 0
    seconds, before = 0.0, changes[0][0] if changes else 0.0
    for time, change in changes:
        if running or time - before <= PAUSE_SECONDS:
            seconds += time - before
        before, running = time, running + change
        at_once = max(at_once, running)
    if not seconds:
        return None
    return Occupation(at_once, seconds, max(0.0, 1 - worker_seconds / (at_once * workers * seconds)))


def pareto(costs: Sequence[float], values: Sequence[float], higher_is_better: bool) -> list[int]:
    """Indices of the points that no other beats in both cost and value, the cheapest first."""
    sign = -1 if higher_is_better else 1
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], sign * values[i])):
        if not front or sign * values[i] < sign * values[front[-1]]:
            front.append(i)
    return front


def at_epoch(rows: Iterable[Row], metric: str, epoch: int) -> dict[str, float]:
    """Trial → its value at an epoch, of those that were measured there."""
    found = {row["trial"]: rung[metric] for row in rows for rung in row["rungs"] if rung["epoch"] == epoch}
    return {trial: value for trial, value in found.items() if value is not None and math.isfinite(value)}


def comparable_epoch(rows: Sequence[Row], metric: str) -> int | None:
    """The last epoch at which most trials were measured: values of one epoch compare, of survivors they mislead.

    Those that early stopping let pass are alike in what mattered, so that nothing seems to matter any more.
    """
    measured = {e: len(at_epoch(rows, metric, e)) for e in {rung["epoch"] for row in rows for rung in row["rungs"]}}
    most = COMPARABLE_SHARE * max(measured.values(), default=0)
    return max((epoch for epoch, count in measured.items() if count and count >= most), default=None)


@dataclass(frozen=True)
class Importance:
    """Of one parameter: its share of the variation, and the largest share in SHUFFLES shuffles of the results."""

    parameter: str
    share: float
    by_chance: float


def searched(space: Mapping[str, Any], family: str | None) -> dict[str, Any]:
    """Parameters that vary: name → {low, high, log}, or the list of choices. space: as in config.yaml.

    With a family its own too, by the names start, end, tau; with None the family itself.
    """
    names = {name: space.get(name) for name in ("learning_rate", "dropout")}
    if family is None:
        names["family"] = list(space["families"])
    else:
        names |= space["families"].get(family) or {}
    names |= {name: [json.dumps(value) for value in choices] for name, choices in (space.get("train") or {}).items()}
    return {n: v for n, v in names.items() if isinstance(v, dict) or (isinstance(v, list) and len(v) > 1)}


def importances(
    rows: Iterable[Row], values: Mapping[str, float], space: Mapping[str, Any], family: str | None
) -> tuple[int, list[Importance]]:
    """fANOVA (Hutter et al. 2014, in Optuna) on the order of the trials' values: the trials used, most important first.

    Of one family's trials and parameters, or of all with what all families share. Reused trials, and known points
    outside the space, are left out. Empty where fewer than MIN_TRIALS are left: then it would be noise.
    """
    parameters = searched(space, family)
    chosen = []
    for row in rows:
        params = {name: _param(row, name) for name in parameters}
        own = family is None or row["family"] == family
        if own and row["trial"] in values and row["state"] != "reused" and _inside(params, parameters):
            chosen.append((params, values[row["trial"]]))
    # A forest over what never varied has no variance to share, which Optuna takes for an error.
    parameters = {n: own for n, own in parameters.items() if len({params[n] for params, _ in chosen}) > 1}
    chosen = [({name: params[name] for name in parameters}, value) for params, value in chosen]
    if len(chosen) < MIN_TRIALS or not parameters:
        return len(chosen), []
    rng = np.random.default_rng(0)
    if len(chosen) > MAX_TRIALS:
        chosen = [chosen[i] for i in rng.permutation(len(chosen))[:MAX_TRIALS]]
    order = np.argsort(np.argsort([value for _, value in chosen])).astype(float)
    shares = _fanova([params for params, _ in chosen], order, parameters)
    shuffled = [_fanova([p for p, _ in chosen], rng.permutation(order), parameters) for _ in range(SHUFFLES)]
    found = [Importance(name, shares[name], max(each[name] for each in shuffled)) for name in parameters]
    return len(chosen), sorted(found, key=lambda each: -each.share)


def _param(row: Row, name: str) -> Any:
    settings = row.get("settings") or {}
    return json.dumps(settings[name]) if name in settings else row.get(name)


def _inside(params: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    for name, space in parameters.items():
        value = params[name]
        if value is None or not (value in space if isinstance(space, list) else space["low"] <= value <= space["high"]):
            return False
    return True


def _fanova(params: Sequence[Mapping[str, Any]], values: np.ndarray, parameters: Mapping[str, Any]) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(space)
        if isinstance(space, list)
        else FloatDistribution(space["low"], space["high"], log=space["log"])
        for name, space in parameters.items()
    }
    study = optuna.create_study()
    study.add_trials(
        optuna.trial.create_trial(params=dict(own), distributions=distributions, value=float(value))
        for own, value in zip(params, values, strict=True)
    )
    found = FanovaImportanceEvaluator(seed=0, n_trees=TREES).evaluate(study)
    return {name: float(found.get(name, 0.0)) for name in parameters}
