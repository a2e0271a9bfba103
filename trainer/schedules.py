"""Noise schedules: (family, start, end, tau) → gamma(u) → betas → alpha_bar. NumPy float64 only, never torch.

gamma(u), u in [0, 1], is the signal variance of Chen 2023 (arXiv:2301.10972): 1 at u = 0, 0 at u = 1 (linear: what its
betas leave), strictly decreasing. s, e, tau below are start, end, tau; T is steps; array index i = 0..T-1 is diffusion
step i + 1. The clipped betas are the authority and alpha_bar is their product (Nichol & Dhariwal 2021).
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

Family = Literal["linear", "polynomial", "cosine", "sigmoid"]
Space = Literal["alpha_bar", "beta"]
FAMILIES: tuple[Family, ...] = get_args(Family)

# The floor keeps 1 - alpha_bar_0 above float32's rounding: without it a float32 sampler divides 0 by 0 at i = 0.
MIN_BETA = 1e-7
MAX_BETA = 0.999  # Nichol & Dhariwal 2021: no singularity near t = T
LINEAR_STEPS = 1000  # the process Ho 2020 states its betas for
MAX_PRIOR_KL = 0.01  # bits per dimension
MIN_ALPHA_BAR = float(np.finfo(np.float32).tiny)  # below it float32 alpha_bar_t / alpha_bar_{t-1} becomes 0 / 0
NOISE_ALPHA_BAR = 1e-20  # x_t is noise to the last bit of float32


def check(family: str, start: float, end: float, tau: float = 1.0, steps: int = 1000, space: str = "alpha_bar") -> None:
    """Raises ValueError, with law, values and remedy, where these give no noise schedule.

    Decided from s, e and tau by the shape of each family, never from rounded tables.
    """
    got = f"but got {family}({start=}, {end=}, {tau=})"
    if family not in FAMILIES:
        raise ValueError(f"schedule.family must be one of {', '.join(FAMILIES)}, but got {family!r}")
    if space not in get_args(Space):
        raise ValueError(f"schedule.space must be one of {', '.join(get_args(Space))}, but got {space!r}")
    if not (math.isfinite(start) and math.isfinite(end) and math.isfinite(tau) and math.isfinite(end - start)):
        raise ValueError(f"schedule.start, schedule.end, their difference and schedule.tau must be finite, {got}")
    if steps < 1 or steps != int(steps):
        raise ValueError(f"schedule.steps must be a whole number >= 1, but got {steps=}")
    if tau <= 0:
        raise ValueError(f"schedule.tau > 0 must hold, {got}: use tau=1")
    if start == end:
        raise ValueError(f"schedule.start < schedule.end must hold, {got}: {_remedy_for_equal(family, end)}")
    if start > end:
        remedy = (
            "betas must rise, swap the two"
            if family == "linear"
            else f"falling arguments only mirror another curve, use start={0.0 - start:g}, end={0.0 - end:g}"
        )
        raise ValueError(f"schedule.start < schedule.end must hold, {got}: {remedy}")
    if family == "linear":
        if start <= 0 or end >= 1:
            raise ValueError(
                f"linear needs 0 < schedule.start < schedule.end < 1, for both are betas, {got}: Ho 2020 has 1e-4, 0.02"
            )
        if tau != 1:
            raise ValueError(f"linear has no tau, so schedule.tau must stay 1 (a curve has one name), {got}")
        if space == "beta":
            raise ValueError(
                f"linear is stated in beta already, so schedule.space must stay alpha_bar, but got {space=}"
            )
    if family in ("polynomial", "cosine") and start < 0 < end:
        raise ValueError(
            f"a {family} schedule must decrease, and turns at 0: schedule.start and schedule.end must lie on one side "
            f"of 0, {got}: use start=0 or end=0"
        )
    if family == "cosine" and (start < -1 or end > 1):
        raise ValueError(
            "a cosine schedule must decrease, and is flat or repeats itself outside [-1, 1]: schedule.start and "
            f"schedule.end must lie in [-1, 0] or in [0, 1], {got}: Nichol & Dhariwal 2021 have nearly 0, 1"
        )


def _remedy_for_equal(family: str, end: float) -> str:
    if family == "linear":
        return "Ho 2020 has start=0.0001, end=0.02"
    if family == "cosine" or end == 0:
        return "use start=0, end=1"
    if end < 0:
        return f"use start={end:g}, end=0"
    return f"use start=0, end={end:g}"  # sigmoid(3, 3) is a known misprint of sigmoid(0, 3)


def linear_log_gamma(u: np.ndarray, start: float, end: float) -> np.ndarray:
    """log gamma(u) of Ho 2020 (arXiv:2006.11239): betas linear in j over 1000 steps, the same process at any T.

    u: (N,) in [0, 1]. Returns (N,): the running sum of log(1 - beta_j), interpolated at 1000 u. Raises as `check`.
    """
    check("linear", start, end)
    sums = np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(start, end, LINEAR_STEPS)))])
    return np.interp(LINEAR_STEPS * np.asarray(u, np.float64), np.arange(LINEAR_STEPS + 1.0), sums)


def polynomial_gamma(u: np.ndarray, start: float, end: float, tau: float) -> np.ndarray:
    """[f(e) - f(x)] / [f(e) - f(s)], f(x) = |x|^(2 tau), x = s + (e - s) u.

    (0, 1) is 1 - u^(2 tau), the warm-up; (-1, 0) is (1 - u)^(2 tau), the cool-off.
    u: (N,) in [0, 1]. Returns (N,), falling from 1 to 0. Raises as `check`.
    """
    check("polynomial", start, end, tau)

    def log_ratio(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        x_lower, x_upper = np.abs(_between(lower, start, end)), np.abs(_between(upper, start, end))
        return _log_ratio((end - start) * np.abs(upper - lower) / x_upper, x_lower, x_upper)

    return _power_curve(u, 2 * tau, log_ratio, rising=start >= 0)


def cosine_gamma(u: np.ndarray, start: float, end: float, tau: float) -> np.ndarray:
    """[f(x) - f(e)] / [f(s) - f(e)], f(x) = max(cos(pi x / 2), 0)^(2 tau), x = s + (e - s) u. Chen 2023, Algorithm 1.

    Nichol & Dhariwal 2021 (arXiv:2102.09672, eq. 17) is s = .008 / 1.008, e = 1, tau = 1.
    u: (N,) in [0, 1]. Returns (N,), falling from 1 to 0. Raises as `check`.
    """
    check("cosine", start, end, tau)

    def log_ratio(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        x_lower, x_upper = np.abs(_between(lower, start, end)), np.abs(_between(upper, start, end))
        # sin of the complement: exactly 0 at x = 1, where cos(pi / 2) is 6e-17
        cos_lower, cos_upper = np.sin(np.pi / 2 * (1 - x_lower)), np.sin(np.pi / 2 * (1 - x_upper))
        # cos b - cos a = 2 sin((a + b) / 2) sin((a - b) / 2)
        gap = 2 * np.sin(np.pi / 4 * (x_lower + x_upper)) * np.sin(np.pi / 4 * (end - start) * np.abs(upper - lower))
        return _log_ratio(gap / cos_upper, cos_lower, cos_upper)

    return _power_curve(u, 2 * tau, log_ratio, rising=start < 0)


def sigmoid_gamma(u: np.ndarray, start: float, end: float, tau: float) -> np.ndarray:
    """[S(e/tau) - S(x/tau)] / [S(e/tau) - S(s/tau)], S logistic, x = s + (e - s) u. Chen 2023, Algorithm 1.

    Evaluated as sinh((e-x)/2tau) cosh(s/2tau) / (sinh((e-s)/2tau) cosh(x/2tau)) with the exponents of sinh and cosh
    taken together: nothing cancels for large tau, nothing overflows for small.
    u: (N,) in [0, 1]. Returns (N,), falling from 1 to 0. Raises as `check`.
    """
    check("sigmoid", start, end, tau)
    u = np.asarray(u, np.float64)
    p = min(1 / np.float64(tau), 1e300) if tau > 1e-300 else 1e300  # 1 / tau itself overflows for the last few floats
    x = _between(u, start, end)
    with np.errstate(over="ignore", under="ignore"):
        # the exponents add up to (s + |s| - x - |x|) / 2 tau
        fall = (end - start) * u if start >= 0 else np.maximum(x, 0.0)
        cosh_ratio = (1 + np.exp(-p * abs(start))) / (1 + np.exp(-p * np.abs(x)))
        sinh_ratio = _expm1_ratio(p, (start - end) * (1 - u), np.asarray(start - end))
        return np.exp(-p * fall) * sinh_ratio * cosh_ratio


def gamma(family: Family, u: np.ndarray, start: float, end: float, tau: float = 1.0) -> np.ndarray:
    """Signal variance at u. u: (N,) in [0, 1]. Returns (N,) float64. Raises as `check`."""
    check(family, start, end, tau)
    if family == "linear":
        return np.exp(linear_log_gamma(u, start, end))
    curves = {
        "polynomial": polynomial_gamma,
        "cosine": cosine_gamma,
        "sigmoid": sigmoid_gamma,
    }
    return curves[family](u, start, end, tau)


def betas(
    family: Family, start: float, end: float, tau: float = 1.0, steps: int = 1000, space: Space = "alpha_bar"
) -> np.ndarray:
    """beta_i = clip(1 - gamma((i+1)/T) / gamma(i/T), 1e-7, 0.999). Returns (T,) float64. Raises as `check`.

    space="beta" is the reading of earlier course code, beta_i = clip(1 - gamma(i/(T-1)), 1e-7, 0.999): the noise of
    the whole way taken for that of one step. cosine(0, 1, 1) is then below alpha_bar 0.01 from i = 177 of 1000 on
    instead of 936. It is here to be compared with, not to be used. Behind alpha_bar 1e-20 its betas are 1e-7: x_t is
    noise there whatever is added, and alpha_bar, 1e-602 at the end, would be 0 in any float.
    """
    check(family, start, end, tau, steps, space)
    u = np.arange(steps + 1) / steps
    if space == "beta":
        raw = 1 - gamma(family, np.linspace(0, 1, steps), start, end, tau)
    elif family == "linear":
        raw = -np.expm1(np.diff(linear_log_gamma(u, start, end)))
    else:
        signal = gamma(family, u, start, end, tau)
        with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
            # 0 / 0 where a steep curve has underflown: nothing is left, so the step may take all it is allowed
            raw = 1 - np.nan_to_num(signal[1:] / signal[:-1], nan=0.0)
    clipped = np.clip(raw, MIN_BETA, MAX_BETA)
    return np.where(alpha_bar(clipped) < NOISE_ALPHA_BAR, MIN_BETA, clipped) if space == "beta" else clipped


def alpha_bar(betas: np.ndarray) -> np.ndarray:
    """prod_{j<=i} (1 - beta_j). betas: (T,). Returns (T,) float64; steep schedules underflow to 0, see `screen`."""
    with np.errstate(under="ignore"):
        return np.cumprod(1 - np.asarray(betas, np.float64))


def log_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """log(alpha_bar / (1 - alpha_bar)) in nats, elementwise. An underflown alpha_bar counts as 2e-308: no -inf."""
    alpha_bar = np.maximum(np.asarray(alpha_bar, np.float64), np.finfo(np.float64).tiny)
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


def terminal_snr(alpha_bar_T: float) -> float:
    """Signal-to-noise ratio of x_T, whose signal variance is alpha_bar_T."""
    return float(alpha_bar_T / (1 - alpha_bar_T))


def prior_kl_bits_per_dim(alpha_bar_T: float) -> float:
    """KL(q(x_T | x_0) || N(0, 1)) a dimension, in bits, averaged over data of unit variance: -log2(1 - ab) / 2."""
    return float(-0.5 * np.log1p(-alpha_bar_T) / math.log(2))


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Largest |difference| of two alpha_bar tables of one length. Raises ValueError where the lengths differ."""
    if np.shape(first) != np.shape(second):
        raise ValueError(f"alpha_bar tables must have one length, but have {np.shape(first)} and {np.shape(second)}")
    return float(np.max(np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64))))


def screen(
    family: Family, start: float, end: float, tau: float = 1.0, steps: int = 1000, space: Space = "alpha_bar"
) -> str | None:
    """Why this schedule is not worth training (law, value, limit), or None. Raises as `check`."""
    last = alpha_bar(betas(family, start, end, tau, steps, space))[-1]
    prior_kl = prior_kl_bits_per_dim(last)
    if prior_kl >= MAX_PRIOR_KL:
        return (
            f"prior KL must be below {MAX_PRIOR_KL} bits per dimension, but is {prior_kl:.3g}: "
            f"alpha_bar_T = {last:.3g} of the image is left where sampling starts from pure noise"
        )
    if last < MIN_ALPHA_BAR:
        return (
            f"alpha_bar_T must be at least {MIN_ALPHA_BAR:.3g}, float32's smallest, but is {last:.3g}: "
            "samplers in float32, such as those of an export, return NaN"
        )
    return None


def _between(u: np.ndarray, start: float, end: float) -> np.ndarray:
    """s + (e - s) u, which rounding must not carry out of [s, e]."""
    return np.clip(start + (end - start) * u, start, end)


def _log_ratio(gap: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """log(lower / upper), lower <= upper, where gap = (upper - lower) / upper is known without cancellation."""
    return np.where(gap < 0.5, np.log1p(-np.minimum(gap, 0.5)), np.log(lower / upper))


def _expm1_ratio(p: float, z: np.ndarray, z_0: np.ndarray) -> np.ndarray:
    """expm1(p z) / expm1(p z_0) for p > 0, z and z_0 <= 0; its limit z / z_0 where p z_0 is lost to rounding."""
    return z / z_0 if p * z_0 > -1e-17 else np.expm1(p * z) / np.expm1(p * z_0)


def _power_curve(
    u: np.ndarray, p: float, log_ratio: Callable[[np.ndarray, np.ndarray], np.ndarray], rising: bool
) -> np.ndarray:
    """[c(u)^p - c(1)^p] / [c(0)^p - c(1)^p] for a monotone c >= 0 of which log(c(a) / c(b)), c(a) <= c(b), is known."""
    u = np.asarray(u, np.float64)
    zero, one = np.zeros(()), np.ones(())
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):  # log 0 and 0 / 0 at the ends
        if rising:
            return np.where(u < 1, _expm1_ratio(p, log_ratio(u, one), log_ratio(zero, one)), 0.0)
        left = _expm1_ratio(p, log_ratio(one, u), log_ratio(one, zero))
        return np.where(u < 1, np.exp(p * log_ratio(u, zero)) * left, 0.0)
