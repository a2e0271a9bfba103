"""Training speed of this loop beside (a) a loop as tutorials write it and (b) diffusers' own recipe, in one process.

    python -m benchmarks.train_throughput "parquet:/path/to/cifar10/train-*.parquet" [--rounds 5] [--steps 8]
        [--switches]

Same U-Net, same initial weights, same batch size, CIFAR-10 at 32x32. The three take turns, a few steps at a time (50
on a GPU, where a few are over before a turn's start and end are), so that a machine that drifts drifts for all; medians
and ratios of the rounds are printed and written to docs/results.
First all three take 20 steps on the same images, timesteps and noise: their losses must agree.
"""

import argparse
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.common import peak_memory_mib, provenance, write
from trainer import data, model, parquet, step
from trainer.config import DataConfig, ModelConfig, SpeedConfig, TrainConfig
from trainer.failures import Worker
from trainer.loop import CHECK_STEPS

BATCH, AGREEING_STEPS, LEARNING_RATE = 16, 20, 2e-4
SMALL = ModelConfig(channels=(32, 64, 64, 64), attention=(False, True, True, True))  # 2.4M, for CPUs
STUDY = ModelConfig()  # the original study's, 38.4M, for GPUs


class EncodedImages(Dataset):
    """Encoded bytes, decoded and transformed an image at a time: what a tutorial's Dataset does."""

    def __init__(self, path: str, count: int):
        file = parquet.find(Path(path), DataConfig()).files[0]
        self.rows = next(pq.ParquetFile(file).iter_batches(count, columns=["img"]))["img"].to_pylist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(self.rows[index]["bytes"])).convert("RGB"))


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x_0, t, noise


class Tutorial:
    """(a) DataLoader with workers, fp32, NCHW, Adam, .item() every step, no EMA."""

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device):
        self.device = device
        self.network = model.build(config.model, (3, 32, 32), 0.0, config.seed).to(device).train()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        workers = 4 if device.type == "cuda" else 0  # on two cores worker processes take time from the training
        options = {"num_workers": workers, "persistent_workers": workers > 0}  # starting them is no part of a step
        self.loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, **options)
        self.endless = self._endless()

    def _endless(self) -> Iterator[torch.Tensor]:
        while True:
            yield from self.loader

    def batch(self) -> Batch:
        x_0 = next(self.endless).to(self.device)
        return x_0, torch.randint(0, 1000, (len(x_0),), device=self.device), torch.randn_like(x_0)

    def step(self, fixed: Batch | None = None) -> float:
        x_0, t, noise = fixed or self.batch()
        predicted = self.network(self.scheduler.add_noise(x_0, noise, t), t).sample
        loss = F.mse_loss(predicted, noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Recipe(Tutorial):
    """(b) diffusers' unconditional training example: AMP where it helps, AdamW, gradient clipping, EMAModel."""

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device):
        super().__init__(config, dataset, device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.clip = config.gradient_clip
        self.ema = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)

    def step(self, fixed: Batch | None = None) -> float:
        x_0, t, noise = fixed or self.batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            predicted = self.network(self.scheduler.add_noise(x_0, noise, t), t).sample
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return loss.detach().item()


class Ours:
    """This project's TrainStep, losses fetched some steps at a time as its loop fetches them."""

    def __init__(self, config: TrainConfig, images: data.Images, device: torch.device):
        self.advance = step.TrainStep(config, images, Worker(device))
        self.done = 0

    def steps(self, count: int) -> list[float]:
        losses: list[float] = []
        for first in range(0, count, CHECK_STEPS):
            taken = [self.advance(self.done + index)[0] for index in range(first, min(first + CHECK_STEPS, count))]
            losses += torch.stack(taken).tolist()
        self.done += count
        return losses


def agreeing_losses(config: TrainConfig, images: data.Images, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Losses of 20 steps on the same batches; (a) has no clipping, so nobody clips here."""
    unclipped = config.model_copy(update={"gradient_clip": 1e9})
    ours, tutorial = Ours(unclipped, images, device), Tutorial(unclipped, dataset, device)

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(step.step_seed(config.seed, number))
        t = torch.randint(1000, (BATCH,), generator=generator, device=device)
        noise = torch.randn((BATCH, 3, 32, 32), generator=generator, device=device)
        index = data.batch_indices(config.seed, number, len(images), BATCH)
        return data.to_model_range(torch.from_numpy(images.pixels[index.numpy()])).to(device), t, noise

    mine = ours.steps(AGREEING_STEPS)
    theirs = [tutorial.step(batch(number)) for number in range(AGREEING_STEPS)]
    recipe = Recipe(unclipped, dataset, device)
    recipes = [recipe.step(batch(number)) for number in range(AGREEING_STEPS)]
    worst = max(float(np.max(np.abs(np.array(mine) / np.array(other) - 1))) for other in (theirs, recipes))
    return {
        "steps": AGREEING_STEPS,
        "largest_relative_difference": worst,
        "ours": mine,
        "tutorial": theirs,
        "recipe": recipes,
    }


def makers(config: TrainConfig, source: str, device: torch.device) -> dict[str, Callable[[], Callable[[int], Any]]]:
    """Each contender by its name, not yet made: made, it is a function that takes so many steps."""

    def ours(**switched: bool) -> Callable[[int], Any]:
        switched_config = config.model_copy(update={"speed": SpeedConfig(**switched)})
        return Ours(switched_config, data.load(config.data).train, device).steps

    def theirs(kind: type[Tutorial]) -> Callable[[int], Any]:
        loop = kind(config, EncodedImages(source, len(data.load(config.data).train)), device)
        return lambda count: [loop.step() for _ in range(count)]

    on_gpu = {
        "ours without bf16": lambda: ours(bf16=False),
        "ours without CUDA graph": lambda: ours(cuda_graphs=False),
        "ours compiled": lambda: ours(compile=True, cuda_graphs=False),
    }
    return {
        "ours": ours,
        "tutorial": lambda: theirs(Tutorial),
        "diffusers recipe": lambda: theirs(Recipe),
        "ours without channels_last": lambda: ours(channels_last=False),
        "ours without fused Adam": lambda: ours(fused_adam=False),
        **(on_gpu if device.type == "cuda" else {"ours with bf16": lambda: ours(bf16=True)}),
    }


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU's memory, or of this process."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_memory_mib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="parquet:PATH of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="a turn; default: 50 on a GPU, 8 elsewhere")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--switches", action="store_true", help="this loop alone, with the switches of train.speed")
    parser.add_argument("--memory-of", help="the peak memory of a process that does nothing but this one's steps")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = arguments.steps or (50 if device.type == "cuda" else 8)
    config = TrainConfig(
        data=DataConfig(name=arguments.data, subset=arguments.images, train_fraction=0.9),
        model=STUDY if device.type == "cuda" else SMALL,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        dropout=0.0,
    )
    source = arguments.data.removeprefix("parquet:")
    made = makers(config, source, device)
    if arguments.memory_of:
        made[arguments.memory_of]()(3)
        print(peak_memory(device))
        return
    names = [name for name in made if name == "ours" or name.startswith("ours") == arguments.switches]
    images = data.load(config.data).train
    agreement = agreeing_losses(config, images, EncodedImages(source, len(images)), device)
    contenders, made_in = {}, {}
    for name in names:
        began = time.perf_counter()
        contenders[name] = made[name]()
        contenders[name](3)
        made_in[name] = time.perf_counter() - began
        print(f"{name}: ready for steps after {made_in[name]:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(arguments.rounds + 1):
        for name, work in contenders.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            work(steps)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
        print({name: round(each[-1], 2) for name, each in seconds.items() if each}, flush=True)
    command = (sys.executable, "-m", "benchmarks.train_throughput", arguments.data, "--images", str(arguments.images))
    memory = {
        name: float(subprocess.run((*command, "--memory-of", name), check=True, capture_output=True, text=True).stdout)
        for name in names
    }

    images_per_second = {name: steps * BATCH / median(times) for name, times in seconds.items()}
    ratios = {
        name: median(theirs / mine for theirs, mine in zip(seconds[name], seconds["ours"], strict=True))
        for name in names
        if name != "ours"
    }
    parameters = sum(p.numel() for p in model.build(config.model, (3, 32, 32), 0.0, 0).parameters())
    result = {
        **provenance(config.seed),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "batch_size": BATCH,
        "images_per_second": images_per_second,
        "speed_ratio_to": ratios,
        "round_seconds": seconds,
        "seconds_until_the_third_step": made_in,
        "agreement": agreement,
        "peak_memory_mib": memory,
    }
    if device.type == "cuda":
        result |= _utilisation(config, images_per_second["ours"])
    write(f"train_{'switches' if arguments.switches else 'throughput'}_{device.type}", result)

    table = Table("", "images/s", "our speed over its", "peak memory, MiB")
    for name, speed in images_per_second.items():
        ratio = f"{ratios[name]:.2f}x" if name in ratios else ""
        table.add_row(name, f"{speed:.1f}", ratio, f"{memory[name]:.0f}")
    Console().print(table)
    print(f"largest relative difference of {AGREEING_STEPS} losses: {agreement['largest_relative_difference']:.1e}")


def _utilisation(config: TrainConfig, images_per_second: float) -> dict[str, float]:
    """MFU: the step's floating-point operations a second over what a large bf16 product reaches on this card."""
    from torch.utils.flop_counter import FlopCounterMode

    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        a @ b
    torch.cuda.synchronize()
    peak = 50 * 2 * size**3 / (time.perf_counter() - began)
    network = model.build(config.model, (3, 32, 32), 0.0, 0).cuda()
    with FlopCounterMode(display=False) as counter:
        x_t = torch.randn(BATCH, 3, 32, 32, device="cuda")
        network(x_t, torch.zeros(BATCH, dtype=torch.int64, device="cuda")).sample.sum().backward()
    flops_per_image = counter.get_total_flops() / BATCH
    return {"matmul_peak_flops": peak, "mfu": flops_per_image * images_per_second / peak}


if __name__ == "__main__":
    main()
