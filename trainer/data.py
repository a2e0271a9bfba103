"""Data sets: one uint8 array a split, and the batch of step k."""

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from trainer.config import DataConfig


@dataclass(frozen=True)
class Images:
    """pixels (N, H, W, C) uint8; labels (N,) int64, or None where the data set has none."""

    pixels: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: np.ndarray) -> "Images":
        return Images(self.pixels[index], None if self.labels is None else self.labels[index])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), as the model wants it."""
        height, width, channels = self.pixels.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Splits:
    """`train` is what a model sees; `held_out` no model and no classifier sees; `rest` is what a subset left over."""

    train: Images
    held_out: Images
    rest: Images

    def key(self) -> str:
        """Hash of everything in the splits: two runs with one key used the same images."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out, self.rest):
            digest.update(repr(part.pixels.shape).encode())
            digest.update(np.ascontiguousarray(part.pixels).data)
            if part.labels is not None:
                digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()[:16]


@lru_cache(maxsize=1)  # a process that trains one trial after another reads its images once
def load(config: DataConfig) -> Splits:
    """Reads and splits a data set, not to be written into. Raises ValueError or FileNotFoundError, saying what to do."""
    images = _read(config)
    subset, rest = np.arange(len(images)), np.arange(0)
    if config.subset is not None and config.subset < len(images):
        subset, rest = _split(images.labels, len(images), config.subset, config.seed)
    elif config.subset is not None and config.subset > len(images):
        raise ValueError(f"data.subset must be at most the data set's {len(images)} images, but got {config.subset}")
    chosen = images.take(subset)
    train, held_out = _split(chosen.labels, len(chosen), round(config.train_fraction * len(chosen)), config.seed)
    return Splits(chosen.take(train), chosen.take(held_out), images.take(rest))


def _read(config: DataConfig) -> Images:
    kind, _, path = config.name.partition(":")
    if config.name == "digits":
        images = _read_digits()
    elif kind == "parquet" and path:
        images = _read_parquet(Path(path).expanduser(), config)
    else:
        raise ValueError(f"data.name must be digits or parquet:PATH, but got {config.name!r}")
    return images


def _read_digits() -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # the files' values are 0..16
    return Images(pixels, bunch.target.astype(np.int64))


def _read_parquet(path: Path, config: DataConfig) -> Images:
    import pyarrow.parquet as pq

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise FileNotFoundError(
            f"data.name: no Parquet file at {path}; give parquet:PATH of a file or of a folder of files"
        )
    pixels: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in files:
        names = pq.read_schema(file).names
        if config.image_column not in names:
            raise ValueError(f"data.image_column={config.image_column!r} is not in {file}; its columns are {names}")
        table = pq.read_table(file, columns=[c for c in (config.image_column, config.label_column) if c in names])
        for row in table[config.image_column].to_pylist():
            pixels.append(_decode(row["bytes"] if isinstance(row, dict) else row, config.image_size))
        if config.label_column in names:
            labels.append(table[config.label_column].to_numpy().astype(np.int64))
    shapes = {image.shape for image in pixels}
    if len(shapes) > 1:
        raise ValueError(
            f"data.image_size must be given, since {path} holds images of several shapes, such as {sorted(shapes)[:3]}"
        )
    return Images(np.stack(pixels), np.concatenate(labels) if len(labels) == len(files) else None)


def _decode(content: bytes, image_size: int | None) -> np.ndarray:
    """Encoded image → (H, W, C) uint8, one channel or three; resized so that the short side fits, then cropped."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as file:
        image = file.convert("L" if file.mode in ("1", "L", "I", "F", "I;16") else "RGB")
        if image_size is not None and image.size != (image_size, image_size):
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
        pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _split(labels: np.ndarray | None, total: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` images and of the others; each class keeps its share where there are labels."""
    rng = np.random.default_rng([seed, total, count])
    order = rng.permutation(total)
    if labels is not None:
        # Every image's place within its class, as a fraction: taking the lowest fractions takes every class evenly.
        place = np.empty(total)
        for label in np.unique(labels):
            members = order[labels[order] == label]
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        order = np.argsort(place, kind="stable")
    return np.sort(order[:count]), np.sort(order[count:])


def epoch_end(epoch: int, num_images: int, batch_size: int) -> int:
    """Steps done when `epoch` epochs are: every batch is full, so a batch may reach into the next epoch."""
    return epoch * num_images // batch_size


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_images: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_images))


def batch_indices(seed: int, step: int, num_images: int, batch_size: int) -> torch.Tensor:
    """(batch_size,) int64: the images of step `step`, counted from 0, whatever the number of workers."""
    first, parts = step * batch_size, []
    while batch_size > 0:
        epoch, offset = divmod(first, num_images)
        part = _permutation(seed, epoch, num_images)[offset : offset + batch_size]
        parts.append(part)
        first, batch_size = first + len(part), batch_size - len(part)
    return torch.cat(parts)


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) uint8 → (N, C, H, W) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def class_count(images: Images) -> int:
    """Number of classes; 0 where there are no labels."""
    return 0 if images.labels is None else int(images.labels.max()) + 1
