"""Several estimates at once, with the two reasons why they are uncertain: the images drawn, and the training's seed.

A configuration is trained from S seeds, and its estimate is the mean of theirs. With v the variance that a checkpoint's
score has from its images, c the covariance of two checkpoints' (they share their noise) and b the variance between
seeds, the mean has the variance (b + v - c) / S + c. The spread s^2 of the seeds' scores estimates b + v - c; it is
pooled over the configurations, so that three seeds are not alone with their two degrees of freedom. Intervals are
Student's, with Satterthwaite's degrees of freedom for the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from evaluation.scores import Array

P_BEST_DRAWS = 100_000
P_BEST_SEED = 0


@dataclass(frozen=True)
class Joint:
    """R estimates at once: means (R,), their covariance from the images drawn (R, R), their variance from seeds (R,).

    `dof` are the degrees of freedom of the last, infinite where it is 0.
    """

    means: Array
    sampling: Array
    seeds: Array
    dof: float

    def half_width(self, variance: ArrayLike, of_seeds: ArrayLike, confidence: float) -> Array:
        """Of the interval of something with this variance, of which `of_seeds` is estimated from seeds."""
        variance, of_seeds = np.asarray(variance), np.asarray(of_seeds)
        with np.errstate(divide="ignore", invalid="ignore"):
            dof = np.where(of_seeds > 0, self.dof * np.square(variance / of_seeds), np.inf)  # Satterthwaite
        return np.asarray(stats.t.ppf(0.5 + confidence / 2, dof) * np.sqrt(variance))

    def intervals(self, of_configuration: Sequence[bool], confidence: float = 0.95) -> Array:
        """(R, 2): of the configuration where that is asked for, else of what was drawn from."""
        of_seeds = np.where(of_configuration, self.seeds, 0.0)
        half = self.half_width(np.diag(self.sampling) + of_seeds, of_seeds, confidence)
        return np.stack([self.means - half, self.means + half], axis=1)

    def ties(self, confidence: float = 0.95) -> np.ndarray:
        """(R, R) bool: whose paired difference is within its interval of 0. Nothing is tied with itself."""
        own = np.diag(self.sampling)
        of_seeds = self.seeds[:, None] + self.seeds
        variance = np.maximum(own[:, None] + own - 2 * self.sampling, 0.0) + of_seeds
        apart = np.abs(self.means[:, None] - self.means)
        tied: np.ndarray = apart <= self.half_width(variance, of_seeds, confidence)
        return tied & ~np.eye(len(own), dtype=bool)

    def p_best(self, draws: int = P_BEST_DRAWS) -> Array:
        """Chance of each to have the highest true score, (R,). Sums to 1; draws that tie are shared out evenly."""
        rng = np.random.default_rng(P_BEST_SEED)
        eigenvalues, vectors = np.linalg.eigh(self.sampling)
        root = vectors * np.sqrt(np.maximum(eigenvalues, 0.0))  # may be singular, which a Cholesky factor cannot
        drawn = self.means + rng.standard_normal((draws, len(root))) @ root.T
        if self.seeds.any():
            scale = np.sqrt(self.dof / rng.chisquare(self.dof, (draws, 1)))
            drawn += rng.standard_normal(drawn.shape) * scale * np.sqrt(self.seeds)
        top = drawn.max(axis=1, keepdims=True)
        best = drawn >= top - 1e-9 * np.abs(top)  # the root of a rounding error of 1e-16 is 1e-8 of a standard error
        return np.asarray((best / best.sum(axis=1, keepdims=True)).mean(axis=0))


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
    dof = int((counts - 1).sum())
    if not dof:
        return Joint(means, sampling, np.zeros(len(members)), np.inf)
    spread, of_images = 0.0, []
    for row, own in enumerate(members):
        if len(own) > 1:
            spread += np.square(values[own] - means[row]).sum()
            block = covariance[np.ix_(own, own)]
            # What seeds do not share is in their spread already.
            shared = (block.sum() - np.trace(block)) / (len(own) * (len(own) - 1))
            sampling[row, row] = max(0.0, shared)
            of_images.append(np.trace(block) / len(own) - shared)
    of_seeds = spread / dof / counts
    # A row of one has its images' noise in `sampling` alone: b is what seeds add to that.
    of_seeds[counts == 1] = max(0.0, spread / dof - float(np.mean(of_images)))
    return Joint(means, sampling, of_seeds, dof)
