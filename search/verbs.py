"""The verbs that need no run and no Ray: train, sample, score."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from evaluation.config import SamplerName
from search.config import SearchConfig, UserError
from search.interrupt import Interrupt


def sample(folder: Path, out: Path, images: int, sampler: SamplerName, steps: int, seed: int, console: Console) -> None:
    """Images from an exported folder, into a file or a folder."""
    import torch

    from evaluation import export, files
    from evaluation.report_words import count
    from evaluation.sampling import Sampler
    from search.watch import progress_bar

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        files.check_out(out)
        denoiser, betas, shape, ranked_by = export.load_export(folder)
        blocks = min(images, ranked_by.block_size)  # a few images do not cost a hundred
        settings = ranked_by.model_copy(update={"name": sampler, "steps": steps, "seed": seed, "block_size": blocks})
        with progress_bar(console, f"Drawing {count(images, 'image')}") as progress:
            drawing = Sampler(denoiser.to(device), betas, shape, settings, device)
            drawn = drawing.images(0, images, lambda done: progress(done, images))
        files.write_images(drawn, out)
    except (ValueError, OSError, FloatingPointError) as error:
        raise UserError(str(error)) from error
    console.print(f"Written: {out}")


def score(path: Path, extractor: str, weights: Path | None, split_size: int, as_json: bool, console: Console) -> None:
    """Prints the score of images, or of stored probabilities or logits."""
    import torch

    from evaluation import files, inception, scores
    from evaluation.classifier import Classifier
    from trainer.storage import Storage

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probabilities = _stored_probabilities(path)
        name, score_name = "stored", "score of stored probabilities"
        if probabilities is None:
            drawn = files.read_images(path)
            if extractor == "inception":
                found: Any = inception.Inception(weights, device)
            else:
                found = Classifier.load(Storage(extractor)).to(device)
            name, score_name = found.name, found.score_name
            probabilities = found.extract(drawn).probabilities
        result = scores.inception_score(probabilities, split_size)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    pool = scores.inception_score(probabilities, len(probabilities)).mean
    if as_json:
        said = {
            "score_name": score_name,
            "score": {"mean": result.mean, "std": result.std},
            "score_pool": pool,
            "n": result.n_used,
            "dropped": result.dropped,
            "split_size": result.split_size,
            "extractor": name,
        }
        print(json.dumps(said, indent=2))
        return
    spread = "" if result.std is None else f" ± {result.std:.4f} between splits"
    left = f", {result.dropped:,} left over" if result.dropped else ""
    console.print(
        f"{score_name} {result.mean:.4f}{spread}  (N {result.n_used:,}, split size {result.split_size:,}{left}; "
        f"all {len(probabilities):,} as one pool {pool:.4f})"
    )


def _stored_probabilities(path: Path) -> np.ndarray | None:
    from evaluation.files import read_array
    from evaluation.scores import softmax_float64

    if path.suffix != ".npz" or not path.is_file():
        return None
    probabilities, _ = read_array(path, "probabilities")
    if probabilities is None:
        logits, _ = read_array(path, "logits")
        return None if logits is None else softmax_float64(logits)
    return probabilities


def train(config: SearchConfig, out: Path, console: Console) -> None:
    """One training of `config.train`, in this process; goes on from the newest checkpoint in `out`."""
    from evaluation.reference import rung_scorer
    from evaluation.report_words import count
    from search.prepare import choose_metric, preflight, reference_of
    from search.watch import progress_bar
    from trainer import checkpoint, local, loop, schedules
    from trainer.storage import Storage

    folder = Storage(out)
    try:
        folder.check_writable()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}; give a folder that can") from error
    found = checkpoint.latest(folder)
    others = set(folder.names()) - set(checkpoint.names(folder))  # beside broken ones: it was cut before its first
    if found is None and not all(name.startswith("events.out.tfevents.") for name in others):
        raise UserError(f"--out {out} is not empty and holds no training; give a new folder")
    if found is not None:
        then, now = found[1].config, config.train
        if (then.learned(), then.data.name) != (now.learned(), now.data.name):
            raise UserError(f"--out {out} holds a training of another configuration; give another --out")
    if reason := schedules.screen(**config.train.schedule.model_dump()):
        console.print(f"A search would leave this schedule out: {reason}")
    splits = preflight(config, console)
    reference = reference_of(config, splits, console, None)
    settings, metric = config.early_stopping, choose_metric(config, reference, console)
    done = f", from epoch {found[1].meta['epoch']}" if found else ""
    console.print(f"Training {config.train.schedule.label()} for {count(config.train.epochs, 'epoch')}{done}")
    console.print(f"TensorBoard:    tensorboard --logdir {folder.uri}")

    def report(metrics: loop.Metrics, checkpoint: Storage) -> None:
        names = ("train_loss", "frechet", "score", "grid_loss")
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in names if metrics.get(name) is not None)
        console.print(f"epoch {metrics['epoch']:>5}  {shown}")

    with Interrupt().handled() as interrupt, interrupt.awaited(), progress_bar(console, "epochs") as progress:
        try:
            local.fit(
                config.train,
                splits.train,
                folder,
                folder,
                local.default_device(),
                report,
                score=rung_scorer(splits, reference, settings.images, settings.sampler, metric),
                rungs=config.rung_epochs(),
                log=lambda metrics: progress(metrics["epoch"], config.train.epochs),
                stop=lambda: interrupt.requested,
            )
        except loop.TrainingFailedError as error:
            raise SystemExit(f"ddpm-search: training failed: {error}") from None
        except loop.InterruptedTrainingError:
            print(f"\nInterrupted; a checkpoint is in {out}. The same command goes on from there.", file=sys.stderr)
            raise SystemExit(130) from None
    console.print(f"Checkpoints:    {out}")
