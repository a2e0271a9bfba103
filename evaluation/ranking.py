"""Scores → a ranking with confidence intervals, ties and P(best): pure, and the same to the bit on every run.

What the intervals say. A score of n images is biased at that n (see scores.inception_score), and so are all scores it
is compared with; the interval is of E[score at this n, of this checkpoint], and is centred on the estimate. Its width
comes from the influence function of the split-wise mean

    score = 1/S sum_s exp(A_s),   A_s = mean_i KL(p_i || q_s),   q_s = mean_i p_i.

Moving weight onto image x changes A by KL(p_x || q) - A: the change through q is -sum_k (p_xk - q_k) = 0, for q is the
distribution that makes the mean KL least. Hence image i of split s has the influence exp(A_s) (KL_is - A_s) / S n, and
by the delta method the variance of the score is the sum of their squares. Influences of two trials at one index come
from one noise, so their sum of products is the covariance that a paired comparison needs.

Coverage of E[score at N] by 95% intervals, simulated: 93-95% for 10 to 1,000 classes and 500 to 5,000 images
(tests/test_ranking.py repeats those of up to 100 classes). A percentile bootstrap covered 48%: resampling repeats
images, which shifts the bias.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from evaluation.scores import Array, FeatureStatistics, frechet_influence, inception_score, split_divergences

P_BEST_DRAWS = 100_000
P_BEST_SEED = 0


@dataclass(frozen=True)
class TrialSamples:
    """What the extractor made of one trial's images: index i is the same noise in every trial.

    `reason` says why there are none (a failed trial); probabilities and features are then not looked at.
    """

    trial: str
    probabilities: ArrayLike | None = None  # (N, K)
    features: ArrayLike | None = None  # (N, D)
    reason: str | None = None


@dataclass(frozen=True)
class ScoreEstimate:
    """`std` is between splits (None where there is one), `ci` of E[score at N]: between 1 and K."""

    mean: float
    std: float | None
    ci: tuple[float, float]


@dataclass(frozen=True)
class FrechetEstimate:
    """`ci` is of E[distance at N] to the reference as it is: neither is extrapolated to endless images."""

    value: float
    ci: tuple[float, float]


@dataclass(frozen=True)
class RankedTrial:
    """One row of ranking.json, less the trial's parameters. A trial that has no score has a reason and no rank."""

    rank: int | None
    trial: str
    score: ScoreEstimate | None
    frechet: FrechetEstimate | None
    p_best: float | None
    tied_with: tuple[str, ...]
    confirmed: bool
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as json reads them back."""
        row = asdict(self)
        row["tied_with"] = list(self.tied_with)
        for name in ("score", "frechet"):
            if row[name] is not None:
                row[name]["ci"] = list(row[name]["ci"])
        return row


@dataclass(frozen=True)
class _Scored:
    trial: str
    score: ScoreEstimate
    frechet: FrechetEstimate
    influence: Array  # (N used,), of the score; its sum of squares is the variance


def rank(
    trials: Sequence[TrialSamples], reference: ArrayLike | FeatureStatistics, split_size: int, confidence: float = 0.95
) -> list[RankedTrial]:
    """Order trials by score, the highest first; those without one last, in the order given, with their reason.

    reference: real features (M, D) or their statistics. `tied_with` names every trial whose paired difference to this
    one has a confidence interval that contains 0 (each pair on its own: no correction for the number of pairs).
    `p_best` is the chance that this trial has the highest E[score at N]: Gaussian draws around the scores with the
    influences' joint covariance.
    Raises ValueError where names repeat, trials have different numbers of images, or N < 2. Probabilities that are no
    distributions and features that are not finite make one trial fail, not the ranking.
    """
    names = [trial.trial for trial in trials]
    if len(set(names)) != len(names):
        raise ValueError(f"trial names must differ, but got {sorted(names)}")
    if split_size < 2 or not 0 < confidence < 1:
        raise ValueError(f"split_size >= 2 and 0 < confidence < 1 must hold, but got {split_size=}, {confidence=}")
    measured = [trial for trial in trials if trial.reason is None]
    counts = {trial.trial: len(np.asarray(trial.probabilities)) for trial in measured}
    if len(set(counts.values())) > 1:
        raise ValueError(f"trials must be scored at the same number of images, but got {counts}")
    if counts and min(counts.values()) < 2:
        raise ValueError("an interval needs at least 2 images a trial")
    if not isinstance(reference, FeatureStatistics):
        reference = FeatureStatistics.of(reference)
    z = float(stats.norm.ppf(0.5 + confidence / 2))

    scored: list[_Scored] = []
    failed: list[RankedTrial] = []
    for trial in trials:
        reason = trial.reason
        if reason is None:
            try:
                scored.append(_score(trial, reference, split_size, z))
                continue
            except ValueError as error:
                reason = str(error)
        failed.append(RankedTrial(None, trial.trial, None, None, None, (), False, reason))

    scored.sort(key=lambda row: (-row.score.mean, row.frechet.value, row.trial))
    if not scored:
        return failed
    means = np.array([row.score.mean for row in scored])
    influences = np.stack([row.influence for row in scored])  # (T, N used)
    tied = _ties(means, influences, z)
    chances = p_best(means, influences @ influences.T)
    ranked = []
    for i, row in enumerate(scored):
        tied_with = tuple(scored[j].trial for j in np.flatnonzero(tied[i]))
        ranked.append(RankedTrial(i + 1, row.trial, row.score, row.frechet, float(chances[i]), tied_with, False, None))
    return ranked + failed


def score_influence(probabilities: ArrayLike, split_size: int) -> Array:
    """Influence of every scored image on the split-wise mean score, (splits * split size,).

    The sum of squares estimates the score's variance, the sum of products with another trial's their covariance; the
    factor n/(n-1) of an unbiased variance is in it. Splits have at least 2 images each.
    """
    scores, divergences = split_divergences(probabilities, split_size)  # (S,), (S, n)
    splits, n = divergences.shape
    centred = divergences - divergences.mean(axis=1, keepdims=True)
    return np.ravel(scores[:, None] * centred) / (splits * np.sqrt(n * (n - 1)))


def p_best(means: Array, covariance: Array) -> Array:
    """Chance of each of T trials to have the highest true score; means (T,), covariance (T, T). Sums to 1.

    Draws that tie (two trials with the same images) are shared out evenly.
    """
    eigenvalues, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0.0))  # may be singular, which a Cholesky factor cannot
    draws = means + np.random.default_rng(P_BEST_SEED).standard_normal((P_BEST_DRAWS, len(means))) @ root.T
    top = draws.max(axis=1, keepdims=True)
    best = draws >= top - 1e-9 * np.abs(top)  # the root of a rounding error of 1e-16 is 1e-8 of a standard error
    return np.asarray((best / best.sum(axis=1, keepdims=True)).mean(axis=0))


def _ties(means: Array, influences: Array, z: float) -> np.ndarray:
    """(T, T) bool: whose paired difference is within its interval of 0. No trial is tied with itself."""
    tied = np.zeros((len(means), len(means)), dtype=bool)
    for i in range(len(means)):
        # From the differences, not from var + var - 2 cov, which cancels for trials that are nearly the same.
        errors = np.sqrt(np.square(influences - influences[i]).sum(axis=1))
        tied[i] = np.abs(means - means[i]) <= z * errors
    return (tied | tied.T) & ~np.eye(len(means), dtype=bool)


def _score(trial: TrialSamples, reference: FeatureStatistics, split_size: int, z: float) -> _Scored:
    assert trial.probabilities is not None
    if trial.features is None:
        raise ValueError("the trial has probabilities but no features")
    probabilities = np.asarray(trial.probabilities)
    features = np.asarray(trial.features)
    if len(features) != len(probabilities):
        raise ValueError(f"{len(probabilities)} images have probabilities but {len(features)} have features")
    score = inception_score(probabilities, split_size)
    influence = score_influence(probabilities, split_size)
    half = z * float(np.sqrt(np.square(influence).sum()))
    ends = (max(1.0, score.mean - half), min(float(probabilities.shape[1]), score.mean + half))
    distance, moved = frechet_influence(features, reference)
    half = z * float(moved.std(ddof=1) / np.sqrt(len(moved)))
    frechet = FrechetEstimate(distance, (max(0.0, distance - half), distance + half))
    return _Scored(trial.trial, ScoreEstimate(score.mean, score.std, ends), frechet, influence)
