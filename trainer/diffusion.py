"""The diffusion process as torch sees it: q(x_t | x_0), the posterior, one ancestral step, the loss. Ho 2020.

N batch · C channels · H,W pixels · T steps. Images are (N, C, H, W) in [-1, 1]; t: (N,) int64 array indices 0..T-1.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

Variance = Literal["fixed_small", "fixed_large"]

MIN_VARIANCE = 1e-20  # diffusers' floor, so that log variance is finite at i = 0, where nothing is left to be drawn
# 1 / sqrt(alpha_bar) stays finite in float32, for inf * 0 is NaN; what it multiplies is clipped to [-1, 1] afterwards
MAX_SCALE = 1e30


class Diffusion:
    """Tables of one noise schedule, and the distributions they define (arXiv:2006.11239).

    betas: (T,) float64 in (0, 1). Everything is derived from log alpha_bar in float64 on the CPU, where a steep
    schedule cannot underflow, and cast once for every device and dtype that asks. Looking t up never waits for the
    device. Raises ValueError where betas are not T >= 1 numbers in (0, 1).
    """

    def __init__(self, betas: np.ndarray) -> None:
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas must be (T,) numbers in (0, 1), but have shape {betas.shape}: {betas}")
        self._tabulate(np.cumsum(np.log1p(-betas)))

    def _tabulate(self, log_alpha_bar: np.ndarray) -> None:
        previous = np.concatenate([[0.0], log_alpha_bar[:-1]])  # alpha_bar before the first step is 1
        self.log_alpha_bar = log_alpha_bar
        self.betas = betas = -np.expm1(log_alpha_bar - previous)
        self.steps = len(betas)
        noise = -np.expm1(self.log_alpha_bar)  # 1 - alpha_bar_t
        noise_previous = -np.expm1(previous)
        variance = noise_previous / noise * betas  # eq. 7
        self._tables = {
            name: torch.from_numpy(table)
            for name, table in {
                "sqrt_alpha_bar": np.exp(0.5 * self.log_alpha_bar),
                "sqrt_noise": np.sqrt(noise),
                "inverse_sqrt_alpha_bar": np.exp(np.minimum(-0.5 * self.log_alpha_bar, np.log(MAX_SCALE))),
                "mean_x_0": np.exp(0.5 * previous) * betas / noise,  # eq. 7
                "mean_x_t": np.exp(0.5 * (log_alpha_bar - previous)) * noise_previous / noise,
                "fixed_small": np.maximum(variance, MIN_VARIANCE),
                "fixed_large": betas,
                "sqrt_alpha_bar_previous": np.exp(0.5 * previous),
                "noise_previous": noise_previous,
            }.items()
        }
        self._cast: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}

    def spaced(self, timesteps: Sequence[int] | np.ndarray) -> "Diffusion":
        """The process that only visits these array indices: its step k is this one's sorted(timesteps)[k].

        Its betas are what lies between two visits, 1 - alpha_bar_t / alpha_bar_s (Nichol & Dhariwal 2021, sec. 4).
        Raises ValueError where timesteps are not distinct indices in 0..T-1.
        """
        kept = np.unique(np.asarray(timesteps, np.int64))
        if not kept.size or len(kept) != len(timesteps) or kept[0] < 0 or kept[-1] >= self.steps:
            raise ValueError(f"timesteps must be distinct indices in 0..{self.steps - 1}, but got {timesteps}")
        spaced = Diffusion.__new__(Diffusion)
        # not by way of betas: many steps in one may leave 1e-17 of the signal, and 1 - 1e-17 is 1
        spaced._tabulate(self.log_alpha_bar[kept])
        return spaced

    def at(self, name: str, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Row t of a table, shaped to multiply x: (N, 1, 1, 1), in x's dtype, in float32 where x is half precision."""
        assert t.shape == (x.shape[0],)
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        if (x.device, dtype) not in self._cast:
            # clone: these must not become inference tensors where sampling asks first and training after it
            with torch.inference_mode(False):
                self._cast[x.device, dtype] = {
                    key: table.to(x.device, dtype, copy=True) for key, table in self._tables.items()
                }
        return self._cast[x.device, dtype][name][t].view(-1, *[1] * (x.dim() - 1))

    def q_sample(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t ~ q(x_t | x_0) from noise ~ N(0, 1) of x_0's shape. Eq. 4."""
        assert noise.shape == x_0.shape
        return self.at("sqrt_alpha_bar", t, x_0) * x_0 + self.at("sqrt_noise", t, x_0) * noise

    def q_posterior(
        self, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q(x_{t-1} | x_t, x_0), eq. 6 and 7: mean (N, C, H, W), variance and log variance (N, 1, 1, 1)."""
        mean = self.at("mean_x_0", t, x_t) * x_0 + self.at("mean_x_t", t, x_t) * x_t
        variance = self.at("fixed_small", t, x_t)
        return mean, variance, variance.log()

    def predict_x_0(self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """The image that eq. 4 sees behind x_t if its noise is eps. Not clipped."""
        return (x_t - self.at("sqrt_noise", t, x_t) * eps) * self.at("inverse_sqrt_alpha_bar", t, x_t)

    def p_sample(
        self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, noise: torch.Tensor | None, variance: Variance
    ) -> torch.Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t) from the model's eps and noise ~ N(0, 1); None at the last step, whose mean it is.

        x_0 is clipped to [-1, 1] before it forms the mean, x_t never. Names and meaning are diffusers' DDPMScheduler's:
        fixed_small is the posterior's variance, whose images spread too little the fewer the steps; fixed_large is
        beta_t, whose images spread too much (and at some ten steps too little as well).
        """
        mean, _, _ = self.q_posterior(self.predict_x_0(x_t, t, eps).clamp(-1, 1), x_t, t)
        return mean if noise is None else mean + self.at(variance, t, x_t).sqrt() * noise

    def ddim_sample(
        self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, noise: torch.Tensor | None, eta: float
    ) -> torch.Tensor:
        """x_{t-1} of DDIM, arXiv:2010.02502 eq. 12 and 16. noise: N(0, 1), needed where eta > 0 but at the last step.

        x_0 is clipped to [-1, 1]; eps is the model's own, not derived anew from the clipped x_0: diffusers' default
        (use_clipped_model_output=False), so that an exported pipeline draws the same images.
        """
        x_0 = self.predict_x_0(x_t, t, eps).clamp(-1, 1)
        variance = eta**2 * self.at("fixed_small", t, x_t)
        # at the last step both terms are 0 in truth, and the floor of fixed_small would make their difference negative
        direction = (self.at("noise_previous", t, x_t) - variance).clamp(min=0).sqrt() * eps
        x_previous = self.at("sqrt_alpha_bar_previous", t, x_t) * x_0 + direction
        return x_previous if noise is None else x_previous + variance.sqrt() * noise


def epsilon_mse(predicted: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise, eq. 14: (N, C, H, W) twice → (N,) float32.

    Under autocast the prediction is bf16: the difference is taken in fp32.
    """
    assert predicted.shape == noise.shape
    return (predicted.float() - noise.float()).square().flatten(1).mean(1)
