"""The verbs that need no run and no Ray: train, sample, score, schedule show and compare."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from search.config import SearchConfig, UserError
from search.interrupt import Interrupt
from search.space_config import KNOWN_POINTS, explain
from trainer import schedules
from trainer.config import ScheduleConfig


def make_schedule(family: str, start: float, end: float, tau: float, steps: int) -> ScheduleConfig:
    """Raises UserError where the values break a law."""
    try:
        return ScheduleConfig.model_validate({"family": family, "start": start, "end": end, "tau": tau, "steps": steps})
    except ValidationError as error:
        raise UserError("; ".join(explain(e) for e in error.errors()[:3])) from None


def schedule_numbers(schedule: ScheduleConfig) -> dict[str, Any]:
    """What `schedule show` prints: beta and alpha_bar (T,), terminal_snr, prior_kl_bits_per_dim, screened."""
    values = schedule.model_dump()
    betas = schedule.betas()
    alpha_bar = schedules.alpha_bar(betas)
    return {
        **values,
        "terminal_snr": schedules.terminal_snr(alpha_bar[-1]),
        "prior_kl_bits_per_dim": schedules.prior_kl_bits_per_dim(alpha_bar[-1]),
        "screened": schedules.screen(**values),
        "beta": betas.tolist(),
        "alpha_bar": alpha_bar.tolist(),
    }


def show_schedule(schedule: ScheduleConfig, as_json: bool, console: Console) -> None:
    numbers = schedule_numbers(schedule)
    if as_json:
        print(json.dumps(numbers))
        return
    from rich.table import Table

    console.print(f"{schedule.label()}, T = {schedule.steps}")
    console.print(
        f"terminal SNR {numbers['terminal_snr']:.3g}, "
        f"prior KL {numbers['prior_kl_bits_per_dim']:.3g} bits per dimension"
    )
    console.print(f"screen: {numbers['screened'] or 'passes'}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step t", "beta", "alpha_bar", "log SNR"):
        table.add_column(name, justify="right")
    log_snr = schedules.log_snr(np.array(numbers["alpha_bar"]))
    for index in np.unique(np.linspace(0, schedule.steps - 1, 11).round().astype(int)):
        table.add_row(
            str(index + 1),
            f"{numbers['beta'][index]:.4g}",
            f"{numbers['alpha_bar'][index]:.4g}",
            f"{log_snr[index]:.2f}",
        )
    console.print(table)


def _check_picture(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, which is what is written, but is {out}")


def plot_schedule(schedule: ScheduleConfig, out: Path) -> None:
    from evaluation import pictures

    _check_picture(out)
    try:
        pictures.plot_schedules([schedule], out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error


def compare_schedules(named: list[str], steps: int, out: Path) -> None:
    """Draws schedules given as FAMILY:START:END[:TAU]; the original study's five where none are."""
    from sklearn.datasets import load_sample_image

    from evaluation import pictures

    _check_picture(out)
    if named:
        chosen = [_parse_schedule(text, steps) for text in named]
    else:
        chosen = [make_schedule(p.family, p.start, p.end, p.tau, steps) for p in KNOWN_POINTS]
    photo = load_sample_image("flower.jpg")[60:380:2, 160:480:2]  # embedded in scikit-learn
    try:
        pictures.plot_compare(chosen, photo, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error


def _parse_schedule(text: str, steps: int) -> ScheduleConfig:
    family, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if not 2 <= len(values) <= 3:
        raise UserError(
            f"a schedule is FAMILY:START:END or FAMILY:START:END:TAU, such as cosine:0:1:1, but got {text!r}"
        )
    return make_schedule(family, values[0], values[1], values[2] if len(values) == 3 else 1.0, steps)


def sample(folder: Path, out: Path, images: int, sampler: str, steps: int, seed: int, console: Console) -> None:
    """Images from an exported folder, into a file or a folder."""
    import torch

    from evaluation import export, files
    from evaluation.config import SamplerConfig
    from evaluation.sampling import sample_images
    from search.watch import progress_bar

    asked = {"name": sampler, "steps": steps, "seed": seed}
    try:
        SamplerConfig.model_validate(asked)
    except ValidationError as error:
        said = "; ".join(f"--{explain(e)}" for e in error.errors())
        raise UserError(said.replace("--name:", "--sampler:")) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        files.check_out(out)
        denoiser, betas, shape, ranked_by = export.load_export(folder)
        settings = ranked_by.model_copy(update=asked)
        with progress_bar(console, f"Drawing {images:,} images") as progress:
            drawn = sample_images(
                denoiser.to(device), betas, shape, settings, 0, images, device, lambda done: progress(done, images)
            )
        files.write_images(drawn, out)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    console.print(f"Written: {out}")


def score(path: Path, extractor: str, weights: Path | None, split_size: int) -> dict[str, Any]:
    """The score of images, or of stored probabilities or logits, as `score --json` prints it."""
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
                judge: Any = inception.Inception(weights, device)
            else:
                judge = Classifier.load(Storage(extractor)).to(device)
            name, score_name = judge.name, judge.score_name
            probabilities = judge.extract(drawn).probabilities
        result = scores.inception_score(probabilities, split_size)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return {
        "score_name": score_name,
        "score": {"mean": result.mean, "std": result.std},
        "score_pool": scores.inception_score(probabilities, len(probabilities)).mean,
        "n": result.n_used,
        "dropped": result.dropped,
        "split_size": result.split_size,
        "extractor": name,
    }


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
    from evaluation import reference
    from search.prepare import choose_metric, preflight
    from search.watch import progress_bar
    from trainer import checkpoint, local, loop
    from trainer.data_cache import cache_folder
    from trainer.storage import Storage

    folder = Storage(out)
    try:
        folder.check_writable()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}; give a folder that can") from error
    found = checkpoint.latest(folder)
    own = re.compile(r"checkpoint_\d{9}|events\.out\.tfevents\..*")  # of one that was cut before its first checkpoint
    if found is None and not all(own.fullmatch(name) for name in folder.names()):
        raise UserError(f"--out {out} is not empty and holds no training; give a new folder")
    if found is not None and found[1].config.learned() != config.train.learned():
        raise UserError(f"--out {out} holds a training of another configuration; give another --out")
    splits = preflight(config, console)
    device = local.default_device()
    try:
        judge = reference.prepare(splits, config.final, cache_folder(), str(device), console.print)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    settings, metric = config.early_stopping, choose_metric(config, judge, console)
    done = f", from epoch {found[1].meta['epoch']}" if found else ""
    console.print(f"Training {config.train.schedule.label()} for {config.train.epochs} epochs{done}")
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
                device,
                report,
                score=reference.rung_scorer(splits, judge, settings.images, settings.sampler, metric),
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
