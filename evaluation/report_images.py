"""The report's grids of images: what the final stage drew of each trial, and what early stopping saw."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from evaluation import pictures
from evaluation.analysis import Row
from evaluation.events import Events
from evaluation.report_words import METRICS, STATES, fixed, joined, label, number, sampler_words

GRID_IMAGES = 36
SMALL_PIXELS = 64  # images up to this size are enlarged without smoothing


def final_grids(
    rows: Sequence[Row],
    ranked: Mapping[str, Row],
    samples: Mapping[str, np.ndarray],
    lost: Mapping[str, str],
    real_samples: np.ndarray | None,
) -> str:
    """The first images of every ranked trial, as the final stage drew them, beside real ones."""
    why = "".join(f"<li>{escape(trial)}: {escape(reason)}</li>" for trial, reason in lost.items())
    gone = (
        f"<p>Images of {escape(joined(list(lost)))} are no longer at hand: <code>ddpm-search evaluate</code> draws "
        f"those of whole checkpoints again.</p><ul>{why}</ul>"
        if lost
        else ""
    )
    if not samples:
        return gone or "<p>The final stage has drawn no images yet.</p>"
    labels = {row["trial"]: label(row) for row in rows}
    real = [] if real_samples is None else [("<strong>Real</strong>, held out from training", real_samples)]
    figures = []
    for trial in sorted(samples, key=lambda trial: list(ranked).index(trial) if trial in ranked else len(ranked)):
        entry = ranked.get(trial) or {"rank": None, "score": None}
        rank = "" if entry["rank"] is None else f"{entry['rank']}. "
        score = "" if entry["score"] is None else f"<br>score {fixed(entry['score']['mean'])}"
        name = f"{rank}<strong>{escape(trial)}</strong><br>{escape(labels[trial])}"
        figures.append((f"{name}{score}{_which_training(entry)}", samples[trial]))
    grids = ((text, pictures.image_grid(images[:GRID_IMAGES]), images.shape[1]) for text, images in real + figures)
    note = (
        "The first images of each trial, not chosen; of one that was trained again, those of its best-scored training. "
        "The same place in two trials' grids started from the same noise."
    )
    return f'<p class="quiet">{note}</p>{_grids(grids)}{gone}'


def _which_training(entry: Mapping[str, Any]) -> str:
    """Whose images are shown under a score that is the mean of several trainings'."""
    if not entry.get("confirmed") or not entry.get("best_training"):
        return ""
    scored = sum(own["score"] is not None for own in entry.get("trainings") or [])
    return f"<br>images of {escape(entry['best_training'])}" + (f", its best of {scored}" if scored else "")


def rung_grids(
    config: Mapping[str, Any], rows: Sequence[Row], best: str | None, metric: str, events: Mapping[str, Events]
) -> str:
    """The best trial and the known points, as each drew at its last rung."""
    figures = []
    for row in sorted(rows, key=lambda row: row["trial"] != best):
        grid = events.get(row["trial"], Events()).samples
        if grid is None or not row["rungs"] or (row["source"] != "known" and row["trial"] != best):
            continue
        who = "the best, " if row["trial"] == best else ""
        who += "known point, " if row["source"] == "known" else ""
        value = f"{METRICS[metric]} {number(row['rungs'][-1][metric])}"
        state, epoch = STATES.get(row["state"], row["state"]), row["rungs"][-1]["epoch"]
        text = f"<strong>{escape(row['trial'])}</strong><br>{escape(label(row))}<br>{who}"
        figures.append((f"{text}{state} at epoch {epoch}, {value}", grid, grid.shape[0] // 8))
    if not figures:
        return ""
    note = (
        "What early stopping saw: drawn at each one's last rung, all with the same noise and sampler "
        f"({sampler_words(config['early_stopping']['sampler'])}). Those stopped early are compared as they were then."
    )
    return f'<h3>The best and the known points</h3><p class="quiet">{note}</p>{_grids(figures)}'


def _grids(figures: Iterable[tuple[str, np.ndarray, int]]) -> str:
    html = ""
    for caption, grid, pixels in figures:
        small = ' class="small"' if pixels <= SMALL_PIXELS else ""
        image = f'<img{small} alt="grid of images" src="{pictures.data_uri(grid)}">'
        html += f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f'<div class="grids">{html}</div>'
