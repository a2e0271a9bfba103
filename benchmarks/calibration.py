"""Do the ranking's intervals hold what they say, and is P(best) a probability? Simulated rankings with known truth.

    python -m benchmarks.calibration [--rankings 1000] [--regimes 0 1 2]

An image is one of ATOMS noises, drawn evenly; a checkpoint is a table of class probabilities, one row a noise, and
there are LEVELS checkpoints of rising certainty, which share most of their noise as trials of one ranking do. A
ranking of N images is then a multinomial count of the noises: score and covariance are exact sums over the table's rows
(checked against the package's own on the expanded images), and the truth E[score at N] of every checkpoint is the mean
of `truth_draws` more rankings. The statistics are the package's (evaluation/joint.py).

Three kinds of ranking, `rankings` of each: CHECKPOINTS trained once; three configurations trained from SEEDS seeds,
whose checkpoints scatter around the configuration's level by about one standard error of a checkpoint's score; three
where those of one configuration scatter by half of that, and those of another by double.
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, provenance, write
from evaluation.joint import Joint, pool
from evaluation.ranking import score_influence, score_intervals
from evaluation.scores import inception_score, softmax_float64

ATOMS, LEVELS, OWN_NOISE = 1000, 32, 0.3
RANGE = 8.0  # of the levels' true scores, in standard errors of one checkpoint's score
CHECKPOINT_WINDOW, CONFIGURATION_WINDOW = 10, 12  # levels that one ranking's are drawn from
CHECKPOINTS, SEEDS = 4, 3
# How far seeds scatter around each configuration's level, in standard errors of one checkpoint's score.
SCATTER = {"configuration": [1.0, 1.0, 1.0], "configuration, seeds unlike": [0.5, 1.0, 2.0]}
KINDS = ("checkpoint", *SCATTER)
P_BEST_DRAWS = 4000
REGIMES = [
    (10, 500, 500),
    (10, 2000, 500),
    (10, 10_000, 5000),
    (1008, 500, 500),
    (1008, 5000, 5000),
    (1008, 10_000, 5000),
]


@dataclass(frozen=True)
class Tables:
    """Class probabilities of LEVELS checkpoints: (ATOMS, K) each."""

    rows: list[np.ndarray]

    @classmethod
    def make(cls, classes: int, sharpness: np.ndarray, seed: int) -> "Tables":
        rng = np.random.default_rng([seed, classes])
        common, label = rng.standard_normal((ATOMS, classes)), rng.integers(classes, size=ATOMS)
        certainty = rng.gamma(2, 0.5, ATOMS)
        rows = []
        for level in sharpness:
            logits = np.sqrt(1 - OWN_NOISE**2) * common + OWN_NOISE * rng.standard_normal((ATOMS, classes))
            logits[np.arange(ATOMS), label] += level * certainty
            rows.append(softmax_float64(logits))
        return cls(rows)

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """counts (R, S, ATOMS), n images a split → (LEVELS, R)."""
        flat = counts.reshape(-1, ATOMS).astype(np.float64)
        found = np.empty((len(self.rows), len(counts)))
        for level, table in enumerate(self.rows):
            divergence = flat @ entropies(table) / flat[0].sum() - entropies(flat @ table / flat[0].sum())
            found[level] = np.exp(divergence).reshape(counts.shape[:2]).mean(axis=1)
        return found

    def influences(self, levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """One ranking's counts (S, ATOMS) → evaluation.ranking.score_influence of an image of every noise that was
        drawn, times the root of their number: (len(levels), those of all splits)."""
        drawn, found = counts > 0, []
        for level in levels:
            table, parts = self.rows[level], []
            for own, seen in zip(counts, drawn, strict=True):
                n, times = own.sum(), own[seen]
                q = np.maximum(own @ table - table[seen], 1e-300) / (n - 1)
                total, each = own @ entropies(table), entropies(table[seen])
                without = np.exp((total - each) / (n - 1) - entropies(q))
                moved = (times @ without / n - without) * np.sqrt((n - 1) / n) / len(counts)
                parts.append(moved * np.sqrt(times))
            found.append(np.concatenate(parts))
        return np.array(found)


def entropies(rows: np.ndarray) -> np.ndarray:
    """sum p log p of every row, in nats."""
    return (rows * np.log(rows)).sum(axis=1)


def counts_of(rankings: int, n: int, split: int, rng: np.random.Generator) -> np.ndarray:
    return rng.multinomial(split, np.full(ATOMS, 1 / ATOMS), size=(rankings, n // split))


def check_against_the_package(tables: Tables, rng: np.random.Generator, n: int, split: int) -> float:
    """Largest relative difference of score and covariance of two checkpoints on expanded images."""
    counts = counts_of(1, n, split, rng)
    index = np.concatenate([np.repeat(np.arange(ATOMS), row) for row in counts[0]])
    expanded, found = [], tables.influences(np.array([0, LEVELS - 1]), counts[0])
    pairs = []
    for level, score in ((0, tables.scores(counts)[0, 0]), (-1, tables.scores(counts)[-1, 0])):
        p = tables.rows[level][index]
        pairs.append((inception_score(p, split).mean, score))
        expanded.append(score_influence(p, split))
    theirs = np.array(expanded) @ np.array(expanded).T
    pairs += zip(theirs.ravel(), (found @ found.T).ravel(), strict=True)
    return max(abs(ours / theirs - 1) for theirs, ours in pairs)


def levels_for(classes: int, n: int, split: int, seed: int) -> np.ndarray:
    """Sharpnesses whose true scores span RANGE standard errors of a score, from a pilot."""
    middle, step = (4.0, 0.02) if classes < 100 else (10.0, 0.02)
    pilot = Tables.make(classes, np.array([middle, middle * (1 + step)]), seed)
    scores = pilot.scores(counts_of(200, n, split, np.random.default_rng(seed)))
    error, rise = scores[0].std(), (scores[1] - scores[0]).mean()
    half = RANGE / 2 * error / rise * step
    return middle * np.linspace(1 - half, 1 + half, LEVELS)


def simulate(classes: int, n: int, split: int, rankings: int, truth_draws: int, seed: int) -> dict[str, Any]:
    began, rng = time.monotonic(), np.random.default_rng([seed, classes, n])
    tables = Tables.make(classes, levels_for(classes, n, split, seed), seed)
    difference = check_against_the_package(tables, rng, n, split)
    assert difference < 1e-8, f"the simulation's sums differ from the package's by {difference}"
    truth_scores = np.concatenate(
        [tables.scores(counts_of(500, n, split, rng)) for _ in range(truth_draws // 500)], axis=1
    )
    truth = truth_scores.mean(axis=1)

    held: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    chances: dict[str, list[tuple[float, bool]]] = {kind: [] for kind in KINDS}
    per_error = LEVELS / RANGE  # levels to one standard error
    for _ in range(rankings // 50):
        counts = counts_of(50, n, split, rng)
        scores = tables.scores(counts)
        for r in range(50):
            levels = window(CHECKPOINT_WINDOW, 0, rng)[:CHECKPOINTS]
            joint = joined(scores[levels, r], tables.influences(levels, counts[r]), [[i] for i in range(CHECKPOINTS)])
            note(held["checkpoint"], chances["checkpoint"], joint, truth[levels])

            for kind, scatter in SCATTER.items():
                centres = window(CONFIGURATION_WINDOW, 6, rng)[: len(scatter)]
                apart = (np.arange(LEVELS) - centres[:, None]) / (per_error * np.array(scatter)[:, None])
                likely = np.exp(-np.square(apart) / 2)
                likely /= likely.sum(axis=1, keepdims=True)
                levels = np.concatenate([rng.choice(LEVELS, SEEDS, p=p) for p in likely])
                members = np.split(np.arange(len(levels)), len(scatter))
                joint = joined(scores[levels, r], tables.influences(levels, counts[r]), members)
                note(held[kind], chances[kind], joint, likely @ truth)
    return {
        **{"classes": classes, "images": n, "split_size": split, "rankings": rankings, "truth_draws": truth_draws},
        "true_scores": [round(float(truth.min()), 4), round(float(truth.max()), 4)],
        "standard_error_of_truth_in_scores_own": round(float(1 / np.sqrt(truth_scores.shape[1])), 4),
        "largest_difference_from_the_package": float(f"{difference:.1e}"),
        "coverage": {kind: round(float(np.mean(values)), 4) for kind, values in held.items()},
        "intervals": {kind: len(values) for kind, values in held.items()},
        "p_best": {kind: reliability(values) for kind, values in chances.items()},
        "seconds": round(time.monotonic() - began, 1),
    }


def window(width: int, margin: int, rng: np.random.Generator) -> np.ndarray:
    """Neighbouring levels in a random order, `margin` of them left out at both ends."""
    return rng.integers(margin, LEVELS - margin - width + 1) + rng.permutation(width)


def joined(scores: np.ndarray, influences: np.ndarray, members: Any) -> Joint:
    return pool(scores, influences @ influences.T, members)


def note(held: list[bool], chances: list[tuple[float, bool]], joint: Joint, truth: np.ndarray) -> None:
    low, high = score_intervals(joint, [True] * len(truth)).T
    held += list((low <= truth) & (truth <= high))
    chances += list(zip(joint.p_best(P_BEST_DRAWS), truth == truth.max(), strict=True))


def reliability(values: list[tuple[float, bool]]) -> list[dict[str, float]]:
    """Ten bins of P(best): how many rows, what was said on average, how often it was so."""
    said, so = np.array([p for p, _ in values]), np.array([best for _, best in values])
    rows = []
    for low in np.arange(10) / 10:
        inside = (said >= low) & ((said < low + 0.1) | (low > 0.85))
        if inside.any():
            rows.append(
                {
                    "n": int(inside.sum()),
                    "said": round(float(said[inside].mean()), 4),
                    "so": round(float(so[inside].mean()), 4),
                }
            )
    return rows


def plot(regimes: dict[str, dict[str, Any]], path: str) -> None:
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        for (label, regime), marker in zip(regimes.items(), "osD^vP", strict=False):
            bins = [row for row in regime["p_best"][kind] if row["n"] >= 20]
            axes.plot([b["said"] for b in bins], [b["so"] for b in bins], marker=marker, markersize=5, label=label)
        axes.set(title=f"Best {kind}", xlabel="P(best) stated", aspect="equal")
    figure.axes[0].set_ylabel("share that was the best")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, default=1000)
    parser.add_argument("--truth-draws", type=int, default=1500)
    parser.add_argument("--regimes", type=int, nargs="+", default=range(len(REGIMES)), help="others stay as measured")
    arguments = parser.parse_args()
    settings = {"atoms": ATOMS, "levels": LEVELS, "own_noise": OWN_NOISE, "range_in_standard_errors": RANGE}
    settings |= {"checkpoints": CHECKPOINTS, "scatter_of_seeds": SCATTER, "seeds": SEEDS}
    settings |= {"rankings": arguments.rankings, "truth_draws": arguments.truth_draws}
    file = RESULTS / "calibration.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    regimes = earlier["regimes"] if earlier.get("settings") == settings else {}
    for index in arguments.regimes:
        classes, n, split = REGIMES[index]
        found = simulate(classes, n, split, arguments.rankings, arguments.truth_draws, seed=0)
        regimes[f"{classes:,} classes, N {n:,} in splits of {split:,}"] = provenance(0) | found
        print({key: found[key] for key in ("classes", "images", "true_scores", "coverage", "seconds")}, flush=True)
        write("calibration", {"settings": settings, "regimes": regimes})
    plot(regimes, "docs/images/calibration.png")


if __name__ == "__main__":
    main()
