"""Where images come from: a data set's name → the files it lies in, its labels, and its images one after another."""

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data_cache import cache_folder, locked
from trainer.decode import Item

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = {"train", "training", "test", "val", "valid", "validation"}
PARQUET_BATCH = 256  # rows read at once


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
    """`files` tell by their sizes and times whether images have changed; `listing` reads the labels, and may be slow."""

    files: list[Path]
    listing: Callable[[], Listing]
    image_size: int | None = None
    crop_bottom: int = 0


def find(config: DataConfig) -> Source:
    """The source that config.name names. Raises ValueError or FileNotFoundError, saying what to do."""
    kind, _, path = config.name.partition(":")
    if config.name == "digits":
        return Source([], _digits, config.image_size)
    if config.name in PUBLISHED:
        return _published(config, PUBLISHED[config.name])
    if kind == "parquet" and path:
        return _parquet(Path(path).expanduser(), config)
    if kind == "folder" and path:
        return _folder(Path(path).expanduser(), config)
    names = ", ".join(("digits", *PUBLISHED))
    raise ValueError(f"data.name must be one of {names}, parquet:PATH or folder:PATH, but got {config.name!r}")


def _digits() -> Listing:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # the files' values are 0..16
    return _of_arrays(pixels, bunch.target, "digits")


def _of_arrays(pixels: np.ndarray, labels: Any, name: str) -> Listing:
    return Listing(
        len(pixels), np.asarray(labels, dtype=np.int64), lambda index: (pixels[i] for i in index), f"{name} {{}}".format
    )


# The published data sets, read by torchvision


@dataclass(frozen=True)
class Published:
    """`needs`: what must lie in the root; `fetch`: where to get it by hand; `open(root, download)`."""

    needs: tuple[str, ...]
    fetch: str
    open: Callable[[Path, bool], Listing]
    image_size: int | None = None
    crop_bottom: int = 0


def _published(config: DataConfig, published: Published) -> Source:
    root = Path(config.root).expanduser() if config.root else cache_folder() / "data"
    files = [root / name for name in published.needs]

    def absent() -> Path | None:
        return next((file for file in files if not file.exists()), None)

    def open_(download: bool) -> Listing:
        try:
            return published.open(root, download)
        except (RuntimeError, ImportError, OSError, ValueError, EOFError) as error:
            why = f"({type(error).__name__}: {error})"
            if download:
                raise ConnectionError(
                    f"data.download: {config.name} could not be fetched {why}; "
                    f"get it from {published.fetch}, so that {files[0]} is there"
                ) from error
            raise ValueError(
                f"data.name: {config.name} in {root} is cut, or not as published {why}; "
                f"delete {files[0].parent} and set data.download to true, or get it again from {published.fetch}"
            ) from error

    if absent() and config.download:
        with locked(root / ".downloading"):  # processes that start at once would write over each other's files
            if absent():
                open_(download=True)
    if missing := absent():
        raise FileNotFoundError(
            f"data.name: {config.name} is not at data.root={root}: there is no {missing}; set data.download to true, "
            f"or get it from {published.fetch}, or set data.root to the folder that has it"
        )
    image_size = config.image_size or published.image_size

    def listing() -> Listing:
        found = open_(download=False)
        if config.name == "mnist" and image_size == 32:
            # 28 does not halve four times; a border of two black pixels keeps every pixel as it is.
            return replace(found, read=lambda index: (np.pad(item, 2) for item in found.read(index)))
        return found

    return Source(files, listing, image_size, published.crop_bottom)


def _of_files(files: list[Path], labels: list[int] | np.ndarray | None) -> Listing:
    return Listing(
        len(files),
        None if labels is None else np.asarray(labels, dtype=np.int64),
        lambda index: (files[i] for i in index),
        lambda i: str(files[i]),
    )


def _cifar10(root: Path, download: bool) -> Listing:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(root), train=True, download=download)
    return _of_arrays(found.data, found.targets, "cifar10 train image")


def _mnist(root: Path, download: bool) -> Listing:
    from torchvision.datasets import MNIST

    found = MNIST(str(root), train=True, download=download)
    return _of_arrays(found.data.numpy(), found.targets.numpy(), "mnist train image")


def _aircraft(root: Path, download: bool) -> Listing:
    from torchvision.datasets import FGVCAircraft

    found = FGVCAircraft(str(root), split="trainval", download=download, loader=Path)
    files, labels = zip(*(found[i] for i in range(len(found))), strict=True)
    return _of_files(list(files), list(labels))


def _flowers102(root: Path, download: bool) -> Listing:
    from torchvision.datasets import Flowers102

    parts = [Flowers102(str(root), split=split, download=download, loader=Path) for split in ("train", "val")]
    files, labels = zip(*(part[i] for part in parts for i in range(len(part))), strict=True)
    return _of_files(list(files), list(labels))


def _celeba(root: Path, download: bool) -> Listing:
    """Without labels: the 40 attributes are not classes."""
    from torchvision.datasets import CelebA

    parts = [CelebA(str(root), split=split, download=download) for split in ("train", "valid")]
    images = root / "celeba" / "img_align_celeba"
    return _of_files([images / name for part in parts for name in part.filename], None)


# All images but the published test split's: train, and val where there is one.
PUBLISHED = {
    "mnist": Published(
        tuple(f"MNIST/raw/{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1"))
        + tuple(f"MNIST/raw/{part}-ubyte" for part in ("t10k-images-idx3", "t10k-labels-idx1")),
        "https://ossci-datasets.s3.amazonaws.com/mnist/ (four .gz files, unpacked)",
        _mnist,
        image_size=32,
    ),
    "cifar10": Published(
        tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6))
        + ("cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta"),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (unpacked)",
        _cifar10,
    ),
    "fgvc-aircraft": Published(
        tuple(f"fgvc-aircraft-2013b/data/{name}" for name in ("images_variant_trainval.txt", "variants.txt", "images")),
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz (unpacked)",
        _aircraft,
        image_size=64,
        crop_bottom=20,  # a banner with the copyright; the data set's own README says to remove it
    ),
    "flowers102": Published(
        ("flowers-102/imagelabels.mat", "flowers-102/setid.mat", "flowers-102/jpg"),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz unpacked, imagelabels.mat, setid.mat)",
        _flowers102,
        image_size=128,
    ),
    "celeba": Published(
        tuple(f"celeba/{name}.txt" for name in ("list_eval_partition", "list_attr_celeba", "identity_CelebA"))
        + tuple(f"celeba/{name}" for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"))
        + ("celeba/img_align_celeba",),
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (img_align_celeba.zip unpacked, and the five .txt files)",
        _celeba,
        image_size=64,
    ),
}


# A user's own


def _folder(root: Path, config: DataConfig) -> Source:
    if not root.is_dir():
        raise FileNotFoundError(f"data.name: there is no folder {root}; give folder:PATH of the folder with the images")
    files = sorted(_images_below(root))
    if not files:
        raise FileNotFoundError(f"data.name: there is no image in {root} (looked for {' '.join(IMAGE_SUFFIXES)})")
    tops = [file.relative_to(root).parts[0] if file.parent != root else None for file in files]
    classes = sorted({top for top in tops if top is not None})
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLIT_NAMES:
        raise ValueError(
            f"data.name: the sub-folders of {root} are splits ({', '.join(classes)}), not classes; "
            f"give one of them, such as folder:{root / classes[0]}, and data.train_fraction splits it"
        )
    labels = None
    if config.labels and len(classes) > 1 and None not in tops:
        labels = [classes.index(top) for top in tops if top is not None]
    return Source(files, lambda: _of_files(files, labels), config.image_size)


def _images_below(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


def _parquet(path: Path, config: DataConfig) -> Source:
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute pattern)
    if not files:
        raise FileNotFoundError(
            f"data.name: no Parquet file at {path}; give parquet:PATH of a file, of a folder of files, "
            "or a pattern such as parquet:data/train-*.parquet"
        )
    return Source(files, lambda: _read_parquet(files, config), config.image_size)


def _read_parquet(files: list[Path], config: DataConfig) -> Listing:
    """Only the labels: images are read, in batches of rows, where they are asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts, columns, labels = [], [], []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                counts.append(opened.metadata.num_rows)
                schema = opened.schema_arrow
                columns.append(_image_column(file, schema, config.image_column))
                if config.labels and config.label_column in schema.names:
                    labels.append(opened.read([config.label_column])[config.label_column])
        except pa.ArrowInvalid as error:
            raise ValueError(f"data.name: {file} is no Parquet file, or is cut ({error}); make it again") from error
    if labels and len(labels) < len(files):
        raise ValueError(
            f"data.label_column={config.label_column!r} is in {len(labels)} of the {len(files)} Parquet files; "
            "give files that have it, or set data.labels to false"
        )
    ends = np.cumsum(counts)

    def read(index: np.ndarray) -> Iterator[Item]:
        row = 0
        for file, column in zip(files, columns, strict=True):
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
                for group in range(opened.num_row_groups):
                    rows = opened.metadata.row_group(group).num_rows
                    if not _between(index, row, row + rows).size:
                        row += rows
                        continue
                    for batch in opened.iter_batches(PARQUET_BATCH, row_groups=[group], columns=[column]):
                        values = batch.column(0)
                        values = values.field(0) if pa.types.is_struct(values.type) else values
                        for i in _between(index, row, row + len(batch)):
                            yield values[i].as_py()
                        row += len(batch)

    def where(i: int) -> str:
        number = int(np.searchsorted(ends, i, side="right"))
        return f"row {i - (ends[number] - counts[number])} of {files[number]}"

    return Listing(int(ends[-1]), _classes(labels, config) if labels else None, read, where)


def _between(index: np.ndarray, start: int, end: int) -> np.ndarray:
    """The part of ascending indices in start..end-1, counted from start."""
    first, last = np.searchsorted(index, [start, end])
    return index[first:last] - start


def _image_column(file: Path, schema: Any, wanted: str | None) -> str:
    """The column, or the field `bytes` in it, that holds encoded images."""
    import pyarrow as pa

    name = next((name for name in ([wanted] if wanted else ["img", "image"]) if name in schema.names), None)
    if name is None:
        raise ValueError(
            f"data.image_column={wanted or 'img or image'} is not in {file}; its columns are {schema.names}"
        )
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return name
    raise ValueError(
        f"data.image_column={name!r} must hold encoded images (binary, or struct<bytes, path>), but in {file} it is {kind}"
    )


def _classes(columns: list[Any], config: DataConfig) -> np.ndarray:
    """0..K-1 in the order of the column's values, which may be numbers or names."""
    import pyarrow as pa

    name = f"data.label_column={config.label_column!r}"
    for column in columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{name} must hold integers or names, but holds {kind}; or set data.labels to false")
        if column.null_count:
            raise ValueError(f"{name} is empty in {column.null_count} rows; leave them out, or set data.labels to false")
    values = np.concatenate([column.to_numpy() for column in columns])
    if values.dtype.kind == "i" and values.min(initial=0) < 0:
        raise ValueError(f"{name} must be at least 0, but got {values.min()}; or set data.labels to false")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
