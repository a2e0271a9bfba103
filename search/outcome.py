"""What a run leaves: its ranking shown, the report, the export and samples of its winner; and each of them again."""

import importlib.metadata
import platform
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from evaluation import card, events, export, pictures, report
from evaluation.config import SamplerConfig
from evaluation.sampling import Sampler
from evaluation.shards import Candidate, kept_images
from search import budget, confirm, tables, watch
from search.config import SearchConfig, UserError
from search.prepare import preflight
from search.records import Records
from search.runs import CONFIG, confirmations, open_run, read_ranking
from trainer import checkpoint
from trainer.config import Weights
from trainer.data import Splits
from trainer.storage import Storage

REPORT = "report/index.html"
SAMPLES = 64


def finish(config: SearchConfig, run: Storage, records: Records, splits: Splits, console: Console) -> None:
    """Report, export and samples of the winner, from what the final stage left."""
    ranked = read_ranking(run)
    if ranked:
        console.print(tables.ranking_table(ranked), tables.ranking_notes(ranked), "", sep="\n")
    write_report(config, run, records, splits, ranked)
    console.print(f"Report:   {run.at(REPORT).uri}")
    winner = _winner(ranked) if ranked else None
    if winner is not None and ranked is not None:
        try:
            export_trial(config, run, records, ranked, winner, None, console)
        except checkpoint.BrokenCheckpointError as error:
            raise UserError(
                f"the winner, {winner}, cannot be exported: {error}; restore it from a copy, or export another: "
                f"ddpm-search export {run.uri} --trial TRIAL --out FOLDER"
            ) from error


def check_ranked(run: Storage) -> None:
    """Raises SystemExit where nothing could be ranked."""
    ranking = read_ranking(run)
    if ranking is None:
        raise SystemExit(f"ddpm-search: no trial came to a checkpoint: nothing to rank; see {run.at(REPORT).uri}")
    if not any(row["rank"] for row in ranking["trials"]):
        raise SystemExit(f"ddpm-search: no trial has a score, for the reasons above; see {run.at(REPORT).uri}")


def export_trial(
    config: SearchConfig,
    run: Storage,
    records: Records,
    ranked: dict[str, Any] | None,
    trial: str,
    out: Path | None,
    console: Console,
    weights: Weights | None = None,
    torch_export: bool = False,
) -> None:
    """Exports a trial to `out` (a local folder; None: RUN/export), with samples.png: into `out`, or into RUN.

    weights: ema or raw; None takes those that were ranked. The samples are the images that were ranked; of a trial or
    weights that were not they are drawn here.
    """
    row = next(row for row in confirm.all_rows(run, records) if row.trial == trial)
    if row.checkpoint is None:
        raise UserError(
            f"trial {trial} has no checkpoint ({row.state}: {row.reason}); choose another: ddpm-search status {run.uri}"
        )
    found = checkpoint.load(run.at(row.checkpoint))
    entries = ranked["trials"] if ranked else []
    named = ((entry, {own["trial"] for own in entry.get("trainings") or ()}) for entry in entries)
    entry = next((entry for entry, names in named if trial == entry["trial"] or trial in names), None)
    if entry and trial == (entry.get("best_training") or entry["trial"]) and entry.get("checkpoint") != row.checkpoint:
        entry = None  # it has trained on since it was ranked
    weights = weights or (ranked or {}).get("weights", config.final.weights)
    text = card.model_card(config.name, vars(row), found, ranked, entry, weights, torch_export)
    provenance = {"run": config.name, "trial": trial, "checkpoint": row.checkpoint, "weights": weights}
    provenance["checkpoint_meta"] = card.published(found.meta)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(run.root) if run.is_local else Path(scratch)
        folder, picture = (out, out / "samples.png") if out else (home / "export", home / "samples.png")
        sampler = SamplerConfig.model_validate(ranked["sampler"]) if ranked else config.final.sampler
        export.export_pipeline(found, folder, sampler, text, provenance, weights, torch_export)
        images = _ranked_images(run, ranked, trial, row.checkpoint, weights)
        try:
            images = _drawn_here(folder, sampler, console) if images is None else images
            pictures.save_grid_png(picture, images)
        except FloatingPointError as error:
            console.print(f"No samples: {error}")
            picture.unlink(missing_ok=True)
        if out is None and not run.is_local:
            for file in (*folder.rglob("*"), picture):
                if file.is_file():
                    run.write(str(file.relative_to(scratch)), file.read_bytes())
    where = str(out) if out else run.at("export").uri
    console.print(f"Export:   {where}  (trial {trial}; diffusers.DDPMPipeline.from_pretrained loads it)")
    if images is not None:
        console.print(f"Samples:  {out / 'samples.png' if out else run.at('samples.png').uri}")


def _ranked_images(
    run: Storage, ranked: dict[str, Any] | None, trial: str, path: str, weights: Weights
) -> np.ndarray | None:
    """None where these weights of the checkpoint were not scored, or their images are gone."""
    if ranked is None or ranked.get("weights", "ema") != weights:
        return None
    try:
        return kept_images(run, Candidate(trial, path), ranked)[:SAMPLES]
    except FileNotFoundError:
        return None


def _drawn_here(folder: Path, sampler: SamplerConfig, console: Console) -> np.ndarray:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser, betas, shape, _ = export.load_export(folder)
    needed = sampler.model_copy(update={"block_size": min(sampler.block_size, SAMPLES)})
    with watch.progress_bar(console, f"Drawing {SAMPLES} images") as progress:
        drawing = Sampler(denoiser.to(device), betas, shape, needed, device)
        return drawing.images(0, SAMPLES, lambda done: progress(done, SAMPLES))


def write_report(
    config: SearchConfig, run: Storage, records: Records, splits: Splits, ranked: dict[str, Any] | None
) -> None:
    """RUN/report/index.html, from whatever there is."""
    samples, lost = {}, {}
    if ranked:
        for row in ranked["trials"]:
            if row["rank"] is not None:
                candidate = Candidate(row.get("best_training") or row["trial"], row.get("checkpoint") or "")
                try:
                    samples[row["trial"]] = kept_images(run, candidate, ranked)
                except FileNotFoundError as error:  # perhaps deleted, to save space
                    lost[row["trial"]] = str(error).replace(f"{run.root}/", "")
    logged = {}
    for trial in run.names("tensorboard"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(run.root, "tensorboard", trial) if run.is_local else Path(scratch)
            if not run.is_local:
                for name in run.names(f"tensorboard/{trial}"):
                    (folder / name).write_bytes(run.read(f"tensorboard/{trial}/{name}"))
            logged[trial] = events.read(folder)
    page = report.render(
        run_name=config.name,
        config=config.model_dump(mode="json"),
        rows=[vars(row) for row in records],
        confirming_seconds=sum(row.worker_seconds for _, row in confirmations(run)),
        ranking=ranked,
        samples=samples,
        lost=lost,
        real_samples=splits.held_out.pixels[splits.held_out.drawn(SAMPLES)],
        events=logged,
        commands=_commands(config, run, ranked),
        versions=versions(),
        ended=budget.read(run).get("ended"),
    )
    run.write(REPORT, page.encode())


def _commands(config: SearchConfig, run: Storage, ranked: dict[str, Any] | None) -> list[str]:
    """What makes a run again, and its ranking where `evaluate` made that by other settings than the run's."""
    final, drawn = config.final, ranked or {}
    own: dict[str, Any] = {"top": final.top, "images": final.images, "weights": final.weights}
    own |= {"sampler": final.sampler.name, "steps": final.sampler.steps}
    sampler = drawn.get("sampler", {})
    drawn = {**drawn, "sampler": sampler.get("name", own["sampler"]), "steps": sampler.get("steps", own["steps"])}
    others = [f"--{name} {drawn[name]}" for name, value in own.items() if drawn.get(name, value) != value]
    again = f"{config.name[:58]}-again"  # a name has 64 letters at most
    return [
        f"ddpm-search run {shlex.quote(run.at(CONFIG).uri)} --name {again}",
        *([f"ddpm-search evaluate runs/{again} {' '.join(others)}"] if others else []),
        f"ddpm-search status {shlex.quote(run.uri)}",
    ]


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    names = ("ddpm-search", "torch", "ray", "optuna", "diffusers", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _winner(ranked: dict[str, Any]) -> str | None:
    """The best-scored seed of the configuration that ranks first."""
    return next((row.get("best_training") or row["trial"] for row in ranked["trials"] if row["rank"] == 1), None)


def report_again(path: str, console: Console) -> None:
    """The report of a run, from what is on disk."""
    config, run, records = open_run(path)
    splits = preflight(config, console)
    write_report(config, run, records, splits, read_ranking(run))
    console.print(f"Report:   {run.at(REPORT).uri}")


def export_again(
    path: str, trial: str | None, out: Path, weights: Weights | None, torch_export: bool, console: Console
) -> None:
    """A trial's export, the winner's where none is named."""
    config, run, records = open_run(path)
    ranked = read_ranking(run)
    known = [row.trial for row in confirm.all_rows(run, records)]
    if trial is None:
        if ranked is None:
            raise UserError(
                f"no ranking at {path}, so no winner; name a --trial, or first: ddpm-search evaluate {path}"
            )
        trial = _winner(ranked)
        if trial is None:
            raise UserError(f"no trial of {path} could be scored, so there is no winner; name a --trial")
    elif trial not in known:
        raise UserError(f"--trial {trial} is not in this run; its trials are {', '.join(known)}")
    try:
        export_trial(config, run, records, ranked, trial, out, console, weights, torch_export)
    except (OSError, checkpoint.BrokenCheckpointError) as error:
        raise UserError(f"trial {trial} cannot be exported to --out {out}: {error}") from error
