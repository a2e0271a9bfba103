"""How a training fails: too little memory and silent workers, both of them real, end it with what to do."""

import os
import re
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_loop import BREAKS, CPU, TINY, toy_images

from evaluation.config import SamplerConfig
from evaluation.rung import RungScorer
from trainer import loop
from trainer.config import TrainConfig
from trainer.data import Images
from trainer.failures import (
    TooLittleMemoryError,
    Worker,
    WorkerFailedError,
    explained,
    failure_report,
    images_at_once,
    is_fault_of_gpu,
)

pytestmark = pytest.mark.slow
HANG_SECONDS = 3


@pytest.mark.parametrize(
    ("settings", "world_size", "at_once"),
    [
        ({}, 4, 64),
        ({}, 3, 86),
        ({"min_workers": 1}, 4, 64),
        ({"min_workers": 1}, 3, 64),
        ({"min_workers": 1}, 1, 64),
        ({"min_workers": 1, "micro_batch": 16}, 3, 16),
        ({"micro_batch": 100}, 4, 64),
    ],
)
def test_workers_that_go_on_without_others_take_no_more_at_once_than_before(settings, world_size, at_once):
    """Their memory holds no more; the rest of their share of the batch is accumulated."""
    config = TINY.model_copy(update={"workers": 4, "batch_size": 256} | settings)
    assert images_at_once(config, Worker(torch.device("cpu"), 0, world_size)) == at_once


def out_of_memory(_: int, folder: str) -> None:
    torch.set_num_threads(1)

    def train(batch_size: int, micro_batch: int | None) -> None:  # one step
        images = Images(np.zeros((batch_size, 32, 32, 1), np.uint8), None)
        settings = {"batch_size": batch_size, "micro_batch": micro_batch, "epochs": 1}
        loop.train(TINY.model_copy(update=settings), images, CPU, lambda metrics, snapshot: None)

    train(4, 2)  # every library that is loaded late is loaded now
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 300 * 2**20, resource.RLIM_INFINITY))
    micro_batch: int | None = None
    said = []
    while True:
        try:
            train(2048, micro_batch)
            break
        except loop.TrainingFailedError as error:
            said.append(failure_report(error)["failure"])
            found = re.search(r"set train.micro_batch to (\d+)", said[-1])
            assert found, said
            micro_batch = int(found[1])
    Path(folder, "said").write_text("\n".join(said))


def test_too_little_memory_says_the_batch_and_a_micro_batch_that_leads_to_one_that_fits(tmp_path):
    mp.spawn(out_of_memory, (str(tmp_path),), nprocs=1)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0].startswith("memory is too small for 2048 images at once (train.batch_size=2048, ")
    assert "set train.micro_batch to 1024 (" in said[0]
    assert len(said) < 11, "no batch but one image at once fitted"


def test_one_image_that_does_not_fit_asks_for_a_smaller_model():
    with (
        pytest.raises(WorkerFailedError, match=r"1 image at once .* smaller train.model"),
        explained(TINY.model_copy(update={"micro_batch": 1}), CPU),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def breaking_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for what, rungs in (("loss", ()), ("weights", (1,))):
        try:
            worker = Worker(torch.device("cpu"), rank, 2)
            loop.train(BREAKS, toy_images(), worker, lambda metrics, snapshot: None, rungs=rungs)
        except loop.TrainingFailedError as error:
            Path(folder, f"{what}{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_all_workers_say_the_same_of_a_training_that_diverged(tmp_path):
    mp.spawn(breaking_worker, (str(tmp_path),), nprocs=2)
    for what, said in (
        ("loss", "the loss is nan at step 2 (epoch 2); the last finite one was"),
        ("weights", "weights"),
    ):
        assert (tmp_path / f"{what}0").read_text().startswith(said)
        assert (tmp_path / f"{what}0").read_text() == (tmp_path / f"{what}1").read_text()


def test_too_little_memory_for_a_rung_asks_for_a_smaller_block_of_its_sampler():
    def judged(block_size: int) -> None:
        sampler = SamplerConfig(steps=2, block_size=block_size)
        score = RungScorer(None, None, toy_images(4).pixels, 4, sampler, "grid_loss")
        loop.train(TINY, toy_images(), CPU, lambda metrics, snapshot: None, score=score)

    judged(2)
    with pytest.raises(TooLittleMemoryError, match=f"early_stopping.sampler.block_size to {2**50} ") as failed:
        judged(2**51)
    assert str(failed.value).startswith("memory is too small to score a rung: 2,251,799,813,685,248 images at once")
    assert 0 < failed.value.worker_seconds < 60


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_gpu_s_memory_ends_in_several_words(error):
    with pytest.raises(TooLittleMemoryError, match=r"set train\.micro_batch to "), explained(TINY, CPU):
        raise error


def test_another_fault_of_a_gpu_is_not_too_little_memory():
    with pytest.raises(torch.AcceleratorError, match="illegal"), explained(TINY, CPU):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("error", "of_gpu"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TooLittleMemoryError("the GPU's memory is too small"), False),
    ],
)
def test_what_another_process_may_not_meet_is_known(error, of_gpu):
    assert is_fault_of_gpu(error) == of_gpu


def silent_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=HANG_SECONDS),
    )
    stopped: list[float] = []

    def report(metrics: loop.Metrics, snapshot: Any) -> None:
        stopped.append(time.monotonic())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    config: TrainConfig = TINY.model_copy(update={"hang_seconds": HANG_SECONDS})
    try:
        loop.train(config, toy_images(), Worker(torch.device("cpu"), rank, 2), report, rungs=[1])
    except WorkerFailedError as error:
        Path(folder, f"rank{rank}").write_text(f"{time.monotonic() - stopped[0]} {error}")


def test_a_worker_that_stops_within_a_step_is_given_up_after_hang_seconds(tmp_path):
    context = mp.get_context("spawn")
    ranks = [context.Process(target=silent_worker, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(timeout=60)
        seconds, said = (tmp_path / "rank0").read_text().split(" ", 1)
        assert HANG_SECONDS - 0.5 < float(seconds) < HANG_SECONDS + 5
        assert "another worker did not answer: it died, or it hung for longer than train.hang_seconds=3" in said
        assert not (tmp_path / "rank1").exists()
    finally:
        for process in ranks:
            process.kill()
            process.join()
