"""Probabilities and features → Inception Score, Fréchet distance, KID, precision and recall: pure float64.

N, M images · K classes · D features · S splits of n images. Nothing here knows which network made the numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

NEIGHBOURS = 3  # k of precision and recall
CHUNK_ROWS = 1024  # rows of a pairwise matrix held at once: memory is CHUNK_ROWS x N, never N x N


class Score(NamedTuple):
    """exp(mean KL) over splits. `std` is between splits (ddof 0, None where there is one): no confidence interval."""

    mean: float
    std: float | None
    n_used: int  # images that were scored: splits * split_size
    split_size: int  # images a split; all of them where there are fewer than were asked for
    splits: int
    dropped: int  # images after the last whole split


class Interval(NamedTuple):
    """An estimate and its two-sided confidence interval."""

    value: float
    ci: tuple[float, float]


class PrecisionRecall(NamedTuple):
    """Kynkäänniemi 2019: precision is the share of generated images near real ones, recall the reverse."""

    precision: float
    recall: float


def softmax_float64(logits: ArrayLike) -> Array:
    """Logits (N, K) of any float type → probabilities (N, K) float64. Raises ValueError where one is not finite."""
    values = _matrix(logits, "logits")
    return np.asarray(special.softmax(values, axis=1), dtype=np.float64)


def check_probabilities(probabilities: ArrayLike) -> Array:
    """(N, K) float64, every row a distribution. Rows within 1e-3 of one (stored in float32 or float16) are rescaled.

    Raises ValueError, naming the first bad row, where a row is not finite, has a negative entry or does not sum to 1.
    """
    values = _matrix(probabilities, "probabilities")
    negative = np.flatnonzero((values < 0).any(axis=1))
    if negative.size:
        row = negative[0]
        raise ValueError(f"probabilities >= 0 must hold, but row {row} has {values[row].min():.6g}; are these logits?")
    totals = values.sum(axis=1)
    off = np.flatnonzero(np.abs(totals - 1) > 1e-3)
    if off.size:
        raise ValueError(f"every row of probabilities must sum to 1, but row {off[0]} sums to {totals[off[0]]:.6g}")
    return values / totals[:, None]


def inception_score(probabilities: ArrayLike, split_size: int) -> Score:
    """Salimans 2016 (arXiv:1606.03498): exp(mean KL(p_i || q)), mean and std over splits of a fixed size.

    probabilities: (N, K). Splits are contiguous by index, of `split_size` images (one pool where N is smaller); a
    remainder is left out. q is the split's mean, and 0 log 0 = 0. Between 1 (every prediction alike) and K (certain and
    balanced). The score of n images is biased downward by about (K-1)/2n in the logarithm, so scores compare only at
    one split_size. Raises ValueError where split_size < 1 or a row is no distribution.
    """
    if split_size < 1:
        raise ValueError(f"split_size >= 1 must hold, but got {split_size=}")
    p = check_probabilities(probabilities)
    n = min(split_size, len(p))
    splits = len(p) // n
    scores = np.empty(splits)
    for s in range(splits):
        part = p[s * n : (s + 1) * n]
        # The sum instead of the mean: a subnormal probability divided by n would leave q = 0 under p > 0.
        scores[s] = np.exp((special.rel_entr(part, part.sum(axis=0)).sum(axis=1) + np.log(n)).mean())
    std = float(scores.std()) if splits > 1 else None
    return Score(float(scores.mean()), std, splits * n, n, splits, len(p) - splits * n)


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,) and covariance (D, D, ddof 1) of the features of n images."""

    mean: Array
    covariance: Array
    n: int

    @cached_property
    def factor(self) -> Array:
        """P (D, r) with P P^T = covariance, r its numerical rank. Found once: it takes seconds where D is 2048."""
        eigenvalues, vectors = np.linalg.eigh(self.covariance)
        kept = eigenvalues > eigenvalues.max(initial=0.0) * len(eigenvalues) * np.finfo(np.float64).eps
        return np.asarray(vectors[:, kept] * np.sqrt(eigenvalues[kept]))

    @classmethod
    def of(cls, features: ArrayLike) -> "FeatureStatistics":
        """features (N, D), N >= 2. Raises ValueError where there are fewer, or one is not finite."""
        return cls.of_blocks([features])

    @classmethod
    def of_blocks(cls, blocks: Iterable[ArrayLike]) -> "FeatureStatistics":
        """Of all rows of the blocks (N_i, D), of which one is held at a time (Chan 1983, doi:10.2307/2683386)."""
        n, mean, scatter = 0, np.zeros(1), np.zeros((1, 1))
        for block in blocks:
            values = _matrix(block, "features")
            of_block = values.mean(axis=0)
            centred, shift = values - of_block, of_block - mean
            total = n + len(values)
            scatter = scatter + centred.T @ centred + np.outer(shift, shift) * (n * len(values) / total)
            mean = mean + shift * (len(values) / total)
            n = total
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images, but got {n}")
        return cls(mean, scatter / (n - 1), n)


def frechet_distance(a: ArrayLike | FeatureStatistics, b: ArrayLike | FeatureStatistics) -> float:
    """Fréchet distance between the Gaussians of two sets of features, Heusel 2017 (arXiv:1706.08500).

        |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)

    a, b: features (N, D) and (M, D), or their statistics; N and M may be smaller than D.
    """
    (stats_a, factor_a), (stats_b, factor_b) = _factored(a), _factored(b)
    # With A = P P^T and B = Q Q^T the trace is the sum of the singular values of P^T Q: no complex numbers, and no
    # square root of a rounding error (which would make 1e-16 of a singular covariance into 1e-8).
    _same_width(stats_a.mean, stats_b.mean)
    return _frechet(stats_a, stats_b, np.linalg.svd(factor_a.T @ factor_b, compute_uv=False))


def frechet_influence(features: ArrayLike, reference: ArrayLike | FeatureStatistics) -> tuple[float, Array]:
    """The Fréchet distance to a fixed reference, and how much each image moves it.

    features: (N, D); reference: real features (M, D) or their statistics. Returns (distance, influence (N,)), whose sum
    of squares is the distance's variance to first order. With m the mean difference, and T the optimal transport map
    between the covariances (d tr (A B)^(1/2) / dA = T/2), it is 1 / sqrt(N (N-1)) of

        2 m·c + N/(N-1) c^T (I - T) c - mean,   c = x - mean_a
    """
    values = _matrix(features, "features")
    (stats_a, factor_a), (stats_b, reference_factor) = _factored(values), _factored(reference)
    _same_width(stats_a.mean, stats_b.mean)
    u, singular, _ = np.linalg.svd(reference_factor.T @ factor_a, full_matrices=False)
    kept = singular > singular.max(initial=0.0) * len(stats_a.mean) * np.finfo(np.float64).eps
    root = reference_factor @ (u[:, kept] / np.sqrt(singular[kept]))  # (D, r), T = root root^T
    centred = values - stats_a.mean
    spread = np.square(centred).sum(axis=1) - np.square(centred @ root).sum(axis=1)  # c^T (I - T) c
    raw = 2 * centred @ (stats_a.mean - stats_b.mean) + spread * len(values) / (len(values) - 1)
    return _frechet(stats_a, stats_b, singular), (raw - raw.mean()) / np.sqrt(len(raw) * (len(raw) - 1))


def kid_influence(a: ArrayLike, b: ArrayLike) -> tuple[float, Array]:
    """Kernel distance of Binkowski 2018 (arXiv:1801.01401): unbiased MMD^2, kernel (x·y/D + 1)^3, over all pairs.

    a, b: features (N, D) and (M, D). Returns (distance, which may be slightly negative, the influence of every image on
    it (N + M,), first those of a). The sum of squares is the variance with both sets taken as random, the sum of
    products with another set's that shares b their covariance. It is that of the first Hoeffding projections with their
    own noise left in: a little large where a and b have one distribution (where the projections vanish), never 0.
    """
    x, y = _matrix(a, "features"), _matrix(b, "features")
    _same_width(x[0], y[0])
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID needs at least 2 images a side, but got {len(x)} and {len(y)}")
    within_x, within_y = _kernel_means(x, x, skip_self=True), _kernel_means(y, y, skip_self=True)
    x_to_y, y_to_x = _kernel_means(x, y), _kernel_means(y, x)
    value = float(within_x.mean() + within_y.mean() - x_to_y.mean() - y_to_x.mean())
    parts = [2 * (p - p.mean()) / np.sqrt(len(p) * (len(p) - 1)) for p in (within_x - x_to_y, within_y - y_to_x)]
    return value, np.concatenate(parts)


def precision_recall(generated: ArrayLike, real: ArrayLike) -> PrecisionRecall:
    """Improved precision and recall, Kynkäänniemi 2019 (arXiv:1904.06991).

    generated (N, D), real (M, D). A set's manifold is the union of balls around its images that reach to their k-th
    nearest neighbour in the same set, k = 3 as in the paper. Raises ValueError where a set has no k neighbours.
    """
    x, y = _matrix(generated, "features"), _matrix(real, "features")
    _same_width(x[0], y[0])
    if min(len(x), len(y)) <= NEIGHBOURS:
        raise ValueError(f"k < number of images must hold, but got k={NEIGHBOURS} with {len(x)} and {len(y)} images")
    return PrecisionRecall(_share_inside(x, y, _radii(y)), _share_inside(y, x, _radii(x)))


def _matrix(values: ArrayLike, name: str) -> Array:
    if np.iscomplexobj(values):
        raise ValueError(f"{name} must be real numbers, but are complex")
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must have shape (N, {'D' if name == 'features' else 'K'}), but got {matrix.shape}")
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{name} must be finite, but {bad.size} of {len(matrix)} rows are not; the first is row {bad[0]}"
        )
    return matrix


def _factored(values: ArrayLike | FeatureStatistics) -> tuple[FeatureStatistics, Array]:
    """Statistics, and a factor of their covariance: of fewer features than they are wide, the centred ones are one."""
    if isinstance(values, FeatureStatistics):
        return values, values.factor
    stats, matrix = FeatureStatistics.of(values), _matrix(values, "features")
    few = len(matrix) <= matrix.shape[1]
    return stats, (matrix - stats.mean).T / np.sqrt(len(matrix) - 1) if few else stats.factor


def _same_width(a: Array, b: Array) -> None:
    if len(a) != len(b):
        raise ValueError(f"both sets must have features of one extractor, but got widths {len(a)} and {len(b)}")


def _frechet(a: FeatureStatistics, b: FeatureStatistics, singular: np.ndarray) -> float:
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * singular.sum()
    return max(0.0, float(distance))  # rounding may leave -1e-14 between equal sets


def _kernel_means(x: Array, y: Array, skip_self: bool = False) -> Array:
    """Mean kernel of every row of x with the rows of y, (N,); skip_self where y is x and a row is not its own pair."""
    means = np.empty(len(x))
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        means[rows] = ((x[rows] @ y.T / x.shape[1] + 1) ** 3).sum(axis=1)
    if not skip_self:
        return means / len(y)
    return (means - (np.square(x).sum(axis=1) / x.shape[1] + 1) ** 3) / (len(y) - 1)


def _squared_distances(x: Array, y: Array) -> Array:
    distances = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.maximum(distances, 0.0, out=distances)


def _radii(x: Array) -> Array:
    """Squared distance of every row to its NEIGHBOURS-th nearest other row, (N,)."""
    radii = np.empty(len(x))
    for start in range(0, len(x), CHUNK_ROWS):
        distances = _squared_distances(x[start : start + CHUNK_ROWS], x)
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        radii[start : start + CHUNK_ROWS] = np.partition(distances, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1]
    return radii


def _share_inside(points: Array, centres: Array, radii: Array) -> float:
    inside = 0
    for start in range(0, len(points), CHUNK_ROWS):
        distances = _squared_distances(points[start : start + CHUNK_ROWS], centres)
        inside += int((distances <= radii).any(axis=1).sum())
    return inside / len(points)
