"""Ray Train around the training loop: one worker group a training, checkpoints in the run's storage."""

import contextlib
import os
import traceback
from collections.abc import Callable, Collection
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from ray.train.v2.api.callback import UserCallback

from trainer import checkpoint, data, loop
from trainer.config import TrainConfig
from trainer.event_log import EventLog
from trainer.failures import (
    TooLittleMemoryError,
    TrainingFailedError,
    WorkerFailedError,
    failure_report,
    is_fault_of_gpu,
)
from trainer.storage import Storage
from trainer.upload import Uploader

MAX_WORKER_FAILURES = 3
RAY_S_OWN = "checkpoint_manager_snapshot.json"  # what Ray Train resumes from; we do from the checkpoints alone
GAVE_UP = "gave_up.json"  # beside the checkpoints: the report of a worker whose next life would fail as this one
# Ray 2.60 looks at which nodes there are every 20 s. A group that it starts before it knows of a loss finds no place
# for all its workers, gives up after this long, and is started again with as many as there is place for.
ELASTIC_START_SECONDS = 30
# Elastic groups start in places that are reserved for their controller. One that a search stops dies without giving its
# places back: the next trial waits until they expire, after 180 s where Ray has its way. Read where controllers run,
# which import this module with their callbacks.
autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = 40
autoscaling_coordinator_client.AUTOSCALING_REQUESTS_INTERVAL_S = 10


class _Imports(UserCallback):
    """Does nothing; it brings this module into the controller."""


def fit(
    config: TrainConfig,
    name: str,
    run: Storage,
    score: loop.Scorer | None = None,
    rungs: Collection[int] = (),
    callbacks: Collection[UserCallback] = (),
    worker: dict[str, float] | None = None,
    strategy: Callable[[], str] = lambda: "PACK",
    images: str | None = None,
) -> dict[str, Any]:
    """Trains in `config.workers` processes and returns the metrics of the last rung.

    Checkpoints go to RUN/train/<name>; the same name goes on from the newest whole one of `config` there. A worker that
    dies is replaced, up to three times; where its node is lost and min_workers allows it, the others go on without it.
    `worker` is what each reserves, such as {"CPU": 1, "GPU": 1}; they are laid by `strategy`, and wait for room as long
    as it takes. `images` is the key of the splits that every node must have. Where training cannot go on, `callbacks`
    hear of it: a report that holds `failure`, see TrainingFailedError.
    """
    elastic = config.min_workers is not None and config.min_workers < config.workers
    if elastic:
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_SECONDS)
    # At a report the others wait for the first, which scores the rung: as long as in a step, where that is longer.
    waits = float(os.environ.get("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "0"))
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(max(waits, config.hang_seconds))
    while True:
        # It names checkpoints of rungs that are deleted since, and Ray Train would refuse to start.
        run.at("train", name).delete(RAY_S_OWN)
        trainer = ray.train.torch.TorchTrainer(
            _train_on_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "name": name,
                "run": run.uri,
                "score": score,
                "rungs": sorted(rungs),
                "images": images,
            },
            torch_config=ray.train.torch.TorchConfig(timeout_s=config.hang_seconds),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(config.min_workers, config.workers) if elastic else config.workers,
                use_gpu="GPU" in (worker or {}),
                resources_per_worker=worker,
                placement_strategy="PACK" if elastic else strategy(),
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=run.at("train").root,
                storage_filesystem=run.fs,
                callbacks=[_Imports(), *callbacks],
                failure_config=ray.train.FailureConfig(
                    max_failures=MAX_WORKER_FAILURES, controller_failure_limit=10 if elastic else 3
                ),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            return trainer.fit().metrics or {}
        except ray.train.ControllerError as error:
            # To Ray Train, which has tried for a while, a group that found no room has failed. Nodes may come back.
            if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                raise


def _train_on_worker(setup: dict[str, Any]) -> None:
    context = ray.train.get_context()
    config = TrainConfig.model_validate(setup["config"])
    run = Storage(setup["run"])
    device = ray.train.torch.get_device()
    worker = loop.Worker(device, context.get_world_rank(), context.get_world_size())
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    if worker.world_size > 1:
        data.load_same(config.data, setup["images"])  # before any waits for another: it may decode for long
    checkpoints = run.at("train", setup["name"])
    found = checkpoint.latest(checkpoints, of=config) if worker.rank == 0 else None
    gave_up = checkpoints.read_json(GAVE_UP) if worker.rank == 0 and checkpoints.exists(GAVE_UP) else None
    # The same for all: a worker that is cut off from the others may be storing one while these look.
    newest, gave_up = ray.train.collective.broadcast_from_rank_zero((found[1].meta["step"] if found else None, gave_up))
    if gave_up is not None:
        if worker.rank == 0:
            checkpoints.delete(GAVE_UP)  # a search that is resumed with other settings may try again
        ray.train.report(gave_up)
        return
    if newest is not None and found is None:
        folder = checkpoints.at(checkpoint.name_of(newest))
        found = folder, checkpoint.load(folder)
    resume = found[1] if found else None
    first_epoch = resume.meta["epoch"] + 1 if resume else 1
    event_log = EventLog(run.at("tensorboard", setup["name"]), config, first_epoch) if worker.rank == 0 else None

    uploader = Uploader(checkpoints)

    def tell(metrics: loop.Metrics, folder: Storage | None = None) -> None:
        """To be called on all ranks. Ray Train hears of rungs alone, and stores and deletes nothing."""
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(folder.root, context.get_storage().storage_filesystem) if folder else None,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def report(metrics: loop.Metrics, snapshot: loop.Snapshot) -> None:
        stored: list[Storage] = []
        if worker.rank == 0:
            uploader.start(snapshot(), then=stored.append)
            if metrics["rung"]:  # training waits, since here it may be stopped
                uploader.finish()
        if metrics["rung"]:
            tell(metrics, *stored)

    try:
        if found and found[1].meta["metrics"]["rung"]:
            tell(found[1].meta["metrics"], found[0] if worker.rank == 0 else None)  # it may not have been heard of
        with contextlib.closing(event_log) if event_log else contextlib.nullcontext(), uploader:
            loop.train(
                config,
                data.load_same(config.data, setup["images"]).train,
                worker,
                report,
                resume=resume,
                score=setup["score"],
                rungs=setup["rungs"],
                log=event_log or (lambda metrics, samples: None),
                ready=uploader.ready,
            )
    except Exception as error:
        # What every rank meets, and would meet again, is reported. Anything else ends this worker: Ray Train then ends
        # the others and starts all of them again, up to three times (a hung worker, a storage or a GPU that is gone).
        everywhere = isinstance(error, TrainingFailedError) and not isinstance(error, WorkerFailedError)
        again = isinstance(error, OSError) or is_fault_of_gpu(error)
        if not everywhere and (worker.world_size > 1 or again):
            if isinstance(error, TooLittleMemoryError):
                checkpoints.write_json(GAVE_UP, failure_report(error))
            raise
        traceback.print_exc()
        ray.train.report(failure_report(error))
