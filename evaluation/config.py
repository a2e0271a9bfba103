"""How images are drawn and scored: settings shared by the rungs and the final stage."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, field_validator

from trainer.config import Config, Seed, Switch, Weights, absolute

SamplerName = Literal["ddpm", "ddim", "dpm++"]
Metric = Literal["frechet", "score", "grid_loss"]  # what is measured at a rung, and may decide there


def rung_epochs(fractions: Iterable[float], epochs: int) -> list[int]:
    """The epochs of rungs, from 1, strictly below the last."""
    at = {max(1, round(fraction * epochs)) for fraction in fractions}
    return sorted(epoch for epoch in at if epoch < epochs)


class SamplerConfig(Config):
    """One sampler for all trials of a ranking."""

    name: SamplerName = "ddim"
    steps: int = Field(50, ge=1, description="denoising steps; cut to the schedule's T where that is smaller")
    spacing: Literal["trailing", "leading", "linspace"] = Field(
        "trailing", description="which steps are visited; only trailing starts at pure noise whatever their number"
    )
    eta: float = Field(0.0, ge=0, le=1, description="ddim: 0 draws no noise on the way, 1 as much as ddpm")
    variance: Literal["fixed_small", "fixed_large"] = Field(
        "fixed_small", description="ddpm's noise: beta tilde or beta (Ho 2020, section 3.2)"
    )
    block_size: int = Field(100, ge=1, description="images a block; one generator a block, so part of the seed")
    seed: Seed = 0
    bf16: Switch = Field("auto", description="the model under autocast; auto: on GPUs. Other images, within rounding")

    def on(self, device_type: str) -> "SamplerConfig":
        """`auto` decided: then equal settings are equal images, and a GPU's are not taken for a CPU's."""
        bf16 = device_type == "cuda" if self.bf16 == "auto" else self.bf16
        return self.model_copy(update={"bf16": bf16})


class ConfirmConfig(Config):
    """The best of the final stage trained again from new seeds: then the ranking speaks of configurations."""

    top: int = Field(0, ge=0, description="configurations; 0 confirms none")
    seeds: int = Field(3, ge=3, description="new trainings of each")


class FinalStageConfig(Config):
    """The final stage: the best trials' images, drawn over the cluster and scored."""

    top: int = Field(5, ge=1, description="trials that are scored")
    images: int = Field(10_000, ge=3, description="images a trial")
    split_size: int = Field(5_000, ge=3, description="images a split of the score")
    sampler: SamplerConfig = SamplerConfig()
    extractor: Literal["auto", "classifier", "inception"] = Field(
        "auto",
        description="auto: inception where its weights are given, or lie in torch's cache and there are no labels, "
        "else the classifier, where there are labels",
    )
    inception_weights: str | None = Field(
        None, description="path of torch-fidelity's weights; None: torch's cache, into which inception downloads them"
    )
    weights: Weights = Field("ema", description="raw: as trained, without the moving average")
    keep_images: bool = Field(False, description="keep every image, in Parquet files beside its features")
    confirm: ConfirmConfig = ConfirmConfig()

    @field_validator("inception_weights")
    @classmethod
    def _absolute_weights(cls, path: str | None) -> str | None:
        return absolute(path) if path else path
