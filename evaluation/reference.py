"""What images are judged by: the extractor, and what it makes of real images and of pure noise."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.config import FinalStageConfig, SamplerConfig
from evaluation.extractors import (
    Classifier,
    Extraction,
    Inception,
    cached_classifier,
    inception_path,
    train_classifier,
)
from evaluation.rung import Metric, RungScorer
from evaluation.scores import FeatureStatistics
from trainer.data import Splits

PROBE_IMAGES = 64  # held-out images of the grid loss
REAL_IMAGES = 10_000  # training images, at most, that KID, precision and recall compare with pair by pair


@dataclass(frozen=True)
class Reference:
    """One extractor's view of a data set. Real images are the held-out ones, as many as there are."""

    extractor: Classifier | Inception
    train: FeatureStatistics
    train_features: np.ndarray  # (at most REAL_IMAGES, D)
    held_out: Extraction
    noise: Extraction
    key: str  # of the data and the classifier's weights: what a shard's results depend on

    @property
    def accuracy(self) -> float | None:
        """The classifier's share of right answers on held-out images."""
        return self.extractor.accuracy if isinstance(self.extractor, Classifier) else None


def prepare(
    splits: Splits, config: FinalStageConfig, cache: Path, device: str, progress: Callable[[str], None]
) -> Reference | None:
    """The reference for a data set; None where nothing can judge its images (no labels, no Inception weights).

    Raises ValueError or OSError where the configuration asks for an extractor that cannot be had.
    """
    key = splits.key()
    extractor = _extractor(splits, config, cache, key, device, progress)
    if extractor is None:
        return None
    held_out = splits.held_out.pixels
    noise = np.random.default_rng(0).standard_normal((max(len(held_out), 2), *held_out.shape[1:]))
    noise = np.clip(np.round((noise + 1) * 127.5), 0, 255).astype(np.uint8)
    progress(f"{extractor.name}: reading the real images")
    train_features = extractor.extract(splits.train.pixels).features
    return Reference(
        extractor=extractor,
        train=FeatureStatistics.of(train_features),
        train_features=train_features[:REAL_IMAGES].copy(),
        held_out=extractor.extract(held_out),
        noise=extractor.extract(noise),
        key=f"{key}-{_weights_hash(extractor)}",
    )


def _weights_hash(extractor: Classifier | Inception) -> str:
    """Of a classifier, which another machine trains differently; Inception's file is hash-checked already."""
    if isinstance(extractor, Inception):
        return extractor.name
    digest = hashlib.sha256()
    for name, value in sorted(extractor.net.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _extractor(
    splits: Splits, config: FinalStageConfig, cache: Path, key: str, device: str, progress: Callable[[str], None]
) -> Classifier | Inception | None:
    labelled = splits.train.labels is not None
    weights = Path(config.inception_weights).expanduser() if config.inception_weights else None
    at_hand = weights is not None or inception_path().is_file()
    if config.extractor == "inception" or (config.extractor == "auto" and not labelled and at_hand):
        return Inception(weights, device=device)
    if not labelled:
        if config.extractor == "classifier":
            raise ValueError("final.extractor is classifier, which needs labels, but the data set has none")
        return None

    mirrored = splits.config.horizontal_flip  # then half of what a model draws is

    def train() -> Classifier:
        progress("training the classifier that judges images (once for a data set)")
        images, rest, held_out = splits.train, splits.rest, splits.held_out
        assert images.labels is not None
        assert rest.labels is not None
        assert held_out.labels is not None
        return train_classifier(
            np.concatenate([images.pixels, rest.pixels]),
            np.concatenate([images.labels, rest.labels]),
            held_out.pixels,
            held_out.labels,
            seed=0,
            device=device,
            horizontal_flip=mirrored,
        )

    return cached_classifier(cache, f"{key}-mirrored" if mirrored else key, train)


def rung_scorer(
    splits: Splits, reference: Reference | None, images: int, sampler: SamplerConfig, metric: Metric
) -> RungScorer:
    """The scorer that goes into every trial."""
    return RungScorer(
        extractor=reference.extractor if reference else None,
        reference=reference.train if reference else None,
        probe=splits.held_out.pixels[:PROBE_IMAGES],
        images=images,
        sampler=sampler,
        metric=metric,
    )
