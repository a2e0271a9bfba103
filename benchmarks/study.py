"""The original study's table, from a finished run of one of its configurations.

    ddpm-search run study-digits
    python -m benchmarks.study runs/study-digits

Writes docs/results/study_digits.json, the table of docs/study.md from it, and its pictures in docs/images.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, provenance, write
from evaluation import export, pictures
from evaluation.events import Events, read
from evaluation.plots import Curve, Panel
from evaluation.sampling import sample_images
from search import confirm, space
from search.records import CONFIRM, Row, open_run
from search.watch import schedule_label
from trainer import checkpoint
from trainer.storage import Storage

DOCUMENT = RESULTS.parent / "study.md"
IMAGES = RESULTS.parent / "images"
# The original report's Inception Scores on CIFAR-10.
REPORTED = {"linear(0.0001, 0.02)": 5.597, "cosine(0, 1, tau 1), no EMA": 7.854, "cosine(0, 1, tau 1)": 7.932}


def label(row: dict[str, Any]) -> str:
    return schedule_label(row) + (", no EMA" if row["settings"].get("ema_decays") == [0] else "")


def figures(run: Storage) -> dict[str, Any]:
    """All that the table needs, of a finished run."""
    config, _, records = open_run(run.uri)
    ranking = run.read_json("ranking.json")
    seconds = {row.trial: row.worker_seconds for row in confirm.all_rows(run, records)}
    names = (
        "score",
        "frechet",
        "p_best",
        "tied_with",
        "confirmed",
        "trial",
        "by_seed",
        "reason",
        "precision",
        "recall",
    )
    rows = []
    for row in ranking["trials"]:
        rows.append(
            {name: row.get(name) for name in names}
            | {"label": label(row), "reported": REPORTED.get(label(row))}
            | {"worker_seconds": round(sum(seconds[seed["trial"]] for seed in row["by_seed"]), 1)}
        )
    shared = ("score_name", "held_out_accuracy", "images", "split_size", "sampler", "real", "noise")
    return {
        **provenance(config.seed),
        "config": config.name,
        "training_images": config.train.data.subset,
        "epochs": config.train.epochs,
        "seeds": config.final.confirm.seeds,
        **{name: ranking[name] for name in shared},
        "worker_hours": round(sum(seconds.values()) / 3600, 3),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The table as docs/study.md has it."""
    number = {row["trial"]: str(index) for index, row in enumerate(result["rows"], 1)}
    lines = [
        f"| | schedule | {result['score_name']} (95% CI) | Fréchet distance (95% CI) | P(best) | tied with | "
        "the report's IS, CIFAR-10 |",
        "|---|---|---|---|---|---|---|",
    ]

    def interval(value: float, ci: list[float], digits: int) -> str:
        return f"{value:.{digits}f} ({ci[0]:.{digits}f}–{ci[1]:.{digits}f})"

    for row in result["rows"]:
        reported = "–" if row["reported"] is None else f"{row['reported']}"
        if row["score"] is None:
            lines.append(f"| {number[row['trial']]} | {row['label']} | {row['reason']} | | | | {reported} |")
            continue
        lines.append(
            f"| {number[row['trial']]} | {row['label']} | {interval(row['score']['mean'], row['score']['ci'], 3)} | "
            f"{interval(row['frechet']['value'], row['frechet']['ci'], 2)} | {row['p_best']:.2f} | "
            f"{', '.join(number[other] for other in row['tied_with']) or '–'} | {reported} |"
        )
    for name in ("real", "noise"):
        at = result[name]
        title = {"real": "real, held out", "noise": "Gaussian noise"}[name]
        lines.append(f"| | {title} (N {at['n']}) | {at['score']:.3f} | {at['frechet']:.2f} | | | |")
    return "\n".join(lines)


def filled(document: str, name: str, text: str) -> str:
    """The document with `text` between the marks of `name`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    changed, count = re.subn(pattern, lambda found: found[1] + text + "\n" + found[2], document, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{DOCUMENT} has no place for {name}")
    return changed


def panels(trainings: list[tuple[str, Events]]) -> list[Panel]:
    """Learning rate and loss of each row's exported seed, by epoch."""

    def curves(tag: str) -> list[Curve]:
        found = [(name, *np.transpose(events.scalars[tag])) for name, events in trainings]
        return [Curve(name, x, y, number) for number, (name, x, y) in enumerate(found)]

    epoch = "epoch"
    return [
        Panel("Learning rate", epoch, "learning rate (log scale)", curves("train/learning_rate"), log_y=True),
        Panel("Loss: not comparable across schedules", epoch, "MSE of epsilon (log scale)", curves("train/loss"),
              log_y=True),
    ]  # fmt: skip


def draw(run: Storage) -> None:
    """Schedules of the rows, how they were trained, and 24 images of each from the same noise."""
    config, _, records = open_run(run.uri)
    rows = {row.trial: row for row in confirm.all_rows(run, records)}
    ranking = run.read_json("ranking.json")
    trials: list[tuple[str, Row]] = [(label(row), rows[row["best_seed"]]) for row in ranking["trials"] if row["rank"]]
    schedules = [space.train_config(config, vars(row)).schedule for name, row in trials if "no EMA" not in name]
    pictures.plot_schedules(schedules, IMAGES / f"{config.name}-schedules.png")
    logs = [(name, read(Path(run.root) / CONFIRM / "tensorboard" / row.trial)) for name, row in trials]
    pictures.plot_panels(panels(logs), IMAGES / f"{config.name}-training.png")
    grids = []
    for name, row in trials:
        folder = Path(run.root) / "study" / row.trial
        export.export_pipeline(checkpoint.load(run.at(str(row.checkpoint))), folder, f"# {name}\n", {})
        denoiser, betas, shape = export.load_export(folder)
        grids.append(sample_images(denoiser, betas, shape, config.final.sampler, 0, 24, "cpu"))
        print(f"{len(grids)}. {name}")
    pictures.save_grid_png(IMAGES / f"{config.name}-samples.png", np.concatenate(grids), columns=24)


def main(path: str) -> None:
    run = Storage(path)
    result = figures(run)
    name = result["config"].replace("-", "_")
    write(name, result)
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), name, table(stored)))
    draw(run)


if __name__ == "__main__":
    main(sys.argv[1])
