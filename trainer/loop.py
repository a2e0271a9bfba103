"""The training loop: plain PyTorch and DDP. Where reports go, what scores a rung and what to resume are handed in."""

import functools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer import checkpoint, data, model, schedules
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.diffusion import Diffusion, epsilon_mse
from trainer.ema import EMA
from trainer.storage import Storage

Metrics = dict[str, Any]
Save = Callable[[Storage], None]


class TrainingFailedError(Exception):
    """Training cannot go on, for a reason that a retry would meet again. The message is that reason."""


def failure_reason(error: Exception) -> str:
    """An error as the trials table says it."""
    return str(error) if isinstance(error, TrainingFailedError) else f"{type(error).__name__}: {error}"


class Scorer(Protocol):
    """Scores the EMA model at a rung: returns the metrics, `frechet`, `score` and `grid_loss` among them."""

    def __call__(self, denoiser: nn.Module, config: TrainConfig, device: torch.device) -> Metrics: ...


@dataclass(frozen=True)
class Worker:
    """One of the processes that train one model together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


def train(
    config: TrainConfig,
    images: data.Images,
    worker: Worker,
    report: Callable[[Metrics, Save], None],
    resume: Checkpoint | None = None,
    score: Scorer | None = None,
    rungs: Collection[int] = (),
    log: Callable[[Metrics], None] = lambda metrics: None,
    report_seconds: float = 60.0,
) -> None:
    """Trains one DDPM on `images` (the train split) from step 0, or on from `resume`.

    report(metrics, save) is called on every rank, at the end of an epoch: at each of `rungs` (epochs, from 1), at the
    last epoch, and where `report_seconds` have passed since the last. save(folder) writes a checkpoint of that moment.
    At rungs and at the last epoch `score` is called on rank 0 and its metrics are reported. log(metrics) is called
    on rank 0 at the end of every epoch. Raises TrainingFailedError on every rank where a loss is not finite.
    """
    num_images, device = len(images), worker.device
    if config.batch_size > num_images:
        raise TrainingFailedError(
            f"batch_size must be at most the {num_images} training images, but got {config.batch_size}"
        )

    # The model, its average and its optimiser, as new or as they were.
    network = model.build(config.model, images.shape, config.dropout, config.seed).to(device).train()
    ema = EMA(network, config.ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    step, epoch, worker_seconds = 0, 0, 0.0
    if resume is not None:
        network.load_state_dict(resume.state["model"])
        ema.model.load_state_dict(resume.state["ema"])
        ema.updates = resume.meta["step"]
        optimizer.load_state_dict(resume.state["optimizer"])
        step, epoch, worker_seconds = resume.meta["step"], resume.meta["epoch"], resume.meta["worker_seconds"]
    denoise = DistributedDataParallel(network) if worker.world_size > 1 else network

    # The images stay on the device as uint8; every rank holds all of them, and takes its slice of each batch.
    pixels = torch.from_numpy(images.pixels).to(device)
    mine = slice(
        worker.rank * config.batch_size // worker.world_size, (worker.rank + 1) * config.batch_size // worker.world_size
    )
    diffusion = Diffusion(schedules.betas(**config.schedule.model_dump()))
    reported_at = time.monotonic()

    while epoch < config.epochs:
        epoch += 1
        epoch_began = time.monotonic()
        learning_rate = config.learning_rate * config.lr_decay ** ((epoch - 1) // config.lr_decay_epochs)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        first_step, last_step = step, data.epoch_end(epoch, num_images, config.batch_size)
        losses = torch.zeros(last_step - first_step, device=device)
        norms = torch.zeros(last_step - first_step, device=device)

        for step in range(first_step, last_step):
            # Everything random in a step comes from (seed, step) for the whole batch: no rank or restart changes it.
            index = data.batch_indices(config.seed, step, num_images, config.batch_size)
            x_0 = data.to_model_range(pixels[index[mine].to(device)])
            generator = torch.Generator(device).manual_seed(step_seed(config.seed, step))
            t = torch.randint(config.schedule.steps, (config.batch_size,), generator=generator, device=device)[mine]
            noise = torch.randn((config.batch_size, *images.shape), generator=generator, device=device)[mine]
            if config.data.horizontal_flip:
                flips = torch.rand(config.batch_size, generator=generator, device=device)[mine] < 0.5
                x_0 = torch.where(flips[:, None, None, None], x_0.flip(3), x_0)
            torch.manual_seed(step_seed(config.seed, step, 1 + worker.rank))  # dropout

            # The loss is the mean over the whole batch; DDP averages gradients over ranks, hence the world size.
            predicted = denoise(diffusion.q_sample(x_0, t, noise), t).sample
            loss = epsilon_mse(predicted, noise).sum() / config.batch_size
            optimizer.zero_grad(set_to_none=True)
            (loss * worker.world_size).backward()
            norms[step - first_step] = nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
            optimizer.step()
            ema.update(network)
            losses[step - first_step] = loss.detach()
        step = last_step

        # The end of an epoch: only here does the host wait for the device, and ranks talk of more than gradients.
        at_rung = epoch in rungs or epoch == config.epochs
        due = torch.tensor([float(time.monotonic() - reported_at > report_seconds and worker.rank == 0)], device=device)
        if worker.world_size > 1:
            dist.all_reduce(losses)
            dist.all_reduce(due)
        _refuse_non_finite(losses.cpu().numpy(), first_step, epoch)
        seconds = time.monotonic() - epoch_began
        metrics: Metrics = {
            "epoch": epoch,
            "step": step,
            "train_loss": losses.mean().item(),
            "learning_rate": learning_rate,
            "gradient_norm": norms.mean().item(),
            "images_per_second": len(losses) * config.batch_size / seconds,
            "epoch_seconds": seconds,
            "ema_decay": ema.current_decay(),
            "rung": at_rung,
        }
        if at_rung and score is not None and worker.rank == 0:
            metrics |= score(ema.model, config, device)
        worker_seconds += (time.monotonic() - epoch_began) * worker.world_size
        metrics["worker_seconds"] = worker_seconds
        if worker.rank == 0:
            log(metrics)
        if at_rung or due.item():
            reported_at = time.monotonic()
            state = {"model": network.state_dict(), "ema": ema.model.state_dict(), "optimizer": optimizer.state_dict()}
            meta = {
                "step": step,
                "epoch": epoch,
                "worker_seconds": worker_seconds,
                "image_shape": images.shape,
                "config": config.model_dump(mode="json"),
                "metrics": {name: value for name, value in metrics.items() if name != "samples"},
            }
            report(metrics, functools.partial(checkpoint.save, state=state, meta=meta))


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed for one step, well mixed: neighbouring steps must not get neighbouring generator states."""
    return int(np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0] >> 1)


def _refuse_non_finite(losses: np.ndarray, first_step: int, epoch: int) -> None:
    if np.isfinite(losses).all():
        return
    bad = int(np.argmax(~np.isfinite(losses)))
    before = f"the last finite one was {losses[bad - 1]:.4g}" if bad else f"epoch {epoch} began with it"
    raise TrainingFailedError(f"the loss is {losses[bad]} at step {first_step + bad + 1} (epoch {epoch}); {before}")
