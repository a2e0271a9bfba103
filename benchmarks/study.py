"""The original study's table, from a finished run of one of its configurations.

    ddpm-search run study-digits
    python -m benchmarks.study runs/study-digits [runs/a-search-at-equal-cost]

Writes docs/results/study_digits.json, the table of docs/study.md from it, and its pictures in docs/images. The second
run is a search with the same data, final stage and seed, whose best configuration is compared with the study's.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, filled, provenance, write
from evaluation import export, pictures, report_words
from evaluation.events import Events, read
from evaluation.plots import Curve, Panel
from evaluation.sampling import Sampler
from search import space
from search.records import Row
from search.runs import open_run
from trainer import checkpoint
from trainer.storage import Storage

DOCUMENT = RESULTS.parent / "study.md"
IMAGES = RESULTS.parent / "images"
# The original report's Inception Scores on CIFAR-10.
REPORTED = {"linear(0.0001, 0.02)": 5.597, "cosine(0, 1, tau 1), no EMA": 7.854, "cosine(0, 1, tau 1)": 7.932}


def label(row: dict[str, Any]) -> str:
    return report_words.label(row) + (", no EMA" if row["settings"].get("ema_decays") == [0] else "")


def figures(run: Storage) -> dict[str, Any]:
    """All that the table needs, of a finished run."""
    from search import confirm  # imports Ray

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
        "trainings",
        "reason",
        "precision",
        "recall",
    )
    rows = []
    for row in ranking["trials"]:
        rows.append(
            {name: row.get(name) for name in names}
            | {"label": label(row), "reported": REPORTED.get(label(row)), "plain": not row["settings"]}
            | {"worker_seconds": round(sum(seconds[seed["trial"]] for seed in row["trainings"]), 1)}
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
        "five_rows_worker_hours": round(sum(row["worker_seconds"] for row in rows if row["plain"]) / 3600, 3),
        "rows": rows,
    }


def searched(run: Storage, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best configuration of a search that was confirmed, beside the best of the study's rows."""
    from search import confirm  # imports Ray

    config, _, records = open_run(run.uri)
    ranking = run.read_json("ranking.json")
    found = [row for row in ranking["trials"] if row["confirmed"]]
    if not found:
        raise SystemExit(f"{run.uri} has confirmed nothing; give final.confirm.top")
    names = ("trial", "family", "start", "end", "tau", "learning_rate", "dropout", "score", "frechet", "trainings")
    best = {name: found[0][name] for name in names} | {"label": label(found[0])}
    # Both drew their images from the same noise, and earlier versions trained from the same seeds: whatever the
    # covariance, the standard deviation of a difference is at most the sum of the two.
    differences = {}
    for name, value, sign in (("score", "mean", 1), ("frechet", "value", -1)):
        rival = max((row for row in rows if row["plain"] and row["confirmed"]), key=lambda row: sign * row[name][value])
        by = best[name][value] - rival[name][value]
        half = sum(np.diff(row[name]["ci"])[0] for row in (best, rival)) / 2
        differences[name] = {"rival": rival["label"], "by": by, "ci": [by - half, by + half]}
    return {
        "overrides": {"trials": config.trials, "budget": config.budget.model_dump()},
        "states": dict(Counter(row.state for row in records)),
        "worker_hours": round(sum(row.worker_seconds for row in confirm.all_rows(run, records)) / 3600, 3),
        "best": best,
        "differences": differences,
    }


def verdict(result: dict[str, Any]) -> str:
    """What the search found, in a paragraph."""
    found, own = result["search"], result["search"]["best"]
    tried = ", ".join(f"{count} {state}" for state, count in found["states"].items())
    told = []
    for name, what, digits in (("score", result["score_name"], 3), ("frechet", "Fréchet distance", 2)):
        one = found["differences"][name]
        low, high = one["ci"]
        differs = "better" if (one["by"] > 0) == (name == "score") else "worse"
        judged = "not told apart" if low <= 0 <= high else differs
        told.append(f"{what} {one['by']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}) beside {one['rival']}, "
                    f"{judged}")  # fmt: skip
    score, frechet = own["score"], own["frechet"]
    scored = sum(seed["score"] is not None for seed in own["trainings"]) - 1  # the first is the search's own
    return (
        f"{tried}; {found['worker_hours']:.2f} worker-hours in all, the five schedules took "
        f"{result['five_rows_worker_hours']:.2f}. Its best, from {scored} new seeds: {own['label']} at "
        f"learning rate {own['learning_rate']:.2g} and dropout {own['dropout']:.2f}, {result['score_name']} "
        f"{interval(score['mean'], score['ci'], 3)}, Fréchet distance {interval(frechet['value'], frechet['ci'], 2)}. "
        f"Against the best of the five by each: {'; '.join(told)}."
    )


def interval(value: float, ci: list[float], digits: int) -> str:
    return f"{value:.{digits}f} ({ci[0]:.{digits}f}–{ci[1]:.{digits}f})"


def table(result: dict[str, Any]) -> str:
    """The table as docs/study.md has it."""
    number = {row["trial"]: str(index) for index, row in enumerate(result["rows"], 1)}
    lines = [
        f"| | schedule | {result['score_name']} (95% CI) | Fréchet distance (95% CI) | P(best) | tied with | "
        "the report's IS, CIFAR-10 |",
        "|---|---|---|---|---|---|---|",
    ]

    for row in result["rows"]:
        reported = "–" if row["reported"] is None else f"{row['reported']}"
        if row["score"] is None:
            lines.append(f"| {number[row['trial']]} | {row['label']} | {row['reason']} | | | | {reported} |")
            continue
        lines.append(
            f"| {number[row['trial']]} | {row['label']} | {interval(row['score']['mean'], row['score']['ci'], 3)} | "
            f"{interval(row['frechet']['value'], row['frechet']['ci'], 2)} | {report_words.chance(row['p_best'])} | "
            f"{', '.join(number[other] for other in row['tied_with']) or '–'} | {reported} |"
        )
    for name in ("real", "noise"):
        at = result[name]
        title = {"real": "real, held out", "noise": "Gaussian noise"}[name]
        lines.append(f"| | {title} (N {at['n']}) | {at['score']:.3f} | {at['frechet']:.2f} | | | |")
    return "\n".join(lines)


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
    from search import confirm  # imports Ray

    config, _, records = open_run(run.uri)
    rows = {row.trial: row for row in confirm.all_rows(run, records)}
    ranking = run.read_json("ranking.json")
    trials: list[tuple[str, Row]] = [
        (label(row), rows[row["best_training"]]) for row in ranking["trials"] if row["rank"]
    ]
    schedules = [space.train_config(config, vars(row)).schedule for name, row in trials if "no EMA" not in name]
    pictures.plot_schedules(schedules, IMAGES / f"{config.name}-schedules.png")
    logs = [(name, read(next(Path(run.root).glob(f"**/tensorboard/{row.trial}")))) for name, row in trials]
    pictures.plot_panels(panels(logs), IMAGES / f"{config.name}-training.png")
    grids = []
    for name, row in trials:
        folder = Path(run.root) / "study" / row.trial
        found, sampler = checkpoint.load(run.at(str(row.checkpoint))), config.final.sampler
        export.export_pipeline(found, folder, sampler, f"# {name}\n", {})
        denoiser, betas, shape, _ = export.load_export(folder)
        grids.append(Sampler(denoiser, betas, shape, sampler, "cpu").images(0, 24))
        print(f"{len(grids)}. {name}")
    pictures.save_grid_png(IMAGES / f"{config.name}-samples.png", np.concatenate(grids), columns=24)


def page(document: str, name: str, result: dict[str, Any]) -> str:
    """docs/study.md with the table of a result, and what a search found beside it."""
    document = filled(document, name, table(result))
    return filled(document, f"{name}_search", verdict(result)) if "search" in result else document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="of a study")
    parser.add_argument("search", nargs="?", help="the run of a search at equal cost")
    parser.add_argument("--cost", action="store_true", help="print the five schedules' worker-hours, and write nothing")
    asked = parser.parse_args()
    run, search = Storage(asked.run), asked.search
    result = figures(run)
    if asked.cost:
        print(f"{result['five_rows_worker_hours']:.2f}")
        return
    name = result["config"].replace("-", "_")
    if search:
        result["search"] = searched(Storage(search), result["rows"])
    write(name, result)
    DOCUMENT.write_text(page(DOCUMENT.read_text(), name, json.loads((RESULTS / f"{name}.json").read_text())))
    draw(run)


if __name__ == "__main__":
    main()
