"""The published data sets, read by torchvision: the images outside the published test split."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.config import DataConfig
from trainer.data_cache import cache_folder, locked
from trainer.datasets import Listing, Source, of_arrays, of_files


@dataclass(frozen=True)
class Published:
    """`needs`: what must lie in the root; `fetch`: where to get it by hand; `open(root, download)`.

    `licence`: what those who publish it say of its use.
    """

    needs: tuple[str, ...]
    fetch: str
    open: Callable[[Path, bool], Listing]
    licence: str
    image_size: int | None = None
    crop_bottom: int = 0


def find(config: DataConfig) -> Source:
    """The published data set that config.name names. Raises ValueError or OSError, saying what to do."""
    published = PUBLISHED[config.name]
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
            return replace(found, read=lambda index: (np.pad(np.asarray(item), 2) for item in found.read(index)))
        return found

    return Source(files, listing, image_size, published.crop_bottom)


def _cifar10(root: Path, download: bool) -> Listing:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(root), train=True, download=download)
    return of_arrays(found.data, found.targets, "cifar10 train image")


def _mnist(root: Path, download: bool) -> Listing:
    from torchvision.datasets import MNIST

    found = MNIST(str(root), train=True, download=download)
    return of_arrays(found.data.numpy(), found.targets.numpy(), "mnist train image")


def _aircraft(root: Path, download: bool) -> Listing:
    from torchvision.datasets import FGVCAircraft

    found = FGVCAircraft(str(root), split="trainval", download=download, loader=Path)
    files, labels = zip(*(found[i] for i in range(len(found))), strict=True)
    return of_files(list(files), list(labels))


def _flowers102(root: Path, download: bool) -> Listing:
    from torchvision.datasets import Flowers102

    parts = [Flowers102(str(root), split=split, download=download, loader=Path) for split in ("train", "val")]
    files, labels = zip(*(part[i] for part in parts for i in range(len(part))), strict=True)
    return of_files(list(files), list(labels))


def _celeba(root: Path, download: bool) -> Listing:
    """Without labels: the 40 attributes are not classes."""
    from torchvision.datasets import CelebA

    parts = [CelebA(str(root), split=split, download=download) for split in ("train", "valid")]
    images = root / "celeba" / "img_align_celeba"
    return of_files([images / name for part in parts for name in part.filename], None)


# All images but the published test split's: train, and val where there is one.
PUBLISHED = {
    "mnist": Published(
        tuple(
            f"MNIST/raw/{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")
        ),
        "https://ossci-datasets.s3.amazonaws.com/mnist/ (four .gz files, unpacked)",
        _mnist,
        "CC BY-SA 3.0, as commonly stated",
        image_size=32,
    ),
    "cifar10": Published(
        tuple(
            f"cifar-10-batches-py/{name}"
            for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
        ),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (unpacked)",
        _cifar10,
        "none stated by its authors",
    ),
    "fgvc-aircraft": Published(
        tuple(f"fgvc-aircraft-2013b/data/{name}" for name in ("images_variant_trainval.txt", "variants.txt", "images")),
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz (unpacked)",
        _aircraft,
        "non-commercial research only; the photographers keep their copyright",
        image_size=64,
        crop_bottom=20,  # a banner with the copyright; the data set's own README says to remove it
    ),
    "flowers102": Published(
        ("flowers-102/imagelabels.mat", "flowers-102/setid.mat", "flowers-102/jpg"),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz unpacked, imagelabels.mat, setid.mat)",
        _flowers102,
        "not stated here: see its authors' page, robots.ox.ac.uk/~vgg/data/flowers/102",
        image_size=128,
    ),
    "celeba": Published(
        tuple(f"celeba/{name}.txt" for name in ("list_eval_partition", "list_attr_celeba", "identity_CelebA"))
        + tuple(f"celeba/{name}" for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"))
        + ("celeba/img_align_celeba",),
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (img_align_celeba.zip unpacked, and the five .txt files)",
        _celeba,
        "non-commercial research only, by its agreement: mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        image_size=64,
    ),
}
