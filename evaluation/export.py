"""A trained model as a folder that diffusers' DDPMPipeline loads, and back."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from evaluation.config import SamplerConfig
from trainer.checkpoint import Checkpoint
from trainer.config import Weights
from trainer.step import Denoiser

FORMAT = "ddpm-search export 1"  # what marks a folder as ours, so that it may be replaced and read
PROVENANCE = "provenance.json"
TORCH_EXPORT = "denoiser.pt2"


def export_pipeline(
    checkpoint: Checkpoint,
    out: Path,
    sampler: SamplerConfig,
    card: str,
    provenance: dict[str, Any],
    weights: Weights = "ema",
    torch_export: bool = False,
) -> None:
    """Writes a checkpoint's model and its schedule, for `DDPMPipeline.from_pretrained`.

    sampler: what the model was ranked by; diffusers' sampler has its variance and spacing. With fixed_large variance,
    trailing spacing and fewer steps than T, DDPMPipeline leaves noise in its images: it draws some at the last step.
    card: the text of README.md, see evaluation/card.py. provenance: where the model is from, kept in provenance.json.
    torch_export: writes the denoiser to denoiser.pt2 as well.
    The folder appears whole or not at all; an earlier export there is replaced.
    Raises FileExistsError where `out` holds anything else.
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    out = out.expanduser().resolve()
    if out.exists() and not (out.is_dir() and (_is_export(out) or not any(out.iterdir()))):
        raise FileExistsError(f"{out} holds something that is no earlier export; give --out a new or an empty folder")
    schedule = checkpoint.config.schedule
    scheduler = DDPMScheduler(
        num_train_timesteps=schedule.steps,
        # Python floats: JSON keeps every bit of them, and so `load_export` has the float64 table of the training.
        trained_betas=schedule.betas().tolist(),
        variance_type=sampler.variance,
        clip_sample=True,
        prediction_type="epsilon",
        timestep_spacing=sampler.spacing,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{uuid.uuid4().hex}.{kind}") for kind in ("new", "old"))
    try:
        denoiser = checkpoint.denoiser(weights)
        DDPMPipeline(denoiser, scheduler).save_pretrained(fresh, safe_serialization=True)
        if torch_export:
            _torch_export(denoiser, checkpoint.meta["image_shape"], fresh / TORCH_EXPORT)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        # Ours goes last over the caller's: a folder that says it is an export can be relied on to be one.
        content = json.dumps(provenance | {"format": FORMAT}, indent=2, allow_nan=False)
        (fresh / PROVENANCE).write_text(content + "\n", encoding="utf-8")
        if out.exists():
            out.rename(old)  # a folder that is not empty cannot be renamed over
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _torch_export(network: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    """(x_t (N, C, H, W), t (N,) int64) → eps, N from 1 to 63: diffusers' upsampling branches at 64."""
    example = torch.zeros((2, *shape)), torch.zeros(2, dtype=torch.int64)
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(Denoiser(network).eval(), example, dynamic_shapes={"x_t": batch, "t": batch})
    torch.export.save(program, path)


def load_export(folder: Path) -> tuple[nn.Module, np.ndarray, tuple[int, int, int], SamplerConfig]:
    """What an export holds: the denoiser in eval mode on the CPU, betas (T,) float64, image shape (C, H, W), and a
    sampler of the variance and the spacing that it was ranked by, in fp32 as diffusers' own.

    Raises ValueError where the folder is no export of ours, or a damaged one.
    """
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    folder = folder.expanduser().resolve()
    if not _is_export(folder):
        raise ValueError(f"{folder} is not an export; give a folder that `ddpm-search export … --out` wrote")
    try:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        betas = np.array(config["trained_betas"], np.float64)
        sampler = SamplerConfig(variance=config["variance_type"], spacing=config["timestep_spacing"], bf16=False)
        denoiser = UNet2DModel.from_pretrained(folder / "unet", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the export {folder} is damaged: {error}; write it again: `ddpm-search export`") from error
    height, width = denoiser.config.sample_size
    return denoiser.eval().requires_grad_(False), betas, (denoiser.config.in_channels, height, width), sampler


def _is_export(folder: Path) -> bool:
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT
