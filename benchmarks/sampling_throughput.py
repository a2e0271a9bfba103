"""Sampling beside diffusers' DDPMPipeline and a plain loop that keeps every step, in one run.

    python -m benchmarks.sampling_throughput [--rounds 5] [--steps 10 40 100]

Same U-Net, same number of steps, all in turn, so that a machine that drifts drifts for all; on a GPU our sampler twice:
in fp32, as the others, and in bf16, as it draws there by itself. Peak memory is measured in a process of its own for
each (a process's peak never falls): on CPU what RSS grew by above the loaded model, on a GPU what torch allocated.
Medians and ratios go to docs/results.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from rich.console import Console
from rich.table import Table

from benchmarks.common import peak_memory_mib, provenance, write
from evaluation.config import SamplerConfig
from evaluation.sampling import Sampler, block_seed
from trainer import model, schedules
from trainer.config import ModelConfig

SHAPE = (3, 32, 32)
SMALL = ModelConfig(channels=(32, 64, 64, 64), attention=(False, True, True, True))  # 2.4M, for CPUs
STUDY = ModelConfig()  # the original study's, 38.4M, for GPUs
BETAS = schedules.betas("linear", 1e-4, 0.02)


def samplers(device: torch.device) -> dict[str, Callable[[int], np.ndarray]]:
    """steps → images (N, H, W, C) uint8, 16 on CPUs and 256 on a GPU; ancestral sampling all of them."""
    size = 256 if device.type == "cuda" else 16
    network = model.build(STUDY if device.type == "cuda" else SMALL, SHAPE, 0.0, seed=0).to(device).eval()
    options = {"trained_betas": BETAS, "timestep_spacing": "trailing", "variance_type": "fixed_small"}
    pipeline = DDPMPipeline(network, DDPMScheduler(1000, **options))
    pipeline.set_progress_bar_config(disable=True)
    scheduler = DDPMScheduler(1000, **options)

    def ours(bf16: bool) -> Callable[[int], np.ndarray]:
        made: dict[int, Sampler] = {}  # the last one alone: its CUDA graph is captured once, for many blocks

        def draw(steps: int) -> np.ndarray:
            if steps not in made:
                made.clear()
                config = SamplerConfig(name="ddpm", steps=steps, block_size=size, bf16=bf16)
                made[steps] = Sampler(network, BETAS, SHAPE, config, device)
            return made[steps].block(0)

        return draw

    def theirs(steps: int) -> np.ndarray:
        generator = torch.Generator(device).manual_seed(block_seed(0, 0))
        call = {"batch_size": size, "generator": generator, "num_inference_steps": steps, "output_type": "np"}
        return (pipeline(**call).images * 255).round().astype(np.uint8)

    @torch.no_grad()
    def keeps(steps: int) -> np.ndarray:
        scheduler.set_timesteps(steps)
        kept = [torch.randn((size, *SHAPE), device=device)]
        for t in scheduler.timesteps:
            kept.append(scheduler.step(network(kept[-1], t).sample, t, kept[-1]).prev_sample)
        images = torch.stack(kept)[-1]
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    rounded = {"ours in bf16": ours(bf16=True)} if device.type == "cuda" else {}
    return {"ours": ours(bf16=False), **rounded, "DDPMPipeline": theirs, "keeps every step": keeps}


def peaks_mib(name: str, rising_steps: list[int], device: torch.device) -> dict[int, float]:
    """In this process, which does nothing else: above what the model and one short sampling took."""
    sample = samplers(device)[name]
    sample(2)
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if gpu else peak_memory_mib()
    peaks = {}
    for steps in rising_steps:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        sample(steps)
        after = torch.cuda.max_memory_allocated() / 2**20 if gpu else peak_memory_mib()
        peaks[steps] = round(after - before, 1)
    return peaks


def memory_of(name: str, rising_steps: list[int]) -> dict[str, float]:
    """`peaks_mib` of a fresh process, for a process's peak never falls."""
    steps = [str(count) for count in rising_steps]
    command = (sys.executable, "-m", "benchmarks.sampling_throughput", "--memory-of", name, "--steps", *steps)
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40, 100])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.memory_of:
        print(json.dumps(peaks_mib(arguments.memory_of, sorted(arguments.steps), device)))
        return

    drawing, steps = samplers(device), arguments.steps[0]
    torch.backends.cudnn.allow_tf32 = False  # a GPU's default rounds convolutions, and not the same way in all
    images = drawing["DDPMPipeline"](5).astype(int)
    difference = np.abs(images - drawing["ours"](5)).max()
    torch.backends.cudnn.allow_tf32 = True
    assert difference <= 1, f"the images differ by {difference} of 255: not the same work"
    seconds: dict[str, list[float]] = {name: [] for name in drawing}
    for draw in drawing.values():
        draw(steps)
    for _ in range(arguments.rounds):
        for name in drawing:
            began = time.monotonic()
            drawing[name](steps)
            seconds[name].append(time.monotonic() - began)
        print({name: round(each[-1], 3) for name, each in seconds.items()}, flush=True)
    memory = {name: memory_of(name, sorted(arguments.steps)) for name in drawing}
    ratios = {
        name: [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)] for name in drawing
    }
    result = {
        **provenance(0),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **{"images": len(images), "steps_timed": steps, "rounds": arguments.rounds},
        "images_per_second": {name: round(len(images) / median(seconds[name]), 3) for name in drawing},
        "ours_is_faster_by": {
            name: {"median": median(each), "range": [min(each), max(each)]}
            for name, each in ratios.items()
            if name != "ours"
        },
        "peak_memory_mib_by_steps": memory,
        "largest_difference_from_DDPMPipeline": int(difference),
    }
    table = Table("", "images/s", *(f"MiB, {count} steps" for count in sorted(arguments.steps)))
    for name in drawing:
        table.add_row(name, f"{result['images_per_second'][name]:.2f}", *map(str, memory[name].values()))
    Console().print(table)
    write(f"sampling_throughput_{device.type}", result)


if __name__ == "__main__":
    main()
