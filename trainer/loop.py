"""The training loop: plain PyTorch and DDP. Where reports go, what scores a rung and what to resume are handed in."""

import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from trainer import data
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.failures import TrainingFailedError, Worker, counted, explained, knowing_its_cost
from trainer.step import TrainStep

Metrics = dict[str, Any]
Snapshot = Callable[[], Checkpoint]

CHECK_STEPS = 50  # steps between two looks at the losses and the clock: the host waits for the device only there


class InterruptedTrainingError(Exception):
    """Stopped between two steps because it was asked to; a checkpoint of that moment was reported."""


class Scorer(Protocol):
    """Scores an EMA model: the metrics, and under `objective` the one that is to be made small."""

    def __call__(self, denoiser: nn.Module, config: TrainConfig, device: torch.device) -> Metrics: ...


def train(
    config: TrainConfig,
    images: data.Images,
    worker: Worker,
    report: Callable[[Metrics, Snapshot], None],
    resume: Checkpoint | None = None,
    score: Scorer | None = None,
    rungs: Collection[int] = (),
    log: Callable[[Metrics, np.ndarray | None], None] = lambda metrics, samples: None,
    ready: Callable[[], bool] = lambda: True,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains one DDPM on `images` (the train split) from step 0, or on from `resume`.

    report(metrics, snapshot) is called on every rank: at each of `rungs` (epochs, from 1), at the last epoch, and after
    checkpoint_seconds and checkpoint_epochs where ready() (asked on rank 0: whether a checkpoint can be stored now).
    snapshot(), to be called before report returns, is the training of that moment, apart from what goes on.
    At rungs and at the last epoch `score` is called on rank 0; where there are several EMA decays, the last epoch
    scores each and the best becomes the model. log(metrics, samples) is called on rank 0 at the end of every epoch,
    samples being the picture that `score` gave, if any. Where stop() becomes true (asked on rank 0, in a process of its
    own between any two steps), a checkpoint is reported.
    Raises TrainingFailedError on every rank where a loss, or a weight that is to be reported, is not finite,
    WorkerFailedError where this rank's memory is too small or another rank does not answer, and
    InterruptedTrainingError after stop().
    """
    num_images, device = len(images), worker.device
    if config.batch_size > num_images:
        raise TrainingFailedError(
            f"batch_size must be at most the number of training images, {num_images}, but is {config.batch_size}"
        )

    # A training as new, or as it was.
    with explained(config, worker):
        advance = TrainStep(config, images, worker)
        if resume is not None:
            advance.load(resume.state, updates=resume.meta["step"])
    meta: dict[str, Any] = {"step": 0, "epoch": 0, "worker_seconds": 0.0, "last_loss": None, "rungs": []}
    meta |= {"ema_decay": config.ema_decays[0], "images": num_images}
    losses = norms = torch.zeros(0)
    if resume is not None:
        meta = {name: resume.meta.get(name, value) for name, value in meta.items()}  # an older one lacks some
        losses, norms = resume.state["losses"], resume.state["norms"]
    meta |= {"image_shape": images.shape, "config": config.model_dump(mode="json")}
    if meta["images"] != num_images:
        raise TrainingFailedError(
            f"the data has {num_images} training images by now, but the training began with {meta['images']}; put them "
            "back, or begin another"
        )
    reported_at = time.monotonic()

    def hand_over(metrics: Metrics) -> None:
        nonlocal reported_at

        def snapshot() -> Checkpoint:
            state = advance.state() | {"losses": losses, "norms": norms}
            return Checkpoint({**meta, "metrics": metrics}, _apart(state))

        with knowing_its_cost(meta):
            report(metrics, snapshot)
        reported_at = time.monotonic()

    def is_due(ended_epoch: int) -> bool:
        late = config.checkpoint_seconds is not None and time.monotonic() - reported_at > config.checkpoint_seconds
        counted = config.checkpoint_epochs is not None and ended_epoch and ended_epoch % config.checkpoint_epochs == 0
        return bool(late or counted) and ready()

    for epoch in range(meta["epoch"] + 1, config.epochs + 1):
        learning_rate = config.learning_rate * config.lr_decay ** ((epoch - 1) // config.lr_decay_epochs)
        for group in advance.optimizer.param_groups:
            group["lr"] = learning_rate
        began, first_step = time.monotonic(), meta["step"]
        last_step = data.epoch_end(epoch, num_images, config.batch_size)

        # Some steps at a time: losses stay on the device, and the host runs ahead of it, until the next look.
        while meta["step"] < last_step:
            done = []
            with counted(meta, worker), explained(config, worker):
                for step in range(meta["step"], min(meta["step"] + CHECK_STEPS, last_step)):
                    done.append(torch.stack(advance(step)))
                    asked = worker.rank == 0 and stop()
                    if asked and worker.world_size == 1:
                        break
                ended_epoch = epoch if meta["step"] + len(done) == last_step else 0
                late = worker.rank == 0 and is_due(ended_epoch)
                due, stopped = _agree(done, [late, asked], worker)
                values = torch.stack(done).cpu()
                _refuse_non_finite(values[:, 0].numpy(), meta, epoch)
                meta |= {"step": meta["step"] + len(done), "last_loss": values[-1, 0].item()}
                at_rung = ended_epoch in rungs or ended_epoch == config.epochs
                if (at_rung or due or stopped) and not advance.is_finite():  # the last step's loss is of those before
                    raise TrainingFailedError(
                        f"weights are not finite after step {meta['step']} (epoch {epoch}), whose loss was still "
                        f"{meta['last_loss']:.4g}"
                    )
            losses, norms = torch.cat([losses, values[:, 0]]), torch.cat([norms, values[:, 1]])
            if meta["step"] < last_step and (due or stopped):
                hand_over(_progress(meta, rung=False))
            if stopped and meta["step"] < last_step:
                raise InterruptedTrainingError

        # The end of an epoch: what was learned is logged, at rungs it is scored, and there it is reported.
        seconds = time.monotonic() - began
        meta["epoch"] = epoch
        metrics = _progress(meta, rung=at_rung) | {
            "train_loss": losses.mean().item(),
            "learning_rate": learning_rate,
            "gradient_norm": norms.mean().item(),
            "images_per_second": (last_step - first_step) * config.batch_size / seconds,
            "epoch_seconds": seconds,
            "ema_decay": advance.emas[0].current_decay(),
        }
        losses = norms = torch.zeros(0)
        if at_rung and score is not None:
            with counted(meta, worker):
                if worker.rank == 0:
                    metrics |= _score(score, advance, config, device, every_decay=epoch == config.epochs, meta=meta)
        metrics["worker_seconds"] = meta["worker_seconds"]
        if worker.rank == 0:
            with knowing_its_cost(meta):
                log(metrics, metrics.pop("samples", None))
        if at_rung:  # all of them are in every checkpoint: who should have noted one may have died meanwhile
            meta["rungs"] = [*meta["rungs"], metrics]
        if at_rung or due or stopped:
            hand_over(metrics)
        if stopped and epoch < config.epochs:
            raise InterruptedTrainingError


def _progress(meta: dict[str, Any], rung: bool) -> Metrics:
    return {"rung": rung} | {name: meta[name] for name in ("epoch", "step", "worker_seconds")}


def _apart(state: Any) -> Any:
    """A copy on the CPU: training goes on in what was copied."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _apart(value) for name, value in state.items()}
    return [_apart(value) for value in state] if isinstance(state, list) else state


def _agree(done: list[torch.Tensor], flags: list[bool], worker: Worker) -> list[bool]:
    """Sums the ranks' shares of each step's loss into `done`, and tells all ranks what rank 0 wants."""
    if worker.world_size == 1:
        return flags
    told = torch.tensor([float(flag) for flag in flags], device=worker.device)
    shares = torch.stack([value[0] for value in done])
    dist.all_reduce(shares)
    dist.all_reduce(told)
    for value, share in zip(done, shares, strict=True):
        value[0] = share
    return [flag > 0 for flag in told.tolist()]


def _score(
    score: Scorer,
    advance: TrainStep,
    config: TrainConfig,
    device: torch.device,
    every_decay: bool,
    meta: dict[str, Any],
) -> Metrics:
    """The scores of the first EMA; with `every_decay`, of the best of all, whose decay goes into the checkpoint."""
    emas = advance.emas if every_decay else advance.emas[:1]
    scored = {ema.decay: score(ema.model, config, device) for ema in emas}
    best = min(scored, key=lambda decay: scored[decay]["objective"])
    meta["ema_decay"] = best
    metrics = {name: _finite(value) for name, value in scored[best].items() if name != "objective"}
    if len(emas) > 1:
        metrics["ema_objectives"] = {str(decay): _finite(scored[decay]["objective"]) for decay in scored}
    return metrics


def _finite(value: Any) -> Any:
    """None for a number that is not finite: a model may give none, whose weights still are; JSON has no word for it."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _refuse_non_finite(losses: np.ndarray, meta: dict[str, Any], epoch: int) -> None:
    """losses: of the steps that follow those done before, of which `meta` tells."""
    if np.isfinite(losses).all():
        return
    bad = int(np.argmax(~np.isfinite(losses)))
    last = losses[bad - 1] if bad else meta["last_loss"]
    before = "" if last is None else f"; the last finite one was {last:.4g}"
    raise TrainingFailedError(f"the loss is {losses[bad]} at step {meta['step'] + bad + 1} (epoch {epoch}){before}")
