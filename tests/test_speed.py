"""What makes a step fast, and that none of it changes what is learned: the compiler is the real one."""

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from test_loop import CPU, TINY, toy_images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import model, speed
from trainer.config import SpeedConfig
from trainer.speed import COMPILE_STEPS, Switches, decide
from trainer.step import TrainStep

GPU = torch.device("cuda")


def test_on_a_cpu_auto_is_channels_last_and_fused_adam_and_no_more():
    assert decide(SpeedConfig(), CPU.device, 1, 10**9) == Switches(False, True, True, False, False)


def test_on_a_gpu_auto_compiles_for_long_trainings_and_takes_a_graph_for_the_others():
    short, long = (decide(SpeedConfig(), GPU, 1, steps) for steps in (COMPILE_STEPS - 1, COMPILE_STEPS))
    assert short == Switches(True, True, True, cuda_graphs=True, compile=False)
    assert long == Switches(True, True, True, cuda_graphs=False, compile=True)
    assert not decide(SpeedConfig(), GPU, 2, 1).cuda_graphs


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("device", [CPU.device, GPU])
def test_what_is_given_is_what_is_done(wanted, device):
    given = dict.fromkeys(SpeedConfig.model_fields, wanted)
    assert vars(decide(SpeedConfig(**given), device, 1, COMPILE_STEPS)) == given


class SmallNet(nn.Module):
    """In the U-Net's place, whose hundred kernels take minutes to compile."""

    def __init__(self, *_: Any):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (self.out(nn.functional.silu(self.into(x_t)) * torch.cos(t)[:, None, None, None]),)


def compile_in_a_process(_: int, folder: str, name: str) -> None:
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    model.build = SmallNet  # type: ignore[assignment,misc]
    losses, graphs = {}, []
    for compiles in (False, True):
        config = TINY.model_copy(update={"speed": SpeedConfig(compile=compiles), "micro_batch": 4})
        advance = TrainStep(config, toy_images(), CPU)  # seven images a step: four at once, and three
        graphs.append(counters["stats"]["unique_graphs"])
        losses[str(compiles)] = [advance(step)[0].item() for step in range(8)]
        compiled = advance.switches.compile
        graphs.append(counters["stats"]["unique_graphs"])
    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
    Path(folder, name).write_text(json.dumps({"losses": losses, "graphs": graphs, "compiled": compiled, **found}))


@pytest.fixture
def _environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(
        "TORCHINDUCTOR_COMPILE_THREADS", "1"
    )  # no processes of its own, which start for longer than this


def compiled(folder: Path, name: str) -> dict[str, Any]:
    mp.spawn(compile_in_a_process, (str(folder), name), nprocs=1)
    return json.loads((folder / name).read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("_environment")
def test_compiling_changes_only_rounding_and_is_done_once_a_node(tmp_path):
    first, second = (compiled(tmp_path, name) for name in ("first", "second"))
    for process in (first, second):
        assert process["compiled"]
        assert process["losses"]["True"] == pytest.approx(process["losses"]["False"], rel=1e-5)
        before, after = process["graphs"][2:]
        assert before == after > 0, "a step waited for the compiler"
    assert first["miss"] > 0
    assert second["miss"] == 0
    assert second["hit"] > 0
    assert any((tmp_path / "cache" / "compiled").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("_environment")
def test_where_compiling_fails_training_goes_on_as_without_and_one_line_says_why(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    found = compiled(tmp_path, "none")
    assert found["losses"]["True"] == found["losses"]["False"]
    lines = [line for line in capfd.readouterr().out.splitlines() if "torch.compile" in line]
    assert len(lines) == 1
    assert "torch.compile failed, going on without" in lines[0]
    assert "No working C++ compiler" in lines[0]
    assert not found["compiled"]  # so that a GPU's training takes a graph in its place


class Recorder(TorchDispatchMode):
    """Stands for a GPU's graph: capturing keeps each operation, replaying does them again into the same memory."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, result in self.calls:
            for kept, again in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != again.data_ptr():
                    kept.copy_(again)


@pytest.fixture
def _graphs_on_the_cpu(monkeypatch):
    """The graphs' own code; only what needs a GPU beneath it is replaced."""
    monkeypatch.setattr("torch.cuda.graphs.graph_pool_handle", lambda: None)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.Stream", mock.MagicMock)
    monkeypatch.setattr("torch.cuda.current_stream", mock.MagicMock)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.CUDAGraph", Recorder)
    monkeypatch.setattr("torch.cuda.graph", lambda graph, **_: graph)


@pytest.mark.slow
@pytest.mark.usefixtures("_graphs_on_the_cpu")
@pytest.mark.parametrize("micro_batch", [None, 4, 2])
def test_a_graph_changes_only_rounding_also_where_gradients_are_accumulated(micro_batch):
    config = TINY.model_copy(update={"batch_size": 8, "micro_batch": micro_batch})
    eager = TrainStep(config, toy_images(), CPU)
    graphed = TrainStep(config.model_copy(update={"speed": SpeedConfig(cuda_graphs=True)}), toy_images(), CPU)
    count = micro_batch or 8
    x_t = graphed._in_format(torch.randn(count, *graphed.shape))
    graphed._denoise = speed.graphed(
        graphed._denoise, [(x_t, torch.zeros(count, dtype=torch.int64))], graphed._autocast
    )
    assert "graphed" in graphed._denoise.forward.__qualname__
    for step in range(6):
        for ours, theirs in zip(graphed(step), eager(step), strict=True):  # loss and gradient norm
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_graphs_on_the_cpu")
def test_a_replayed_model_sees_what_it_is_given_and_keeps_nothing_of_it():
    network = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3))

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x_t) * t[:, None]

    inputs = [(torch.randn(2, 3), torch.tensor([step, step + 1])) for step in range(1, 4)]
    with torch.no_grad():
        fast = speed.replayed(denoise, *inputs[0])
        assert fast is not denoise
        drawn = [fast(*each) for each in inputs]  # all kept: none is another's memory
        for ours, each in zip(drawn, inputs, strict=True):
            torch.testing.assert_close(ours, denoise(*each), rtol=0, atol=0)
        network[0].weight.mul_(2)
        torch.testing.assert_close(fast(*inputs[0]), denoise(*inputs[0]), rtol=0, atol=0)


def test_sampling_goes_on_without_a_graph_that_cannot_be_had(monkeypatch, capsys):
    def no_stream() -> None:
        raise RuntimeError("CUDA error: operation not permitted\nmore of it")

    monkeypatch.setattr("torch.cuda.current_stream", no_stream)
    assert speed.replayed(torch.mul, torch.ones(1), torch.ones(1)) is torch.mul
    line = "no CUDA graph of the model, sampling without: RuntimeError: CUDA error: operation not permitted\n"
    assert capsys.readouterr().out == line
