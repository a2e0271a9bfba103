"""A trained model as a folder that diffusers' DDPMPipeline loads, and back."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer import schedules
from trainer.checkpoint import Checkpoint
from trainer.config import ScheduleConfig

FORMAT = "ddpm-search export 1"  # what marks a folder as ours, so that it may be replaced and read
PROVENANCE = "provenance.json"
TORCH_EXPORT = "denoiser.pt2"


def export_pipeline(
    checkpoint: Checkpoint,
    out: Path,
    card: str,
    provenance: dict[str, Any],
    raw: bool = False,
    torch_export: bool = False,
) -> None:
    """Writes the EMA model (the raw one where asked for) and its schedule, for `DDPMPipeline.from_pretrained`.

    card: the text of README.md, see `model_card`. provenance: where the model comes from, kept in provenance.json.
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
        trained_betas=schedules.betas(**schedule.model_dump()).tolist(),
        variance_type="fixed_small",
        clip_sample=True,
        prediction_type="epsilon",
        # As evaluation/sampling.py visits them: "leading", the default, would never see pure noise at fewer steps.
        timestep_spacing="trailing",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{uuid.uuid4().hex}.{kind}") for kind in ("new", "old"))
    try:
        denoiser = checkpoint.denoiser(raw)
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


class _Denoiser(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        eps: torch.Tensor = self.network(x_t, t, return_dict=False)[0]
        return eps


def _torch_export(network: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    """(x_t (N, C, H, W), t (N,) int64) → eps, N from 1 to 63: diffusers' upsampling branches at 64."""
    example = torch.zeros((2, *shape)), torch.zeros(2, dtype=torch.int64)
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(_Denoiser(network).eval(), example, dynamic_shapes={"x_t": batch, "t": batch})
    torch.export.save(program, path)


def load_export(folder: Path) -> tuple[nn.Module, np.ndarray, tuple[int, int, int]]:
    """What an export holds: the denoiser in eval mode on the CPU, betas (T,) float64, image shape (C, H, W).

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
        denoiser = UNet2DModel.from_pretrained(folder / "unet", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the export {folder} is damaged: {error}; write it again: `ddpm-search export`") from error
    height, width = denoiser.config.sample_size
    return denoiser.eval().requires_grad_(False), betas, (denoiser.config.in_channels, height, width)


def model_card(
    run_name: str,
    row: dict[str, Any],
    data_name: str,
    ranking: dict[str, Any] | None,
    entry: dict[str, Any] | None,
    raw: bool = False,
    torch_export: bool = False,
) -> str:
    """README.md of an export, as the Hugging Face hub reads it.

    row: the trial in trials.parquet. ranking: ranking.json, entry: the trial in it, or the one it repeats; None where
    it was not scored.
    """
    space = (row.get("settings") or {}).get("schedule.space", "alpha_bar")
    own = {name: row[name] for name in ("family", "start", "end", "tau")}
    schedule = ScheduleConfig.model_construct(**own, space=space)
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags: [ddpm, diffusion, ddpm-search]",
        "---",
        "",
        f"# DDPM of {data_name}: {schedule.label()}",
        "",
        f"Trial {row['trial']} of the search {run_name}, written by ddpm-search. "
        + (
            "The weights are as trained, not their moving average."
            if raw
            else "The weights are their moving average (EMA)."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| Noise schedule | {schedule.label()} |",
        f"| Learning rate | {row['learning_rate']:.3g} |",
        f"| Dropout | {row['dropout']:.3g} |",
        f"| Training seed | {row['seed']} |",
        f"| Epochs | {row['epoch']} ({row['state']}) |",
        f"| Training cost | {row['worker_seconds'] / 3600:.3g} worker-hours for this trial |",
        f"| Data | {data_name} |",
        "",
        "## Quality",
        "",
        *_quality(ranking, entry, row["trial"], "raw" if raw else "ema"),
        "",
        "## Use",
        "",
        "```python",
        "from diffusers import DDPMPipeline",
        "",
        'pipe = DDPMPipeline.from_pretrained("path/to/this/folder")',
        "steps = pipe.scheduler.config.num_train_timesteps",
        "image = pipe(batch_size=1, num_inference_steps=steps).images[0]",
        "```",
        "",
        f"The schedule is in the scheduler's `trained_betas`. Where the model comes from is in {PROVENANCE}.",
        "",
        *(
            [f'`torch.export.load("{TORCH_EXPORT}").module()(x_t, t)` predicts the noise in up to 63 images.', ""]
            if torch_export
            else []
        ),
    ]
    return "\n".join(lines)


def _quality(ranking: dict[str, Any] | None, entry: dict[str, Any] | None, trial: str, weights: str) -> list[str]:
    """Scores of the entry, and of `trial` alone where the entry is a configuration's."""
    if ranking is not None and ranking.get("weights", weights) != weights:
        return [f"Not scored: the ranking is of the {ranking['weights']} weights, these are the {weights} ones."]
    if ranking is None or entry is None or entry["rank"] is None:
        why = f": {entry['reason']}" if entry and entry["reason"] else ""
        return [f"Not scored by the final stage{why}."]
    score, frechet, real, same = entry["score"], entry["frechet"], ranking["real"], entry["at_real_n"]
    name, images, real_n = ranking["score_name"], f"{ranking['images']:,} images", f"{real['n']:,}"
    tied = ", ".join(entry["tied_with"]) or "no other"
    sampler = ", ".join(f"{key} {value}" for key, value in ranking["sampler"].items())
    this, own = "this model", []
    if entry["confirmed"]:
        this = f"the configuration, mean of {len(entry['seeds'])} new seeds"
        own = [_seed(seed, name, trial) for seed in entry["by_seed"]]
    return [
        f"| | {name} | Fréchet distance |",
        "|---|---|---|",
        f"| {this}, {images} | {_estimate(score, 'mean')} | {_estimate(frechet, 'value')} |",
        f"| {this}, {real_n} images | {same['score']:.3f} | {same['frechet']:.3f} |",
        f"| real held-out images, {real_n} | {real['score']:.3f} | {real['frechet']:.3f} |",
        "",
        f"Rank {entry['rank']} of {sum(e['rank'] is not None for e in ranking['trials'])}; best with probability "
        f"{entry['p_best']:.2f}; not told apart from {tied}. Brackets are 95% confidence intervals, "
        + ("of the configuration." if entry["confirmed"] else "of this trained model, not of its configuration."),
        "",
        *(f"- {line}" for line in own),
        *([""] if own else []),
        f"Judged by {ranking['extractor']}; splits of {ranking['split_size']:,} images; sampler {sampler}.",
    ]


def _seed(seed: dict[str, Any], name: str, trial: str) -> str:
    label = f"Seed {seed['seed']} ({seed['trial']})"
    if seed["score"] is None:
        return f"{label}: no score: {seed['reason']}."
    this = "; **this model**." if seed["trial"] == trial else "."
    return f"{label}: {name} {seed['score']:.3f}, Fréchet distance {seed['frechet']:.3f}{this}"


def _estimate(estimate: dict[str, Any], name: str) -> str:
    low, high = estimate["ci"]
    return f"{estimate[name]:.3f} [{low:.3f}, {high:.3f}]"


def _is_export(folder: Path) -> bool:
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT
