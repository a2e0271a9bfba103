"""What a run will cost, before it costs anything: `run --dry-run`, from steps that are really taken."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from evaluation.report_words import label, searched_words
from evaluation.rung import RungScorer
from evaluation.sampling import Sampler
from search import space
from search.config import SearchConfig, UserError
from search.disk import disk_bytes, expected_checkpoint_bytes, size
from search.records import Records
from search.searcher import HonestOptunaSearch
from search.space_config import Range
from trainer import checkpoint, data, failures, local, loop
from trainer.config import TrainConfig
from trainer.failures import TooLittleMemoryError
from trainer.storage import Storage

STEPS_SECONDS = 3.0  # how long training steps are timed
PASSED_BY_MEDIAN = 0.5
CONTEXT_BYTES = 600 * 2**20  # of a GPU, for CUDA itself in a process, before it holds anything: generous


@dataclass(frozen=True)
class Measured:
    """Of one worker of one trial with the base training's settings; communication between workers is not in it."""

    start_seconds: float  # a process with its imports and data
    step_seconds: float
    rung_seconds: float  # the scores of one EMA
    checkpoint_bytes: int  # or what is expected of a larger choice of space.train
    image_seconds: float  # of the final stage: drawing and judging one image
    image_bytes: int  # what the final stage keeps of one image
    gpu_bytes: int = 0  # a GPU's memory that one training with its rungs takes, context and all; 0 on CPUs
    gpu_room_bytes: int = 0  # what others left of it


def measure(config: SearchConfig, scorer: RungScorer, asked_at: float) -> Measured:
    """Trains and samples a few steps in this process. asked_at: time.time() when it was asked for."""
    training, device = config.train, local.default_device()
    before, _ = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    share = max(1, training.batch_size // training.workers)
    images = data.load(training.data).train
    own, worker = training.model_copy(update={"batch_size": share}), loop.Worker(device)

    def train(steps: range) -> None:
        for step in steps:
            advance(step)

    with failures.explained(own, worker):
        advance = loop.TrainStep(own, images, worker)
        start_seconds = time.time() - asked_at
        train(range(3))
        count = max(1, min(50, int(STEPS_SECONDS / _seconds(lambda: train(range(3, 4)), device))))
        step_seconds = _seconds(lambda: train(range(4, 4 + count)), device) / count
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Storage(folder), advance.state(), {"config": training.model_dump(mode="json")})
        checkpoint_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    checkpoint_bytes = max(checkpoint_bytes, expected_checkpoint_bytes(config, images.shape))

    denoiser, betas = advance.emas[0].model, training.schedule.betas()

    def rung(steps: int) -> Callable[[], Any]:
        scored = dataclasses.replace(scorer, sampler=scorer.sampler.model_copy(update={"steps": steps}))
        return lambda: scored(denoiser, training, device)

    kept = 0

    def block(steps: int) -> Callable[[], None]:
        settings = config.final.sampler.model_copy(update={"steps": steps})
        sampler = Sampler(denoiser, betas, images.shape, settings, device)
        extractor = scorer.extractor and scorer.extractor.to(device)
        if device.type == "cuda":
            sampler.block(0)  # its graph, which is captured once for all blocks

        def draw() -> None:
            nonlocal kept
            drawn = sampler.block(1)
            if extractor is not None:
                judged = extractor.extract(drawn)
                kept = (judged.features.nbytes + judged.probabilities.nbytes) // len(drawn)

        return draw

    rung_seconds = _of_steps(rung, scorer.sampler.steps, device)
    gpu = (0, 0)
    if device.type == "cuda":
        after, total = torch.cuda.mem_get_info(device)
        gpu = gpu_memory(total, before, after, torch.cuda.max_memory_reserved(device))
    block_seconds = _of_steps(block, config.final.sampler.steps, device)
    return Measured(
        start_seconds,
        step_seconds,
        rung_seconds,
        checkpoint_bytes,
        block_seconds / config.final.sampler.block_size,
        kept,
        *gpu,
    )


def gpu_memory(total: int, before: int, after: int, reserved: int) -> tuple[int, int]:
    """Bytes of a GPU that this process takes, and what there is for it and its like.

    before, after: what was free when it had its context and nothing else, and at last; what others had, they keep.
    reserved: PyTorch's most, which counts where another process ended meanwhile.
    """
    return CONTEXT_BYTES + max(before - after, reserved), min(total, before + CONTEXT_BYTES)


def measure_on_cluster(config: SearchConfig, scorer: RungScorer, use_gpu: bool) -> Measured:
    """`measure` where a trial would run. Raises UserError where one has too little memory."""
    # max_calls: the process ends, and gives back the GPU's memory, which the next one to measure or train counts on.
    task = ray.remote(max_calls=1, max_retries=0)(measure).options(num_cpus=1, num_gpus=int(use_gpu))
    try:
        result: Measured = ray.get(task.remote(config, scorer, time.time()))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TooLittleMemoryError):
            raise UserError(str(error.cause)) from error
        raise
    return result


def largest_on_cluster(config: SearchConfig, scorer: RungScorer) -> Measured:
    """Of the trials that `config` may try, the one that takes most of a GPU's memory."""

    def needs(training: TrainConfig) -> tuple[Any, ...]:
        return training.model, training.batch_size, training.micro_batch, len(training.ema_decays)

    unlike = {needs(training): training for _, training in config.variants()}
    measured = [
        measure_on_cluster(config.model_copy(update={"train": training}), scorer, use_gpu=True)
        for training in unlike.values()
    ]
    return max(measured, key=lambda one: one.gpu_bytes)


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


def forecast(config: SearchConfig, measured: Measured, images: int, at_once: int, slots: int) -> dict[str, Any]:
    """Hours and bytes of a run. images: of the training split; slots: workers that the cluster holds.

    `expected` takes a share of 1/reduction (median: a half) to pass each rung; `at_most` is where no trial is stopped.
    """
    stopping = config.early_stopping
    passed = {"asha": 1 / stopping.reduction, "median": PASSED_BY_MEDIAN, "none": 1.0}[stopping.scheduler]
    rungs, train = config.rung_epochs(), config.train
    steps = [data.epoch_end(epoch, images, train.batch_size) for epoch in (0, *rungs, train.epochs)]
    scored = [measured.rung_seconds] * len(rungs) + [measured.rung_seconds * len(train.ema_decays)]
    parts = [(b - a) * measured.step_seconds + s for a, b, s in zip(steps, steps[1:], scored, strict=False)]

    def hours(share: float) -> dict[str, float]:
        """Where so many of the trials at a rung pass it."""
        trial = sum(part * share**index for index, part in enumerate(parts))
        rounds = max(1.0, config.trials / at_once)
        if share == 1:
            rounds = math.ceil(rounds)
        starts = rounds if config.runner == "train" else 1
        # However many at once, one is trained in full.
        search = (max(rounds * trial, sum(parts)) + starts * measured.start_seconds) / 3600
        work = config.trials * trial * train.workers / 3600
        limits = ((config.budget.hours, search), (config.budget.worker_hours, work))
        allowed = [(1 - config.budget.reserve) * limit / needed for limit, needed in limits if limit and needed]
        cut = min([1.0, *allowed])
        return {"search": search * cut, "workers": work * cut}

    drawn = (config.final.top + config.confirmations) * config.final.images
    return {
        "trial_hours": sum(parts) / 3600,
        "expected": hours(passed),
        "at_most": hours(1.0),
        "confirm_hours": math.ceil(config.confirmations / at_once) * sum(parts) / 3600,
        "final_stage_hours": drawn * measured.image_seconds / slots / 3600,
        "disk_bytes": disk_bytes(config, measured.checkpoint_bytes, at_once) + drawn * measured.image_bytes,
    }


def describe(config: SearchConfig, metric: str) -> dict[str, Any]:
    """The space, and what becomes of each known point before it is trained. Writes nothing that stays."""
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Storage(folder))
        searcher = HonestOptunaSearch(config.model_copy(update={"name": "plan"}), metric, records, None)
        for point in config.known_points:
            records.add(searcher.new_row(space.known_params(config, point), known=True))
        known = [row.params() | {"screened" if row.state == "screened" else "reused": row.reason} for row in records]
    families = {
        family: {n: v.model_dump() if isinstance(v, Range) else v for n, v in space.parameters(config, family).items()}
        for family in config.space.families
    }
    return {
        "space": families,
        "choices": {name: list(values) for name, values in config.space.train.items()},
        "known_points": known,
    }


def show(plan: dict[str, Any], console: Console) -> None:
    """The plan as a person reads it."""
    measured, cost = plan["measured"], plan["forecast"]
    base = " (of the base training, as all hours here)" if plan["choices"] else ""
    console.print(f"Plan of {plan['run']}: nothing is written there, nothing is trained.\n")
    console.print("Space")
    for family, named in plan["space"].items():
        own = ", ".join(
            f"{n.partition('.')[2]} {searched_words(v)}" for n, v in named.items() if n.startswith(f"{family}.")
        )
        console.print(f"  {family:<16}{own}")
    shared = {n: v for n, v in next(iter(plan["space"].values())).items() if "." not in n} | plan["choices"]
    for name, value in shared.items():
        console.print(f"  {name:<16}{searched_words(value)}")
    console.print("Known points, tried first")
    for point in plan["known_points"]:
        said = next((f"{key}: {point[key]}" for key in ("screened", "reused") if point.get(key)), "passes the screen")
        console.print(f"  {label(point):<32}{said}")
    console.print(
        f"Trials           {plan['trials']}, {plan['trials_at_once']} at once, {plan['steps']:,} steps "
        f"({plan['epochs']} epochs) each\n"
        f"Rungs            after epochs {', '.join(map(str, plan['rungs'])) or '(none)'}, by {plan['metric']}\n"
        f"Measured         {measured['step_seconds'] * 1e3:.3g} ms a step, {measured['rung_seconds']:.3g} s a rung, "
        f"{measured['image_seconds'] * 1e3:.3g} ms an image of the final stage, {measured['start_seconds']:.3g} s a "
        f"process, {size(measured['checkpoint_bytes'])} a checkpoint\n"
        f"One trial        {cost['trial_hours']:.3g} hours in full{base}\n"
        f"Search           about {cost['expected']['search']:.3g} hours ({cost['expected']['workers']:.3g} of workers)"
        f", or {cost['at_most']['search']:.3g} ({cost['at_most']['workers']:.3g}) if no trial is stopped\n"
        + (f"Confirming       about {cost['confirm_hours']:.3g} hours\n" if cost["confirm_hours"] else "")
        + f"Final stage      about {cost['final_stage_hours']:.3g} hours\n"
        f"Disk             up to {size(cost['disk_bytes'])}"
        + (f", {size(plan['free_bytes'])} free" if plan["free_bytes"] is not None else "")
    )
    if plan["warning"]:
        console.print(plan["warning"])
