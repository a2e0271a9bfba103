"""TensorBoard events are read as they were meant: once an epoch, to the last whole record."""

from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from evaluation import events


def test_a_resumed_trials_epochs_are_read_once_with_their_latest_value(tmp_path: Path):
    assert events.read(tmp_path) == events.Events()
    assert events.read(tmp_path / "nowhere") == events.Events()
    grids = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    with SummaryWriter(str(tmp_path), purge_step=1) as writer:
        for epoch in range(1, 6):
            writer.add_scalar("train/loss", 1 / epoch, epoch)
            if epoch in (3, 5):
                writer.add_scalar("rung/frechet", 50.0, epoch)
                writer.add_image("samples", grids[epoch], epoch, dataformats="HWC")
    with SummaryWriter(str(tmp_path), purge_step=4) as writer:  # as EventLog does: the checkpoint was of epoch 3
        for epoch in range(4, 8):
            writer.add_scalar("train/loss", 10 + epoch, epoch)
    with SummaryWriter(str(tmp_path)) as writer:  # a restart that was not logged as one
        writer.add_scalar("train/loss", 20.0, 7)
    found = events.read(tmp_path)
    epochs, losses = zip(*found.scalars["train/loss"], strict=True)
    assert epochs == (1, 2, 3, 4, 5, 6, 7)
    assert losses == pytest.approx([1, 1 / 2, 1 / 3, 14, 15, 16, 20])  # events are float32
    assert found.scalars["rung/frechet"] == [(3, 50.0)]  # of epoch 5 it is void
    assert found.samples is not None
    assert (found.samples == grids[3]).all()
    assert len(found.spans) == 3
    assert all(began <= ended for began, ended in found.spans)


def test_a_file_cut_short_is_read_to_its_last_whole_record(tmp_path: Path):
    with SummaryWriter(str(tmp_path)) as writer:
        for epoch in range(1, 1301):  # more than TensorBoard's own reader keeps by default
            writer.add_scalar("train/loss", float(epoch), epoch)
    assert events.read(tmp_path).scalars["train/loss"] == [(epoch, float(epoch)) for epoch in range(1, 1301)]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert events.read(tmp_path).scalars["train/loss"] == [(epoch, float(epoch)) for epoch in range(1, 1300)]
