"""What one trial costs, in seconds, bytes and a GPU's memory: from steps that are really taken."""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from pydantic import ValidationError
from rich.console import Console

from cluster import capacity
from evaluation.files import parquet_of
from evaluation.rung import RungScorer
from evaluation.sampling import Sampler
from search.config import SearchConfig, UserError
from search.disk import expected_checkpoint_bytes, size
from search.space_config import Range
from trainer import checkpoint, data, failures, local, loop, speed
from trainer.config import ModelConfig, TrainConfig
from trainer.failures import TooLittleMemoryError
from trainer.storage import Storage

STEPS_SECONDS = 3.0  # how long training steps are timed
CONTEXT_BYTES = 600 * 2**20  # of a GPU, for CUDA itself in a process, before it holds anything: generous
MEMORY = ("model", "batch_size", "micro_batch", "ema_decays")  # settings that change how much of it a training takes


@dataclass(frozen=True)
class Measured:
    """Of one worker of one trial with the base training's settings; communication between workers is not in it."""

    start_seconds: float  # a process with its imports and data
    step_seconds: float
    rung_seconds: float  # the scores of one EMA
    checkpoint_bytes: int  # or what is expected of a larger choice of space.train
    image_seconds: float = 0.0  # of the final stage: drawing and judging one image
    image_bytes: int = 0  # what the final stage keeps of one image
    gpu_bytes: int = 0  # a GPU's memory that one training with its rungs takes, context and all; 0 on CPUs
    gpu_room_bytes: int = 0  # what others left of it


def measure(config: SearchConfig, scorer: RungScorer, asked_at: float, final_stage: bool) -> Measured:
    """Trains and samples a few steps in this process. asked_at: time.time() when it was asked for."""
    training, device = config.train, local.default_device()
    before, _ = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    images, worker = data.load(training.data).train, loop.Worker(device)

    def train(steps: range) -> None:
        for step in steps:
            advance(step)

    with failures.explained(training, dataclasses.replace(worker, world_size=training.workers)):
        advance = loop.TrainStep(_share(training, len(images), device), images, worker)
        start_seconds = time.time() - asked_at
        train(range(3))
        count = max(1, min(50, int(STEPS_SECONDS / _seconds(lambda: train(range(3, 4)), device))))
        step_seconds = _seconds(lambda: train(range(4, 4 + count)), device) / count
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Storage(folder), advance.state(), {"config": training.model_dump(mode="json")})
        checkpoint_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    checkpoint_bytes = max(checkpoint_bytes, expected_checkpoint_bytes(config, images.shape))
    denoiser = advance.emas[0].model

    def rung(steps: int) -> Callable[[], Any]:
        scored = dataclasses.replace(scorer, sampler=scorer.sampler.model_copy(update={"steps": steps}))
        return lambda: scored(denoiser, training, device)

    rung_seconds = _of_steps(rung, scorer.sampler.steps, device)
    gpu, drawing = {}, {}
    if device.type == "cuda":
        after, total = torch.cuda.mem_get_info(device)
        gpu = gpu_memory(total, before, after, torch.cuda.max_memory_reserved(device))
    if final_stage:
        del advance  # whoever draws there holds no training
        local.release_memory()
        drawing = _final_stage(config, scorer, denoiser, images.shape, device)
    return Measured(start_seconds, step_seconds, rung_seconds, checkpoint_bytes, **drawing, **gpu)


def _share(training: TrainConfig, images: int, device: torch.device) -> TrainConfig:
    """One worker's part of a training, as a training of its own that is as fast."""
    if training.workers == 1:
        return training
    steps = data.epoch_end(training.epochs, images, training.batch_size)
    switches = speed.decide(training.speed, device, training.workers, steps)
    own = {
        "batch_size": training.batch_size // training.workers,
        "min_workers": None,
        "speed": training.speed.model_copy(update=dataclasses.asdict(switches)),
    }
    return training.model_copy(update=own)


def _final_stage(
    config: SearchConfig, scorer: RungScorer, denoiser: Any, shape: tuple[int, int, int], device: torch.device
) -> dict[str, Any]:
    """image_seconds and image_bytes. Raises TooLittleMemoryError."""
    settings, kept = config.final.sampler, 0

    def block(steps: int) -> Callable[[], None]:
        sampled = settings.model_copy(update={"steps": steps})
        sampler = Sampler(denoiser, config.train.schedule.betas(), shape, sampled, device)
        extractor = scorer.extractor and scorer.extractor.to(device)
        if device.type == "cuda":
            sampler.block(0)  # its graph, which is captured once for all blocks

        def draw() -> None:
            nonlocal kept
            drawn = sampler.block(1)
            if extractor is not None:
                judged = extractor.extract(drawn)
                kept = (judged.features.nbytes + judged.probabilities.nbytes) // len(drawn)
            if config.final.keep_images:
                kept += len(parquet_of(drawn, 0)) // len(drawn)

        return draw

    def too_little() -> str:
        return (
            f"{failures.memory_of(device)} is too small to draw {settings.block_size:,} images at once; "
            f"set final.sampler.block_size to {settings.block_size // 2}"
        )

    with failures.too_little_memory_is(too_little):
        seconds = _of_steps(block, settings.steps, device)
    return {"image_seconds": seconds / settings.block_size, "image_bytes": kept}


def gpu_memory(total: int, before: int, after: int, reserved: int) -> dict[str, int]:
    """gpu_bytes that this process takes, and gpu_room_bytes for it and its like.

    before, after: what was free when it had its context and nothing else, and at last; what others had, they keep.
    reserved: PyTorch's most, which counts where another process ended meanwhile.
    """
    return {
        "gpu_bytes": CONTEXT_BYTES + max(before - after, reserved),
        "gpu_room_bytes": min(total, before + CONTEXT_BYTES),
    }


def measure_on_cluster(config: SearchConfig, scorer: RungScorer, use_gpu: bool, final_stage: bool = True) -> Measured:
    """`measure` where a trial would run. Raises UserError where one has too little memory."""
    # max_calls: the process ends, and gives back the GPU's memory, which the next one to measure or train counts on.
    task = ray.remote(max_calls=1, max_retries=0)(measure).options(num_cpus=1, num_gpus=int(use_gpu))
    try:
        result: Measured = ray.get(task.remote(config, scorer, time.time(), final_stage))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TooLittleMemoryError):
            raise UserError(str(error.cause)) from error
        raise
    return result


def trials_per_gpu(config: SearchConfig, scorer: RungScorer, console: Console) -> int:
    """What `auto` is: as many as a GPU holds of the trial that takes most of its memory.

    1 where it does not hold each, which would fail and might take its neighbours along. Raises UserError where it
    holds none.
    """
    held, refused = [], []
    for training in most_memory(config):
        try:
            asked = config.model_copy(update={"train": training})
            held.append(measure_on_cluster(asked, scorer, use_gpu=True, final_stage=False))
        except UserError as error:
            refused.append(error)
    if not held:
        raise refused[0]
    most = max(held, key=lambda one: one.gpu_bytes)
    count = 1 if refused else capacity.trials_per_gpu(most.gpu_bytes, most.gpu_room_bytes)
    why = f": {refused[0]}" if refused else f" ({size(most.gpu_bytes)} each of {size(most.gpu_room_bytes)})"
    console.print(f"Trials per GPU: {count}{why}")
    return count


def most_memory(config: SearchConfig) -> list[TrainConfig]:
    """Of the trainings that a search may try, those that take most of a GPU's memory: one or a few of each model."""
    choices = [[(name, value) for value in values] for name, values in config.space.train.items()]
    points = [point.train.items() for point in config.known_points]
    need: dict[tuple[ModelConfig, int, int], TrainConfig] = {}
    for settings in [*itertools.product(*choices), *points]:
        with contextlib.suppress(ValidationError):  # of two that do not go together: such a trial does not begin
            made = config.training({name: value for name, value in settings if name.partition(".")[0] in MEMORY})
            at_once = min(made.micro_batch or made.batch_size, made.batch_size)
            need[made.model, at_once, len(made.ema_decays)] = made

    def outdone(model: ModelConfig, images: int, emas: int) -> bool:
        others = [(n, k) for other, n, k in need if other == model and (n, k) != (images, emas)]
        return any(n >= images and k >= emas for n, k in others)

    most = [made for which, made in need.items() if not outdone(*which)]
    searched = config.space.dropout  # where there is none, its masks are not kept
    dropout = searched.high if isinstance(searched, Range) else searched or 0.0
    return [made.model_copy(update={"dropout": max(made.dropout, dropout)}) for made in most]


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _of_steps(made: Callable[[int], Callable[[], Any]], steps: int, device: torch.device) -> float:
    """Seconds of a sampler of so many steps, from one of a few and one of more: the rest is a straight line."""
    few, more = (5, 25) if device.type == "cuda" else (2, 4)  # a GPU's steps are short beside capturing its graph
    made(1)()
    if steps <= more:
        return _seconds(made(steps), device)
    short, long = _seconds(made(few), device), _seconds(made(more), device)
    return short + (steps - few) * max(0.0, long - short) / (more - few)
