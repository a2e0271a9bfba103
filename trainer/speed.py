"""How fast a step is: what `auto` means, and the U-Net as a CUDA graph or compiled."""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config import SpeedConfig
from trainer.data_cache import cache_folder

# Three minutes of compiling, as seen on two cores, are 3.6 ms a step over so many. Whether compiling saves as much on a
# GPU has not been measured; trainings that are shorter have the CUDA graph alone, which takes seconds.
COMPILE_STEPS = 50_000

Inputs = list[tuple[torch.Tensor, torch.Tensor]]  # x_t and t, one of each shape that will come
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Switches:
    """SpeedConfig, decided."""

    bf16: bool
    channels_last: bool
    fused_adam: bool
    cuda_graphs: bool
    compile: bool


def decide(speed: SpeedConfig, device: torch.device, world_size: int, steps: int) -> Switches:
    """What `auto` means on this device, for a training of so many steps. CPU figures: docs/training.md."""
    on_gpu = device.type == "cuda"
    compiles = on_gpu and steps >= COMPILE_STEPS if speed.compile == "auto" else speed.compile
    auto = {
        "bf16": on_gpu,
        "channels_last": True,
        "fused_adam": True,
        "cuda_graphs": on_gpu and world_size == 1 and not compiles,
        "compile": compiles,
    }
    return Switches(**{name: auto[name] if wanted == "auto" else wanted for name, wanted in speed})


def compiled(denoise: nn.Module, inputs: Inputs, autocast: Autocast) -> Any:
    """torch.compile, tried on `inputs` there and back; `denoise` itself, and one line that says why, where it fails.

    What is compiled is kept in the cache folder, for the next trial of this node.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "compiled")  # importing torch._dynamo has set another
    torch.compiler.reset()  # variants of trials before this one in the process count against a limit
    fast = torch.compile(denoise, dynamic=False)
    try:
        for x_t, t in inputs:
            with autocast():
                predicted = fast(x_t, t)
            predicted.float().sum().backward()
    except Exception as error:
        print(f"torch.compile failed, going on without: {_first_line(error)}", flush=True)
        return denoise
    finally:
        denoise.zero_grad(set_to_none=True)
    return fast


def graphed(denoise: Any, inputs: Inputs, autocast: Autocast) -> Any:
    """`denoise` as a CUDA graph; itself where batches have several shapes, which a graph has not, or where it fails."""
    if len(inputs) > 1:
        return denoise
    # Capturing makes the gradients' nodes on a stream of its own, and PyTorch would warn of that at the first step.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        with autocast():
            return torch.cuda.make_graphed_callables(denoise, inputs[0])
    except RuntimeError as error:
        print(f"no CUDA graph of the model, going on without: {_first_line(error)}", flush=True)
        return denoise


def replayed(denoise: Callable[..., torch.Tensor], x_t: torch.Tensor, t: torch.Tensor) -> Callable[..., torch.Tensor]:
    """`denoise` without gradients as a CUDA graph for inputs like these; itself where capturing fails."""
    x_t, t = x_t.clone(), t.clone()
    try:
        current, beside = torch.cuda.current_stream(), _beside()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):  # libraries choose and allocate at their first calls, which a graph must not
            for _ in range(2):
                denoise(x_t, t)
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that uploads checkpoints may go on using the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = denoise(x_t, t)
    except RuntimeError as error:
        print(f"no CUDA graph of the model, sampling without: {_first_line(error)}", flush=True)
        return denoise

    def replay(next_x_t: torch.Tensor, next_t: torch.Tensor) -> torch.Tensor:
        x_t.copy_(next_x_t)
        t.copy_(next_t)
        graph.replay()
        return output.clone()  # the next replay writes there

    return replay


@functools.cache
def _beside() -> torch.cuda.Stream:
    """One for the process: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
