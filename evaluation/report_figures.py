"""The report's figures: sample grids, schedules and learning curves as HTML, from what a run recorded."""

import base64
import io
import logging
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from evaluation import pictures
from evaluation.pictures import Curve, Panel
from trainer.config import ScheduleConfig

Row = dict[str, Any]  # one row of trials.parquet
Curves = dict[str, list[tuple[int, float]]]  # TensorBoard tag → (epoch, value), of one trial

MAX_NAMED = 8  # curves with a colour of their own; the others are grey
GRID_IMAGES = 36
NOT_KNOWN = "–"

METRICS = {
    "frechet": "Fréchet distance (lower is better)",
    "score": "score (higher is better)",
    "grid_loss": "grid loss (lower is better)",
}


def read_curves(folder: Path) -> Curves:
    """Every scalar in the TensorBoard event files of one trial's folder, by tag, in the order of epochs.

    A resumed trial logs again the epochs after its checkpoint: what the earlier process wrote of them is dropped, so
    an epoch has one value, the latest. Empty where there are no events.
    """
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        SCALARS,
        EventAccumulator,
    )

    if not any(folder.glob("*tfevents*")):
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every restart that it takes into account
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0 keeps all; the default thins out long runs
    events.Reload()
    # The accumulator drops what a restart made void, but only where the restart was logged: hence also the dict.
    return {tag: sorted({e.step: e.value for e in events.Scalars(tag)}.items()) for tag in events.Tags()[SCALARS]}


def label(row: Row) -> str:
    # A screened schedule may break a law, and is named like any other: so its values are not checked.
    return ScheduleConfig.model_construct(**{n: row[n] for n in ("family", "start", "end", "tau")}).label()


def fixed(value: float | None, decimals: int = 2) -> str:
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def name_curves(rows: Sequence[Row], ranked: dict[str, Row]) -> dict[str, int]:
    """Trials with a colour of their own, and its number: the ranked in their order, then the known points."""
    known = [row["trial"] for row in rows if row["source"] == "known" and row["state"] != "screened"]
    scored = [trial for trial, entry in ranked.items() if entry["rank"] is not None]
    finished = [row["trial"] for row in rows if row["state"] == "completed"]
    return {trial: i for i, trial in enumerate(list(dict.fromkeys([*scored, *known, *finished]))[:MAX_NAMED])}


def sample_grids(
    rows: Sequence[Row], ranked: dict[str, Row], samples: dict[str, np.ndarray], real_samples: np.ndarray | None
) -> str:
    if not samples and real_samples is None:
        return "<p>No images have been drawn yet.</p>"
    labels = {row["trial"]: label(row) for row in rows}
    figures = [] if real_samples is None else [("<strong>Real</strong>, held out from training", real_samples)]
    for trial in sorted(samples, key=lambda trial: list(ranked).index(trial) if trial in ranked else len(ranked)):
        entry = ranked.get(trial) or {"rank": None, "score": None}
        rank = "" if entry["rank"] is None else f"{entry['rank']}. "
        score = "" if entry["score"] is None else f"<br>score {fixed(entry['score']['mean'])}"
        caption = f"{rank}<strong>{escape(trial)}</strong><br>{escape(labels[trial])}{score}"
        figures.append((caption, samples[trial]))
    html = ""
    for caption, images in figures:
        png = io.BytesIO()
        pictures.save_grid_png(png, images[:GRID_IMAGES])
        source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        html += f'<figure><img alt="grid of images" src="{source}"><figcaption>{caption}</figcaption></figure>'
    note = "Not chosen: the first of each trial. The same place in two trials' grids started from the same noise."
    return f'<p class="quiet">{note}</p><div class="grids">{html}</div>'


def _legend(rows: Sequence[Row], named: dict[str, int]) -> str:
    labels = {row["trial"]: label(row) for row in rows}
    items = [(*pictures.style(number), f"{trial}: {labels[trial]}") for trial, number in named.items()]
    if len(rows) > len(items):
        items.append((pictures.CONTEXT, (), "other trials"))
    html = ""
    for colour, dashes, text in items:
        line = f'<path d="M0 5H36" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{_dasharray(dashes)}"/>'
        html += f'<li><svg viewBox="0 0 36 10" aria-hidden="true">{line}</svg>{escape(text)}</li>'
    return f'<ul class="legend">{html}</ul>'


def _dasharray(dashes: Sequence[float]) -> str:
    return " ".join(f"{2.5 * length:g}" for length in dashes)  # matplotlib's are in line widths


def _panels(panels: Iterable[Panel]) -> str:
    figures = (f"<figure>{pictures.panel_svg(panel, f'{panel.title}: {panel.ylabel}')}</figure>" for panel in panels)
    return f'<div class="panels">{"".join(figures)}</div>'


def schedule_plots(config: dict[str, Any], rows: Sequence[Row], named: dict[str, int]) -> str:
    fixed = {name: config["train"]["schedule"][name] for name in ("steps", "space")}
    drawn: list[tuple[ScheduleConfig, int | None]] = []
    for row in rows:
        try:
            schedule = ScheduleConfig.model_validate(fixed | {n: row[n] for n in ("family", "start", "end", "tau")})
        except ValidationError:
            continue  # screened because it breaks a law: there is no curve, and its reason stands among all trials
        drawn.append((schedule, named.get(row["trial"])))
    if not drawn:
        return "<p>No trial has begun yet.</p>"
    steps = f"T = {drawn[0][0].steps:,} diffusion steps; t/T = 0 is the image, 1 is noise."
    return _legend(rows, named) + _panels(pictures.schedule_panels(drawn)) + f'<p class="quiet">{steps}</p>'


def learning_curves(
    config: dict[str, Any], rows: Sequence[Row], named: dict[str, int], curves: dict[str, Curves]
) -> str:
    ends = {"completed": "o", "stopped": "x", "failed": "x"}

    def panel(title: str, ylabel: str, points: dict[str, list[tuple[int, float]]], log_y: bool = True) -> list[Panel]:
        found = []
        for row in rows:
            if values := points.get(row["trial"]):
                x, y = np.array(values, dtype=np.float64).T
                found.append(Curve(row["trial"], x, y, named.get(row["trial"]), ends.get(row["state"], "")))
        return [Panel(title, "epoch", ylabel, found, log_y)] if found else []

    def rungs(metric: str) -> dict[str, list[tuple[int, float]]]:
        return {row["trial"]: [(r["epoch"], r[metric]) for r in row["rungs"] if r[metric] is not None] for row in rows}

    def logged(tag: str) -> dict[str, list[tuple[int, float]]]:
        return {trial: tags.get(tag, []) for trial, tags in curves.items()}

    metric = config["early_stopping"]["metric"]
    if metric == "auto":  # what it came to, is what was measured
        metric = next((name for name in METRICS if any(rungs(name).values())), "frechet")
    panels = [
        *panel("At each rung", METRICS[metric], rungs(metric), log_y=metric != "score"),
        *panel("Training loss", "epsilon-MSE", logged("train/loss")),
        *panel("Learning rate", "learning rate", logged("train/learning_rate")),
    ]
    if not panels:
        return "<p>No trial has reported yet.</p>"
    text = (
        "Circle: finished. Cross: stopped or failed there. Only what is measured at a rung decides who is stopped. The "
        "training loss of two schedules is not comparable, for each draws its own noise levels: a lower one is not a "
        "better model."
    )
    return f'<p class="quiet">{text}</p>' + _legend(rows, named) + _panels(panels)
