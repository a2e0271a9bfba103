"""The final stage: shards of the best trials' images, drawn and scored over the cluster.

Shards go to a pool of actors and not through Ray Data's map_batches, which has no way to drop what is left of a trial
that turned out to have no score, and starts dead actors again for ever where this gives up after a few. What the two
take for the same shards: benchmarks/pool_or_ray_data.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from evaluation.config import FinalStageConfig
from evaluation.extractors import Extractor
from evaluation.reference import Reference
from evaluation.sampling import Sampler
from evaluation.shards import Candidate, Shard, is_done, shards_of, store
from trainer import checkpoint
from trainer.failures import TooLittleMemoryError, memory_of, too_little_memory_is
from trainer.storage import Storage

MOST_LOST = 3  # workers that Ray could not bring back
# The latter is killed by Ray, and no actor error.
LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)


class ShardWorker:
    """Draws and scores shards; keeps the last checkpoint in memory."""

    def __init__(self, run: Storage, config: FinalStageConfig, device: str):
        self.run, self.config, self.device = run, config, device
        self.extractor: Extractor | None = None
        self.loaded: tuple[str, Sampler] | None = None

    def work(self, shard: Shard, extractor: Extractor) -> str | None:
        """None, or why this checkpoint has no score."""
        if is_done(self.run, shard, self.config):
            return None  # by a worker that died before it could say so: Ray tries its task again
        # Comes with the task, not the constructor: Ray restarts an actor without the objects that it was made from.
        with too_little_memory_is(lambda: self._too_small("the extractor", "use a device with more, or free some")):
            self.extractor = self.extractor or extractor.to(self.device)
        path = shard.candidate.checkpoint
        if self.loaded is None or self.loaded[0] != path:
            try:
                found = checkpoint.load(self.run.at(path))
            except checkpoint.BrokenCheckpointError as error:
                return str(error).replace(f"{self.run.uri}/", "")  # a ranking is published, and a run is moved
            with too_little_memory_is(lambda: self._too_small("the model", "use a device with more, or free some")):
                denoiser, betas = found.denoiser(self.config.weights).to(self.device), found.config.schedule.betas()
            if self.device == "cuda":  # the layout of its fast convolutions
                denoiser = denoiser.to(memory_format=torch.channels_last)
            shape = tuple(found.meta["image_shape"])
            self.loaded = path, Sampler(denoiser, betas, shape, self.config.sampler, self.device)
        sampler = self.loaded[1]
        try:
            with too_little_memory_is(self._out_of_memory):
                images = sampler.images(shard.first, shard.count)
                judged = self.extractor.extract(images)
        except FloatingPointError as error:
            return str(error)
        store(self.run, shard, self.config, images, judged)
        return None

    def _out_of_memory(self) -> str:
        block = self.config.sampler.block_size
        remedy = (
            f"set final.sampler.block_size to {block // 2} in {self.run.uri}/config.yaml (for all trials: other blocks "
            f"are other images), then: ddpm-search resume {self.run.uri}"
            if block > 1
            else "use a device with more"
        )
        return self._too_small(f"{block:,} images at once (final.sampler.block_size={block})", remedy)

    def _too_small(self, for_what: str, remedy: str) -> str:
        return f"{memory_of(torch.device(self.device))} is too small for {for_what}; {remedy}"


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
            shards += shards_of(run, candidate, config, reference)
        except checkpoint.BrokenCheckpointError as error:
            reasons[candidate.trial] = str(error)
    waiting = [shard for shard in reversed(shards) if not is_done(run, shard, config)]
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
                if isinstance(error.cause, TooLittleMemoryError | OSError):  # such as of a full disk
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
