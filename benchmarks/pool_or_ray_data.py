"""The final stage's shards by its own pool of actors, and by Ray Data's map_batches.

    python -m benchmarks.pool_or_ray_data [--images 4000] [--rounds 3]

The same shards of an untrained model of digits, drawn and scored by the same ShardWorker in two actors of one CPU each,
on a Ray of two CPUs that runs already. The two take turns, each into a folder of its own, and must leave the same files
to the bit. Seconds are from nothing to the last shard, actors' start included.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import ray
import ray.data

from benchmarks.common import provenance, write
from evaluation import reference, stage
from evaluation.config import FinalStageConfig
from evaluation.extractors import Extractor
from evaluation.reference import Reference
from evaluation.shards import Candidate, Shard, shards_of
from evaluation.stage import ShardWorker
from search import config_file
from trainer import checkpoint, data, model
from trainer.data_cache import cache_folder
from trainer.storage import Storage

WORKERS, SEED = 2, 0
CANDIDATE = Candidate("untrained", "train/untrained/checkpoint_000000001")


class DataWorker:
    """ShardWorker as Ray Data wants it: a batch is one shard."""

    def __init__(self, run: Storage, final: FinalStageConfig, extractor: Extractor):
        self.worker, self.extractor = ShardWorker(run, final, "cpu"), extractor

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        (first,), (count,), (path,) = batch["first"], batch["count"], batch["path"]
        reason = self.worker.work(Shard(CANDIDATE, int(first), int(count), str(path)), self.extractor)
        return {"reason": [reason or ""]}


def by_pool(run: Storage, final: FinalStageConfig, judge: Reference) -> None:
    assert stage.draw(run, [CANDIDATE], final, judge, WORKERS, use_gpu=False) == {}


def by_ray_data(run: Storage, final: FinalStageConfig, judge: Reference) -> None:
    shards = shards_of(run, CANDIDATE, final, judge)
    rows = [{"first": shard.first, "count": shard.count, "path": shard.path} for shard in shards]
    done = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            DataWorker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=WORKERS),
            fn_constructor_args=(run, final, judge.extractor),
            num_cpus=1,
        )
        .take_all()
    )
    assert [row["reason"] for row in done] == [""] * len(rows)


WAYS: dict[str, Callable[[Storage, FinalStageConfig, Reference], None]] = {"pool": by_pool, "ray_data": by_ray_data}


def scored(run: Storage, final: FinalStageConfig, judge: Reference) -> list[np.ndarray]:
    """Every shard's features."""
    paths = [shard.path for shard in shards_of(run, CANDIDATE, final, judge)]
    return [np.load(io.BytesIO(run.read(path)))["features"] for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = config_file.load("digits")
    final = settings.final.model_copy(update={"images": arguments.images})
    splits = data.load(settings.train.data)
    judge = reference.prepare(splits, final, cache_folder(), "cpu", print)
    assert judge is not None
    weights = model.build(settings.train.model, splits.train.shape, 0.0, SEED).state_dict()
    meta: dict[str, Any] = {"config": settings.train.model_dump(mode="json"), "image_shape": splits.train.shape}
    meta |= {"step": 0, "epoch": 0, "ema_decay": settings.train.ema_decays[0]}
    state = {"model": weights, "ema": {str(settings.train.ema_decays[0]): weights}}

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 1024**2)
    ray.data.DataContext.get_current().enable_progress_bars = False
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(arguments.rounds):
        left = {}
        for name in list(WAYS)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
                run = Storage(folder)
                checkpoint.save(run.at(CANDIDATE.checkpoint), state, meta)
                began = time.monotonic()
                WAYS[name](run, final, judge)
                seconds[name].append(round(time.monotonic() - began, 2))
                left[name] = scored(run, final, judge)
        assert all(np.array_equal(*pair) for pair in zip(*left.values(), strict=True)), "not the same work"
    sizes = {"images": arguments.images, "shards": len(left["pool"]), "workers": WORKERS}
    result = {**provenance(SEED), **sizes, "sampler_steps": final.sampler.steps, "seconds": seconds}
    result |= {"median_seconds": {name: median(values) for name, values in seconds.items()}}
    print(result["median_seconds"])
    write("pool_or_ray_data", result)


if __name__ == "__main__":
    main()
