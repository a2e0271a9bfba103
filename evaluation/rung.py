"""The scores of a rung: what early stopping looks at. The training loop calls it, and knows nothing of how it works."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from evaluation.config import Metric, SamplerConfig
from evaluation.extractors import Extractor
from evaluation.pictures import image_grid
from evaluation.sampling import Sampler
from evaluation.scores import FeatureStatistics, frechet_distance, inception_score
from trainer import data, failures, schedules
from trainer.config import ScheduleConfig, TrainConfig

LOG_SNR_GRID = np.linspace(-8, 8, 17)
LOG_SNR_WIDTH = 2.5  # standard deviation of the weight around log-SNR 0, in nats


def objective(metrics: Mapping[str, Any], metric: str) -> float:
    """The value that early stopping, the searcher and the choice of an EMA make small; inf where there is none."""
    value = metrics.get(metric)
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if metric == "score" else float(value)


@dataclass(frozen=True)
class RungScorer:
    """Scores an EMA model: the same noise, sampler and number of images for every trial.

    extractor and reference (of the training images) are None where nothing can judge images: then the grid loss alone
    is measured. probe: (M, H, W, C) uint8 held-out images for the grid loss. key: of the splits that all is made of.
    """

    extractor: Extractor | None
    reference: FeatureStatistics | None
    probe: np.ndarray
    images: int
    sampler: SamplerConfig
    metric: Metric = "frechet"
    key: str | None = None

    def __call__(self, denoiser: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, Any]:
        """frechet, score, grid_loss; `samples`, (H, W, C) uint8, a picture of the first; `objective`, to be small.

        Raises TooLittleMemoryError, which says what to set.
        """
        with failures.too_little_memory_is(lambda: self._out_of_memory(device)):
            metrics: dict[str, Any] = {"grid_loss": grid_loss(denoiser, config.schedule, self.probe, device)}
            metrics |= self._judge(denoiser, config, device)
        return metrics | {"objective": objective(metrics, self.metric)}

    def _out_of_memory(self, device: torch.device) -> str:
        block, probe = self.sampler.block_size, len(self.probe)
        remedy = (
            f"set early_stopping.sampler.block_size to {block // 2} (for all trials: other blocks are other images)"
            if block > probe  # the grid loss takes so many at once
            else "give a smaller train.model or a smaller train.data.image_size"
        )
        return (
            f"{failures.memory_of(device)} is too small to score a rung: {max(block, probe):,} images at once "
            f"(early_stopping.sampler.block_size={block}); {remedy}"
        )

    def _judge(self, denoiser: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        count = self.images if self.extractor else min(self.images, 64)
        betas = config.schedule.betas()
        shape = (self.probe.shape[3], *self.probe.shape[1:3])
        try:
            drawn = Sampler(denoiser, betas, shape, self.sampler, device).images(0, count)
        except FloatingPointError:
            return {"frechet": None, "score": None}
        metrics["samples"] = image_grid(drawn[:64], columns=8)
        if self.extractor is not None and self.reference is not None:
            judged = self.extractor.to(device).extract(drawn)
            metrics["frechet"] = frechet_distance(judged.features, self.reference)
            metrics["score"] = inception_score(judged.probabilities, split_size=count).mean
        return metrics


@torch.no_grad()
def grid_loss(denoiser: nn.Module, schedule: ScheduleConfig, probe: np.ndarray, device: torch.device) -> float:
    """Epsilon-MSE at log-SNRs that are the same for every schedule, weighted towards the middle.

    17 points lambda from -8 to 8, weight exp(-(lambda / 2.5)^2 / 2), fixed images and noise. The model is asked at the
    time, between its own steps, at which its schedule has that log-SNR (at its first or last step where it has none).
    """
    log_snr = schedules.log_snr(schedules.alpha_bar(schedule.betas()))
    times = np.interp(-LOG_SNR_GRID, -log_snr, np.arange(len(log_snr)))  # log-SNR falls with time
    weights = np.exp(-((LOG_SNR_GRID / LOG_SNR_WIDTH) ** 2) / 2)
    x_0 = data.to_model_range(torch.from_numpy(probe)).to(device)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for point, time in zip(LOG_SNR_GRID, times, strict=True):
        signal = 1 / (1 + np.exp(-point))  # alpha_bar at this log-SNR
        x_t = float(np.sqrt(signal)) * x_0 + float(np.sqrt(1 - signal)) * noise
        t = torch.full((len(x_0),), float(time), device=device)
        losses.append((denoiser(x_t, t).sample.float() - noise).square().mean())
    return float(np.average(torch.stack(losses).double().cpu().numpy(), weights=weights))
