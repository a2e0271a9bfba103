"""Exports: what diffusers loads draws our images, what we load has every bit, and nothing of others is overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from evaluation import export
from evaluation.config import SamplerConfig
from evaluation.sampling import Sampler, block_seed
from search import verbs
from trainer import model, schedules
from trainer.checkpoint import Checkpoint
from trainer.config import ModelConfig, ScheduleConfig, TrainConfig

SHAPE = (1, 8, 8)
SAMPLER = SamplerConfig()


def make_checkpoint(seed: int = 0) -> Checkpoint:
    """An untrained model, its EMA weights other than its raw ones."""
    config = TrainConfig(
        schedule=ScheduleConfig(family="cosine", start=0, end=1, steps=20),
        model=ModelConfig(
            channels=(8, 16), attention=(False, True), layers_per_block=1, attention_head_dim=8, norm_groups=4
        ),
    )
    weights = [model.build(config.model, SHAPE, config.dropout, s).state_dict() for s in (seed, seed + 1)]
    meta = {"config": config.model_dump(mode="json"), "image_shape": SHAPE, "step": 10, "epoch": 1, "ema_decay": 0.99}
    return Checkpoint(meta, {"model": weights[0], "ema": {"0.99": weights[1]}})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine two threads wait for each other a hundred times longer than these layers take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint()


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    export.export_pipeline(checkpoint, out, SAMPLER, "# card", {"trial": "t0", "format": "not ours to give"})
    return out


def test_loaded_export_is_the_ema_model_its_betas_to_the_last_bit_and_its_shape(checkpoint: Checkpoint, folder: Path):
    denoiser, betas, shape, _ = export.load_export(folder)
    assert betas.dtype == np.float64
    assert (betas == schedules.betas(**checkpoint.config.schedule.model_dump())).all()
    assert shape == SHAPE
    assert not denoiser.training
    assert denoiser.state_dict().keys() == checkpoint.state["ema"]["0.99"].keys()
    for name, weight in denoiser.state_dict().items():
        assert torch.equal(weight, checkpoint.state["ema"]["0.99"][name])
    assert any(not torch.equal(w, checkpoint.state["model"][name]) for name, w in denoiser.state_dict().items())


def test_loaded_export_draws_the_checkpoints_images(checkpoint: Checkpoint, folder: Path):
    denoiser, betas, shape, _ = export.load_export(folder)
    sampler = SamplerConfig(steps=5, block_size=2)
    own = Sampler(checkpoint.denoiser(), betas, SHAPE, sampler, "cpu").block(0)
    assert (Sampler(denoiser, betas, shape, sampler, "cpu").block(0) == own).all()


def test_folder_holds_what_a_diffusers_pipeline_needs_a_card_and_provenance(folder: Path):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "model_index.json",
        "provenance.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert (folder / "README.md").read_text() == "# card"
    assert json.loads((folder / "provenance.json").read_text()) == {"trial": "t0", "format": export.FORMAT}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing temporary stays


def test_earlier_export_and_empty_folder_are_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    export.export_pipeline(make_checkpoint(0), tmp_path / "out", SAMPLER, "first", {})
    (tmp_path / "out" / "leftover").touch()
    export.export_pipeline(second := make_checkpoint(5), tmp_path / "out", SAMPLER, "second", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "README.md").read_text() == "second"
    assert not (tmp_path / "out" / "leftover").exists()
    weights = export.load_export(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(weight, second.state["ema"]["0.99"][name]) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["notes.txt", "provenance.json"])
def test_folder_that_is_no_export_is_refused_and_left_as_it_was(tmp_path: Path, checkpoint: Checkpoint, name: str):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text('{"format": "another tool"}')
    for out in (tmp_path / "mine", tmp_path / "mine" / name):
        with pytest.raises(FileExistsError, match="give --out a new or an empty folder"):
            export.export_pipeline(checkpoint, out, SAMPLER, "", {})
    assert (tmp_path / "mine" / name).read_text() == '{"format": "another tool"}'


def test_failed_export_leaves_the_earlier_one(tmp_path: Path, checkpoint: Checkpoint):
    export.export_pipeline(checkpoint, tmp_path / "out", SAMPLER, "first", {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        export.export_pipeline(checkpoint, tmp_path / "out", SAMPLER, "second", {"score": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "README.md").read_text() == "first"


def test_what_is_no_export_is_not_loaded(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not an export; give a folder"):
            export.load_export(path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b"cut"),
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("scheduler/scheduler_config.json", b"{}"),
        ("scheduler/scheduler_config.json", b'{"trained_betas": [0.1,'),
    ],
)
def test_damaged_export_is_refused_with_a_remedy(
    tmp_path: Path, checkpoint: Checkpoint, file: str, content: bytes | None
):
    export.export_pipeline(checkpoint, tmp_path / "out", SAMPLER, "", {})
    (tmp_path / "out" / file).unlink()
    if content is not None:
        (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged.*write it again"):
        export.load_export(tmp_path / "out")


def test_raw_weights_are_exported_on_request(checkpoint: Checkpoint, tmp_path: Path):
    export.export_pipeline(checkpoint, tmp_path / "raw", SAMPLER, "card", {}, weights="raw")
    loaded, *_ = export.load_export(tmp_path / "raw")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, checkpoint.state["model"][name])


@pytest.mark.slow
def test_torch_exported_denoiser_is_the_model_for_any_batch_up_to_63(checkpoint: Checkpoint, tmp_path: Path):
    export.export_pipeline(checkpoint, tmp_path / "model", SAMPLER, "card", {}, torch_export=True)
    program = torch.export.load(tmp_path / "model" / export.TORCH_EXPORT).module()
    denoiser, _, shape, _ = export.load_export(tmp_path / "model")
    for count in (1, 5, 63):
        x, t = torch.randn(count, *shape), torch.arange(count) % 20
        with torch.no_grad():
            torch.testing.assert_close(program(x, t), denoiser(x, t).sample)


LOADED_WITHOUT_US = """
import importlib.util, sys
from pathlib import Path
OURS = "trainer", "evaluation", "search", "cluster"
sys.path = [place for place in sys.path if not any((Path(place) / name / "__init__.py").exists() for name in OURS)]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert not any(map(importlib.util.find_spec, OURS)), sys.path
import numpy as np, torch
from diffusers import DDIMScheduler, DDPMPipeline
folder, out, seed, count, steps, sampler = sys.argv[1:]
torch.set_num_threads(1)
pipe = DDPMPipeline.from_pretrained(folder)
if sampler == "ddim":
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(int(seed))
images = pipe(batch_size=int(count), generator=generator, num_inference_steps=int(steps), output_type="np").images
np.save(out, (images * 255).round().astype(np.uint8))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sampler", "steps", "ranked_by"),
    [
        (100, "ddpm", 20, SAMPLER),
        (100, "ddim", 20, SAMPLER),
        (100, "ddim", 5, SAMPLER),
        (3, "ddpm", 20, SAMPLER),  # three images cost three, not a block of a hundred
        (100, "ddpm", 5, SamplerConfig(variance="fixed_large", spacing="leading")),
    ],
)
def test_diffusers_without_our_code_draws_the_images_of_ddpm_search_sample(
    checkpoint: Checkpoint, tmp_path: Path, count: int, sampler: str, steps: int, ranked_by: SamplerConfig
):
    export.export_pipeline(checkpoint, tmp_path / "model", ranked_by, "", {})
    seed = block_seed(3, 0)
    arguments = [str(tmp_path / "model"), str(tmp_path / "images.npy"), str(seed), str(count), str(steps), sampler]
    # -I: no working directory and no PYTHONPATH; where our packages are installed is taken off the path.
    subprocess.run([sys.executable, "-I", "-c", LOADED_WITHOUT_US, *arguments], cwd=tmp_path, check=True)
    verbs.sample(tmp_path / "model", tmp_path / "ours.npz", count, sampler, steps, 3, Console(quiet=True))
    theirs, ours = np.load(tmp_path / "images.npy"), np.load(tmp_path / "ours.npz")["images"]
    assert theirs.shape == ours.shape
    assert ours.std() > 10  # else any two grey pictures would agree
    assert np.abs(theirs.astype(int) - ours).max() <= 1
    # And these are what a ranking by such blocks scores.
    settings = ranked_by.model_copy(update={"name": sampler, "steps": steps, "seed": 3, "block_size": count})
    betas = schedules.betas(**checkpoint.config.schedule.model_dump())
    assert (Sampler(checkpoint.denoiser(), betas, SHAPE, settings, "cpu").block(0) == ours).all()
