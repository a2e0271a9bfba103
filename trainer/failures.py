"""What ends a training, said so that a user knows what to do."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import TrainConfig


@dataclass(frozen=True)
class Worker:
    """One of the processes that train one model together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


class TrainingFailedError(Exception):
    """Training cannot go on, for a reason that every worker meets and a retry would meet again."""


class WorkerFailedError(TrainingFailedError):
    """This worker cannot go on; others may not know of it."""


class TooLittleMemoryError(WorkerFailedError):
    """This worker would meet it again."""


def failure_report(error: Exception) -> dict[str, Any]:
    """What a trial reports in place of metrics: {failure, worker_seconds, rung}."""
    said = str(error) if isinstance(error, TrainingFailedError) else f"{type(error).__name__}: {error}"
    return {"failure": said, "worker_seconds": getattr(error, "worker_seconds", 0.0), "rung": True}


@contextlib.contextmanager
def knowing_its_cost(meta: dict[str, Any]) -> Iterator[None]:
    """What breaks a block carries meta["worker_seconds"]: what the training took until then, over all its lives."""
    try:
        yield
    except Exception as error:
        error.worker_seconds = meta["worker_seconds"]  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def counted(meta: dict[str, Any], worker: Worker) -> Iterator[None]:
    """Adds what a block takes all workers to meta["worker_seconds"]; what breaks it carries the sum."""
    with knowing_its_cost(meta):
        began = time.monotonic()
        try:
            yield
        finally:
            meta["worker_seconds"] += (time.monotonic() - began) * worker.world_size


def is_out_of_memory(error: Exception) -> bool:
    no_memory = (
        *("can't allocate memory", "could not create a primitive"),  # PyTorch's and oneDNN's, on CPUs
        # CUDA's own, Triton's, cuBLAS' and cuDNN's, outside PyTorch's allocator, where a GPU is shared
        *("CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"),
        *("STATUS_ALLOC_FAILED", "ALLOCATION_FAILED"),
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in no_memory)


def is_fault_of_gpu(error: Exception) -> bool:
    """Of the device or its driver: another process may go on where this one cannot."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in ("CUDA error", "cuDNN error"))
    )


def memory_of(device: torch.device) -> str:
    return "the GPU's memory" if device.type == "cuda" else "memory"


@contextlib.contextmanager
def too_little_memory_is(said: Callable[[], str]) -> Iterator[None]:
    """Too little memory in a block becomes a TooLittleMemoryError that says this."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TooLittleMemoryError(said()) from error
        raise


@contextlib.contextmanager
def explained(config: TrainConfig, worker: Worker) -> Iterator[None]:
    """Around steps: too little memory, and workers that do not answer, become a WorkerFailedError with a remedy."""
    try:
        with too_little_memory_is(lambda: _out_of_memory(config, worker)):
            yield
    except RuntimeError as error:
        text = str(error)
        if worker.world_size > 1 and ("Timed out" in text or "closed by peer" in text or "reset by peer" in text):
            raise WorkerFailedError(
                f"another worker did not answer: it died, or it hung for longer than train.hang_seconds="
                f"{config.hang_seconds} ({text.splitlines()[0]})"
            ) from error
        raise


def images_at_once(config: TrainConfig, worker: Worker) -> int:
    """That a worker takes, at most. Those that go on without the others take no more than beside them."""
    workers = max(config.workers, worker.world_size) if config.min_workers else worker.world_size
    most = -(-config.batch_size // workers)
    return min(config.micro_batch or most, most)


def _out_of_memory(config: TrainConfig, worker: Worker) -> str:
    at_once = images_at_once(config, worker)
    remedy = (
        f"set train.micro_batch to {at_once // 2} (gradients are accumulated: the same batch is learned from)"
        if at_once > 1
        else "give a smaller train.model or a smaller train.data.image_size"
    )
    images = f"{at_once} image{'s' if at_once > 1 else ''} at once"
    return (
        f"{memory_of(worker.device)} is too small for {images} (train.batch_size={config.batch_size}, "
        f"train.micro_batch={config.micro_batch}, {worker.world_size} workers); {remedy}"
    )
