"""Several estimates at once, with the two reasons why they are uncertain: the images drawn, and the training's seed.

A configuration is trained from S seeds, and its estimate is the mean of theirs. With v the variance that a checkpoint's
score has from its images, c the covariance of two checkpoints' (they share their noise) and b the variance between
seeds, the mean has the variance (b + v - c) / S + c. The spread s^2 of the seeds' scores estimates b + v - c with S - 1
degrees of freedom. Where the rows' spreads differ by no more than chance they are pooled, so that three seeds are not
alone with their two; where they differ by more, each is drawn towards the others' (`shrink`). Intervals are Student's,
with Satterthwaite's degrees of freedom for sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from evaluation.scores import Array

CONFIDENCE = 0.95  # of every interval
P_BEST_DRAWS = 100_000
P_BEST_SEED = 0


@dataclass(frozen=True)
class Joint:
    """R estimates at once: means (R,), their covariance from the images drawn (R, R), their variance from seeds (R,).

    `dof` (R,) are the degrees of freedom of the last, `pooled_dof` those of all rows' spreads together: no less.
    """

    means: Array
    sampling: Array
    seeds: Array
    dof: Array
    pooled_dof: float

    def intervals(self, of_configuration: Sequence[bool]) -> Array:
        """(R, 2): of the configuration where that is asked for, else of what was drawn from."""
        of_seeds = np.where(of_configuration, self.seeds, 0.0)
        half = half_width(np.diag(self.sampling) + of_seeds, of_seeds, self.dof)
        return np.stack([self.means - half, self.means + half], axis=1)

    def ties(self) -> np.ndarray:
        """(R, R) bool: whose paired difference is within its interval of 0. Nothing is tied with itself."""
        apart = np.abs(self.means[:, None] - self.means)
        tied: np.ndarray = apart <= self.half_widths_of_differences()
        return tied & ~np.eye(len(apart), dtype=bool)

    def half_widths_of_differences(self) -> Array:
        """(R, R): of the intervals of all paired differences."""
        own = np.diag(self.sampling)
        of_seeds = self.seeds[:, None] + self.seeds
        squares = np.square(self.seeds) / self.dof
        with np.errstate(divide="ignore", invalid="ignore"):
            dof = np.square(of_seeds) / (squares[:, None] + squares)
        # Two rows do not know more than all of them, and with one spread for all they know the same.
        dof = np.minimum(dof, self.pooled_dof)
        variance = np.maximum(own[:, None] + own - 2 * self.sampling, 0.0) + of_seeds
        return half_width(variance, of_seeds, dof)

    def p_best(self, draws: int = P_BEST_DRAWS) -> Array:
        """Chance of each to have the highest true score, (R,). Sums to 1; draws that tie are shared out evenly.

        True scores are taken for equally likely beforehand. A normal prior of unknown spread, which draws them towards
        each other, was tried and is worse: docs/measure.md.
        """
        rng = np.random.default_rng(P_BEST_SEED)
        eigenvalues, vectors = np.linalg.eigh(self.sampling)
        root = vectors * np.sqrt(np.maximum(eigenvalues, 0.0))  # may be singular, which a Cholesky factor cannot
        drawn = self.means + rng.standard_normal((draws, len(root))) @ root.T
        if self.seeds.any():
            variances = self.seeds * self.pooled_dof / rng.chisquare(self.pooled_dof, (draws, 1))
            own = self.dof < self.pooled_dof  # the others have one spread in common, and err together
            variances[:, own] = (self.seeds * self.dof)[own] / rng.chisquare(self.dof[own], (draws, own.sum()))
            drawn += rng.standard_normal(drawn.shape) * np.sqrt(variances)
        top = drawn.max(axis=1, keepdims=True)
        best = drawn >= top - 1e-9 * np.abs(top)  # the root of a rounding error of 1e-16 is 1e-8 of a standard error
        return np.asarray((best / best.sum(axis=1, keepdims=True)).mean(axis=0))


def half_width(variance: ArrayLike, of_seeds: ArrayLike, dof: ArrayLike) -> Array:
    """Of the interval of something with this variance, of which `of_seeds` is estimated with `dof`."""
    variance, of_seeds = np.asarray(variance), np.asarray(of_seeds)
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = np.where(of_seeds > 0, dof * np.square(variance / of_seeds), np.inf)  # Satterthwaite
    return np.asarray(stats.t.ppf(0.5 + CONFIDENCE / 2, dof) * np.sqrt(variance))


def pool(values: Array, covariance: Array, members: Sequence[Sequence[int]]) -> Joint:
    """Joins checkpoints to rows: values (M,) and their covariance from the images drawn (M, M); row r is members[r].

    A row of several checkpoints is their configuration, and where there is one such row all rows are: one of a single
    checkpoint then has the others' spread between seeds.
    """
    weights = np.zeros((len(members), len(values)))
    for row, own in enumerate(members):
        weights[row, own] = 1 / len(own)
    means, sampling = weights @ values, weights @ covariance @ weights.T
    counts = np.array([len(own) for own in members])
    if counts.max() == 1:
        return Joint(means, sampling, np.zeros(len(members)), np.full(len(members), np.inf), np.inf)
    spreads, of_images = np.zeros(len(members)), []
    for row, own in enumerate(members):
        if len(own) > 1:
            spreads[row] = np.var(values[own], ddof=1)
            block = covariance[np.ix_(own, own)]
            # What seeds do not share is in their spread already.
            shared = (block.sum() - np.trace(block)) / (len(own) * (len(own) - 1))
            sampling[row, row] = max(0.0, shared)
            of_images.append(np.trace(block) / len(own) - shared)
    variances, dof = shrink(spreads, counts - 1)
    # A row of one has its images' noise in `sampling` alone: b is what seeds add to that.
    variances[counts == 1] = np.maximum(variances[counts == 1] - np.mean(of_images), 0.0)
    return Joint(means, sampling, variances / counts, dof, float((counts - 1).sum()))


def shrink(spreads: Array, dof: np.ndarray) -> tuple[Array, Array]:
    """Sample variances (R,) of `dof` (R,) → better ones and theirs; a row of dof 0 has the others' alone.

    The empirical Bayes of Smyth 2004 (Stat. Appl. Genet. Mol. Biol. 3(1), 3), as in limma: true variances scatter
    around a common one, which is worth `prior` observations to a row. Where that is finite, an interval does not count
    them as degrees of freedom, as limma does: `prior` is found from a few rows here, not from thousands of genes.
    """
    known = dof > 0
    prior, common = prior_variance(spreads[known], dof[known])
    better = common + dof / (prior + dof) * (spreads - common)
    return better, np.where(known & np.isfinite(prior), dof, min(prior, dof.sum()))


def prior_variance(spreads: Array, dof: np.ndarray) -> tuple[float, float]:
    """(How many observations the others' spreads are worth to a row, the variance they speak for): the moments of
    log s^2, Smyth 2004.

    The first is infinite (one variance for all rows) where spreads differ by no more than chance, or are not three.
    """
    pooled, middle = float(dof @ spreads / dof.sum()), float(np.median(spreads))
    if len(spreads) < 3 or middle == 0:
        return np.inf, pooled
    logs = np.log(np.maximum(spreads, 1e-5 * middle)) - special.digamma(dof / 2) + np.log(dof / 2)
    scatter = float(np.var(logs, ddof=1) - special.polygamma(1, dof / 2).mean())  # of the true variances' logarithms
    if scatter <= 0:
        return np.inf, pooled
    # trigamma(prior / 2) = scatter, between the bounds that 1/x < trigamma(x) < 1/x + 1/x^2 gives.
    half = float(optimize.brentq(lambda x: special.polygamma(1, x) - scatter, 1 / scatter, 1 / scatter + 1))
    half = max(half, 0.5)  # with less than one observation a row without a spread could be anything
    return 2 * half, float(np.exp(logs.mean() + special.digamma(half) - np.log(half)))
