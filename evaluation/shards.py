"""Shards of a candidate's images on disk: what their names depend on, which are whole, and what they hold.

A shard is whole blocks of images, a function of (checkpoint, sampler, extractor, first index, count). What an earlier
call or a killed one left is kept, so calling again draws only what is missing.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.config import FinalStageConfig
from evaluation.extractors import Extraction
from evaluation.files import holds_images, parquet_of
from evaluation.reference import Reference
from trainer import checkpoint
from trainer.storage import Storage

BLOCKS_PER_SHARD = 5
KEPT_IMAGES = 64  # of each trial, for the report


@dataclass(frozen=True)
class Candidate:
    """A trial of the final stage; `checkpoint` is its path below the run.

    `confirms` names the candidate whose configuration this one is, trained from another seed.
    """

    trial: str
    checkpoint: str
    confirms: str | None = None


@dataclass(frozen=True)
class Shard:
    """Images first .. first + count - 1 of one candidate; `path` is where its results go, below the run."""

    candidate: Candidate
    first: int
    count: int
    path: str

    @property
    def images(self) -> str:
        """Where the images go that are kept."""
        folder, _, name = self.path.rpartition("/")
        return f"{folder}/images/{name.removesuffix('.npz')}.parquet"


def shards_of(run: Storage, candidate: Candidate, config: FinalStageConfig, reference: Reference) -> list[Shard]:
    return _shards_judged_by(run, candidate, config, reference.extractor.name, reference.key)


def store(run: Storage, shard: Shard, config: FinalStageConfig, images: np.ndarray, judged: Extraction) -> None:
    """Writes what `results` reads, and all images where they are kept."""
    buffer = io.BytesIO()
    kept = images[: max(0, KEPT_IMAGES - shard.first)]
    np.savez(buffer, probabilities=judged.probabilities, features=judged.features, images=kept)
    if config.keep_images:
        run.write(shard.images, parquet_of(images, shard.first))
    # Last, for this is the file that says that a shard is done.
    run.write(shard.path, buffer.getvalue())


def results(run: Storage, shard: Shard) -> dict[str, np.ndarray]:
    """probabilities, features and kept images. Raises FileNotFoundError where there are none, or none that are whole.

    One that is cut or damaged is as good as none: it can be drawn again.
    """
    content = run.read(shard.path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()  # the check sums, before NumPy believes a header
        if damaged is None:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ("probabilities", "features", "images")}
        why = damaged
    except MemoryError:
        raise
    except Exception as error:  # a flipped bit may be anything: another compression, a password, a wrong offset
        why = f"{type(error).__name__}: {error}"
    raise FileNotFoundError(f"{shard.path} is cut or damaged ({why}); ddpm-search evaluate draws it again")


def is_done(run: Storage, shard: Shard, config: FinalStageConfig) -> bool:
    try:
        results(run, shard)
        return not config.keep_images or holds_images(run.read(shard.images), shard.first, shard.count)
    except FileNotFoundError:
        return False


def extraction_of(run: Storage, candidate: Candidate, config: FinalStageConfig, reference: Reference) -> Extraction:
    drawn = (results(run, shard) for shard in shards_of(run, candidate, config, reference))
    return Extraction.joined(Extraction(held["probabilities"], held["features"]) for held in drawn)


def kept_images(run: Storage, candidate: Candidate, ranked: Mapping[str, Any]) -> np.ndarray:
    """The first images of a candidate as ranking.json had them drawn, (n, H, W, C) uint8: the same noise for every
    trial. n is KEPT_IMAGES, or all that were ranked.

    Raises FileNotFoundError where they are no longer there, cannot be read, or were drawn by another version.
    """
    drawn = {name: ranked[name] for name in ("images", "sampler", "weights") if name in ranked}
    asked = FinalStageConfig.model_validate(drawn)
    try:
        shards = _shards_judged_by(run, candidate, asked, ranked["extractor"], ranked.get("reference"))
    except checkpoint.BrokenCheckpointError as error:
        raise FileNotFoundError(str(error)) from error
    return np.concatenate([results(run, shard)["images"] for shard in shards if shard.first < KEPT_IMAGES])


def identity(run: Storage, candidate: Candidate) -> tuple[str, int]:
    """A checkpoint's SHA-256, and its schedule's T. Raises BrokenCheckpointError."""
    try:
        meta = run.read_json(f"{candidate.checkpoint}/checkpoint.json")
        return meta["sha256"], int(meta["config"]["schedule"]["steps"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        why = str(error).replace(f"{run.root}/", "")
        raise checkpoint.BrokenCheckpointError(f"checkpoint {candidate.checkpoint} cannot be read: {why}") from error


def _shards_judged_by(
    run: Storage, candidate: Candidate, config: FinalStageConfig, extractor: str, reference: str | None
) -> list[Shard]:
    """A folder a setting: results of another checkpoint, sampler or extractor are never taken for these."""
    settings = {
        "checkpoint": identity(run, candidate)[0],
        "sampler": config.sampler.model_dump(),
        "weights": config.weights,
        "extractor": extractor,
        "data": reference,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = f"evaluation/{candidate.trial}/{digest}"
    size = BLOCKS_PER_SHARD * config.sampler.block_size
    return [
        Shard(
            candidate,
            first,
            min(size, config.images - first),
            f"{folder}/{first:07d}-{min(size, config.images - first)}.npz",
        )
        for first in range(0, config.images, size)
    ]
