"""One training in this process: the loop with its checkpoints, events and resume, and no Ray."""

import contextlib
import gc
from collections.abc import Callable, Collection

import numpy as np
import torch

from trainer import checkpoint, data, loop
from trainer.config import TrainConfig
from trainer.event_log import EventLog
from trainer.storage import Storage
from trainer.upload import Uploader


def fit(
    config: TrainConfig,
    images: data.Images,
    checkpoints: Storage,
    events: Storage,
    device: torch.device,
    report: Callable[[loop.Metrics, Storage], None],
    score: loop.Scorer | None = None,
    rungs: Collection[int] = (),
    log: Callable[[loop.Metrics], None] = lambda metrics: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains from the newest whole checkpoint of `config` in `checkpoints`, or from the start, to the last epoch.

    report(metrics, checkpoint) comes after each checkpoint is stored, on this thread. At rungs and at the end training
    waits for that, since there it may be stopped; elsewhere it goes on, and the report comes before the next one.
    Where the last checkpoint was stored but not reported, it is reported first.
    Raises TrainingFailedError, what storing raised, and InterruptedTrainingError after stop().
    """
    found = checkpoint.latest(checkpoints, of=config)
    resume = found[1] if found else None
    if found is not None and resume is not None and resume.meta.get("metrics"):
        report(resume.meta["metrics"], found[0])
    event_log = EventLog(events, config, resume.meta["epoch"] + 1 if resume else 1)

    def log_all(metrics: loop.Metrics, samples: np.ndarray | None) -> None:
        event_log(metrics, samples)
        log(metrics)

    def store_and_report(metrics: loop.Metrics, snapshot: loop.Snapshot) -> None:
        uploader.start(snapshot(), then=lambda folder: report(metrics, folder))
        if metrics["rung"]:
            uploader.finish()

    with contextlib.closing(event_log), Uploader(checkpoints) as uploader:
        loop.train(
            config,
            images,
            loop.Worker(device),
            store_and_report,
            resume,
            score,
            rungs,
            log_all,
            ready=uploader.ready,
            stop=stop,
        )


def release_memory() -> None:
    """Gives back what finished trainings held, on the GPU too. No CUDA graph may be in use: its memory may go."""
    # What only reference cycles hold: a graphed network refers to its own replaced forward, and its graph's memory,
    # weights and all, would stay until Python looks.
    gc.collect()
    if torch.cuda.is_available():
        # cuBLAS keeps a workspace for each stream, and each capture of a graph takes a new one: 65 MiB a training, seen
        # on an H200. PyTorch's own graphs of compiled models clear them by the same call.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def default_device() -> torch.device:
    """The GPU that this process may use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
