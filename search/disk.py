"""The room that a run takes: what it will need, what is kept of a trial that has ended, and a disk that is full."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from search.config import SearchConfig, UserError
from search.interrupt import resume_command
from search.records import ENDED, NOT_CHOSEN, Row
from trainer import checkpoint, model
from trainer.storage import Storage

OF_A_RUNNING_TRIAL = 5  # checkpoints: the last two rungs', the two newest, and one that is being written
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_bytes(config: SearchConfig, checkpoint_bytes: int, at_once: int) -> int:
    """Of checkpoints, at most: one of each trial that has ended, confirmations too, five of each that runs."""
    running = min(at_once, config.trials)
    return checkpoint_bytes * (config.trials + config.confirmations + running * (OF_A_RUNNING_TRIAL - 1))


def expected_checkpoint_bytes(config: SearchConfig, shape: tuple[int, int, int]) -> int:
    """Of weights, their averages and Adam's two moments, in float32: what a checkpoint is but for some kilobytes.

    Of the largest model and the most averages that space.train may choose.
    """
    variants = [training for _, training in config.variants()]
    with torch.device("meta"):
        networks = [model.build(chosen, shape, 0.0, seed=0) for chosen in {training.model for training in variants}]
    weights = max(sum(p.numel() for p in network.parameters()) for network in networks)
    return weights * 4 * (3 + max(len(training.ema_decays) for training in variants))


def free_bytes(run: Storage) -> int | None:
    """Free space where a run is or will be; None where that is no local folder."""
    if not run.is_local:
        return None
    folder = Path(run.root)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shortage(needed: int, run: Storage) -> str | None:
    """A warning where there is less room than a run may need."""
    free = free_bytes(run)
    if free is None or needed <= free:
        return None
    return f"Warning: this run may need {size(needed)} of disk, but {size(free)} are free at {run.uri}"


def size(count: float) -> str:
    """1.5 GB"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def keep_what_is_asked_for(run: Storage, row: Row) -> None:
    """Deletes the checkpoints of a trial that has ended, but the one that ranking and export take, if there is one."""
    folder = f"train/{row.trial}"
    names = [f"{folder}/{name}" for name in checkpoint.names(run.at(folder))]
    if row.state in ENDED and row.reason != NOT_CHOSEN and (row.checkpoint is None or row.checkpoint in names):
        for name in names:
            if name != row.checkpoint:
                run.delete(name)


@contextlib.contextmanager
def full_disk_said(run: Storage) -> Iterator[None]:
    """Raises UserError where there is no room: what is on disk is whole, since every write replaces a whole file."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # Tune raises errors of its own from those of its parts
        while cause and not (isinstance(cause, OSError) and cause.errno in DISK_FULL):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise UserError(
            f"no room is left at {run.uri} ({cause}); what is finished is kept: "
            f"free some, then: {resume_command(run.uri)}"
        ) from error
