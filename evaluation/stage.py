"""The final stage: images of the best trials, drawn and scored in shards over the cluster, then ranked.

A shard is whole blocks of images, a function of (checkpoint, sampler, extractor, first index, count). What an earlier
call or a killed one left is kept, so calling again draws only what is missing.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from evaluation import scores
from evaluation.config import FinalStageConfig, SamplerConfig
from evaluation.extractors import Classifier, Extraction, Inception
from evaluation.ranking import RankedTrial, TrialSamples, rank
from evaluation.reference import Reference
from evaluation.sampling import sample_images
from trainer import checkpoint, schedules
from trainer.storage import Storage

BLOCKS_PER_SHARD = 5
KEPT_IMAGES = 64  # of each trial, for the report


@dataclass(frozen=True)
class Candidate:
    """A trial of the final stage; `checkpoint` is its path below the run."""

    trial: str
    checkpoint: str


@dataclass(frozen=True)
class Shard:
    """Images first .. first + count - 1 of one candidate; `path` is where its results go, below the run."""

    candidate: Candidate
    first: int
    count: int
    path: str


class ShardWorker:
    """Draws and scores shards; keeps the last checkpoint in memory."""

    def __init__(self, run: Storage, sampler: SamplerConfig, device: str):
        self.run, self.sampler, self.device = run, sampler, device
        self.extractor: Classifier | Inception | None = None
        self.loaded: tuple[str, checkpoint.Checkpoint, Any] | None = None

    def work(self, shard: Shard, extractor: Classifier | Inception) -> None:
        # Comes with the task, not the constructor: Ray restarts an actor without the objects that it was made from.
        self.extractor = self.extractor or extractor.to(self.device)
        path = shard.candidate.checkpoint
        if self.loaded is None or self.loaded[0] != path:
            found = checkpoint.load(self.run.at(path))
            self.loaded = path, found, found.denoiser().to(self.device)
        _, found, denoiser = self.loaded
        betas = schedules.betas(**found.config.schedule.model_dump())
        shape = tuple(found.meta["image_shape"])
        images = sample_images(denoiser, betas, shape, self.sampler, shard.first, shard.count, self.device)
        judged = self.extractor.extract(images)
        buffer = io.BytesIO()
        kept = images[: max(0, KEPT_IMAGES - shard.first)]
        np.savez(buffer, probabilities=judged.probabilities, features=judged.features, images=kept)
        self.run.write(shard.path, buffer.getvalue())


ShardActor: Any = ray.remote(max_restarts=3, max_task_retries=3)(ShardWorker)


def draw(
    run: Storage,
    candidates: Sequence[Candidate],
    config: FinalStageConfig,
    reference: Reference,
    workers: int,
    use_gpu: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draws and scores what is missing of every candidate's images. progress is told (images done, images in all)."""
    shards = [s for c in candidates for s in _shards(run, c, config, reference)]
    missing = [shard for shard in shards if not run.exists(shard.path)]
    total = sum(shard.count for shard in shards)
    done = total - sum(shard.count for shard in missing)
    progress(done, total)
    if not missing:
        return
    device = "cuda" if use_gpu else "cpu"
    extractor = ray.put(reference.extractor.to("cpu"))
    actors = [
        ShardActor.options(num_cpus=1, num_gpus=int(use_gpu)).remote(run, config.sampler, device)
        for _ in range(min(workers, len(missing)))
    ]
    try:
        waiting = list(reversed(missing))
        running = {actor.work.remote(shard, extractor): (actor, shard) for actor in actors if (shard := waiting.pop())}
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            actor, shard = running.pop(ready[0])
            ray.get(ready[0])
            done += shard.count
            progress(done, total)
            if waiting:
                following = waiting.pop()
                running[actor.work.remote(following, extractor)] = actor, following
    finally:
        for actor in actors:
            ray.kill(actor)


def ranking(
    run: Storage, candidates: Sequence[Candidate], config: FinalStageConfig, reference: Reference, notes: dict[str, str]
) -> dict[str, Any]:
    """Ranks what `draw` drew: the content of ranking.json but for the trials' parameters.

    notes: trial → reason, for trials that have no images. The real images are the held-out ones; where they are fewer
    than `config.images`, `at_real_n` has every trial's scores at their number, for a fair comparison.
    """
    drawn = {c.trial: _read(run, c, config, reference)[0] for c in candidates}
    samples = [TrialSamples(trial, judged.probabilities, judged.features) for trial, judged in drawn.items()]
    samples += [TrialSamples(trial, reason=reason) for trial, reason in notes.items()]
    ranked = rank(samples, reference.train, config.split_size)
    real_n = min(config.images, len(reference.held_out.features))

    def at(judged: Extraction, n: int) -> dict[str, Any]:
        return {
            "n": n,
            "score": scores.inception_score(judged.probabilities[:n], config.split_size).mean,
            "frechet": scores.frechet_distance(judged.features[:n], reference.train),
        }

    def row(trial: RankedTrial) -> dict[str, Any]:
        at_real_n = at(drawn[trial.trial], real_n) if trial.score is not None else None
        return trial.to_dict() | {"at_real_n": at_real_n}

    return {
        "extractor": reference.extractor.name,
        "score_name": reference.extractor.score_name,
        "held_out_accuracy": reference.accuracy,
        "images": config.images,
        "split_size": config.split_size,
        "sampler": config.sampler.model_dump(),
        "steps": config.sampler.steps,
        "seed": config.sampler.seed,
        "real": at(reference.held_out, real_n),
        "noise": at(reference.noise, real_n),
        "trials": [row(trial) for trial in ranked],
    }


def kept_images(run: Storage, candidate: Candidate, config: FinalStageConfig, reference: Reference) -> np.ndarray:
    """The first images of a candidate, (n, H, W, C) uint8: the same noise for every trial."""
    return _read(run, candidate, config, reference)[1]


def _shards(run: Storage, candidate: Candidate, config: FinalStageConfig, reference: Reference) -> list[Shard]:
    """A folder a setting: results of another checkpoint, sampler or extractor are never taken for these."""
    settings = {
        "checkpoint": run.read_json(f"{candidate.checkpoint}/checkpoint.json")["sha256"],
        "sampler": config.sampler.model_dump(),
        "extractor": reference.extractor.name,
        "data": reference.key,
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


def _read(
    run: Storage, candidate: Candidate, config: FinalStageConfig, reference: Reference
) -> tuple[Extraction, np.ndarray]:
    parts = []
    for shard in _shards(run, candidate, config, reference):
        with np.load(io.BytesIO(run.read(shard.path)), allow_pickle=False) as content:
            parts.append({name: content[name] for name in ("probabilities", "features", "images")})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Extraction(joined["probabilities"], joined["features"]), joined["images"]
