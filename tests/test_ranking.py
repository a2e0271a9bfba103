import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from evaluation import joint as joint_module
from evaluation.joint import P_BEST_DRAWS, Joint, pool, prior_variance, shrink
from evaluation.ranking import TrialSamples, rank, score_influence
from evaluation.scores import (
    Array,
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kid_influence,
    softmax_float64,
)

Z = 1.959964


def draw_probabilities(n: int, k: int, sharpness: float, rng: np.random.Generator, skew: float = 0.0) -> np.ndarray:
    """Predictions of varying certainty over unbalanced classes, for which no closed form exists."""
    weights = np.linspace(1, 2 + skew, k)
    classes = rng.choice(k, size=n, p=weights / weights.sum())
    logits = rng.standard_normal((n, k))
    logits[np.arange(n), classes] += sharpness * rng.gamma(2, 0.5, n)
    return softmax_float64(logits)


def draw_features(n: int, rng: np.random.Generator, shift: float = 0.1, d: int = 16) -> np.ndarray:
    mix = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    return np.maximum(1.1 * rng.standard_normal((n, d)) @ mix + shift, 0)


REFERENCE = FeatureStatistics.of(draw_features(5000, np.random.default_rng(7), shift=0.0))


def trial(name: str, sharpness: float, n: int = 600, seed: int = 0, own: float = 0.0) -> TrialSamples:
    """Trials of one seed share their noise; `own` mixes in noise of the trial's own."""
    rng, private = np.random.default_rng(seed), np.random.default_rng([seed, *name.encode()])
    classes, noise = rng.integers(10, size=n), rng.standard_normal((n, 10))
    noise = np.sqrt(1 - own**2) * noise + own * private.standard_normal((n, 10))
    probabilities = softmax_float64(noise + sharpness * np.eye(10)[classes])
    return TrialSamples(name, probabilities, draw_features(n, rng))


# Intervals


def coverage(k: int, n: int, split_size: int, sharpness: float, rankings: int, draws_for_truth: int) -> float:
    rng = np.random.default_rng([k, n, split_size])
    expected = np.mean(
        [inception_score(draw_probabilities(n, k, sharpness, rng), split_size).mean for _ in range(draws_for_truth)]
    )
    covered = 0
    for _ in range(rankings):
        p = draw_probabilities(n, k, sharpness, rng)
        mean = inception_score(p, split_size).mean
        half = Z * np.sqrt(np.square(score_influence(p, split_size)).sum()) / mean
        covered += abs(np.log(expected / mean)) <= half
    return covered / rankings


def test_interval_covers_the_expected_score_at_n():
    assert 0.92 <= coverage(10, 500, 500, sharpness=4, rankings=300, draws_for_truth=1000) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "n", "split_size", "sharpness"),
    [
        (10, 500, 500, 4),
        (10, 2000, 500, 4),
        (10, 2000, 2000, 4),
        (10, 1000, 1000, 12),
        (10, 500, 500, 40),
        (100, 1000, 1000, 6),
    ],
)
def test_interval_covers_the_expected_score_at_n_in_many_regimes(k, n, split_size, sharpness):
    assert 0.93 <= coverage(k, n, split_size, sharpness, rankings=1000, draws_for_truth=2000) <= 0.97


def test_influence_is_what_the_score_loses_without_an_image():
    p = draw_probabilities(60, 10, 4, np.random.default_rng(0))
    p[3] = np.eye(10)[2]  # zeros, and a class that may then be in no other image
    whole = score_influence(p, 30)
    for split in (p[:30], p[30:]):
        without = np.array([inception_score(np.delete(split, i, axis=0), 29).mean for i in range(30)])
        expected = (without.mean() - without) * np.sqrt(29 / 30)
        own, whole = whole[:30], whole[30:]
        np.testing.assert_allclose(own, expected / 2, rtol=1e-9, atol=1e-12)


def test_standard_errors_are_right_where_classes_are_many_and_images_few():
    """The derivative in an image's weight, the infinitesimal jackknife, comes out a tenth too small here."""
    rng = np.random.default_rng(1)
    drawn = [draw_probabilities(60, 120, 9, rng) for _ in range(300)]
    spread = np.std([inception_score(p, 60).mean for p in drawn])
    stated = np.sqrt(np.mean([np.square(score_influence(p, 60)).sum() for p in drawn]))
    assert stated == pytest.approx(spread, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "low", "high"), [(2000, 0.93, 0.975), (150, 0.93, 1.0)])  # wide where n is near D
def test_frechet_interval_covers_its_expectation_at_n(n, low, high):
    rng = np.random.default_rng(n)
    expected = np.mean([frechet_distance(draw_features(n, rng), REFERENCE) for _ in range(1000)])
    p = draw_probabilities(n, 10, 4, rng)
    rows = [rank([TrialSamples("a", p, draw_features(n, rng))], REFERENCE, n)[0] for _ in range(500)]
    intervals = [r.distances["frechet"].ci for r in rows]
    covered = np.mean([lower <= expected <= upper for lower, upper in intervals])
    assert low <= covered <= high


def test_interval_is_centred_on_the_estimate_and_is_no_split_std():
    (row,) = rank([trial("a", 4)], REFERENCE, split_size=200)
    assert row.score is not None
    assert np.sqrt(np.prod(row.score.ci)) == pytest.approx(row.score.mean)
    assert np.mean(row.distances["frechet"].ci) == pytest.approx(row.distances["frechet"].value)
    assert row.score.std == inception_score(trial("a", 4).probabilities, 200).std


def test_interval_shrinks_with_the_square_root_of_n():
    widths = [np.ptp(rank([trial("a", 4, n=n)], REFERENCE, 100)[0].score.ci) for n in (500, 8000)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)


def test_interval_stays_between_1_and_k():
    one_hot = np.repeat(np.eye(10), [2, 1, 1, 1, 1, 1, 1, 1, 1, 1], axis=0)
    (row,) = rank([TrialSamples("a", one_hot, draw_features(11, np.random.default_rng(0)))], REFERENCE, 11)
    assert row.score is not None
    assert 1 <= row.score.ci[0] < row.score.mean <= row.score.ci[1] <= 10


# Order, ties, P(best)


def test_trials_are_ordered_by_score_whatever_order_they_come_in():
    trials = [trial("weak", 1), trial("strong", 6), trial("middle", 3)]
    rows = rank(trials, REFERENCE, 300)
    assert [(r.rank, r.trial) for r in rows] == [(1, "strong"), (2, "middle"), (3, "weak")]
    assert [r.score.mean for r in rows if r.score] == sorted([r.score.mean for r in rows if r.score], reverse=True)
    assert rank(trials[::-1], REFERENCE, 300) == rows
    assert [r.tied_with for r in rows] == [(), (), ()]
    assert [r.p_best for r in rows] == pytest.approx([1, 0, 0], abs=1e-6)


def test_trials_with_the_same_images_are_tied_and_equally_likely_the_best():
    same = trial("a", 4)
    rows = rank([same, TrialSamples("b", same.probabilities, same.features), trial("weak", 1)], REFERENCE, 300)
    assert [r.tied_with for r in rows] == [("b",), ("a",), ()]
    assert [r.p_best for r in rows] == pytest.approx([0.5, 0.5, 0.0], abs=1e-12)


def test_common_noise_separates_trials_that_independent_noise_cannot():
    for seed in range(5):
        paired = rank([trial("a", 4.0, seed=seed), trial("b", 4.05, seed=seed)], REFERENCE, 300)
        assert [r.tied_with for r in paired] == [(), ()]
    apart = [rank([trial("a", 4.0, seed=seed), trial("b", 4.05, seed=seed + 1)], REFERENCE, 300) for seed in range(5)]
    assert sum(r[0].tied_with == (r[1].trial,) for r in apart) >= 3


def share_called_different(rankings: int) -> float:
    rows = [
        rank([trial("a", 4, 500, i, own=0.5), trial("b", 4, 500, i, own=0.5)], REFERENCE, 250) for i in range(rankings)
    ]
    return float(np.mean([r[0].tied_with == () for r in rows]))


@pytest.mark.slow
def test_equal_trials_are_called_different_in_about_5_of_100():
    assert 0.01 <= share_called_different(100) <= 0.10


@pytest.mark.slow
def test_equal_trials_are_called_different_in_5_of_100():
    assert 0.03 <= share_called_different(1000) <= 0.07


def test_p_best_of_two_is_the_normal_probability_of_their_difference():
    covariance = np.array([[1.0, 0.6], [0.6, 2.0]])  # the difference has variance 1.8
    chances = Joint(np.array([0.5, 0.0]), covariance, np.zeros(2), np.full(2, np.inf), np.inf).p_best()
    assert chances[0] == pytest.approx(0.6453, abs=4 * np.sqrt(0.25 / P_BEST_DRAWS))  # Phi(0.5 / sqrt(1.8))
    assert chances.sum() == pytest.approx(1, abs=1e-12)


def test_the_lead_over_the_next_row_is_the_paired_difference_that_decides_ties():
    trials = [trial(name, sharpness, own=0.3) for name, sharpness in (("a", 4.2), ("b", 4.1), ("c", 3.0), ("d", 2.95))]
    rows = rank([*trials, TrialSamples("lost", reason="x")], REFERENCE, 300)
    assert [row.to_next is None for row in rows] == [False, False, False, True, True]
    for row, below in pairwise(rows[:4]):
        low, high = row.to_next.ci
        assert row.to_next.value == pytest.approx(row.score.mean - below.score.mean)
        assert row.to_next.value == pytest.approx((low + high) / 2)
        assert (low <= 0 <= high) == (below.trial in row.tied_with)
    # Oracle: jackknife of the difference itself. Common noise drops out of it.
    first, second = (score_influence(trials[i].probabilities, 300) for i in (0, 1))
    half = Z * np.sqrt(np.square(first - second).sum())
    assert np.diff(rows[0].to_next.ci)[0] / 2 == pytest.approx(half)
    assert rows[0].to_dict()["to_next"] == {"score": rows[0].to_next.value, "ci": list(rows[0].to_next.ci)}


def test_a_confirmed_row_may_be_behind_the_next_which_is_not():
    """It is ranked before it all the same, and the difference speaks of the two configurations, as ties do."""
    confirming = [repeat("a", sharpness, i) for i, sharpness in enumerate((3.8, 4.0, 4.2))]
    first, second = rank([trial("a", 5), trial("b", 5), *confirming], REFERENCE, 300)
    assert (first.trial, first.confirmed, second.trial, second.confirmed) == ("a", True, "b", False)
    assert first.to_next.value == pytest.approx(first.score.mean - second.score.mean)
    assert first.to_next.value < 0
    assert second.to_next is None
    alone, _ = rank([trial("a", 4), trial("b", 5)], REFERENCE, 300)
    assert np.ptp(first.to_next.ci) > np.ptp(alone.to_next.ci)  # the spread between seeds is in it, of both


# Configurations: trials that were trained again


def repeat(row: str, sharpness: float, seed: int) -> TrialSamples:
    """Another seed of `row`, whose checkpoint has this sharpness; its images see the noise of all trials."""
    return replace(trial(f"{row}-seed{seed}", sharpness, own=0.5), confirms=row)


def simulate_seeds(
    rankings: int, counts: tuple[int, ...], between: float | Array, shared: float, rng: np.random.Generator
) -> tuple[Array, float]:
    """(share of each row's means that its intervals hold, share of pairs that are tied) of one shape of a ranking.

    Checkpoint s of configuration c scores between_c * N(0, 1) + an error of variance 1, of which `shared` is one error
    of all (their common noise).
    """
    members = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    covariance = np.full((sum(counts),) * 2, shared) + (1 - shared) * np.eye(sum(counts))
    between = np.repeat(np.broadcast_to(between, len(counts)), counts)
    held, tied = [], []
    for _ in range(rankings):
        noise = rng.multivariate_normal(np.zeros(sum(counts)), covariance, method="cholesky")
        joint = pool(between * rng.standard_normal(sum(counts)) + noise, covariance, members)
        low, high = joint.intervals([len(own) > 1 for own in members]).T
        held.append((low <= 0) & (high >= 0))
        tied.append(joint.ties()[np.triu_indices(len(counts), 1)])
    return np.mean(held, axis=0), float(np.mean(tied))


@pytest.mark.parametrize(("between", "shared"), [(0.0, 0.9), (1.0, 0.5), (3.0, 0.9), (3.0, 0.0)])
def test_a_confirmed_interval_holds_the_configurations_mean_over_seeds(between, shared):
    held, tied = simulate_seeds(800, (3, 3, 4), between, shared, np.random.default_rng(5))
    # Where seeds differ by less than a score's own error, what is shared may be counted a little too much.
    assert 0.93 <= held.mean() <= (0.97 if between else 0.995), held
    assert tied >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(3, 3), (3,) * 3, (3,) * 7, (3, 4, 5, 2, 3)])
def test_where_seeds_spread_alike_intervals_hold_what_they_say(counts):
    held, tied = simulate_seeds(1500, counts, 3.0, 0.5, np.random.default_rng(len(counts)))
    assert 0.93 <= held.mean() <= 0.97, held
    assert 0.935 <= tied <= 0.965


@pytest.mark.slow
@pytest.mark.parametrize("between", [(1, 4, 4), (1, 1, 4), (1, 1, 1, 4, 4, 4), (1, 1, 1, 1, 1, 4)])
def test_where_seeds_spread_unlike_intervals_come_nearer_to_what_they_say_than_pooled_ones(between, monkeypatch):
    def pooled(spreads: Array, dof: Array) -> tuple[Array, Array]:
        return np.full(len(dof), dof @ spreads / dof.sum()), np.full(len(dof), dof.sum())

    found = []
    for _ in range(2):
        counts, spread = (3,) * len(between), 10.0 * np.array(between)
        held, _ = simulate_seeds(1500, counts, spread, 0.5, np.random.default_rng(0))
        found.append(np.array([held[spread == each].mean() for each in (10, 40)]))
        monkeypatch.setattr(joint_module, "shrink", pooled)
    own, pooled_away = (np.abs(held - 0.95) for held in found)
    assert (own < pooled_away).all(), found


def test_rows_lend_each_other_as_many_observations_as_their_true_variances_agree():
    """Oracle: spreads drawn from the model that is fitted (inverse chi square variances of 6 degrees of freedom)."""
    rng, dof = np.random.default_rng(0), np.tile([2, 3, 4], 10_000)
    true = 5 * 6 / rng.chisquare(6, len(dof))
    spreads = true * rng.chisquare(dof) / dof
    assert prior_variance(spreads, dof) == pytest.approx((6, 5), rel=0.05)
    variances, degrees = shrink(np.append(spreads, 0.0), np.append(dof, 0))
    assert variances[:-1] == pytest.approx((6 * 5 + dof * spreads) / (6 + dof), rel=0.05)
    assert variances[-1] == pytest.approx(5, rel=0.05)  # of a row without a spread
    assert degrees[[0, 1, 2, -1]] == pytest.approx([2, 3, 4, 6], rel=0.05)


@pytest.mark.parametrize("apart", [1.05, 30.0, 1e3, 1e9])
def test_a_prior_is_found_however_far_spreads_are_apart(apart):
    spreads = np.array([1.0, apart, apart, 1.0, apart**2])
    observations, variance = prior_variance(spreads, np.full(5, 2))
    assert observations >= 1
    assert 0.1 < variance < apart**2
    variances, _ = shrink(spreads, np.full(5, 2))
    assert (np.diff(variances[[0, 1, 4]]) >= 0).all()


def test_spreads_that_are_alike_or_too_few_are_pooled():
    for spreads, dof in (([1.0, 1.1, 0.9], [2, 2, 3]), ([0.01, 9.0], [2, 4]), ([0.0, 0.0, 0.0, 4.0], [2] * 4)):
        variances, degrees = shrink(np.array(spreads), np.array(dof))
        assert variances == pytest.approx(np.full(len(dof), np.average(spreads, weights=dof)))
        assert degrees.tolist() == [sum(dof)] * len(dof)


def test_rows_that_lend_each_other_nothing_differ_as_welch_has_it():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 1, 4), rng.normal(1, 5, 6)
    seeds = np.array([stats.sem(first), stats.sem(second)]) ** 2
    joint = Joint(np.array([first.mean(), second.mean()]), np.zeros((2, 2)), seeds, np.array([3.0, 5.0]), np.inf)
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert joint.half_widths_of_differences()[0, 1] == pytest.approx((high - low) / 2)
    # And all rows together know no more than their spreads do.
    joint = replace(joint, dof=np.array([4.0, 4.0]), pooled_dof=4.0)
    assert joint.half_widths_of_differences()[0, 1] == pytest.approx(stats.t.ppf(0.975, 4) * np.sqrt(seeds.sum()))


def test_one_configuration_alone_has_students_interval():
    values = np.array([1.0, 2.0, 4.0])
    joint = pool(values, np.zeros((3, 3)), [[0, 1, 2]])
    low, high = joint.intervals([True])[0]
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)))


def test_a_winner_by_luck_is_found_out_and_its_best_seed_is_named():
    """`lucky` scored high once; its new seeds are worse than those of `steady`."""
    trials = [trial("lucky", 6, own=0.5), trial("steady", 5, own=0.5), trial("weak", 2)]
    assert [row.trial for row in rank(trials, REFERENCE, 300)] == ["lucky", "steady", "weak"]
    seeds = [repeat("lucky", sharpness, i) for i, sharpness in enumerate((3.0, 3.2, 3.4))]
    seeds += [repeat("steady", sharpness, i) for i, sharpness in enumerate((4.9, 5.0, 5.2))]
    first, second, third = rank([*trials, *seeds], REFERENCE, 300)
    assert (first.trial, second.trial, third.trial) == ("steady", "lucky", "weak")
    assert (first.confirmed, second.confirmed, third.confirmed) == (True, True, False)
    assert first.mean_of == ("steady-seed0", "steady-seed1", "steady-seed2")
    assert (first.best_training, second.best_training, third.best_training) == ("steady-seed2", "lucky", "weak")
    alone = {row.trial: row for row in rank([replace(t, confirms=None) for t in seeds], REFERENCE, 300)}
    scores = [alone[name].score.mean for name in first.mean_of]
    assert first.score.mean == pytest.approx(np.mean(scores))
    assert first.distances["frechet"].value == pytest.approx(
        np.mean([alone[name].distances["frechet"].value for name in first.mean_of])
    )
    assert np.ptp(first.score.ci) > max(np.ptp(row.score.ci) for row in alone.values())
    unconfirmed = rank([trial("weak", 2)], REFERENCE, 300)[0].score  # of the checkpoint, as before
    assert (third.score.mean, *third.score.ci) == pytest.approx((unconfirmed.mean, *unconfirmed.ci), rel=1e-12)


def test_a_seed_that_failed_is_left_out_and_one_is_not_enough():
    lost = TrialSamples("a-seed2", reason="the loss was not finite", confirms="a")
    (row,) = rank([trial("a", 4), repeat("a", 4, 0), repeat("a", 4.2, 1), lost], REFERENCE, 300)
    assert row.confirmed
    assert row.mean_of == ("a-seed0", "a-seed1")
    (row,) = rank([trial("a", 4), repeat("a", 4, 0), lost], REFERENCE, 300)
    assert not row.confirmed
    assert row.mean_of == ("a",)


def test_p_best_of_configurations_counts_the_spread_between_seeds():
    values = np.array([1.0, 1.1, 1.2, 0.9, 1.0, 1.1])
    certain = np.zeros((6, 6))
    joint = pool(values, certain, [[0, 1, 2], [3, 4, 5]])
    # The difference has Student's t of 4 degrees of freedom: 0.1 of standard error 0.1 * sqrt(2 / 3).
    assert joint.p_best()[0] == pytest.approx(stats.t.cdf(0.1 / (0.1 * np.sqrt(2 / 3)), 4), abs=0.01)
    assert pool(values[:2], certain[:2, :2], [[0], [1]]).p_best().tolist() == [0, 1]
    # A row whose spread is its own has its own degrees of freedom.
    joint = Joint(np.array([1.0, 0.0]), certain[:2, :2], np.array([0.0, 1.0]), np.array([9.0, 3.0]), 9.0)
    assert joint.p_best()[0] == pytest.approx(stats.t.cdf(1.0, 3), abs=0.01)


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_best_is_as_often_right_as_it_says(seeds):
    """Over rankings of four whose true scores lie about two standard errors apart: see benchmarks/calibration.py."""
    rng, shared, rows = np.random.default_rng(seeds), 0.8, 4
    covariance = np.full((rows * seeds,) * 2, shared) + (1 - shared) * np.eye(rows * seeds)
    members = np.split(np.arange(rows * seeds), rows)
    said, best = [], []
    for _ in range(400):
        truth = rng.normal(0, 2.0, rows)
        noise = rng.multivariate_normal(np.zeros(rows * seeds), covariance, method="cholesky")
        between = rng.normal(0, 1.0, rows * seeds) if seeds > 1 else 0.0
        said.append(pool(np.repeat(truth, seeds) + between + noise, covariance, members).p_best(draws=1000))
        best.append(truth == truth.max())
    chance, was = np.ravel(said), np.ravel(best)
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.01)):
        inside = (chance >= low) & (chance < high)
        error = np.sqrt(max(was[inside].mean() * (1 - was[inside].mean()), 0.01) / inside.sum())
        assert was[inside].mean() == pytest.approx(chance[inside].mean(), abs=3 * error), (low, high)


# What cannot be ranked


def test_trials_without_a_score_come_last_with_their_reason():
    nan = trial("nan", 4)
    nan_features = np.full_like(np.asarray(nan.features), np.nan)
    rows = rank(
        [
            TrialSamples("lost", reason="the loss was not finite at step 12"),
            TrialSamples("nan", nan.probabilities, nan_features),
            trial("good", 4),
            TrialSamples("logits", np.log(np.asarray(nan.probabilities)), nan.features),
        ],
        REFERENCE,
        300,
    )
    assert [(r.rank, r.trial) for r in rows] == [(1, "good"), (None, "lost"), (None, "nan"), (None, "logits")]
    assert rows[1].reason == "the loss was not finite at step 12"
    assert "features must be finite" in str(rows[2].reason)
    assert "are these logits?" in str(rows[3].reason)
    assert rows[0].p_best == 1
    assert rows[1].score is rows[1].p_best is rows[1].best_training is None
    assert rows[1].distances == {}


def test_a_ranking_of_failures_is_still_a_ranking():
    assert [r.rank for r in rank([TrialSamples("a", reason="x")], REFERENCE, 300)] == [None]
    assert rank([], REFERENCE, 300) == []


def test_rows_are_what_ranking_json_holds():
    kid = {"kid": lambda features: kid_influence(features, np.asarray(trial("real", 1).features))}
    row = rank([trial("a", 4)], REFERENCE, 300, distances=kid)[0].to_dict()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert set(row) == {
        *(
            "rank",
            "trial",
            "score",
            "frechet",
            "kid",
            "p_best",
            "tied_with",
            "to_next",
            "confirmed",
            "reason",
            "mean_of",
            "best_training",
        )
    }
    assert list(row["score"]) == ["mean", "std", "ci"]
    assert list(row["frechet"]) == list(row["kid"]) == ["value", "ci"]
    assert row["confirmed"] is False
    assert row["mean_of"] == ["a"]
    lost = rank([TrialSamples("a", reason="x")], REFERENCE, 300)[0].to_dict()
    assert lost["score"] is lost["frechet"] is None


def test_trials_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="same number of images"):
        rank([trial("a", 4, n=100), trial("b", 4, n=200)], REFERENCE, 50)
    with pytest.raises(ValueError, match="names must differ"):
        rank([trial("a", 4), trial("a", 5)], REFERENCE, 50)
    with pytest.raises(ValueError, match="split_size >= 3"):  # else an interval without any width
        rank([trial("a", 4)], REFERENCE, 2)
    with pytest.raises(ValueError, match="at least 3 images"):
        rank([trial("a", 4, n=2)], REFERENCE, 50)
    interval = rank([trial("a", 4, n=3)], REFERENCE, 50)[0].score.ci
    assert interval[0] < interval[1]
