"""Ray Train around the training loop: one worker group a training, checkpoints in the run's storage."""

import os
import tempfile
import traceback
from collections.abc import Collection
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.callback import UserCallback

from trainer import checkpoint, data, loop
from trainer.config import TrainConfig
from trainer.event_log import EventLog
from trainer.local import checkpoint_name
from trainer.storage import Storage

MAX_WORKER_FAILURES = 3


def fit(
    config: TrainConfig,
    name: str,
    run: Storage,
    score: loop.Scorer | None = None,
    rungs: Collection[int] = (),
    callbacks: Collection[UserCallback] = (),
    worker: dict[str, float] | None = None,
    strategy: str = "PACK",
    report_seconds: float = 60.0,
) -> dict[str, Any]:
    """Trains in `config.workers` processes and returns the last reported metrics.

    Checkpoints go to RUN/train/<name>; the same name goes on from the newest whole one there. A worker that dies
    is replaced, up to three times. `worker` is what each reserves, such as {"CPU": 1, "GPU": 1}. Metrics
    hold `failure` where training cannot go on: see TrainingFailedError.
    """
    trainer = ray.train.torch.TorchTrainer(
        _train_on_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "name": name,
            "run": run.uri,
            "score": score,
            "rungs": sorted(rungs),
            "report_seconds": report_seconds,
        },
        torch_config=ray.train.torch.TorchConfig(timeout_s=config.hang_seconds),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu="GPU" in (worker or {}),
            resources_per_worker=worker,
            placement_strategy=strategy,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=run.at("train").root,
            storage_filesystem=run.fs,
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=MAX_WORKER_FAILURES, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    return trainer.fit().metrics or {}


def _train_on_worker(setup: dict[str, Any]) -> None:
    context = ray.train.get_context()
    config = TrainConfig.model_validate(setup["config"])
    run = Storage(setup["run"])
    device = ray.train.torch.get_device()
    worker = loop.Worker(device, context.get_world_rank(), context.get_world_size())
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    found = checkpoint.latest(run.at("train", setup["name"])) if ray.train.get_checkpoint() else None
    resume = found[1] if found else None
    first_epoch = resume.meta["epoch"] + 1 if resume else 1
    event_log = EventLog(run.at("tensorboard", setup["name"]), config, first_epoch) if worker.rank == 0 else None

    def log(metrics: loop.Metrics) -> None:
        assert event_log is not None
        samples: np.ndarray | None = metrics.pop("samples", None)
        event_log(metrics, samples)

    def report(metrics: loop.Metrics, save: loop.Save) -> None:
        if worker.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="ddpm-search-") as folder:
            save(Storage(folder))
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=checkpoint_name(metrics),
            )

    try:
        images = data.load(config.data).train
        loop.train(
            config,
            images,
            worker,
            report,
            resume=resume,
            score=setup["score"],
            rungs=setup["rungs"],
            log=log,
            report_seconds=setup["report_seconds"],
        )
    except Exception as error:
        # What every rank meets, and would meet again, is reported. Anything else ends this worker: Ray Train then ends
        # the others and starts all of them again, up to three times (a hung worker, a storage that is gone).
        everywhere = isinstance(error, loop.TrainingFailedError)
        if not everywhere and (worker.world_size > 1 or isinstance(error, OSError)):
            raise
        traceback.print_exc()
        ray.train.report({"failure": loop.failure_reason(error), "rung": True})
