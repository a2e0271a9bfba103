"""One training step: the model, its averages, its optimiser, and everything random from (seed, step)."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer import data, model, speed
from trainer.config import TrainConfig
from trainer.diffusion import Diffusion, epsilon_mse
from trainer.ema import EMA
from trainer.failures import Worker, images_at_once


class Denoiser(nn.Module):
    """The U-Net with a tensor for its output, which CUDA graphs and torch.export want."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x_t, t, return_dict=False)[0]


class TrainStep:
    """The state of one training on one worker, and the step that advances it.

    pixels: (N, H, W, C) uint8 training images. They stay on the device where they fit in a quarter of its free memory
    (on the CPU they are never copied: a memory-mapped array is read as it is needed), else batches are copied over.
    """

    def __init__(self, config: TrainConfig, images: data.Images, worker: Worker):
        self.config, self.worker, self.shape = config, worker, images.shape
        device = worker.device
        steps = data.epoch_end(config.epochs, len(images), config.batch_size)
        self.switches = speed.decide(config.speed, device, worker.world_size, steps)
        self.network = model.build(config.model, images.shape, config.dropout, config.seed).to(device).train()
        if self.switches.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.emas = [EMA(self.network, decay) for decay in config.ema_decays]
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, fused=self.switches.fused_adam
        )
        self.diffusion = Diffusion(config.schedule.betas())
        first = worker.rank * config.batch_size // worker.world_size
        self._mine = slice(first, (worker.rank + 1) * config.batch_size // worker.world_size)
        self._pixels = _resident(images.pixels, device)
        self._denoise = self._fastest_denoiser()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        # No cast is kept between steps: a kept one would outlive the CUDA graph that made it.
        device = self.worker.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.switches.bf16, cache_enabled=False)

    def _fastest_denoiser(self) -> Any:
        worker, own = self.worker, self._mine.stop - self._mine.start
        size = min(images_at_once(self.config, worker), own)
        inputs = []
        for count in {size, own % size} - {0}:  # the last part of a batch may be smaller
            x_t = self._in_format(torch.randn(count, *self.shape, device=worker.device))
            inputs.append((x_t, torch.zeros(count, dtype=torch.int64, device=worker.device)))
        denoise: Any = Denoiser(self.network)
        if self.switches.compile:
            denoise, plain = speed.compiled(denoise, inputs, self._autocast), denoise
            if denoise is plain:  # it failed: what else there is
                uncompiled = self.config.speed.model_copy(update={"compile": False})
                self.switches = speed.decide(uncompiled, worker.device, worker.world_size, 0)
        if worker.world_size > 1:
            return DistributedDataParallel(denoise)
        if self.switches.cuda_graphs and worker.device.type == "cuda":
            denoise = speed.graphed(denoise, inputs, self._autocast)
        return denoise

    def _in_format(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.switches.channels_last else x

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Advances by step `step`, counted from 0: (its part of the batch's loss, gradient norm), on the device.

        Nothing in here waits for the device.
        """
        config, worker, device = self.config, self.worker, self.worker.device
        # Everything random comes from (seed, step), for the whole batch: no rank, restart or size of part changes it.
        index = data.batch_indices(config.seed, step, len(self._pixels), config.batch_size)
        generator = torch.Generator(device).manual_seed(step_seed(config.seed, step))
        t = torch.randint(config.schedule.steps, (config.batch_size,), generator=generator, device=device)[self._mine]
        noise = torch.randn((config.batch_size, *self.shape), generator=generator, device=device)[self._mine]
        x_0 = data.to_model_range(_rows(self._pixels, index[self._mine], device))
        if config.data.horizontal_flip:
            flips = torch.rand(config.batch_size, generator=generator, device=device)[self._mine] < 0.5
            x_0 = torch.where(flips[:, None, None, None], x_0.flip(3), x_0)
        torch.manual_seed(step_seed(config.seed, step, 1 + worker.rank))  # dropout

        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        size = images_at_once(config, worker)
        for first in range(0, len(x_0), size):
            part = slice(first, first + size)
            last = first + size >= len(x_0)
            with contextlib.nullcontext() if last else self._no_sync():
                loss = self._loss(x_0[part], t[part], noise[part])
                (loss * worker.world_size).backward()  # DDP averages over ranks what is a sum
            total += loss.detach()
            if self.switches.cuda_graphs and first == 0 and not last:
                # A graph's backward gives its own memory as gradients, and writes the next part's there.
                for parameter in self.network.parameters():
                    parameter.grad = parameter.grad.clone()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
        self.optimizer.step()
        for ema in self.emas:
            ema.update(self.network)
        return total, norm

    def _loss(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """These images' share of the mean over the whole batch."""
        x_t = self._in_format(self.diffusion.q_sample(x_0, t, noise))
        with self._autocast():
            predicted = self._denoise(x_t, t)
        return epsilon_mse(predicted, noise).sum() / self.config.batch_size

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Gradients of all parts but the last stay here: they are averaged over ranks once a step."""
        return (
            self._denoise.no_sync() if isinstance(self._denoise, DistributedDataParallel) else contextlib.nullcontext()
        )

    def is_finite(self) -> bool:
        """Whether every weight is; asking waits for the device."""
        return bool(torch.stack([weight.isfinite().all() for weight in self.network.parameters()]).all())

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {
            "model": self.network.state_dict(),
            "ema": {str(ema.decay): ema.model.state_dict() for ema in self.emas},
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any], updates: int) -> None:
        """Goes on from `state` after `updates` steps."""
        self.network.load_state_dict(state["model"])
        # Fused or not, and how moments lie in memory: as this configuration has it, and not as the checkpoint's had.
        # A fused Adam takes moments to lie as their weights do, without a look.
        groups = [group | {"fused": self.switches.fused_adam} for group in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
        for ema in self.emas:
            ema.model.load_state_dict(state["ema"][str(ema.decay)])
            ema.updates = updates


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed for one step, well mixed: neighbouring steps must not get neighbouring generator states."""
    return int(np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0] >> 1)


def _resident(pixels: np.ndarray, device: torch.device) -> np.ndarray | torch.Tensor:
    if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    return pixels


def _rows(pixels: np.ndarray | torch.Tensor, index: torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(pixels, torch.Tensor):
        return pixels[index.to(device, non_blocking=True)]
    batch = torch.from_numpy(pixels[index.numpy()])
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch
