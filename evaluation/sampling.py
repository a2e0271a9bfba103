"""Model + image indices → uint8 images: ancestral DDPM, DDIM and DPM-Solver++, the same images whatever the shard.

Images come in blocks of `sampler.block_size` indices. Block b has one torch.Generator seeded from (seed, b), which
draws in the order of diffusers' pipelines: x_T, then the noise of every step that needs some. A block is computed whole
and cut afterwards, so image i is the same to the bit whichever images are asked for with it (on one type of device).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from evaluation.config import SamplerConfig
from trainer import speed
from trainer.diffusion import Diffusion

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t (N, C, H, W), t (N,)) → eps (N, C, H, W)
Model = Callable[..., Any]  # a Denoiser, or diffusers' UNet2DModel, which returns eps as `.sample`


def timesteps(T: int, steps: int, spacing: str = "trailing") -> np.ndarray:
    """The array indices a sampler visits, falling: (min(steps, T),) int64.

    Spacings of Lin et al. 2023 (arXiv:2305.08891, table 2), as in diffusers' DDPM and DDIM schedulers. "trailing"
    always visits T - 1: x_T is pure noise, and a sampler that starts earlier ("leading", or "linspace" of one step)
    takes it for an image that still shows through. The last step goes from the last index visited to the image.
    """
    if T < 1 or steps < 1:
        raise ValueError(f"sampler.steps and the schedule's T must be >= 1, but got {steps=}, {T=}")
    steps = min(steps, T)
    if spacing == "leading":
        return np.arange(steps, dtype=np.int64)[::-1] * (T // steps)
    if spacing == "linspace":
        return np.linspace(0, T - 1, steps).round().astype(np.int64)[::-1]
    return np.round(T - np.arange(steps) * (T / steps)).astype(np.int64) - 1


class Sampler:
    """Draws a model's images.

    betas: (T,) float64 of the schedule that the model was trained on. shape: (C, H, W). On CUDA the model is captured
    as a CUDA graph with the first block; its weights may change afterwards, but not move.
    """

    def __init__(
        self,
        model: Model,
        betas: np.ndarray,
        shape: tuple[int, int, int],
        config: SamplerConfig,
        device: torch.device | str,
    ):
        self.model, self.device = model, torch.device(device)
        self.config = config.on(self.device.type)
        self.timesteps = timesteps(len(betas), config.steps, config.spacing)
        self.block_shape = (config.block_size, *shape)
        self._diffusion = Diffusion(betas).spaced(self.timesteps)
        self._fast: Denoiser | None = None

    def images(self, first: int, count: int, progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """Images first .. first + count - 1, (count, H, W, C) uint8.

        progress is called after every block with the number of images done so far. A shard that is not whole blocks
        costs the blocks it touches. Raises ValueError for negative numbers, FloatingPointError as `block`.
        """
        if first < 0 or count < 0:
            raise ValueError(f"first >= 0 and count >= 0 must hold, but got {first=}, {count=}")
        size, channels, height, width = self.block_shape
        images = np.empty((count, height, width, channels), np.uint8)
        done = 0
        while done < count:
            index, skip = divmod(first + done, size)
            part = self.block(index)[skip : skip + count - done]
            images[done : done + len(part)] = part
            done += len(part)
            progress(done)
        return images

    def block(self, index: int) -> np.ndarray:
        """One block of images, (block_size, H, W, C) uint8.

        Raises FloatingPointError where the model's output led to NaN or infinity: such images have no score.
        """
        x = self.denoised(index)
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"sampling gave NaN or infinite pixels in block {index}: the model has diverged")
        # diffusers' formula, then round: truncation would darken every image by half a level
        pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def denoised(self, index: int) -> torch.Tensor:
        """One block as the sampler leaves it: (block_size, C, H, W) float32 on the device, not clamped or rounded."""
        config, diffusion, size = self.config, self._diffusion, self.block_shape
        generator = torch.Generator(self.device).manual_seed(block_seed(config.seed, index))
        with _evaluating(self.model), torch.inference_mode():
            x = torch.randn(size, generator=generator, device=self.device)
            x_0_before = None
            for k, t in zip(range(len(self.timesteps) - 1, -1, -1), self.timesteps.tolist(), strict=True):
                eps = self._predict_eps(x, torch.full(size[:1], t, device=self.device))
                step = torch.full(size[:1], k, device=self.device)
                if config.name == "dpm++":
                    x_0 = diffusion.predict_x_0(x, step, eps).clamp(-1, 1)
                    x = dpm_step(diffusion.log_alpha_bar, k, x, x_0, x_0_before)
                    x_0_before = x_0
                    continue
                draws = k > 0 and (config.name == "ddpm" or config.eta > 0)  # the last step's outcome is the image
                noise = torch.randn(size, generator=generator, device=self.device) if draws else None
                if config.name == "ddpm":
                    x = diffusion.p_sample(x, step, eps, noise, config.variance)
                else:
                    x = diffusion.ddim_sample(x, step, eps, noise, config.eta)
        return x

    def _predict_eps(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return self._eager(x_t, t)
        if self._fast is None:
            self._fast = speed.replayed(self._eager, x_t, t)
        return self._fast(x_t, t)

    def _eager(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.config.bf16), cache_enabled=False):
            output = self.model(x_t, t)
        eps = output if isinstance(output, torch.Tensor) else output.sample
        return eps.float()  # what the sampler itself does stays in fp32


def dpm_step(
    log_alpha_bar: np.ndarray, k: int, x: torch.Tensor, x_0: torch.Tensor, x_0_before: torch.Tensor | None
) -> torch.Tensor:
    """From step k of a process to k - 1 (to the image from 0): DPM-Solver++(2M), arXiv:2211.01095 algorithm 2.

    log_alpha_bar: (S,) float64 of the steps that are visited. x_0: what the model sees behind x, clipped to [-1, 1] (on
    a cosine schedule the solver explodes without); x_0_before: what it saw at step k + 1, None at the first step.
    Coefficients come from logarithms in float64, so they are finite wherever the schedule is.
    """
    if k == 0:
        return x_0

    def log_sigma(i: int) -> float:
        return 0.5 * float(np.log(-np.expm1(log_alpha_bar[i])))

    def half_log_snr(i: int) -> float:
        return 0.5 * float(log_alpha_bar[i]) - log_sigma(i)

    h = half_log_snr(k - 1) - half_log_snr(k)
    if x_0_before is not None:
        ratio = h / (half_log_snr(k) - half_log_snr(k + 1))
        x_0 = x_0 + 0.5 * ratio * (x_0 - x_0_before)
    alpha = float(np.exp(0.5 * log_alpha_bar[k - 1]))
    return float(np.exp(log_sigma(k - 1) - log_sigma(k))) * x - alpha * float(np.expm1(-h)) * x_0


def block_seed(seed: int, block: int) -> int:
    """64 bits that any change of seed or block changes; neighbours share no structure (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0])


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """eval() for the while, then every submodule's own training flag again: a frozen part of a model stays frozen.

    On CUDA the fastest convolution is chosen by timing where benchmark is on, which can change the last bits between
    two processes: it is off meanwhile.
    """
    training = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = False
        for module in training:
            module.training = False
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for module, flag in training.items():
            module.training = flag
