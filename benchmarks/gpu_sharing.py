"""How much faster several trainings on one GPU are than one after the other: what `trials_per_gpu` gains.

    python -m benchmarks.gpu_sharing [--at-once 2 4 8] [--seconds 6]

Each training is a process of its own, as a trial is. All are set up first; then as many as it says train at the same
time for some seconds while the others wait. Images are random pixels: a step costs the same. The study's U-Net (38.4M,
32x32, batch 16) and that of the digits (8x8, batch 64). Where NVIDIA's MPS runs (nvidia-cuda-mps-control -d), processes
use the GPU side by side instead of in turn; it says whether it does by CUDA_MPS_PIPE_DIRECTORY.
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.common import provenance, write
from search.config_file import load
from trainer import data, step
from trainer.config import DataConfig, TrainConfig
from trainer.failures import Worker
from trainer.loop import CHECK_STEPS

START_SECONDS = 300  # that all are set up in


def settings() -> dict[str, tuple[TrainConfig, tuple[int, ...]]]:
    """By the name that the table shows: the training and its images' shape, (N, H, W, C)."""
    study = TrainConfig(data=DataConfig(name="digits"))  # the name is not looked at: pixels are random
    return {"study": (study, (5000, 32, 32, 3)), "digits": (load("digits", []).train, (1437, 8, 8, 1))}


def train(rank: int, name: str, rounds: list[int], seconds: float, barrier: Any, done: Any) -> None:
    """One process: in the rounds that it takes part in it trains until the time is over, and says its images."""
    config, shape = settings()[name]
    pixels = np.random.default_rng(rank).integers(0, 256, shape, np.uint8)
    advance = step.TrainStep(config, data.Images(pixels, None), Worker(torch.device("cuda")))
    taken = 0

    def some() -> int:
        nonlocal taken
        losses = [advance(taken + index)[0] for index in range(CHECK_STEPS)]
        taken += CHECK_STEPS
        assert torch.stack(losses).isfinite().all()  # waits for the GPU
        return CHECK_STEPS

    some()
    for at_once in rounds:
        barrier.wait()
        began, steps = time.perf_counter(), 0
        while rank < at_once and time.perf_counter() - began < seconds:
            steps += some()
        if rank < at_once:
            rate = steps * config.batch_size / (time.perf_counter() - began)
            print(f"{name}, {at_once} at once: {rate:,.0f} images/s of one", flush=True)
            done.put((at_once, rate))
        barrier.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, nargs="+", default=[2, 4, 8], help="beside one alone")
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU")
    table = Table("", "at once", "images/s together", "times one alone")
    result: dict[str, Any] = {}
    for name in settings():
        context, rounds = mp.get_context("spawn"), sorted({1, *arguments.at_once})
        barrier, done = context.Barrier(max(rounds), timeout=START_SECONDS), context.Queue()
        options = (name, rounds, arguments.seconds, barrier, done)
        workers = mp.spawn(train, options, max(rounds), join=False)
        while not workers.join():  # raises what one of them raised, and ends the others
            pass
        rates: dict[int, list[float]] = {at_once: [] for at_once in rounds}
        for _ in range(sum(rounds)):
            at_once, rate = done.get()
            rates[at_once].append(rate)
        result[name] = {str(at_once): sum(each) for at_once, each in rates.items()}
        for at_once, together in result[name].items():
            table.add_row(name, at_once, f"{together:,.0f}", f"{together / result[name]['1']:.2f}")
    Console().print(table)
    mps = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    where = {"device": torch.cuda.get_device_name(), "mps": mps, "seconds": arguments.seconds}
    write(f"gpu_sharing{'_mps' * mps}", {**provenance(0), **where, "images_per_second": result})


if __name__ == "__main__":
    main()
