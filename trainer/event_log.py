"""TensorBoard events of one training: scalars, sample grids, hyperparameters."""

import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.config import TrainConfig
from trainer.storage import Storage

SCALARS = {
    "train_loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "ema_decay": "train/ema_decay",
    "images_per_second": "speed/images_per_second",
    "epoch_seconds": "speed/epoch_seconds",
    "frechet": "rung/frechet",
    "score": "rung/score",
    "grid_loss": "rung/grid_loss",
}


class EventLog:
    """Writes to `folder`. Events need a local disk; elsewhere they are written locally and copied at rungs."""

    def __init__(self, folder: Storage, config: TrainConfig, first_epoch: int):
        self.folder = folder
        local = folder.root if folder.is_local else tempfile.mkdtemp(prefix="ddpm-search-events-")
        self.local = Path(local)
        _wait_for_a_later_second(folder)
        # Epochs after the checkpoint that is resumed were logged by a process that died: they are logged again.
        self.writer = SummaryWriter(local, purge_step=first_epoch, flush_secs=10)
        schedule = config.schedule
        experiment, start, _ = hparams(
            {
                "family": schedule.family,
                "start": schedule.start,
                "end": schedule.end,
                "tau": schedule.tau,
                "learning_rate": config.learning_rate,
                "dropout": config.dropout,
                "batch_size": config.batch_size,
            },
            dict.fromkeys(("rung/frechet", "rung/score", "rung/grid_loss", "train/loss"), 0.0),
        )
        # Its end is not written: a trial that is stopped early has no last moment of its own.
        events = self.writer._get_file_writer()  # the public add_hparams would open a second event file
        for summary in (experiment, start):
            events.add_summary(summary)

    def __call__(self, metrics: dict[str, Any], samples: np.ndarray | None = None) -> None:
        """Logs one epoch; `samples` is a (H, W, C) uint8 picture of a grid of images."""
        for name, tag in SCALARS.items():
            if metrics.get(name) is not None:
                self.writer.add_scalar(tag, metrics[name], metrics["epoch"])
        if samples is not None:
            self.writer.add_image("samples", samples, metrics["epoch"], dataformats="HWC")
        self.writer.flush()
        if metrics["rung"]:
            self._copy()

    def close(self) -> None:
        """Ends its thread; what was logged since the last rung is copied too."""
        self.writer.close()
        self._copy()
        if not self.folder.is_local:
            shutil.rmtree(self.local, ignore_errors=True)

    def _copy(self) -> None:
        if not self.folder.is_local:
            for file in self.local.iterdir():
                self.folder.write(file.name, file.read_bytes())


def _wait_for_a_later_second(folder: Storage) -> None:
    """Files are read in the order of their names, which begin with a second and end in a number without zeros before
    it: of two of one second the later may come first, and its epochs be taken for those of a process that died.
    """
    found = (re.match(r"events\.out\.tfevents\.(\d+)", name) for name in folder.names())
    taken = {int(seconds[1]) for seconds in found if seconds}
    while int(time.time()) in taken:
        time.sleep(0.05)
