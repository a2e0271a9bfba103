"""Where images come from: their places, their labels, and one image after another. Digits, and a folder of files.

Parquet files are in parquet.py, the published data sets in published.py.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.decode import Item

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = {"train", "training", "test", "val", "valid", "validation"}


@dataclass(frozen=True)
class Listing:
    """What a data set holds, before any image is decoded.

    labels: (count,) int64, or None. read(index): the images at ascending indices, one by one. where(i): image i's
    place, as an error names it.
    """

    count: int
    labels: np.ndarray | None
    read: Callable[[np.ndarray], Iterator[Item]]
    where: Callable[[int], str]


@dataclass(frozen=True)
class Source:
    """`files` tell by size and time whether images have changed; `listing` reads the labels, and may be slow."""

    files: list[Path]
    listing: Callable[[], Listing]
    image_size: int | None = None
    crop_bottom: int = 0


def listing(source: Source, config: DataConfig) -> Listing:
    """The source's listing, without its labels where they are not wanted or all say the same."""
    found = source.listing()
    wanted = config.labels and found.labels is not None and (found.labels != found.labels[:1]).any()
    return found if wanted else replace(found, labels=None)


def of_items(items: Any, labels: Any, where: Callable[[int], str]) -> Listing:
    labels = None if labels is None else np.asarray(labels, dtype=np.int64)
    return Listing(len(items), labels, lambda index: (items[i] for i in index), where)


def of_arrays(pixels: np.ndarray, labels: Any, name: str) -> Listing:
    return of_items(pixels, labels, f"{name} {{}}".format)


def of_files(files: list[Path], labels: Any) -> Listing:
    return of_items(files, labels, lambda i: str(files[i]))


def digits() -> Listing:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # the files' values are 0..16
    return of_arrays(pixels, bunch.target, "digits")


def folder(root: Path, config: DataConfig) -> Source:
    if not root.is_dir():
        raise FileNotFoundError(f"data.name: there is no folder {root}; give folder:PATH of the folder with the images")
    files = sorted(files_below(root, IMAGE_SUFFIXES))
    if not files:
        raise FileNotFoundError(f"data.name: there is no image in {root} (looked for {' '.join(IMAGE_SUFFIXES)})")
    tops = [file.relative_to(root).parts[0] if file.parent != root else None for file in files]
    classes = sorted({top for top in tops if top is not None})
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLIT_NAMES:
        raise ValueError(
            f"data.name: the sub-folders of {root} are splits ({', '.join(classes)}), not classes; "
            f"give one of them, such as folder:{root / classes[0]}, and data.train_fraction splits it"
        )
    number = {name: i for i, name in enumerate(classes)}
    labels = None if None in tops else [number[top] for top in tops if top is not None]
    return Source(files, lambda: of_files(files, labels), config.image_size)


def files_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """But hidden ones. A folder that links lead to, round in a circle or not, is read once: itself, if below root."""

    def refuse(error: OSError) -> None:
        raise OSError(
            f"data.name: {error.filename} cannot be listed ({error.strerror}); make it readable, or take it away"
        ) from error

    tops, read = [str(root)], set()
    for top in tops:  # links to folders are added at the end, after all that is no link
        for parent, folders, names in os.walk(top, onerror=refuse):
            real = os.path.realpath(parent)
            if real in read:
                folders.clear()
                continue
            read.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += [link for name in folders if os.path.islink(link := os.path.join(parent, name))]  # noqa: PTH114, PTH118
            for name in names:
                if name.lower().endswith(suffixes) and not name.startswith("."):
                    yield Path(parent, name)
