"""What a trial costs: sizes that are those of real files, and the GPU's memory that trials share."""

import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from rich.console import Console

from evaluation.config import SamplerConfig
from evaluation.rung import RungScorer
from search import trial_cost
from search.config import UserError
from search.config_file import load
from search.trial_cost import Measured
from trainer import data, failures, local
from trainer.storage import Storage

SMALL = [
    "train.model={channels: [8, 16], attention: [false, true], attention_head_dim: 8, norm_groups: 4}",
    "train.epochs=1",
    "train.data.subset=64",
    "train.batch_size=16",
    "final.sampler={steps: 6, block_size: 8}",
]
GIB = 2**30
NOTHING = Measured(0.0, 0.0, 0.0, 0)
COSINE = {"family": "cosine", "start": 0, "end": 1}


@pytest.mark.parametrize("others", [0, 30 * GIB])
@pytest.mark.parametrize("ended_meanwhile", [0, 20 * GIB])
def test_memory_of_a_gpu_that_others_hold_is_neither_the_trials_nor_for_trials(others, ended_meanwhile):
    total, own, context = 80 * GIB, 7 * GIB, trial_cost.CONTEXT_BYTES
    before = total - others - context
    after = before - own + min(others, ended_meanwhile)
    assert trial_cost.gpu_memory(total, before, after, reserved=own) == {
        "gpu_bytes": own + context,
        "gpu_room_bytes": total - others,
    }


@pytest.mark.slow
def test_what_is_measured_is_what_a_training_writes(tmp_path):
    config = load("digits", SMALL)
    splits = data.load(config.train.data)
    scorer = RungScorer(None, None, splits.held_out.pixels, 8, SamplerConfig(steps=6, block_size=8), "grid_loss")
    measured = trial_cost.measure(config, scorer, 0.0, final_stage=True)
    local.fit(
        config.train,
        splits.train,
        Storage(tmp_path),
        Storage(tmp_path),
        torch.device("cpu"),
        lambda metrics, folder: None,
    )
    (folder,) = tmp_path.glob("checkpoint_*")
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert measured.checkpoint_bytes == pytest.approx(written, rel=0.05)
    assert min(measured.step_seconds, measured.rung_seconds, measured.image_seconds) > 0


def small(channels):
    return {"channels": channels, "attention": [False, True], "attention_head_dim": 8, "norm_groups": 4}


SAME = ({"batch_size": 16}, {"batch_size": 64, "micro_batch": 16, "lr_decay": 0.5}, {})


@pytest.mark.parametrize(
    ("space", "points", "most"),
    [
        ({}, SAME, {(8, 16, 1)}),
        ({"lr_decay": [0.5, 0.9]}, (), {(8, 16, 1)}),
        # each choice is suggested by itself: the largest of all may come together
        ({"batch_size": [16, 512, 32], "ema_decays": [[0.9], [0.9, 0.99, 0.999]]}, (), {(8, 512, 3)}),
        ({"batch_size": [16, 512], "micro_batch": [None, 8]}, (), {(8, 512, 1)}),
        ({"batch_size": [16, 512], "micro_batch": [8]}, (), {(8, 8, 1)}),
        ({"model": [small([8, 16]), small([16, 16])], "batch_size": [16, 32]}, (), {(8, 32, 1), (16, 32, 1)}),
        ({"batch_size": [4, 8]}, (), {(8, 8, 1)}),  # the base training's 16 never come
        ({"batch_size": [4, 8]}, SAME, {(8, 16, 1)}),  # but a known point's do
        ({}, ({"batch_size": 1024}, {"ema_decays": [0.9, 0.99]}), {(8, 1024, 1), (8, 16, 2)}),
        ({"model.channels": [[8, 16], [8, 16, 16]]}, (), {(8, 16, 1)}),  # three levels have no three attentions
    ],
)
def test_the_largest_trainings_that_may_come_are_measured(space, points, most):
    config = load("digits", [*SMALL, f"known_points={json.dumps([COSINE | {'train': train} for train in points])}"])
    config = config.model_copy(update={"space": config.space.model_copy(update={"train": space})})
    found = trial_cost.most_memory(config)
    assert {
        (made.model.channels[0], min(made.micro_batch or made.batch_size, made.batch_size), len(made.ema_decays))
        for made in found
    } == most
    assert {made.dropout for made in found} == {0.2}  # the most that is searched: its masks are kept


def counted(config, scorer):
    console = Console(file=io.StringIO(), width=200)
    return trial_cost.trials_per_gpu(config, scorer, console), console.file.getvalue()  # type: ignore[attr-defined]


def test_as_many_trials_share_a_gpu_as_it_holds_of_the_largest_and_none_where_one_does_not_fit(monkeypatch):
    def measured(config, scorer, use_gpu, final_stage):
        assert use_gpu
        assert not final_stage
        if config.train.batch_size > 64:
            raise UserError("the GPU's memory is too small for 512 images at once")
        return dataclasses.replace(NOTHING, gpu_bytes=config.train.batch_size * GIB, gpu_room_bytes=160 * GIB)

    monkeypatch.setattr(trial_cost, "measure_on_cluster", measured)
    assert counted(load("digits", SMALL), None) == (9, "Trials per GPU: 9 (17.2 GB each of 172 GB)\n")
    two = ["space.train.batch_size=[16, 512]", "space.train.model=" + json.dumps([small([8, 16]), small([16, 16])])]
    large, larger = [*SMALL, "train.batch_size=64"], [*SMALL, "train.batch_size=512", "train.data.subset=600"]
    assert counted(load("digits", [*large, two[1]]), None)[0] == 2
    wide = "known_points=" + json.dumps([COSINE | {"train": {"batch_size": 512, "model": small([16, 16])}}])
    count, said = counted(load("digits", [*large, wide, "space.train.batch_size=[16, 64]"]), None)
    assert (count, said) == (1, "Trials per GPU: 1: the GPU's memory is too small for 512 images at once\n")
    with pytest.raises(UserError, match="512 images"):
        counted(load("digits", larger), None)


@pytest.mark.parametrize(("workers", "share"), [(1, 16), (4, 4), (16, 1)])
def test_a_worker_s_share_is_as_fast_as_the_training(workers, share):
    """On a GPU: compiling pays for itself by the steps of the training, which are fewer than its shares' would be."""
    config = load("digits", [*SMALL, "runner=train", "train.batch_size=16", f"train.workers={workers}"]).train
    own = trial_cost._share(config, 800_000, torch.device("cuda"))
    assert own.batch_size == share
    assert (own is config) == (workers == 1)
    elastic = trial_cost._share(config.model_copy(update={"min_workers": 1}), 800_000, torch.device("cuda"))
    assert failures.images_at_once(elastic, failures.Worker(torch.device("cpu"))) == share
    if workers > 1:
        assert own.speed.compile is True
        assert own.speed.cuda_graphs is False
        short = trial_cost._share(config, 400_000, torch.device("cuda"))
        assert short.speed.compile is False  # 25,000 steps, though 100,000 or more of its shares


@dataclasses.dataclass(frozen=True)
class Signing(RungScorer):
    """Leaves the process that it scored in."""

    folder: str = ""

    def __call__(self, *args):
        Path(self.folder, str(os.getpid())).touch()
        return super().__call__(*args)


@pytest.mark.slow
@pytest.mark.ray
def test_what_measures_ends_and_gives_its_memory_back_and_too_little_memory_is_the_user_s_to_mend(tmp_path, local_ray):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the tests
    config = load("digits", SMALL)
    probe = data.load(config.train.data).held_out.pixels
    sampler = SamplerConfig(steps=6, block_size=8)
    trial_cost.measure_on_cluster(
        config, Signing(None, None, probe, 8, sampler, "grid_loss", None, str(tmp_path)), use_gpu=False
    )
    (process,) = (int(path.name) for path in tmp_path.iterdir())
    end = time.monotonic() + 20
    while psutil.pid_exists(process):
        assert time.monotonic() < end, "it keeps what it took, of a GPU too"
        time.sleep(0.1)

    too_large = sampler.model_copy(update={"block_size": 2**51})
    with pytest.raises(UserError, match=f"early_stopping.sampler.block_size to {2**50} "):
        trial_cost.measure_on_cluster(config, RungScorer(None, None, probe, 8, too_large, "grid_loss"), use_gpu=False)
    drawn = config.final.model_copy(update={"sampler": too_large})
    config, scorer = config.model_copy(update={"final": drawn}), RungScorer(None, None, probe, 8, sampler, "grid_loss")
    with pytest.raises(UserError, match=f"final.sampler.block_size to {2**50}$"):
        trial_cost.measure_on_cluster(config, scorer, use_gpu=False)
    assert trial_cost.measure_on_cluster(config, scorer, use_gpu=False, final_stage=False).image_seconds == 0
