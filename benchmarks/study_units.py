"""The original study one training at a time, without Ray, for a GPU that is at hand for minutes.

    python -m benchmarks.study_units study-cifar10 --row 4 --seed 1 --set train.data.name=parquet:/data/cifar10
    python -m benchmarks.study_units study-cifar10

The first trains row 4 (from 1, of the configuration's known points) from one seed, draws `final.images` images and
scores them: docs/results/study_cifar10/4-1.json and a picture of 24 of its images. All are judged by the classifier
that the first one trained, in runs/study_cifar10: take that folder along to another machine. The second command joins
all that there is to docs/results/study_cifar10.json and the table in docs/study.md. Nothing is chosen by a first seed,
so all count; each draws its images from noise of its own, so that the spread between a row's seeds is all the
uncertainty that it has.
"""

import argparse
import json
import tempfile
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import study
from benchmarks.common import RESULTS, provenance, write
from evaluation import pictures, scores
from evaluation.joint import pool
from evaluation.ranking import score_influence, score_intervals
from evaluation.sampling import Sampler
from search import prepare, space, watch
from search.config import SearchConfig
from search.config_file import load
from trainer import checkpoint, local
from trainer.storage import Storage

# What units must have in common to stand in one table.
SHARED = ("reference", "classes", "images", "split_size", "sampler", "training_images", "epochs")


def unit(config: SearchConfig, row: int, seed: int, run: Storage) -> tuple[dict[str, Any], np.ndarray]:
    """Trains, draws and scores; and the first 24 images. run: keeps the classifier that judges all units."""
    console, device = Console(), local.default_device()
    splits = prepare.preflight(config, console)
    reference = prepare.reference_of(config, splits, console, run)
    if reference is None:
        raise SystemExit(f"nothing can judge the images of {config.train.data.name}: give final.inception_weights")
    params = space.flat(space.known_params(config, config.known_points[row - 1]))
    training, final = space.train_config(config, params | {"seed": seed}), config.final
    sampler = final.sampler.model_copy(update={"seed": seed}).on(device.type)
    seconds, began = {}, time.monotonic()

    def clocked(name: str) -> None:
        nonlocal began
        seconds[name], began = round(time.monotonic() - began, 1), time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        kept = Storage(folder)
        local.fit(
            training,
            splits.train,
            kept,
            kept.at("events"),
            device,
            report=lambda metrics, stored: None,
            log=lambda metrics: print(f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}", flush=True),
        )
        newest = checkpoint.latest(kept)
        assert newest is not None
        found = newest[1]
    clocked("training")
    denoiser = found.denoiser(final.weights).to(device)
    drawing = Sampler(denoiser, training.schedule.betas(), splits.train.shape, sampler, device)
    with watch.progress_bar(console, f"Drawing {final.images:,} images") as progress:
        images = drawing.images(0, final.images, lambda done: progress(done, final.images))
    clocked("sampling")
    judged = reference.extractor.to(device).extract(images)
    score = scores.inception_score(judged.probabilities, final.split_size)
    frechet, influence = scores.frechet_influence(judged.features, reference.train)
    clocked("scoring")

    def real(of: Any) -> dict[str, float]:
        own = scores.inception_score(of.probabilities, final.split_size).mean
        return {"n": len(of.features), "score": own, "frechet": scores.frechet_distance(of.features, reference.train)}

    return {
        **provenance(seed),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "row": row,
        "label": study.label(params),
        "plain": not params["settings"],
        "score": score.mean,
        "score_variance": float(np.square(score_influence(judged.probabilities, final.split_size)).sum()),
        "frechet": frechet,
        "frechet_variance": float(np.square(influence).sum()),
        "seconds": seconds,
        "reference": reference.key,
        "classes": judged.probabilities.shape[1],
        "score_name": reference.extractor.score_name,
        "held_out_accuracy": reference.accuracy,
        "images": final.images,
        "split_size": final.split_size,
        "sampler": sampler.model_dump(exclude={"seed"}),
        "training_images": len(splits.train),
        "epochs": training.epochs,
        "real": real(reference.held_out),
        "noise": real(reference.noise),
    }, images[:24]  # fmt: skip


def joined(config: SearchConfig, units: list[dict[str, Any]]) -> dict[str, Any]:
    """What `study.table` draws, of units that were measured alike.

    Intervals are of the configuration where a row has several seeds, else of its one training.
    """
    for other in units[1:]:
        if differing := [name for name in SHARED if other[name] != units[0][name]]:
            raise SystemExit(f"units differ in {', '.join(differing)}: measure them alike, or take some away")
    rows = sorted({each["row"] for each in units})
    own = [[place for place, each in enumerate(units) if each["row"] == row] for row in rows]

    def joint(metric: str) -> Any:
        variances = [each[f"{metric}_variance"] for each in units]
        return pool(np.array([each[metric] for each in units]), np.diag(variances), own)

    score, frechet = joint("score"), joint("frechet")
    several = [len(places) > 1 for places in own]
    of_score = np.clip(score_intervals(score, several), 1.0, units[0]["classes"])
    of_frechet = np.maximum(frechet.intervals(several), 0.0)
    ties, chances = score.ties(), score.p_best()
    entries = [
        {
            "trial": str(row),
            "label": units[places[0]]["label"],
            "plain": units[places[0]]["plain"],
            "reported": study.REPORTED.get(units[places[0]]["label"]),
            "score": {"mean": score.means[i], "ci": list(of_score[i])},
            "frechet": {"value": frechet.means[i], "ci": list(of_frechet[i])},
            "p_best": chances[i],
            "tied_with": [str(rows[j]) for j in np.flatnonzero(ties[i])],
            "confirmed": several[i],
            "seeds": [units[place]["seed"] for place in places],
            "seconds": [units[place]["seconds"] for place in places],
            "commits": sorted({units[place]["commit"] for place in places}, key=str),  # None outside git
        }
        for i, (row, places) in enumerate(zip(rows, own, strict=True))
    ]
    return {
        **provenance(config.seed),
        "config": config.name,
        "devices": sorted({each["device"] for each in units}),
        **{name: units[0][name] for name in (*SHARED, "score_name", "held_out_accuracy", "real", "noise")},
        "rows": sorted(entries, key=lambda entry: -entry["score"]["mean"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--row", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    asked = parser.parse_args()
    config = load(asked.config, asked.overrides)
    name = config.name.replace("-", "_")
    folder = RESULTS / name
    if asked.row is not None:
        if not 1 <= asked.row <= len(config.known_points):
            parser.error(f"--row is 1 to {len(config.known_points)}, but is {asked.row}")
        result, images = unit(config, asked.row, asked.seed, Storage(f"runs/{name}"))
        folder.mkdir(parents=True, exist_ok=True)
        pictures.save_grid_png(folder / f"{asked.row}-{asked.seed}.png", images)
        write(f"{name}/{asked.row}-{asked.seed}", result)
        return
    units = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not units:
        parser.error(f"no unit is in {folder}: give a --row")
    write(name, joined(config, units))
    document = study.DOCUMENT.read_text()
    if f"<!-- {name} -->" not in document:
        document += f"\n## {config.name}, as far as it is measured\n\n<!-- {name} -->\n<!-- end -->\n"
    study.DOCUMENT.write_text(study.page(document, name, json.loads((RESULTS / f"{name}.json").read_text())))


if __name__ == "__main__":
    main()
