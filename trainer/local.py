"""One training in this process: the loop with its checkpoints, events and resume, and no Ray."""

from collections.abc import Callable, Collection

import torch

from trainer import checkpoint, data, loop
from trainer.config import TrainConfig
from trainer.event_log import EventLog
from trainer.storage import Storage

KEPT_CHECKPOINTS = 2  # the one before is what is left where the newest is damaged


def checkpoint_name(metrics: loop.Metrics) -> str:
    """Named by its step: one that is trained again after a crash overwrites its own checkpoint."""
    return f"checkpoint_{metrics['step']:09d}"


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
    report_seconds: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains from the newest whole checkpoint in `checkpoints`, or from the start, to the last epoch.

    report(metrics, checkpoint) comes after each checkpoint is on disk; where the last one was written but not
    reported, it is reported first. Raises TrainingFailedError, and InterruptedTrainingError after stop().
    """
    found = checkpoint.latest(checkpoints)
    resume = found[1] if found else None
    if found is not None and resume is not None and resume.meta.get("metrics"):
        report(resume.meta["metrics"], found[0])
    event_log = EventLog(events, config, resume.meta["epoch"] + 1 if resume else 1)

    def log_all(metrics: loop.Metrics) -> None:
        event_log(metrics, metrics.pop("samples", None))
        log(metrics)

    def save_and_report(metrics: loop.Metrics, save: loop.Save) -> None:
        folder = checkpoints.at(checkpoint_name(metrics))
        save(folder)
        for name in checkpoint.names(checkpoints)[:-KEPT_CHECKPOINTS]:
            checkpoints.delete(name)
        report(metrics, folder)

    worker = loop.Worker(device)
    loop.train(config, images, worker, save_and_report, resume, score, rungs, log_all, report_seconds, stop)


def default_device() -> torch.device:
    """The GPU that this process may use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
