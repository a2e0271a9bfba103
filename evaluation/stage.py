"""The final stage: images of the best trials, drawn and scored in shards over the cluster, then ranked.

A shard is whole blocks of images, a function of (checkpoint, sampler, extractor, first index, count). What an earlier
call or a killed one left is kept, so calling again draws only what is missing.

Shards go to a pool of actors and not through Ray Data's map_batches, which has no way to drop what is left of a trial
that turned out to have no score, and starts dead actors again for ever where this gives up after a few. What the two
take for the same shards: benchmarks/pool_or_ray_data.py.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from evaluation import scores
from evaluation.config import FinalStageConfig
from evaluation.extractors import Extraction, Extractor
from evaluation.files import holds_images, parquet_of
from evaluation.ranking import Distance, RankedTrial, TrialSamples, rank
from evaluation.reference import Reference
from evaluation.sampling import sample_images
from trainer import checkpoint
from trainer.failures import TooLittleMemoryError, memory_of, too_little_memory_is
from trainer.storage import Storage

BLOCKS_PER_SHARD = 5
KEPT_IMAGES = 64  # of each trial, for the report
MOST_LOST = 3  # workers that Ray could not bring back
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
)  # the latter is killed by Ray, and no actor error


@dataclass(frozen=True)
class Candidate:
    """A trial of the final stage; `checkpoint` is its path below the run.

    `repeats` names the candidate whose configuration this one is, trained from another seed.
    """

    trial: str
    checkpoint: str
    repeats: str | None = None


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


class ShardWorker:
    """Draws and scores shards; keeps the last checkpoint in memory."""

    def __init__(self, run: Storage, config: FinalStageConfig, device: str):
        self.run, self.config, self.device = run, config, device
        self.extractor: Extractor | None = None
        self.loaded: tuple[str, checkpoint.Checkpoint, Any] | None = None

    def work(self, shard: Shard, extractor: Extractor) -> str | None:
        """None, or why this checkpoint has no score."""
        # Comes with the task, not the constructor: Ray restarts an actor without the objects that it was made from.
        self.extractor = self.extractor or extractor.to(self.device)
        path = shard.candidate.checkpoint
        if self.loaded is None or self.loaded[0] != path:
            try:
                found = checkpoint.load(self.run.at(path))
            except checkpoint.BrokenCheckpointError as error:
                return str(error).replace(f"{self.run.uri}/", "")  # a ranking is published, and a run is moved
            self.loaded = path, found, found.denoiser(self.config.weights).to(self.device)
        _, found, denoiser = self.loaded
        betas = found.config.schedule.betas()
        shape = tuple(found.meta["image_shape"])
        try:
            with too_little_memory_is(self._out_of_memory):
                images = sample_images(
                    denoiser, betas, shape, self.config.sampler, shard.first, shard.count, self.device
                )
                judged = self.extractor.extract(images)
        except FloatingPointError as error:
            return str(error)
        buffer = io.BytesIO()
        kept = images[: max(0, KEPT_IMAGES - shard.first)]
        np.savez(buffer, probabilities=judged.probabilities, features=judged.features, images=kept)
        if self.config.keep_images:
            self.run.write(shard.images, parquet_of(images, shard.first))
        # Last, for this is the file that says that a shard is done.
        self.run.write(shard.path, buffer.getvalue())
        return None

    def _out_of_memory(self) -> str:
        block = self.config.sampler.block_size
        remedy = (
            f"set final.sampler.block_size to {block // 2} in {self.run.uri}/config.yaml (for all trials: other blocks "
            f"are other images), then: ddpm-search resume {self.run.uri}"
            if block > 1
            else "use a device with more"
        )
        where = memory_of(torch.device(self.device))
        return f"{where} is too small to draw {block:,} images at once (final.sampler.block_size={block}); {remedy}"


ShardActor: Any = ray.remote(max_restarts=3, max_task_retries=3)(ShardWorker)


def draw(
    run: Storage,
    candidates: Sequence[Candidate],
    config: FinalStageConfig,
    reference: Reference,
    workers: int,
    use_gpu: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
    memory: float = 0,
) -> dict[str, str]:
    """Draws and scores what is missing of every candidate's images. progress is told (images done, images in all).

    workers: at least 1, which waits where there is no room for it. memory: bytes that each reserves of its node.

    A worker that is lost costs the shards in flight: Ray starts it again, up to three times, then this does, three in
    all. One that has nothing to do gives its place back, for one that is started again may have lost its own.
    Returns trial → reason, of trials whose images are not finite or whose checkpoint is damaged. Raises ray's own
    error where workers die, or are killed for their memory, again and again, and TooLittleMemoryError where a block of
    images does not fit.
    """
    assert workers >= 1
    reasons: dict[str, str] = {}
    shards: list[Shard] = []
    for candidate in candidates:
        try:
            shards += _shards(run, candidate, config, reference)
        except checkpoint.BrokenCheckpointError as error:
            reasons[candidate.trial] = str(error)
    waiting = [shard for shard in reversed(shards) if not _is_done(run, shard, config)]
    total = sum(shard.count for shard in shards)
    done = total - sum(shard.count for shard in waiting)
    progress(done, total)
    if not waiting:
        return reasons
    extractor = ray.put(reference.extractor.to("cpu"))

    def worker() -> Any:
        options = ShardActor.options(num_cpus=1, num_gpus=int(use_gpu), memory=memory or None)
        actors.append(options.remote(run, config, "cuda" if use_gpu else "cpu"))
        return actors[-1]

    actors: list[Any] = []
    idle, lost = [worker() for _ in range(min(workers, len(waiting)))], 0
    running: dict[Any, tuple[Any, Shard]] = {}
    try:
        while waiting or running:
            while idle and waiting:
                actor, shard = idle.pop(), waiting.pop()
                running[actor.work.remote(shard, extractor)] = actor, shard
            while idle:
                ray.kill(idle.pop())
            ready, _ = ray.wait(list(running), num_returns=1)
            actor, shard = running.pop(ready[0])
            try:
                reason = ray.get(ready[0])
            except LOST:
                ray.kill(actor)  # Ray may have started it again, in the place that the next one needs
                lost += 1
                if lost > MOST_LOST:
                    raise
                waiting.append(shard)
                idle.append(worker())
                continue
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, TooLittleMemoryError):
                    raise error.cause from error
                raise
            idle.append(actor)
            if reason:
                reasons[shard.candidate.trial] = reason
                done += sum(other.count for other in waiting if other.candidate == shard.candidate)
                waiting = [other for other in waiting if other.candidate != shard.candidate]
            done += shard.count
            progress(done, total)
    finally:
        for actor in actors:
            ray.kill(actor)
    return reasons


def ranking(
    run: Storage, candidates: Sequence[Candidate], config: FinalStageConfig, reference: Reference, notes: dict[str, str]
) -> dict[str, Any]:
    """Ranks what `draw` drew: the content of ranking.json but for the trials' parameters.

    notes: trial → reason, for trials that have no images. The real images are held-out ones; where they are fewer
    than `config.images`, `at_real_n` has every trial's scores, precision and recall at their number, for a fair
    comparison. Fréchet distances are to all `train_images`, KID, precision and recall (k = 3) to `real_images` of
    them. `steps` are those that were taken, fewer than the sampler's where a schedule has no more; `score_pool` is the
    score without splits; `dropped` images are left over by whole splits, and only by the score.
    """
    drawn = {c.trial: _read(run, c, config, reference) for c in candidates if c.trial not in notes}
    steps = {c.trial: min(config.sampler.steps, _identity(run, c)[1]) for c in candidates if c.trial in drawn}
    repeats = {c.trial: c.repeats for c in candidates}
    samples = [TrialSamples(t, judged.probabilities, judged.features, None, repeats[t]) for t, judged in drawn.items()]
    samples += [TrialSamples(trial, reason=reason, repeats=repeats.get(trial)) for trial, reason in notes.items()]
    train = reference.train_features
    distances: dict[str, Distance] = {
        "frechet_held_out": lambda features: scores.frechet_influence(features, reference.held_out_statistics),
        "kid": lambda features: scores.kid_influence(features, train),
    }
    ranked = rank(samples, reference.train, config.split_size, distances=distances)
    real_n = min(config.images, len(reference.held_out.features))

    def at(judged: Extraction, n: int) -> dict[str, Any]:
        score = scores.inception_score(judged.probabilities[:n], config.split_size)
        return {
            "n": n,
            "dropped": score.dropped,
            "score": score.mean,
            "score_pool": scores.inception_score(judged.probabilities[:n], n).mean,
            "frechet": scores.frechet_distance(judged.features[:n], reference.train),
        }

    def with_neighbours(judged: Extraction, n: int) -> dict[str, Any]:
        if min(n, len(train)) <= scores.NEIGHBOURS:
            return at(judged, n) | {"precision": None, "recall": None}
        return at(judged, n) | scores.precision_recall(judged.features[:n], train)._asdict()

    def real_row(judged: Extraction) -> dict[str, Any]:
        return with_neighbours(judged, real_n) | {"kid": scores.kid(judged.features[:real_n], train).value}

    def row(trial: RankedTrial) -> dict[str, Any]:
        """A confirmed row's numbers are means over its seeds; `by_seed` has each, the first one too."""
        judged = [drawn[seed] for seed in trial.seeds]

        def mean_at(n: int) -> dict[str, Any] | None:
            return _mean([with_neighbours(seed, n) for seed in judged])

        whole = mean_at(config.images)
        own = [name for name, of in repeats.items() if trial.trial in (name, of)]
        lost = {"n": 0, "score": None, "frechet": None}
        return trial.to_dict() | {
            "steps": max((steps[seed] for seed in trial.seeds), default=None),
            "at_real_n": whole if real_n == config.images else mean_at(real_n),
            "by_seed": [
                (at(drawn[name], config.images) if name in drawn else lost) | {"trial": name, "reason": notes.get(name)}
                for name in own
            ],
            **{name: whole and whole[name] for name in ("score_pool", "precision", "recall")},
        }

    n = min(config.split_size, config.images)
    return {
        "extractor": reference.extractor.name,
        "judge": reference.key,
        "score_name": reference.extractor.score_name,
        "held_out_accuracy": reference.accuracy,
        "images": config.images,
        "split_size": n,
        "dropped": config.images % n,
        "train_images": reference.train.n,
        "real_images": len(train),
        "sampler": config.sampler.model_dump(),
        "steps": max(steps.values(), default=config.sampler.steps),
        "seed": config.sampler.seed,
        "weights": config.weights,
        "top": config.top,
        "real": real_row(reference.held_out),
        "noise": real_row(reference.noise),
        "trials": [row(trial) for trial in ranked],
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of every number; None where a row has none."""
    if not rows:
        return None
    return {
        name: None if rows[0][name] is None else type(rows[0][name])(np.mean([r[name] for r in rows]))
        for name in rows[0]
    }


def kept_images(run: Storage, candidate: Candidate, ranked: Mapping[str, Any]) -> np.ndarray:
    """The first images of a candidate as ranking.json had them drawn, (n, H, W, C) uint8: the same noise for every
    trial. n is KEPT_IMAGES, or all that were ranked.

    Raises FileNotFoundError where they are no longer there, cannot be read, or were drawn by another version.
    """
    drawn = {name: ranked[name] for name in ("images", "sampler", "weights") if name in ranked}
    asked = FinalStageConfig.model_validate(drawn)
    try:
        shards = _shards_judged(run, candidate, asked, ranked["extractor"], ranked.get("judge"))
    except checkpoint.BrokenCheckpointError as error:
        raise FileNotFoundError(str(error)) from error
    return np.concatenate([_results(run, shard)["images"] for shard in shards if shard.first < KEPT_IMAGES])


def _identity(run: Storage, candidate: Candidate) -> tuple[str, int]:
    """A checkpoint's SHA-256, and its schedule's T. Raises BrokenCheckpointError."""
    try:
        meta = run.read_json(f"{candidate.checkpoint}/checkpoint.json")
        return meta["sha256"], int(meta["config"]["schedule"]["steps"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        why = str(error).replace(f"{run.root}/", "")
        raise checkpoint.BrokenCheckpointError(f"checkpoint {candidate.checkpoint} cannot be read: {why}") from error


def _shards(run: Storage, candidate: Candidate, config: FinalStageConfig, reference: Reference) -> list[Shard]:
    return _shards_judged(run, candidate, config, reference.extractor.name, reference.key)


def _shards_judged(
    run: Storage, candidate: Candidate, config: FinalStageConfig, extractor: str, judge: str | None
) -> list[Shard]:
    """A folder a setting: results of another checkpoint, sampler or extractor are never taken for these."""
    settings = {
        "checkpoint": _identity(run, candidate)[0],
        "sampler": config.sampler.model_dump(),
        "weights": config.weights,
        "extractor": extractor,
        "data": judge,
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


def _results(run: Storage, shard: Shard) -> dict[str, np.ndarray]:
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


def _is_done(run: Storage, shard: Shard, config: FinalStageConfig) -> bool:
    try:
        _results(run, shard)
        return not config.keep_images or holds_images(run.read(shard.images), shard.first, shard.count)
    except FileNotFoundError:
        return False


def _read(run: Storage, candidate: Candidate, config: FinalStageConfig, reference: Reference) -> Extraction:
    drawn = (_results(run, shard) for shard in _shards(run, candidate, config, reference))
    return Extraction.joined(Extraction(results["probabilities"], results["features"]) for results in drawn)
