"""Laws of trainer/schedules.py."""

import math
import subprocess
import sys

import numpy as np
import pytest

from trainer import schedules

LINEAR_HO = ("linear", 1e-4, 0.02, 1.0)
NICHOL = ("cosine", 0.008 / 1.008, 1.0, 1.0)
PUBLISHED = [
    LINEAR_HO,
    NICHOL,
    ("cosine", 0, 1, 1.0),
    ("cosine", 0.2, 1, 1.0),
    ("cosine", 0.2, 1, 2.0),
    ("sigmoid", -3, 3, 1.0),
    ("sigmoid", 0, 3, 0.3),
    ("sigmoid", 0, 3, 0.7),
    ("polynomial", -1, 0, 1.0),
]
VALID = [
    *PUBLISHED,
    ("polynomial", 0, 1, 2.0),
    ("polynomial", 0.2, 1, 0.5),
    ("polynomial", -1, -0.2, 3.0),
    ("cosine", -1, 0, 1.5),
    ("cosine", -0.9, -0.1, 0.5),
    ("cosine", 0.1, 0.6, 2.0),
    ("sigmoid", -5, -1, 0.4),
    ("sigmoid", 1, 4, 2.0),
]


def random_schedule(seed):
    rng = np.random.default_rng(seed)
    family = schedules.FAMILIES[seed % 4]
    if family == "linear":
        return family, float(rng.uniform(1e-6, 1e-3)), float(rng.uniform(2e-3, 0.05)), 1.0
    span = {"polynomial": (0.0, 4.0), "cosine": (0.0, 1.0), "sigmoid": (-6.0, 6.0)}[family]
    start, end = sorted(rng.uniform(*span, 2).tolist())
    tau = float(np.exp(rng.uniform(math.log(0.2), math.log(3))))
    if family != "sigmoid" and rng.random() < 0.5:
        start, end = -end, -start
    return family, start, end, tau


def naive_gamma(family, u, start, end, tau):
    """The formulas of the design, as printed."""
    x = start + (end - start) * u
    f = {
        "polynomial": lambda v: np.abs(v) ** (2 * tau),
        "cosine": lambda v: np.maximum(np.cos(np.pi * v / 2), 0) ** (2 * tau),
        "sigmoid": lambda v: 1 / (1 + np.exp(-v / tau)),
    }[family]
    start, end = np.float64(start), np.float64(end)
    return (f(end) - f(x)) / (f(end) - f(start))


def test_linear_at_1000_steps_is_hos_table():
    np.testing.assert_allclose(schedules.betas(*LINEAR_HO), np.linspace(1e-4, 0.02, 1000), rtol=0, atol=1e-14)


def test_nichol_cosine_is_diffusers_betas_for_alpha_bar():
    from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

    theirs = betas_for_alpha_bar(1000, alpha_transform_type="cosine").double().numpy()
    np.testing.assert_allclose(schedules.betas(*NICHOL), theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("curve", [c for c in VALID if c[0] != "linear"])
def test_gamma_is_the_printed_formula(curve):
    u = np.linspace(0, 1, 257)
    expected = naive_gamma(curve[0], u, *curve[1:])
    np.testing.assert_allclose(schedules.gamma(curve[0], u, *curve[1:]), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(80))
def test_every_valid_schedule_falls_from_1_to_0_strictly(seed):
    family, start, end, tau = random_schedule(seed)
    curve = schedules.gamma(family, np.linspace(0, 1, 101), start, end, tau)
    assert curve[0] == 1
    assert family == "linear" or curve[-1] == 0
    assert (np.diff(curve) <= 0).all()
    for steps in (1, 2, 10, 1000):
        betas = schedules.betas(family, start, end, tau, steps)
        alpha_bar = schedules.alpha_bar(betas)
        assert betas.shape == (steps,)
        assert betas.dtype == np.float64
        assert (betas >= schedules.MIN_BETA).all()
        assert (betas <= schedules.MAX_BETA).all()
        assert (np.diff(alpha_bar) < 0).all()
        assert (alpha_bar > 0).all()
        assert (alpha_bar < 1).all()
        assert np.isfinite(schedules.log_snr(alpha_bar)).all()
        assert (np.diff(schedules.log_snr(alpha_bar)) < 0).all()


@pytest.mark.parametrize("tau", [1e-320, 1e-300, 1e-6, 1e-3, 30.0, 1e6, 1e300])
@pytest.mark.parametrize("curve", [c[:3] for c in VALID if c[0] != "linear"])
def test_tables_stay_finite_at_any_tau(curve, tau):
    betas = schedules.betas(*curve, tau)
    assert ((betas >= schedules.MIN_BETA) & (betas <= schedules.MAX_BETA)).all()
    assert np.isfinite(schedules.log_snr(schedules.alpha_bar(betas))).all()


def test_sigmoid_at_large_tau_is_the_straight_line_it_tends_to():
    u = np.linspace(0, 1, 101)  # S(v) is linear near 0; the printed formula has lost every digit here
    np.testing.assert_allclose(schedules.sigmoid_gamma(u, -3, 3, 1e12), 1 - u, atol=1e-12)


def test_sigmoid_at_tiny_tau_is_the_exponential_it_tends_to():
    u = np.linspace(0.1, 0.5, 5)  # exp(-x / tau) * 2, x = 3 u
    np.testing.assert_allclose(schedules.sigmoid_gamma(u, 0, 3, 0.005), 2 * np.exp(-3 * u / 0.005), rtol=1e-10)


@pytest.mark.parametrize("family", ["sigmoid", "polynomial", "cosine"])
def test_falling_arguments_are_the_mirrored_curve(family):
    u = np.linspace(0, 1, 65)
    np.testing.assert_allclose(naive_gamma(family, u, 1, 0, 0.7), schedules.gamma(family, u, -1, 0, 0.7), atol=1e-13)


@pytest.mark.parametrize("curve", PUBLISHED)
@pytest.mark.parametrize("steps", [100, 250, 4000])
def test_another_number_of_steps_is_the_same_process(curve, steps):
    """alpha_bar at equal u agrees but for what the ceiling on beta takes in the last step."""
    coarse = schedules.alpha_bar(schedules.betas(*curve, steps))
    continuous = schedules.gamma(curve[0], np.arange(1, steps + 1) / steps, *curve[1:])
    np.testing.assert_allclose(coarse[:-1], continuous[:-1], atol=2e-6)
    assert coarse[-1] < 1e-3


def test_polynomial_warm_up_starts_at_the_floor():
    assert schedules.betas("polynomial", 0, 1, 2.0)[0] == schedules.MIN_BETA


def test_alpha_bar_reading_falls_below_a_hundredth_at_936_and_beta_reading_at_177():
    for space, first in (("alpha_bar", 936), ("beta", 177)):
        alpha_bar = schedules.alpha_bar(schedules.betas("cosine", 0, 1, 1.0, 1000, space))
        assert np.argmax(alpha_bar < 0.01) == first


def test_the_beta_reading_without_what_underflows_draws_the_same_images():
    """Of Gaussian data, whose best denoiser is known: mean and variance behind each step that is left as it was."""
    steps, mean, variance = 100, 0.3, 0.2
    raw = np.clip(1 - schedules.cosine_gamma(np.linspace(0, 1, steps), 0, 1, 1), schedules.MIN_BETA, schedules.MAX_BETA)
    ours = schedules.betas("cosine", 0, 1, 1.0, steps, "beta")
    assert all(schedules.screen("cosine", 0, 1, 1.0, n, "beta") is None for n in (steps, 1000))
    assert schedules.alpha_bar(raw)[-1] < 1e-50
    same = ours == raw
    assert np.all(ours[~same] == schedules.MIN_BETA)

    def moments(betas: np.ndarray) -> np.ndarray:
        """(T, 2): mean and variance of x_{i-1} by ancestral sampling with fixed-small variance, from N(0, 1)."""
        left = schedules.alpha_bar(betas)
        found, at = np.empty((steps, 2)), (0.0, 1.0)
        for i in reversed(range(steps)):
            before = left[i - 1] if i else 1.0
            gain = np.sqrt(left[i]) * variance / (left[i] * variance + 1 - left[i])  # of E[x_0 | x_i] = rest + gain x_i
            rest = mean * (1 - np.sqrt(left[i]) * gain)
            of_image = np.sqrt(before) * betas[i] / (1 - left[i])
            slope = of_image * gain + np.sqrt(1 - betas[i]) * (1 - before) / (1 - left[i])
            added = betas[i] * (1 - before) / (1 - left[i])
            at = (of_image * rest + slope * at[0], slope**2 * at[1] + added)
            found[i] = at
        return found

    np.testing.assert_allclose(moments(ours)[same], moments(raw)[same], rtol=1e-6, atol=1e-10)  # sqrt of 1e-20


@pytest.mark.parametrize("curve", PUBLISHED)
def test_published_schedules_pass_the_screen(curve):
    betas = schedules.betas(*curve)
    assert schedules.prior_kl_bits_per_dim(schedules.alpha_bar(betas)[-1]) <= 1e-4
    assert schedules.screen(*curve) is None


def test_screen_refuses_signal_left_at_the_end():
    reason = schedules.screen("linear", 1e-4, 0.001)
    assert reason is not None
    assert "prior KL must be below 0.01" in reason
    assert "0.62" in reason


def test_screen_refuses_what_float32_samplers_cannot_hold():
    reason = schedules.screen("sigmoid", 0, 3, 1e-3)
    assert reason is not None
    assert "float32" in reason


def test_prior_kl_is_the_mean_gaussian_divergence():
    alpha_bar_T = 0.3
    x_0 = np.random.default_rng(0).choice([-1.0, 1.0], 1000)  # unit variance, zero mean
    mean, variance = math.sqrt(alpha_bar_T) * x_0, 1 - alpha_bar_T
    kl = 0.5 * (variance + mean**2 - 1 - math.log(variance)) / math.log(2)
    assert schedules.prior_kl_bits_per_dim(alpha_bar_T) == pytest.approx(kl.mean())
    assert schedules.terminal_snr(alpha_bar_T) == pytest.approx(0.3 / 0.7)
    assert schedules.log_snr(np.array([alpha_bar_T]))[0] == pytest.approx(math.log(0.3 / 0.7))


def test_largest_difference_finds_one_entry():
    assert schedules.largest_difference(np.array([0.9, 0.5]), np.array([0.9, 0.25])) == 0.25
    with pytest.raises(ValueError, match="one length"):
        schedules.largest_difference(np.ones(2), np.ones(3))


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        (("sigmoid", 3, 3), r"start < schedule.end must hold.*start=3, end=3.*use start=0, end=3"),
        (("linear", 0.01, 0.01), r"start < schedule.end must hold.*Ho 2020"),
        (("cosine", 0.5, 0.5), r"start < schedule.end must hold.*use start=0, end=1"),
        (("polynomial", -2, -2), r"start < schedule.end must hold.*use start=-2, end=0"),
        (("sigmoid", 3, 0), r"start < schedule.end must hold.*use start=-3, end=0"),
        (("linear", 0.02, 1e-4), r"start < schedule.end must hold.*swap"),
        (("cosine", 0, 1, 0), r"tau > 0 must hold.*tau=0"),
        (("sigmoid", 0, 1, -1), r"tau > 0 must hold.*tau=-1"),
        (("cosine", 0, 1, 1, 0), r"steps must be a whole number >= 1.*steps=0"),
        (("cosine", 0, 1, 1, 2.5), r"steps must be a whole number >= 1.*steps=2.5"),
        (("polynomial", -1, 1), r"must decrease.*one side of 0.*start=-1, end=1"),
        (("polynomial", -0.5, 1), r"must decrease.*one side of 0"),
        (("cosine", -0.5, 1), r"must decrease.*one side of 0.*start=-0.5, end=1"),
        (("cosine", -1e-300, 1), r"must decrease.*one side of 0"),  # rounded tables would not show it
        (("cosine", 0, 1.0000000001), r"must decrease.*flat.*\[-1, 1\]"),
        (("cosine", -1.5, 0), r"must decrease.*flat.*\[-1, 1\]"),
        (("cosine", 4, 5), r"must decrease.*repeats"),
        (("linear", 0, 0.02), r"linear needs 0 < schedule.start.*start=0"),
        (("linear", 0.1, 1), r"linear needs 0 < schedule.start.*end=1"),
        (("linear", 1e-4, 0.02, 2), r"linear has no tau.*tau=2"),
        (("linear", 1e-4, 0.02, 1, 1000, "beta"), r"linear is stated in beta already.*space='beta'"),
        (("cosine", math.nan, 1), r"must be finite.*start=nan"),
        (("cosine", 0, math.inf), r"must be finite.*end=inf"),
        (("cosine", 0, 1, math.inf), r"must be finite.*tau=inf"),
        (("sigmoid", -1.7e308, 1.7e308), r"difference.*must be finite"),
        (("quadratic", 0, 1), r"family must be one of linear, polynomial, cosine, sigmoid.*'quadratic'"),
        (("cosine", 0, 1, 1, 1000, "log"), r"space must be one of alpha_bar, beta.*'log'"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_law(arguments, law):
    with pytest.raises(ValueError, match=law):
        schedules.check(*arguments)
    with pytest.raises(ValueError, match=law):
        schedules.betas(*arguments)


@pytest.mark.parametrize("curve", VALID)
def test_what_decreases_is_not_refused(curve):
    schedules.check(*curve)


def test_schedules_do_not_import_torch():
    code = "import sys, trainer.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
