"""What a search costs until it has a good model: this one, random search, and tutorials' OptunaSearch + ASHA.

    python -m benchmarks.search_efficiency record --out benchmarks/curves/digits.parquet    (hours; resumable)
    python -m benchmarks.search_efficiency compare                                          (minutes)

Trainings are replayed from recorded curves (curves.py): the searchers and schedulers are the real ones and suggest what
they like; what comes back is the curve of the nearest configuration that this search has not trained yet, at the
recorded cost. Four workers are simulated. Each repeat has its own seed and its own random four fifths of the pool.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks import curves, replay
from benchmarks.common import provenance, write
from search import searcher, space
from search.early_stopping import RungScheduler
from search.records import Records
from trainer.storage import Storage

WORKERS, REPEATS, POOL_SHARE = 4, 200, 0.8
TARGET_SHARE = 0.05  # the quality to be reached is that of the best twentieth of random configurations
EQUAL_COST = 20  # full trainings, at which the qualities are compared
LIMITS = {"cost_ratio_to_random": 0.6}


@dataclass(frozen=True)
class Costs:
    """CPU seconds, the median of the pool: one network for all configurations, on a machine with other load."""

    epoch: float
    loss: float
    score: float

    @property
    def full(self) -> float:
        return curves.EPOCHS * self.epoch + self.score


Outcome = tuple[float, float, float]  # at the end of a full training: worker-seconds of all so far, its quality (the
# Fréchet distance on fresh noise), what the search itself goes by


class Pool:
    """The recorded curves that one repeat may meet, each once."""

    def __init__(self, recorded: list[curves.Curve], costs: Costs):
        self.recorded, self.costs, self.nearest = recorded, costs, curves.Nearest(recorded)
        self.taken: dict[int, None] = {}

    def take(self, params: dict[str, Any]) -> curves.Curve:
        place = self.nearest(params, set(self.taken))
        assert place is not None
        self.taken[place] = None
        return self.recorded[place]

    def scored(self, suggestion: dict[str, Any], rungs: list[int]) -> replay.Steps:
        """As this project's trials report: at rungs and at the end, scored there."""
        training = suggestion["train"]
        names = ("learning_rate", "dropout")
        curve = self.take(training["schedule"] | {name: training[name] for name in names})
        steps, seconds = [], 0.0
        for epoch in curve.epochs:
            seconds += self.costs.epoch
            if epoch["epoch"] in (*rungs, curves.EPOCHS):
                seconds += self.costs.score
                report = {"epoch": epoch["epoch"], "rung": True, "worker_seconds": seconds, "curve": curve}
                steps.append((seconds, report | {name: epoch[name] for name in ("frechet", "score", "grid_loss")}))
        return steps

    def judged_by_loss(self, params: dict[str, Any]) -> replay.Steps:
        """As tutorials' trials report: the validation loss of every epoch."""
        curve, each = self.take(space.flat(params)), self.costs.epoch + self.costs.loss
        return [
            (each * epoch["epoch"], {"epoch": epoch["epoch"], "val_loss": epoch["val_loss"], "curve": curve})
            for epoch in curve.epochs
        ]

    def unjudged(self, params: dict[str, Any]) -> replay.Steps:
        """As trials of a search without early stopping: scored at the end alone."""
        curve = self.take(space.flat(params))
        report = {"epoch": curves.EPOCHS, "frechet": curve.epochs[-1]["frechet"], "curve": curve}
        return [(self.costs.full, report)]


def ours(
    pool: Pool, seed: int, enough: Callable[..., bool], overrides: tuple[str, ...] = (), without: str | None = None
) -> replay.Replay:
    """This project's search, or all of it but one part, or with other settings."""
    config = curves.settings((f"seed={seed}", *overrides))
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with ExitStack() as stack:
        records = Records(Storage(stack.enter_context(tempfile.TemporaryDirectory(dir=fast))))
        if without == "screen":
            stack.enter_context(patch.object(space, "screen", lambda config, params: None))
        search = searcher.HonestOptunaSearch(config, "frechet", records, None)
        if without == "TPE":
            search._ot_study.sampler = optuna.samplers.RandomSampler(seed)
        rungs, epochs = config.rung_epochs(), config.train.epochs
        scheduler = RungScheduler(config.early_stopping, "frechet", rungs, epochs, records)
        at_rungs = partial(pool.scored, rungs=rungs)
        return replay.run(search, scheduler, at_rungs, WORKERS, len(pool.recorded), ended=enough)


def random_search(pool: Pool, seed: int, enough: Callable[..., bool]) -> replay.Replay:
    """Random configurations, all trained in full."""
    draw = space.define_by_run(curves.settings())
    search = OptunaSearch(draw, metric="frechet", mode="min", sampler=optuna.samplers.RandomSampler(seed))
    return replay.run(search, FIFOScheduler(), pool.unjudged, WORKERS, len(pool.recorded), ended=enough)


def tutorial(pool: Pool, seed: int, enough: Callable[..., bool]) -> replay.Replay:
    """OptunaSearch and ASHA as they come, on the validation loss."""
    draw = space.define_by_run(curves.settings())
    search = OptunaSearch(draw, metric="val_loss", mode="min", sampler=optuna.samplers.TPESampler(seed=seed))
    with patch.object(search, "on_trial_result", lambda trial_id, result: None):  # it wants Tune's own iteration count
        asha = AsyncHyperBandScheduler("epoch", "val_loss", "min", max_t=curves.EPOCHS, grace_period=1)
        return replay.run(search, asha, pool.judged_by_loss, WORKERS, len(pool.recorded), ended=enough)


METHODS: dict[str, Callable[..., replay.Replay]] = {
    "this search": ours,
    "random search": random_search,
    "OptunaSearch + ASHA on the validation loss": tutorial,
    "without screen": partial(ours, without="screen"),
    "without rungs": partial(ours, overrides=("early_stopping.rungs=[]",)),
    "without TPE": partial(ours, without="TPE"),
    "without known points": partial(ours, overrides=("known_points=[]",)),
    "one rung, at 1/9": partial(ours, overrides=(f"early_stopping.rungs=[{1 / 9}]",)),
    "one rung, at 1/3": partial(ours, overrides=(f"early_stopping.rungs=[{1 / 3}]",)),
    "the best half goes on": partial(ours, overrides=("early_stopping.reduction=2",)),
    "the best quarter goes on": partial(ours, overrides=("early_stopping.reduction=4",)),
    "median stopping": partial(ours, overrides=("early_stopping.scheduler=median",)),
}


def repeat(seed: int, recorded: list[curves.Curve], costs: Costs, target: float) -> dict[str, list[Outcome]]:
    """Every method once, on the same part of the pool; a search goes on until it has the quality and its cost."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    part = np.random.default_rng(seed).permutation(len(recorded))[: round(POOL_SHARE * len(recorded))]
    outcomes: dict[str, list[Outcome]] = {}
    for name, method in METHODS.items():
        found: list[Outcome] = []

        def enough(run: replay.Replay, trial: replay.Trial, found: list[Outcome] = found) -> bool:
            last, spent = trial.last, run.seconds * WORKERS
            if last["epoch"] == curves.EPOCHS:
                quality = last["curve"].fresh_frechet
                found.append((spent, np.inf if quality is None else quality, last.get("frechet", last.get("val_loss"))))
            return spent > EQUAL_COST * costs.full and any(quality <= target for _, quality, _ in found)

        method(Pool([recorded[place] for place in part], costs), seed, enough)
        outcomes[name] = found
    return outcomes


def compare(repeats: int) -> None:
    """Writes docs/results/search_efficiency.json. Fails where the aim is missed."""
    recorded = [c for c in curves.load(curves.FILE) if c.seed == curves.POOL_SEED and c.failure is None]
    epochs = [epoch for curve in recorded for epoch in curve.epochs]
    costs = Costs(
        epoch=float(np.median([epoch["train_seconds"] for epoch in epochs])),
        loss=float(np.median([epoch["loss_seconds"] for epoch in epochs])),
        score=float(np.median([epoch["score_seconds"] for epoch in epochs if epoch["frechet"] is not None])),
    )
    qualities = [np.inf if c.fresh_frechet is None else c.fresh_frechet for c in recorded if c.source == "random"]
    target = float(np.quantile(qualities, TARGET_SHARE))
    with ProcessPoolExecutor(2) as processes:
        jobs = [processes.submit(repeat, seed, recorded, costs, target) for seed in range(repeats)]
        runs = [job.result() for job in jobs]
    summarise(recorded, costs, target, qualities, runs)


def summarise(
    recorded: list[curves.Curve],
    costs: Costs,
    target: float,
    qualities: list[float],
    runs: list[dict[str, list[Outcome]]],
) -> None:
    """Writes the result. Fails where the aim is missed."""
    rng = np.random.default_rng(0)
    base = np.array([_until(run["random search"], target) for run in runs])
    methods = {}
    for name in METHODS:
        cost = np.array([_until(run[name], target) for run in runs])
        chosen = np.array([_chosen(run[name], EQUAL_COST * costs.full) for run in runs])
        best = np.array([_best(run[name], EQUAL_COST * costs.full) for run in runs])
        picks = rng.integers(0, len(runs), (2000, len(runs)))
        often = np.isfinite(cost).mean() >= 0.9
        methods[name] = {
            "reached": float(np.isfinite(cost).mean()),
            # Of one that mostly does not come to it, the cost where it does would say nothing.
            "full_trainings_until_quality": _interval(cost / costs.full, picks) if often else None,
            "cost_ratio_to_random": _ratio(cost, base, picks) if often else None,
            "chosen_frechet_at_equal_cost": _interval(chosen, picks),
            "best_frechet_at_equal_cost": _interval(best, picks),
        }
    known = [c.fresh_frechet for c in recorded if c.source == "known"]
    result = provenance(0) | {
        "repeats": len(runs),
        "workers": WORKERS,
        "pool": {source: sum(c.source == source for c in recorded) for source in ("known", "random", "failing")},
        "failing_the_screen": sum(c.screened is not None for c in recorded),
        "cpu_seconds": {"epoch": costs.epoch, "validation_loss": costs.loss, "rung": costs.score, "full": costs.full},
        "frechet_of_known_points": known,
        "frechet_of_random": np.quantile(qualities, (0, 0.05, 0.25, 0.5, 0.75)).tolist(),
        "target_frechet": target,
        "equal_cost_full_trainings": EQUAL_COST,
        "rank_correlation_with_quality": _correlations(recorded),
        "limits": LIMITS,
        "methods": methods,
    }
    write("search_efficiency", result)
    ratio = methods["this search"]["cost_ratio_to_random"]
    if ratio is None or ratio["value"] > LIMITS["cost_ratio_to_random"]:
        raise SystemExit(f"missed: cost ratio to random search {ratio} (aim {LIMITS['cost_ratio_to_random']})")


def _until(found: list[Outcome], target: float) -> float:
    """Worker-seconds until a full training had the quality; inf where none of the pool that was met had it."""
    return next((spent for spent, quality, _ in found if quality <= target), np.inf)


def _best(found: list[Outcome], spent: float) -> float:
    """The best quality of any full training by then."""
    return min((quality for cost, quality, _ in found if cost <= spent), default=np.nan)


def _chosen(found: list[Outcome], spent: float) -> float:
    """The quality of the full training that the search itself holds for the best by then."""
    return min(((own, quality) for cost, quality, own in found if cost <= spent), default=(0, np.nan))[1]


def _interval(values: np.ndarray, picks: np.ndarray) -> dict[str, float]:
    """Mean with a 95 % bootstrap interval over repeats; of those that have a value."""
    means = np.nanmean(np.where(np.isfinite(values), values, np.nan)[picks], axis=1)
    value = np.mean(values[np.isfinite(values)]) if np.isfinite(values).any() else np.nan
    return {"value": float(value), "low": float(np.quantile(means, 0.025)), "high": float(np.quantile(means, 0.975))}


def _ratio(cost: np.ndarray, base: np.ndarray, picks: np.ndarray) -> dict[str, float]:
    """Ratio of the mean costs, over the repeats in which both came to the quality; 95 % bootstrap interval."""
    both = np.isfinite(cost) & np.isfinite(base)
    ours, theirs = np.where(both, cost, 0.0), np.where(both, base, 0.0)
    ratios = ours[picks].sum(1) / theirs[picks].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {"value": float(ours.sum() / theirs.sum()), "low": float(low), "high": float(high)}


def _correlations(recorded: list[curves.Curve]) -> dict[str, dict[str, float]]:
    """Spearman's, of a report with the quality in the end, over configurations that pass the screen."""
    ended = [c for c in recorded if c.fresh_frechet is not None and c.screened is None]

    def ranks(values: list[float]) -> np.ndarray:
        return np.argsort(np.argsort(values))

    quality = ranks([c.fresh_frechet for c in ended if c.fresh_frechet is not None])
    return {
        str(epoch): {
            name: float(np.corrcoef(ranks([c.epochs[epoch - 1][name] for c in ended]), quality)[0, 1])
            for name in ("val_loss", "grid_loss", "frechet")
        }
        for epoch in curves.RUNGS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    record = verbs.add_parser("record", help="train what of the pool is not recorded yet")
    record.add_argument("--out", type=Path, default=curves.FILE)
    record.add_argument("--seconds", type=float, default=np.inf, help="begin no training after these")
    record.add_argument("--fresh", action="store_true", help="the better third once more, from a new seed")
    comparison = verbs.add_parser("compare", help="replay the searches")
    comparison.add_argument("--repeats", type=int, default=REPEATS)
    asked = parser.parse_args()
    if asked.verb == "record":
        curves.record(asked.out, asked.fresh, asked.seconds)
    else:
        compare(asked.repeats)


if __name__ == "__main__":
    main()
