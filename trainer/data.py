"""Data sets: decoded once, split, and mapped from disk; the batch of step k."""

import hashlib
import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import data_cache, datasets, parquet, published
from trainer.config import DataConfig
from trainer.ingest import Progress, decode_all

if TYPE_CHECKING:
    import torch  # batches alone need it, and what only looks at images need not wait for it

# What data.name may be with a path behind it.
AT_A_PATH: dict[str, Callable[[Path, DataConfig], datasets.Source]] = {
    "parquet": parquet.find,
    "folder": datasets.folder,
}
ON_NODE = " (on node "  # behind what is wrong there: the same on two nodes is alike but for this
CACHE_VERSION = 4  # raised whenever the same files and settings come to give other pixels or splits, or are refused


@dataclass(frozen=True)
class Images:
    """pixels (N, H, W, C) uint8, read-only; labels (N,) int64, or None where the data set has none."""

    pixels: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), as the model wants it."""
        height, width, channels = self.pixels.shape[1:]
        return channels, height, width

    def drawn(self, count: int) -> np.ndarray:
        """Indices of `count` images (of all, where there are fewer) in an order drawn once and for all.

        For whoever looks at some of them: files often lie in the order of their classes, and so do images.
        """
        return np.random.default_rng(0).permutation(len(self))[:count]


@dataclass(frozen=True)
class Splits:
    """`train` is what a model sees; `held_out` no model and no classifier sees; `rest` is what a subset left over."""

    train: Images
    held_out: Images
    config: DataConfig
    meta: dict[str, Any]
    entry: str  # of the cache

    def key(self) -> str:
        """Hash of the images: two runs with one key used the same, wherever their files lie.

        Of the pixels and labels of train and held_out; of rest, which may never be decoded, by the files' names and
        sizes.
        """
        return self.meta["key"]

    @cached_property
    def rest(self) -> Images:
        """Decoded when it is first asked for. Raises as `load` does."""
        return _rest(self)


def prepare(config: DataConfig, progress: Progress | None = None) -> None:
    """Decodes train and held_out into the cache where they are not there; progress(done, total) counts images.

    Raises ValueError or OSError, saying what to do.
    """
    _splits(config, progress)


@lru_cache(maxsize=1)  # a process that trains one trial after another opens its images once
def load(config: DataConfig) -> Splits:
    """A data set's splits, not to be written into: mapped from disk, so that N processes of a node hold them once.

    The images are those outside the published test split, where there is one; `subset` of them, drawn by seed, is
    divided by train_fraction; each class keeps its share within one image. Raises ValueError or OSError, saying what
    to do.
    """
    return _splits(config, None)


def load_same(config: DataConfig, key: str | None) -> Splits:
    """`load` where a search has images of this key: nodes may have copies of their own.

    Raises ValueError where this node has another or none, its name last (ON_NODE), and OSError as `load`.
    """
    try:
        splits = load(config)
    except FileNotFoundError as error:
        raise ValueError(f"{error}{ON_NODE}{platform.node()})") from error
    if key is not None and splits.key() != key:
        raise ValueError(
            f"data.name: {config.name} has other images than where the search began; give all nodes the same"
            f"{ON_NODE}{platform.node()})"
        )
    return splits


def _splits(config: DataConfig, progress: Progress | None) -> Splits:
    source = _find(config)

    def make(folder: Path) -> dict[str, Any]:
        listing = datasets.listing(source, config)
        train, held_out, _ = _choose(config, listing)
        meta = decode_all(folder, source, listing, {"train": train, "held_out": held_out}, config, progress)
        files = [(file.name, 0 if file.is_dir() else _size_and_time(file)[0]) for file in source.files]
        return meta | {"key": _hash(meta["content"], files, listing.count)[:16]}

    name = _entry_name(config, source)
    meta, arrays = data_cache.entry(name, make)
    # The mapped file is read-only and torch would have it writable; the warning says nothing that a user can act on.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return Splits(_images(arrays, "train"), _images(arrays, "held_out"), config, meta, name)


def _find(config: DataConfig) -> datasets.Source:
    """The source that config.name names. Raises ValueError or OSError, saying what to do."""
    kind, _, path = config.name.partition(":")
    if config.name == "digits":
        return datasets.Source([], datasets.digits, config.image_size)
    if config.name in published.PUBLISHED:
        return published.find(config)
    if kind in AT_A_PATH and path:
        return AT_A_PATH[kind](Path(path).expanduser(), config)
    names = ", ".join(("digits", *published.PUBLISHED))
    places = " or ".join(f"{kind}:PATH" for kind in AT_A_PATH)
    raise ValueError(f"data.name must be one of {names}, {places}, but got {config.name!r}")


def _rest(splits: Splits) -> Images:
    config, train = splits.config, splits.train
    if not splits.meta["rest"]:
        return Images(train.pixels[:0], None if train.labels is None else train.labels[:0])
    source = _find(config)
    if _entry_name(config, source) != splits.entry:
        # What is left over by the files of now may be held out by those of then.
        raise ValueError(f"data.name: the files of {config.name} changed while they were in use; start again")

    def make(folder: Path) -> dict[str, Any]:
        listing = datasets.listing(source, config)
        _, _, rest = _choose(config, listing)
        return decode_all(folder, source, listing, {"rest": rest}, config, like=train.pixels.shape[1:])

    _, arrays = data_cache.entry(f"rest-{splits.entry}", make)
    return _images(arrays, "rest")


def _images(arrays: dict[str, np.ndarray], split: str) -> Images:
    return Images(arrays[split], arrays.get(f"{split}-labels"))


def _entry_name(config: DataConfig, source: datasets.Source) -> str:
    """By the settings that pixels and splits depend on, and the files' places, sizes and times."""
    settings = config.model_dump(exclude={"root", "download", "horizontal_flip"})
    files = [(str(file.absolute()), *_size_and_time(file)) for file in source.files]
    return _hash(CACHE_VERSION, settings, files)[:32]


def _size_and_time(file: Path) -> tuple[int, int]:
    """In bytes and nanoseconds; of a link to nothing 0 and 0: who reads it says so, and may leave it out."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _choose(config: DataConfig, listing: datasets.Listing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending indices of train, held_out and rest."""
    count, labels = listing.count, listing.labels
    subset, rest = np.arange(count), np.arange(0)
    if config.subset is not None and config.subset > count:
        raise ValueError(f"data.subset must be at most the data set's {count} images, but got {config.subset}")
    if config.subset is not None and config.subset < count:
        subset, rest = split(labels, count, config.subset, config.seed)
    training = round(config.train_fraction * len(subset))
    if not 0 < training < len(subset):
        raise ValueError(
            f"data.train_fraction must leave at least one image to train on and one held out, but of {len(subset)} "
            f"images {config.train_fraction} gives {training} to train on"
        )
    train, held_out = split(None if labels is None else labels[subset], len(subset), training, config.seed)
    return subset[train], subset[held_out], rest


def split(labels: np.ndarray | None, total: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of `count` of `total` images and of the others, drawn by seed.

    Where there are labels, each class keeps its share within one image (largest remainders, ties drawn), except that
    large classes give up what it takes for every class to have one of the `count`, where that is enough for all.
    """
    rng = np.random.default_rng([seed, total, count])
    order = rng.permutation(total)
    if labels is None:
        return np.sort(order[:count]), np.sort(order[count:])
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count  # in units of 1/total: integers, so that no rounding decides
    quotas = share // total
    remainders = share % total
    first = np.lexsort((rng.random(len(classes)), -remainders))
    quotas[first[: count - quotas.sum()]] += 1
    if count >= len(classes):  # nothing can learn to tell a class that is among the others alone
        for empty in np.flatnonzero(quotas == 0):
            above_share = np.where(quotas > 1, quotas * total - share, -total * total)
            quotas[above_share.argmax()] -= 1
            quotas[empty] = 1
    ordered = labels[order]
    chosen = np.concatenate([order[ordered == label][:quota] for label, quota in zip(classes, quotas, strict=True)])
    others = np.ones(total, dtype=bool)
    others[chosen] = False
    return np.sort(chosen), np.flatnonzero(others)


def epoch_end(epoch: int, num_images: int, batch_size: int) -> int:
    """Steps done when `epoch` epochs are: every batch is full, so a batch may reach into the next epoch."""
    return epoch * num_images // batch_size


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_images: int) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_images))


def batch_indices(seed: int, step: int, num_images: int, batch_size: int) -> "torch.Tensor":
    """(batch_size,) int64: the images of step `step`, counted from 0, whatever the number of workers."""
    import torch

    first, parts = step * batch_size, []
    while batch_size > 0:
        epoch, offset = divmod(first, num_images)
        part = _permutation(seed, epoch, num_images)[offset : offset + batch_size]
        parts.append(part)
        first, batch_size = first + len(part), batch_size - len(part)
    return torch.cat(parts)


def to_model_range(pixels: "torch.Tensor") -> "torch.Tensor":
    """(N, H, W, C) uint8 → (N, C, H, W) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
