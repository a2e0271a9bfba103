"""What images are judged by: the extractor, and what it makes of real images and of pure noise."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.classifier import Classifier, cached_classifier, kept_classifier
from evaluation.config import FinalStageConfig, Metric, SamplerConfig
from evaluation.extractors import Extraction, Extractor
from evaluation.inception import Inception, inception_path
from evaluation.rung import RungScorer
from evaluation.scores import FeatureStatistics
from evaluation.train_classifier import train_classifier
from trainer.data import Splits
from trainer.storage import Storage

EXTRACTOR = "extractor"  # the folder of a run that its classifier is kept in
PROBE_IMAGES = 64  # held-out images of the grid loss
# Of real images, so many at most are compared one by one (scores, KID, precision and recall); means and covariances are
# of all. Drawn, since files often lie in the order of their classes.
REAL_IMAGES = 10_000
NOISE_AT_ONCE = 500  # a batch of the classifier, ten of Inception


@dataclass(frozen=True)
class Reference:
    """One extractor's view of a data set. Its memory does not grow with the data."""

    extractor: Extractor
    train: FeatureStatistics
    train_features: np.ndarray  # (at most REAL_IMAGES, D)
    held_out_statistics: FeatureStatistics
    held_out: Extraction  # of at most REAL_IMAGES, or as many as are drawn of a trial, in random order
    noise: Extraction  # of as many
    key: str  # of the data and the classifier's weights: what a shard's results depend on

    @property
    def accuracy(self) -> float | None:
        return self.extractor.accuracy


def prepare(
    splits: Splits,
    config: FinalStageConfig,
    cache: Path,
    device: str,
    progress: Callable[[str], None],
    run: Storage | None = None,
    inception: Inception | None = None,
) -> Reference | None:
    """The reference for a data set; None where nothing can judge its images (no labels, no Inception weights).

    A classifier is the one that `run` keeps, else that of the cache, else it is trained; and kept in `run` from then.
    device: where it works; the extractor that comes back is on the CPU, for it is sent to processes that have no GPU.
    inception: what `inception_of` says, where another machine has the weights.
    Raises ValueError or OSError where the configuration asks for an extractor that cannot be had.
    """
    key = splits.key()
    extractor = inception or _extractor(splits, config, cache, key, device, progress, run)
    if extractor is None:
        return None
    for what, images in (("to train on", splits.train), ("held out", splits.held_out)):
        if len(images) < 2:
            raise ValueError(
                f"at least 2 images {what} are needed to judge others by, but train.data.train_fraction="
                f"{splits.config.train_fraction} leaves {len(images)} of {len(splits.train) + len(splits.held_out)}; "
                "change it, or give more images"
            )
    progress(f"{extractor.name}: reading the real images")
    train, held_out = splits.train.pixels, splits.held_out.pixels
    shown = splits.held_out.drawn(max(REAL_IMAGES, config.images))
    judge = extractor.to(device)
    train_statistics, judged_train = _judged(judge, train, splits.train.drawn(REAL_IMAGES))
    held_out_statistics, judged_held_out = _judged(judge, held_out, shown)
    return Reference(
        extractor=extractor,
        train=train_statistics,
        train_features=judged_train.features,
        held_out_statistics=held_out_statistics,
        held_out=judged_held_out,
        noise=Extraction.joined(map(judge.extract, _noise(max(len(shown), 2), held_out.shape[1:]))),
        key=f"{key}-{extractor.key}",
    )


def _judged(extractor: Extractor, pixels: np.ndarray, kept: np.ndarray) -> tuple[FeatureStatistics, Extraction]:
    """Statistics of all images; probabilities and features of the rows `kept`, in their order. One pass."""
    parts, wanted = [], np.zeros(len(pixels), bool)
    wanted[kept] = True

    def features() -> Iterator[np.ndarray]:
        for first in range(0, len(pixels), REAL_IMAGES):
            block = slice(first, first + REAL_IMAGES)
            judged = extractor.extract(pixels[block])
            parts.append(Extraction(judged.probabilities[wanted[block]], judged.features[wanted[block]]))
            yield judged.features

    statistics = FeatureStatistics.of_blocks(features())
    ascending, place = Extraction.joined(parts), np.argsort(np.argsort(kept))
    return statistics, Extraction(ascending.probabilities[place], ascending.features[place])


def _noise(count: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """`count` images of Gaussian noise in blocks (n, H, W, C) uint8: as float64 they are eight times as large."""
    rng = np.random.default_rng(0)
    for first in range(0, count, NOISE_AT_ONCE):
        drawn = rng.standard_normal((min(NOISE_AT_ONCE, count - first), *shape))
        yield np.clip(np.round((drawn + 1) * 127.5), 0, 255).astype(np.uint8)


def inception_of(splits: Splits, config: FinalStageConfig) -> Inception | None:
    """Inception with its weights, where it is what judges these images. Raises as `prepare` does."""
    weights = Path(config.inception_weights).expanduser() if config.inception_weights else None
    wanted = weights is not None or (splits.train.labels is None and inception_path().is_file())
    return Inception(weights) if config.extractor == "inception" or (config.extractor == "auto" and wanted) else None


def _extractor(
    splits: Splits,
    config: FinalStageConfig,
    cache: Path,
    key: str,
    device: str,
    progress: Callable[[str], None],
    run: Storage | None,
) -> Extractor | None:
    if (inception := inception_of(splits, config)) is not None:
        return inception
    if splits.train.labels is None:
        if config.extractor != "auto":
            raise ValueError(f"final.extractor is {config.extractor}, which needs labels, but the data set has none")
        return None

    mirrored = splits.config.horizontal_flip  # then half of what a model draws is

    def train() -> Classifier:
        progress("training the classifier that judges images (once for a data set)")
        images, rest, held_out = splits.train, splits.rest, splits.held_out
        assert images.labels is not None
        assert rest.labels is not None
        assert held_out.labels is not None
        labels = np.concatenate([images.labels, rest.labels])
        classes = np.unique(labels)  # a class may have had broken images alone, which were left out
        known = np.isin(held_out.labels, classes)
        if not known.any():
            raise ValueError(
                "no held-out image is of a class that has others to train on, so that nothing can learn to judge them; "
                "give more images of each class, or set train.data.labels to false"
            )
        return train_classifier(
            [images.pixels, rest.pixels],
            np.searchsorted(classes, labels),
            held_out.pixels if known.all() else held_out.pixels[known],  # the former may be mapped from disk
            np.searchsorted(classes, held_out.labels[known]),
            seed=0,
            device=device,
            horizontal_flip=mirrored,
        )

    name = f"{key}-mirrored" if mirrored else key

    def of_this_machine() -> Classifier:
        return cached_classifier(cache, name, train)

    return of_this_machine() if run is None else kept_classifier(run.at(EXTRACTOR, name), of_this_machine)


def rung_scorer(
    splits: Splits, reference: Reference | None, images: int, sampler: SamplerConfig, metric: Metric
) -> RungScorer:
    """The scorer that goes into every trial."""
    return RungScorer(
        extractor=reference.extractor if reference else None,
        reference=reference.train if reference else None,
        probe=splits.held_out.pixels[splits.held_out.drawn(PROBE_IMAGES)],
        images=images,
        sampler=sampler,
        metric=metric,
        key=splits.key(),
    )
