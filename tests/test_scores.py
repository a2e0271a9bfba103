import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from evaluation import scores
from evaluation.scores import FeatureStatistics, frechet_distance, inception_score, kid_influence, precision_recall


def random_logits(n: int, k: int = 10, seed: int = 0) -> np.ndarray:
    return 3 * np.random.default_rng(seed).standard_normal((n, k))


def random_features(n: int, d: int = 16, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    return np.maximum(scale * rng.standard_normal((n, d)) @ mix + shift, 0)


# Inception Score


@pytest.mark.parametrize("splits", [1, 4])
def test_score_matches_torch_fidelity(splits):
    logits = random_logits(400)
    theirs = metric_isc.isc_features_to_metric(torch.as_tensor(logits), splits=splits, shuffle=False)
    ours = inception_score(scores.softmax_float64(logits), 400 // splits)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert (ours.std or 0.0) == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("k", [2, 10, 1000])
def test_balanced_one_hot_predictions_score_k(k):
    assert inception_score(np.tile(np.eye(k), (3, 1)), split_size=3 * k).mean == pytest.approx(k, rel=1e-12)


def test_constant_predictions_score_1():
    row = scores.softmax_float64(random_logits(1))
    assert inception_score(np.repeat(row, 100, axis=0), split_size=100).mean == pytest.approx(1, abs=1e-13)


def test_unbalanced_certain_predictions_score_the_exponential_of_their_entropy():
    p = np.array([0.5, 0.25, 0.25])
    one_hot = np.repeat(np.eye(3), (50, 25, 25), axis=0)
    assert inception_score(one_hot, 100).mean == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-13)


def test_zero_and_subnormal_probabilities_are_exact():
    p = np.array([[1.0, 0.0, 5e-324], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert inception_score(p, 4).mean == pytest.approx(2, rel=1e-15)


def test_splits_are_contiguous_and_a_remainder_is_dropped():
    p = scores.softmax_float64(random_logits(25))
    parts = [inception_score(p[i : i + 10], 10).mean for i in (0, 10)]
    score = inception_score(p, split_size=10)
    assert score == (np.mean(parts), np.std(parts), 20, 10, 2, 5)


def test_fewer_images_than_a_split_are_one_pool_without_std():
    p = scores.softmax_float64(random_logits(25))
    assert inception_score(p, 5000) == inception_score(p, 25)
    assert inception_score(p, 5000)[1:] == (None, 25, 25, 1, 0)


def test_score_does_not_depend_on_the_precision_that_probabilities_were_stored_in():
    p = scores.softmax_float64(random_logits(500))
    assert inception_score(p.astype(np.float32), 500).mean == pytest.approx(inception_score(p, 500).mean, rel=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([[0.5, 0.5], [0.5, 0.6]]), "row 1 sums to 1.1"),
        (np.array([[1.5, -0.5]]), ">= 0"),
        (np.array([[np.nan, 0.5]]), "finite"),
        (np.array([[np.inf, 0.5]]), "finite"),
        (np.array([[0.5, 0.5 + 0j]]), "real numbers"),
        (np.array([0.5, 0.5]), "shape"),
        (np.empty((0, 10)), "shape"),
    ],
)
def test_what_is_no_distribution_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        inception_score(bad, 10)


def test_split_size_below_1_is_refused():
    with pytest.raises(ValueError, match="split_size >= 1"):
        inception_score(np.eye(3), 0)


def test_softmax_survives_large_logits():
    assert scores.softmax_float64([[1e4, 0.0], [-1e4, -1e4]]).tolist() == [[1.0, 0.0], [0.5, 0.5]]


# Fréchet distance


def test_frechet_matches_torch_fidelity():
    a, b = random_features(300), random_features(400, shift=0.2, seed=1)
    stats = [metric_fid.fid_features_to_statistics(torch.as_tensor(x)) for x in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-10)
    assert frechet_distance(FeatureStatistics.of(a), b) == frechet_distance(a, b)


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    d = 12
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0]
    mean_a, mean_b = np.zeros(d), np.full(d, 0.3)
    variance_a, variance_b = np.linspace(0, 2, d), np.linspace(3, 1, d)  # one variance is 0: singular
    a = FeatureStatistics(mean_a, basis * variance_a @ basis.T, 100)
    b = FeatureStatistics(mean_b, basis * variance_b @ basis.T, 100)
    expected = d * 0.09 + np.square(np.sqrt(variance_a) - np.sqrt(variance_b)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_rank_one_covariances_is_the_closed_form():
    u, v = np.array([3.0, 0.0, 4.0]), np.array([0.0, 2.0, 1.0])  # tr (uu' vv')^(1/2) = |u·v|
    a, b = (FeatureStatistics(np.zeros(3), np.outer(w, w), 9) for w in (u, v))
    assert frechet_distance(a, b) == pytest.approx(25 + 5 - 2 * 4, rel=1e-12)


@pytest.mark.parametrize("n", [10, 2000])
def test_frechet_of_equal_sets_is_0(n):
    a = random_features(n, d=64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-11)


def test_frechet_is_symmetric_with_fewer_images_than_dimensions():
    a, b = random_features(20, d=64), random_features(30, d=64, seed=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 0


def test_statistics_of_blocks_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(5, 2, (101, 7)).astype(np.float32)
    whole, blocks = FeatureStatistics.of(rows), FeatureStatistics.of_blocks(rows[i : i + 10] for i in range(0, 101, 10))
    assert whole.n == blocks.n == 101
    np.testing.assert_allclose(whole.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(blocks.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(blocks.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [40, 500])  # fewer images than dimensions, and more
def test_frechet_influence_is_the_derivative_in_the_weight_of_an_image(n):
    a, b = random_features(n, d=64), FeatureStatistics.of(random_features(1000, d=64, shift=0.2, seed=1))

    def distance(weights: np.ndarray) -> float:
        mean = weights @ a
        covariance = (a - mean).T @ ((a - mean) * weights[:, None]) * n / (n - 1)
        return frechet_distance(FeatureStatistics(mean, covariance, n), b)

    value, influence = scores.frechet_influence(a, b)
    influence *= np.sqrt(n * (n - 1))
    assert value == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert influence.mean() == pytest.approx(0, abs=1e-12)
    step = 1e-5
    for i in range(0, n, n // 5):
        ends = [distance((1 - e) * np.full(n, 1 / n) + e * (np.arange(n) == i)) for e in (-step, step)]
        assert influence[i] == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4, abs=1e-5)


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="widths 16 and 8"):
        frechet_distance(random_features(20), random_features(20, d=8))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(random_features(1), random_features(20))
    with pytest.raises(ValueError, match=r"1 of 3 rows are not.* row 1"):
        frechet_distance([[0.0], [np.nan], [1.0]], [[0.0], [1.0]])


# KID, precision and recall


def test_kid_matches_torch_fidelity(monkeypatch):
    monkeypatch.setattr(scores, "CHUNK_ROWS", 64)  # several chunks, the last one short
    a, b = random_features(200), random_features(200, shift=0.2, seed=1)
    theirs = metric_kid.kid_features_to_metric(
        torch.as_tensor(a), torch.as_tensor(b), kid_subsets=1, kid_subset_size=200, verbose=False
    )
    assert kid_influence(a, b)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


def test_kid_of_unequal_sizes_is_the_sum_over_pairs():
    a, b = random_features(7, d=3), random_features(5, d=3, seed=1)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    assert kid_influence(a, b)[0] == pytest.approx(
        sum(within) - 2 * np.mean([k(x, y) for x in a for y in b]), rel=1e-12
    )


@pytest.mark.slow
def test_kid_influence_is_the_derivative_in_the_weight_of_an_image():
    """Of the sum over pairs, in which an image weighs 1/N with every other."""
    a, b = random_features(40), random_features(60, shift=0.3, seed=1)
    kernels = [(x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]

    def distance(p: np.ndarray, q: np.ndarray) -> float:
        own = [
            (w @ (k - np.diag(np.diag(k))) @ w) * len(w) / (len(w) - 1)
            for w, k in zip((p, q), kernels[:2], strict=True)
        ]
        return float(sum(own) - 2 * p @ kernels[2] @ q)

    uniform = np.full(40, 1 / 40), np.full(60, 1 / 60)
    value, influence = kid_influence(a, b)
    assert value == pytest.approx(distance(*uniform), rel=1e-12)
    for side, i in ((0, 3), (0, 17), (1, 5)):
        n, step, ends = len(uniform[side]), 1e-6, []
        for e in (-step, step):
            weights = list(uniform)
            weights[side] = (1 - e) * uniform[side] + e * (np.arange(n) == i)
            ends.append(distance(*weights))
        found = influence[i + 40 * side] * np.sqrt(n * (n - 1))
        assert found == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=0.02, abs=1e-4)  # but 1/N for its own pair


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "low", "high"), [(0.05, 0.92, 0.99), (0.0, 0.95, 1.0)])
def test_kid_interval_covers_its_expectation(shift, low, high):
    found = [
        kid_influence(random_features(300, 8, shift, seed=2 * i), random_features(400, 8, seed=2 * i + 1))
        for i in range(400)
    ]
    truth = np.mean([value for value, _ in found]) if shift else 0.0  # unbiased: 0 between equal distributions
    off = [abs(value - truth) / np.sqrt(np.square(influence).sum()) for value, influence in found]
    assert low <= np.mean(np.array(off) <= norm.ppf(0.975)) <= high


def test_precision_and_recall_match_torch_fidelity(monkeypatch):
    monkeypatch.setattr(scores, "CHUNK_ROWS", 64)
    a, b = random_features(300, scale=0.8), random_features(250, shift=0.1, seed=1)
    theirs = metric_prc.calculate_precision_recall_full(torch.as_tensor(a), torch.as_tensor(b), neighborhood=3)
    assert precision_recall(a, b) == pytest.approx(theirs, abs=1e-6)  # they average in float32
    assert 0 < precision_recall(a, b).recall < 1


def test_a_narrow_generator_has_precision_and_no_recall():
    rng = np.random.default_rng(0)
    real = rng.uniform(-1, 1, (500, 2))
    narrow = 0.01 * rng.standard_normal((500, 2))
    found = precision_recall(narrow, real)
    assert found.precision > 0.95
    assert found.recall < 0.05
    assert precision_recall(real, narrow) == found[::-1]


def test_too_few_images_for_k_neighbours_are_refused():
    with pytest.raises(ValueError, match="k=3 with 3 and 10"):
        precision_recall(random_features(3), random_features(10))
