"""Scores → a ranking with confidence intervals, ties and P(best): pure, and the same to the bit on every run.

What the intervals say. A score of n images is biased at that n (see scores.inception_score), and so are all scores it
is compared with; the interval is of E[score at this n, of this checkpoint], and starts from the estimate. Its width
comes from the jackknife of the split-wise mean

    score = 1/S sum_s exp(A_s),   A_s = mean_i KL(p_i || q_s),   q_s = mean_i p_i:

what the score is without image i. Where classes are many and images few, an image changes q, and the derivative (KL of
an image, less A) gives standard errors a tenth too small. Leaving out one image of two trials at one index leaves out
one noise, so the sums of products are the covariance that a paired comparison needs. A score is the exponential of a
mean, and its error grows with it: intervals are of its logarithm.

Trials that were trained again from new seeds (`TrialSamples.confirms`) are trainings of one configuration. Its score is
the mean of its new seeds alone: the first one was chosen for being good, and flatters it (the winner's curse). How the
spread between seeds comes into the interval: evaluation/joint.py.

Coverage, and the calibration of P(best): benchmarks/calibration.py, docs/measure.md. A percentile bootstrap covered
48%: resampling repeats images, which shifts the bias.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from evaluation.joint import Joint, pool
from evaluation.scores import (
    Array,
    FeatureStatistics,
    Interval,
    check_probabilities,
    frechet_influence,
    inception_score,
)

Distance = Callable[[Array], tuple[float, Array]]  # features (N, D) → value and influences, as scores.kid_influence


@dataclass(frozen=True)
class TrialSamples:
    """What the extractor made of one trial's images: index i is the same noise in every trial.

    `reason` says why there are none (a failed trial); probabilities and features are then not looked at. `confirms`
    names the trial whose configuration this one is, trained from another seed.
    """

    trial: str
    probabilities: ArrayLike | None = None  # (N, K)
    features: ArrayLike | None = None  # (N, D)
    reason: str | None = None
    confirms: str | None = None


@dataclass(frozen=True)
class ScoreEstimate:
    """`std` is between splits (None where there is one, or several seeds), `ci` of E[score at N]: between 1 and K."""

    mean: float
    std: float | None
    ci: tuple[float, float]


@dataclass(frozen=True)
class RankedTrial:
    """One row of ranking.json, less the trial's parameters. A trial that has no score has a reason and no rank.

    `distances` (the Fréchet distance among them) have an interval of E[distance at N] to the reference as it is:
    neither is extrapolated to endless images. Where the row is confirmed, intervals speak of the configuration, and
    every number is the mean over `mean_of`; `best_training` has the highest score among those and the first one.
    `to_next` is the score's paired difference to the row of the next rank, None where there is none. It speaks of what
    `tied_with` speaks of, also where that row is the first that is not confirmed: it is below 0 if that scored higher.
    """

    rank: int | None
    trial: str
    score: ScoreEstimate | None
    distances: dict[str, Interval]
    p_best: float | None
    tied_with: tuple[str, ...]
    to_next: Interval | None
    confirmed: bool
    reason: str | None
    mean_of: tuple[str, ...]
    best_training: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as json reads them back."""
        row = asdict(self)
        row |= {"tied_with": list(self.tied_with), "mean_of": list(self.mean_of)}
        if self.to_next is not None:
            row["to_next"] = {"score": self.to_next.value, "ci": list(self.to_next.ci)}
        if self.score is not None:
            row["score"]["ci"] = list(self.score.ci)
        found = {name: {"value": at.value, "ci": list(at.ci)} for name, at in row.pop("distances").items()}
        return row | {"frechet": None} | found


def rank(
    trials: Sequence[TrialSamples],
    reference: ArrayLike | FeatureStatistics,
    split_size: int,
    distances: Mapping[str, Distance] | None = None,
) -> list[RankedTrial]:
    """Order configurations by score, the highest first: confirmed ones (at least 2 new trainings have a score),
    then those of one checkpoint, then those without a score in the order given, with their reason.

    reference: real features (M, D) or their statistics; `distances` are others than the Fréchet distance to it.
    `tied_with` names every row whose paired difference to this one has a confidence interval that contains 0 (each pair
    on its own: no correction for the number of pairs). `p_best` is the chance to have the highest E[score at N]. Both
    speak of configurations as soon as one row is confirmed, for then the spread between seeds is known.
    Raises ValueError where names repeat, trials have different numbers of images, or N < 3. Probabilities that are no
    distributions and features that are not finite make one trial fail, not the ranking.
    """
    _check(trials, split_size)
    frechet: Distance = partial(frechet_influence, reference=reference)
    scored, reasons = _score_all(trials, {"frechet": frechet} | dict(distances or {}), split_size)
    rows = [trial.trial for trial in trials if trial.confirms is None]
    again = {row: [t.trial for t in trials if t.confirms == row and t.trial in scored] for row in rows}
    confirmed = {row for row in rows if len(again[row]) >= 2}
    members = {row: again[row] if row in confirmed else [row] for row in rows if row in confirmed or row in scored}
    order = {row: np.mean([scored[name].values["score"] for name in own]) for row, own in members.items()}
    ranked = sorted(members, key=lambda row: (row not in confirmed, -order[row], row))
    failed = [
        RankedTrial(None, row, None, {}, None, (), None, False, reasons[row], (), None)
        for row in rows
        if row not in members
    ]
    if not ranked:
        return failed

    used = [name for row in ranked for name in members[row]]
    places = [[used.index(name) for name in members[row]] for row in ranked]
    of_rows: dict[str, tuple[Joint, Array]] = {}
    for metric in next(iter(scored.values())).values:
        influences = np.stack([scored[name].influences[metric] for name in used])
        values = np.array([scored[name].values[metric] for name in used])
        joint = pool(values, influences @ influences.T, places)
        of_configuration = [row in confirmed for row in ranked]
        intervals = score_intervals if metric == "score" else Joint.intervals
        of_rows[metric] = joint, intervals(joint, of_configuration)
    joint, of_score = of_rows.pop("score")
    of_score = np.clip(of_score, 1.0, float(next(iter(scored.values())).classes))
    tied, chances = joint.ties(), joint.p_best()
    leads = -np.diff(joint.means)
    half = np.diag(joint.half_widths_of_differences(), k=1)
    to_next = [Interval(float(at), (float(at - by), float(at + by))) for at, by in zip(leads, half, strict=True)]

    result = []
    for i, row in enumerate(ranked):
        std = None if row in confirmed else scored[row].std
        best = max((name for name in (row, *again[row]) if name in scored), key=lambda n: scored[n].values["score"])
        result.append(
            RankedTrial(
                rank=i + 1,
                trial=row,
                score=ScoreEstimate(float(joint.means[i]), std, _pair(of_score[i])),
                distances={
                    name: Interval(float(of.means[i]), _pair(np.maximum(ci[i], 0.0) if name != "kid" else ci[i]))
                    for name, (of, ci) in of_rows.items()
                },
                p_best=float(chances[i]),
                tied_with=tuple(ranked[j] for j in np.flatnonzero(tied[i])),
                to_next=to_next[i] if i < len(to_next) else None,
                confirmed=row in confirmed,
                reason=None,
                mean_of=tuple(members[row]),
                best_training=best,
            )
        )
    return result + failed


@dataclass(frozen=True)
class _Scored:
    """One trial's values by metric, and the influence of every image on them: its sum of squares is the variance."""

    values: dict[str, float]
    influences: dict[str, Array]
    std: float | None
    classes: int


def _check(trials: Sequence[TrialSamples], split_size: int) -> None:
    names = [trial.trial for trial in trials]
    if len(set(names)) != len(names):
        raise ValueError(f"trial names must differ, but got {sorted(names)}")
    # Without one of two images a score is 1, whatever they are: an interval of no width.
    if split_size < 3:
        raise ValueError(f"split_size >= 3 must hold, but got {split_size=}")
    counts = {trial.trial: len(np.asarray(trial.probabilities)) for trial in trials if trial.reason is None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"trials must be scored at the same number of images, but got {counts}")
    if counts and min(counts.values()) < 3:
        raise ValueError("an interval needs at least 3 images a trial")


def _score_all(
    trials: Sequence[TrialSamples], distances: Mapping[str, Distance], split_size: int
) -> tuple[dict[str, _Scored], dict[str, str]]:
    """What could be scored, and why the rest could not."""
    scored, reasons = {}, {}
    for trial in trials:
        try:
            if trial.reason is not None:
                raise ValueError(trial.reason)
            scored[trial.trial] = _score(trial, distances, split_size)
        except ValueError as error:
            reasons[trial.trial] = str(error)
    return scored, reasons


def _score(trial: TrialSamples, distances: Mapping[str, Distance], split_size: int) -> _Scored:
    assert trial.probabilities is not None
    if trial.features is None:
        raise ValueError("the trial has probabilities but no features")
    probabilities, features = np.asarray(trial.probabilities), np.asarray(trial.features)
    if len(features) != len(probabilities):
        raise ValueError(f"{len(probabilities)} images have probabilities but {len(features)} have features")
    score = inception_score(probabilities, split_size)
    values, influences = {"score": score.mean}, {"score": score_influence(probabilities, split_size)}
    for name, distance in distances.items():
        values[name], influences[name] = distance(features)
    return _Scored(values, influences, score.std, probabilities.shape[1])


def _pair(ends: Array) -> tuple[float, float]:
    return float(ends[0]), float(ends[1])


def score_intervals(joint: Joint, of_configuration: Sequence[bool]) -> Array:
    """`Joint.intervals`, of the scores' logarithms: (R, 2)."""
    relative = joint.intervals(of_configuration) / joint.means[:, None] - 1
    return np.asarray(joint.means[:, None] * np.exp(relative))


def score_influence(probabilities: ArrayLike, split_size: int) -> Array:
    """Influence of every scored image on the split-wise mean score, (splits * split size,): what it loses without it.

    The sum of squares estimates the score's variance (the jackknife's), the sum of products with another trial's their
    covariance. Splits have at least 3 images each.
    """
    p = check_probabilities(probabilities)
    n = min(split_size, len(p))
    splits = len(p) // n
    without = np.empty((splits, n))
    for s in range(splits):
        part = p[s * n : (s + 1) * n]
        entropy = special.xlogy(part, part).sum(axis=1)
        q = np.maximum(part.sum(axis=0) - part, 0.0) / (n - 1)
        # mean KL(p_i || q) = mean of sum p log p, less sum q log q
        without[s] = np.exp((entropy.sum() - entropy) / (n - 1) - special.xlogy(q, q).sum(axis=1))
    return np.ravel(without.mean(axis=1, keepdims=True) - without) * np.sqrt((n - 1) / n) / splits
