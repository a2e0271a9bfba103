"""The chosen images of a data set, decoded in one pass into one .npy file a split: a few hundred are held at a time."""

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data_cache import RowsFile, cache_folder
from trainer.datasets import Listing, Source
from trainer.decode import Item, decode

log = logging.getLogger(__name__)

DECODED_AT_ONCE = 256
NAMED = 3  # broken images that an error names
Progress = Callable[[int, int], None]


def decode_all(
    folder: Path,
    source: Source,
    listing: Listing,
    parts: dict[str, np.ndarray],
    config: DataConfig,
    progress: Progress | None = None,
    like: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Writes PART.npy (N, H, W, C), and PART-labels.npy where there are labels, into `folder`.

    parts: name → ascending indices. like: the (H, W, C) that images must have. Returns what a cache entry says of
    itself. Raises ValueError where images cannot be read, unless config.skip_broken, or differ in size.
    """
    index = np.sort(np.concatenate(list(parts.values())))
    owner = {int(i): name for name, members in parts.items() for i in members}
    kept: dict[str, list[int]] = {name: [] for name in parts}
    broken: list[str] = []
    log.info("decoding %d images of %s into %s", len(index), config.name, folder)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(RowsFile(folder / f"{name}.npy")) for name in parts}
        for done, (i, pixels) in enumerate(_decoded(source, listing, index, like[2] if like else config.channels), 1):
            if isinstance(pixels, Exception):
                broken.append(f"{listing.where(i)} ({pixels})")
            else:
                if done == 1:
                    _check_space(folder, len(index) * pixels.nbytes)
                like = like or pixels.shape
                if pixels.shape != like:
                    raise ValueError(_differs(listing.where(i), pixels.shape, like))
                files[owner[i]].write(pixels)
                kept[owner[i]].append(i)
            if progress is not None and (done % DECODED_AT_ONCE == 0 or done == len(index)):
                progress(done, len(index))
        content = [(name, file.rows, file.finish()) for name, file in files.items()]
    _judge_broken(broken, kept, len(index), config.skip_broken)
    arrays = list(parts)
    if listing.labels is not None:
        for name, members in kept.items():
            labels = listing.labels[members]
            with (folder / f"{name}-labels.npy").open("wb") as file:
                np.save(file, labels)
                file.flush()
                os.fsync(file.fileno())  # as RowsFile does, and why
            arrays.append(f"{name}-labels")
            content.append((arrays[-1], len(labels), hashlib.sha256(labels.tobytes()).hexdigest()))
    return {
        "name": config.name,
        "arrays": arrays,
        "content": [like, content],
        "left_out": broken,
        "rest": listing.count - len(index),
    }


def _decoded(
    source: Source, listing: Listing, index: np.ndarray, channels: int | None
) -> Iterator[tuple[int, np.ndarray | Exception]]:
    """Each image of `index`, or why it cannot be read. `channels` None: grey where all of the first chunk are."""

    def attempt(item: Item) -> np.ndarray | Exception:
        try:
            return decode(item, source.image_size, channels, source.crop_bottom)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many: OSError, SyntaxError, struct.error, decompression bombs, …
            return error

    items, start = listing.read(index), 0
    undecided = channels is None
    # Threads: Pillow decodes and scales outside the interpreter's lock. In chunks: map() would read all items at once.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode") as pool:
        while chunk := list(itertools.islice(items, DECODED_AT_ONCE)):
            decoded = list(pool.map(attempt, chunk))
            depths = {each.shape[2] for each in decoded if isinstance(each, np.ndarray)}
            if undecided and depths:
                undecided = False
                # All grey: left as None, so that an RGB image later is refused instead of losing its colours.
                channels = 3 if 3 in depths else None
            for i, pixels in zip(index[start:].tolist(), decoded, strict=False):
                if channels == 3 and isinstance(pixels, np.ndarray) and pixels.shape[2] == 1:
                    pixels = np.repeat(pixels, 3, axis=2)
                yield i, pixels
            start += len(chunk)


def _judge_broken(broken: list[str], kept: dict[str, list[int]], total: int, skip: bool) -> None:
    if not broken:
        return
    named = "; ".join(broken[:NAMED]) + ("; …" if len(broken) > NAMED else "")
    if not skip:
        raise ValueError(
            f"{len(broken)} of {total} images cannot be read: {named}. "
            "Mend or remove them, or set data.skip_broken to true, which leaves them out"
        )
    for name, members in kept.items():
        if not members:
            raise ValueError(f"data.skip_broken leaves no image to be {name}: {len(broken)} cannot be read: {named}")
    log.warning("%d of %d images cannot be read and are left out: %s", len(broken), total, named)


def _differs(where: str, shape: tuple[int, ...], like: tuple[int, ...]) -> str:
    """What to do about an image of another shape than those before it."""
    if shape[2] != like[2]:
        return (
            f"data.channels must be given, since the first images are grey and {where} is not: "
            "3 makes all RGB, 1 makes all grey"
        )
    return (
        f"data.image_size must be given, since images differ in size: {where} is {shape[1]}x{shape[0]}, "
        f"those before it are {like[1]}x{like[0]}"
    )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the decoded images need {needed / 1e9:.1f} GB, and {cache_folder()} has {free / 1e9:.1f} GB free; set "
            "the environment variable DDPM_SEARCH_CACHE to a folder on another disk, or give a smaller data.subset or "
            "data.image_size"
        )
