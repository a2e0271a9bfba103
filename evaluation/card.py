"""README.md of an export, as the Hugging Face hub reads it: what was trained, on what, and how good it is."""

from pathlib import Path
from typing import Any

from evaluation.export import PROVENANCE, TORCH_EXPORT
from evaluation.report_words import chance, sampler_words
from trainer.checkpoint import Checkpoint
from trainer.config import DataConfig, ModelConfig, Weights
from trainer.published import PUBLISHED

# What those who publish the data say of its use.
LICENCES = {
    "digits": "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits: Alpaydin and Kaynak 1998, "
    "doi:10.24432/C50P49)",
} | {name: known.licence for name, known in PUBLISHED.items()}


def model_card(
    run_name: str,
    row: dict[str, Any],
    checkpoint: Checkpoint,
    ranking: dict[str, Any] | None,
    entry: dict[str, Any] | None,
    weights: Weights = "ema",
    torch_export: bool = False,
) -> str:
    """The text of README.md.

    row: the trial in trials.parquet. ranking: ranking.json, entry: the trial in it, or the one it confirms; None where
    it was not scored.
    """
    config = checkpoint.config
    name, schedule = _without_path(config.data.name), config.schedule
    channels, height, width = checkpoint.meta["image_shape"]
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags: [ddpm, diffusion, ddpm-search]",
        "---",
        "",
        f"# DDPM of {name}: {schedule.label()}",
        "",
        f"Trial {row['trial']} of the search {run_name}, written by ddpm-search. "
        + (
            "The weights are as trained, not their moving average."
            if weights == "raw"
            else "The weights are their moving average (EMA)."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| Noise schedule | {schedule.label()} |",
        f"| Diffusion steps T | {schedule.steps:,} |",
        f"| Learning rate | {config.learning_rate:.3g} |",
        f"| Dropout | {config.dropout:.3g} |",
        f"| Batch size | {config.batch_size:,} |",
        f"| Training seed | {row['seed']} |",
        f"| Epochs | {row['epoch']} ({row['state']}) |",
        f"| Training cost | {row['worker_seconds'] / 3600:.3g} worker-hours for this trial |",
        f"| Model | {_network(config.model)} |",
        f"| Parameters | {sum(weight.numel() for weight in checkpoint.state['model'].values()):,} |",
        f"| Images | {width} × {height}, {'grey' if channels == 1 else 'colour'} |",
        f"| Data | {_data(config.data)} |",
        f"| Licence of the data | {LICENCES.get(name, 'the licence of your own data applies')} |",
        "",
        "## Quality",
        "",
        *_quality(ranking, entry, row["trial"], weights),
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


def _without_path(name: str) -> str:
    """A data set's name, of a path its last part: an export is published, and its reader has no such folder."""
    kind, colon, path = name.partition(":")
    return f"{kind}{colon}{Path(path).name}"


def published(meta: dict[str, Any]) -> dict[str, Any]:
    """What checkpoint.json says, without places on this machine: as an export has it."""
    data = meta["config"]["data"]
    data = data | {"name": _without_path(data["name"]), "root": None}
    return meta | {"config": meta["config"] | {"data": data}}


def _network(model: ModelConfig) -> str:
    attends = [str(level) for level, attention in enumerate(model.attention, 1) if attention]
    where = f"at level {', '.join(attends)} and in the middle" if attends else "in the middle"
    return (
        f"U-Net, channels {', '.join(map(str, model.channels))}, {model.layers_per_block} layers a block, "
        f"self-attention {where} ({model.attention_head_dim} channels a head)"
    )


def _data(data: DataConfig) -> str:
    subset = "" if data.subset is None else f", {data.subset:,} images drawn by seed {data.seed}"
    return f"{_without_path(data.name)}{subset}; trained on {data.train_fraction:.0%} of them, the rest held out"


def _quality(ranking: dict[str, Any] | None, entry: dict[str, Any] | None, trial: str, weights: Weights) -> list[str]:
    """Scores of the entry, and of `trial` alone where the entry is a configuration's."""
    if ranking is not None and ranking.get("weights", weights) != weights:
        return [f"Not scored: the ranking is of the {ranking['weights']} weights, these are the {weights} ones."]
    if ranking is None or entry is None or entry["rank"] is None:
        why = f": {entry['reason']}" if entry and entry["reason"] else ""
        return [f"Not scored by the final stage{why}."]
    score, frechet, real, same = entry["score"], entry["frechet"], ranking["real"], entry["at_real_n"]
    name, images, real_n = ranking["score_name"], f"{ranking['images']:,} images", f"{real['n']:,}"
    fewer = real["n"] != ranking["images"]  # a comparison at one number of images needs a row of its own
    left_over = f", {ranking['dropped']:,} left over" if ranking.get("dropped") else ""
    tied = ", ".join(entry["tied_with"]) or "no other"
    # a schedule may have fewer steps
    sampler = sampler_words(ranking["sampler"] | ({"steps": entry["steps"]} if entry.get("steps") else {}))
    this, of = "this model", "of this trained model, not of its configuration"
    if entry["confirmed"]:
        this, of = f"the configuration, mean of {len(entry['mean_of'])} new seeds", "of the configuration"
    elif trial != entry["trial"]:  # too few of the configuration's new seeds could be scored to confirm it
        this, of = f"its first training, {entry['trial']}", f"of {entry['trial']}, not of its configuration"
    own = [] if this == "this model" else [_seed(seed, name, trial) for seed in entry["trainings"]]
    return [
        f"| | {name} | Fréchet distance |",
        "|---|---|---|",
        f"| {this}, {images} | {_estimate(score, 'mean')} | {_estimate(frechet, 'value')} |",
        *([f"| {this}, {real_n} images | {same['score']:.3f} | {same['frechet']:.3f} |"] if fewer else []),
        f"| real held-out images, {real_n} | {real['score']:.3f} | {real['frechet']:.3f} |",
        "",
        f"Rank {entry['rank']} of {sum(e['rank'] is not None for e in ranking['trials'])}; best with probability "
        f"{chance(entry['p_best'])}; tied with {tied}. Brackets are 95% confidence intervals, {of}.",
        "",
        *(f"- {line}" for line in own),
        *([""] if own else []),
        f"Judged by {ranking['extractor']}; splits of {ranking['split_size']:,} images{left_over}; {sampler}.",
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
