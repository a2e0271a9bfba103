"""The report's figures: schedules and what they do to an image, curves of the trials, families, cost."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from pydantic import ValidationError

from evaluation import analysis, pictures, plots
from evaluation.analysis import Row
from evaluation.events import Events
from evaluation.plots import Curve, Panel
from evaluation.report_images import SMALL_PIXELS
from evaluation.report_words import METRICS, better, capitalised, joined, label
from trainer import schedules
from trainer.config import ScheduleConfig

MAX_NAMED = 8  # curves with a colour of their own; the others are grey
MAX_GREY = 100
MAX_STRIPS = 24
FAMILY_MARKERS: dict[str, str] = dict(zip(schedules.FAMILIES, "os^DvPX*", strict=False))


def name_curves(rows: Sequence[Row], ranked: Mapping[str, Row]) -> dict[str, int]:
    """Trials with a colour of their own, and its number: the ranked in their order, known points, the finished."""
    known = [row["trial"] for row in rows if row["source"] == "known" and row["state"] != "reused"]
    scored = [trial for trial, entry in ranked.items() if entry["rank"] is not None]
    finished = [row["trial"] for row in rows if row["state"] == "completed"]
    return {trial: i for i, trial in enumerate(list(dict.fromkeys([*scored, *known, *finished]))[:MAX_NAMED])}


def _stroke(style: int | None) -> str:
    colour, dashes = (plots.CONTEXT, ()) if style is None else plots.style(style)
    lengths = " ".join(f"{2.5 * length:g}" for length in dashes)  # matplotlib's are in line widths
    line = f'<path d="M0 5H36" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{lengths}"/>'
    return f'<svg viewBox="0 0 36 10" aria-hidden="true">{line}</svg>'


def _legend(rows: Sequence[Row], named: Mapping[str, int], drawn: Iterable[str]) -> str:
    labels, drawn = {row["trial"]: label(row) for row in rows}, set(drawn)
    items = [(_stroke(style), f"{trial}: {labels[trial]}") for trial, style in named.items() if trial in drawn]
    if drawn - named.keys():
        items.append((_stroke(None), "other trials"))
    return f'<ul class="legend">{"".join(f"<li>{stroke}{escape(text)}</li>" for stroke, text in items)}</ul>'


def _panels(panels: Iterable[Panel]) -> str:
    figures = (f"<figure>{plots.panel_svg(panel, f'{panel.title}: {panel.ylabel}')}</figure>" for panel in panels)
    return f'<div class="panels">{"".join(figures)}</div>'


def _shown(rows: Sequence[Row], named: Mapping[str, int]) -> tuple[list[Row], str]:
    """The rows that are drawn, and a sentence where others are not."""
    others = [row for row in rows if row["trial"] not in named]
    step = max(1, -(-len(others) // MAX_GREY))
    shown = [row for row in rows if row["trial"] in named] + others[::step]
    return shown, "" if step == 1 else f" Of the {len(others):,} other trials one in {step} is drawn."


def schedule_plots(
    config: Mapping[str, Any], rows: Sequence[Row], named: Mapping[str, int], image: np.ndarray | None
) -> str:
    """alpha_bar, log-SNR and beta of the trials, and what each schedule does to one image (H, W, C) uint8."""
    base = {name: config["train"]["schedule"][name] for name in ("steps", "space")}
    drawn: dict[str, ScheduleConfig] = {}
    shown, left_out = _shown(rows, named)
    for row in shown:
        own = {name: row[name] for name in ("family", "start", "end", "tau")}
        settings = row.get("settings") or {}
        own |= {name: settings.get(f"schedule.{name}", base[name]) for name in ("steps", "space")}
        try:
            drawn[row["trial"]] = ScheduleConfig.model_validate(base | own)
        except ValidationError:
            continue  # screened because it breaks a law: there is no curve, and its reason stands among all trials
    if not drawn:
        return "<p>No trial has begun yet.</p>"
    panels = plots.schedule_panels((schedule, named.get(trial)) for trial, schedule in drawn.items())
    note = f"T = {base['steps']:,} diffusion steps; t/T = 0 is the image, 1 is noise.{left_out}"
    html = f'{_legend(rows, named, drawn)}{_panels(panels)}<p class="quiet">{note}</p>'
    return html if image is None else html + _strips(rows, drawn, named, image)


def _strips(
    rows: Sequence[Row], drawn: Mapping[str, ScheduleConfig], named: Mapping[str, int], image: np.ndarray
) -> str:
    screened = {row["trial"] for row in rows if row["state"] == "screened"}
    first: dict[str, str] = {}  # one strip for equal schedules
    for trial, schedule in drawn.items():
        first.setdefault(schedule.label(), trial)
    figures = []
    for schedule_label, trial in list(first.items())[:MAX_STRIPS]:
        times, noised = pictures.noised_strip(drawn[trial], image)
        strip = pictures.image_grid(np.stack(noised), columns=len(noised), min_pixels=32)
        small = ' class="small"' if image.shape[0] <= SMALL_PIXELS else ""
        who = f"<br>{escape(trial)}" + (", screened out" if trial in screened else "")
        caption = f"{_stroke(named.get(trial))}{escape(schedule_label)}{who}"
        alt = f"one image noised at t/T {times[0]:.1f} to {times[-1]:.1f}"
        figures.append(
            f"<figure><figcaption>{caption}</figcaption>"
            f'<img{small} alt="{alt}" src="{pictures.data_uri(strip)}"></figure>'
        )
    left = len(first) - len(figures)
    more = f" {left:,} more schedules are left out." if left else ""
    note = f"One real image with the same noise, at t/T = 0, 0.1, … 1: what each schedule leaves of it.{more}"
    return f'<h3>One image, noised</h3><p class="quiet">{note}</p><div class="strips">{"".join(figures)}</div>'


def learning_curves(
    config: Mapping[str, Any],
    rows: Sequence[Row],
    named: Mapping[str, int],
    events: Mapping[str, Events],
    metric: str,
) -> str:
    """What was measured at the rungs, the deciding metric first, and the loss and learning rate of every epoch."""
    ends = {"completed": "o", "stopped": "x", "failed": "x"}
    shown, left_out = _shown(rows, named)
    epochs = config["train"]["epochs"]
    rungs = sorted({rung["epoch"] for row in rows for rung in row["rungs"] if rung["epoch"] < epochs})

    def panel(title: str, ylabel: str, points: dict[str, list[tuple[int, float]]], **how: Any) -> list[Panel]:
        found = []
        for row in shown:
            if values := points.get(row["trial"]):
                x, y = np.array(values, dtype=np.float64).T
                end = ends.get(row["state"], "")
                if steps := how.get("steps", ""):  # an epoch's value holds from the end of the one before
                    x, y = np.concatenate([[x[0] - 1], x]), np.concatenate([y[:1], y])
                found.append(
                    Curve(row["trial"], x, y, named.get(row["trial"]), end, how.get("marker", ""), steps=steps)
                )
        log_y = how.get("log_y", True)
        return [Panel(title, "epoch", ylabel, found, log_y=log_y, rungs=rungs, whole_x=True)] if found else []

    def measured(name: str) -> dict[str, list[tuple[int, float]]]:
        return {row["trial"]: [(r["epoch"], r[name]) for r in row["rungs"] if r[name] is not None] for row in shown}

    def logged(tag: str) -> dict[str, list[tuple[int, float]]]:
        return {trial: own.scalars.get(tag, []) for trial, own in events.items()}

    panels = []
    for name in sorted(METRICS, key=lambda name: name != metric):
        title = capitalised(METRICS[name]) + (", which decides" if name == metric else "")
        panels += panel(title, better(name), measured(name), marker=".", log_y=name != "score")
    panels += panel("Training loss", "epsilon-MSE, mean of an epoch", logged("train/loss"))
    panels += panel("Learning rate", "learning rate", logged("train/learning_rate"), steps="pre")
    if not panels:
        return "<p>No trial has reported yet.</p>"
    text = (
        "Circle: finished. Cross: stopped or failed there. Dashed: a rung, where the weak are stopped; the last epoch "
        "is measured too. The training loss of two schedules is not comparable, for each draws its own noise levels: "
        f"a lower one is not a better model.{left_out}"
    )
    drawn = {curve.label for each in panels for curve in each.curves}
    return f'<p class="quiet">{text}</p>{_legend(rows, named, drawn)}{_panels(panels)}'


def family_plot(rows: Sequence[Row], metric: str, epoch: int) -> str:
    """Every trial's value at one epoch, by family."""
    values = analysis.at_epoch(rows, metric, epoch)
    measured = {row["family"] for row in rows if row["trial"] in values}
    families = [family for family in FAMILY_MARKERS if family in measured]
    curves = []
    for at, family in enumerate(families):
        y = np.array([values[row["trial"]] for row in rows if row["family"] == family and row["trial"] in values])
        x = at + np.linspace(-0.2, 0.2, len(y)) if len(y) > 1 else np.array([float(at)])
        curves.append(Curve(family, x, y, _family_style(family), marker=FAMILY_MARKERS[family], line=False))
    ylabel = f"{METRICS[metric]} ({better(metric)})"
    title = f"Every trial at epoch {epoch}"
    return _panels([Panel(title, "schedule family", ylabel, curves, log_y=metric != "score", names=families)])


def cost_plots(rows: Sequence[Row], metric: str) -> str:
    """What a trial came to at its last rung, against what it cost, with the Pareto front."""
    panels, fronts = [], []
    judged = any(rung["score"] is not None for row in rows for rung in row["rungs"])
    for name in dict.fromkeys(["score", metric] if judged else [metric]):
        found = [row for row in rows if row["rungs"] and row["rungs"][-1][name] is not None and row["worker_seconds"]]
        if len(found) < 2:
            continue
        costs, values = [r["worker_seconds"] for r in found], [r["rungs"][-1][name] for r in found]
        front = analysis.pareto(costs, values, higher_is_better=name == "score")
        x, y = np.array([(costs[i], values[i]) for i in front]).T
        curves = [Curve("Pareto front", x, y, style=4, steps="post")]
        for family, marker in FAMILY_MARKERS.items():
            what = family
            for done in (True, False):
                own = [i for i, r in enumerate(found) if r["family"] == family and (r["state"] == "completed") == done]
                if own:
                    x, y = np.array([(costs[i], values[i]) for i in own]).T
                    curves.append(Curve(what, x, y, _family_style(family), marker=marker, line=False, filled=done))
                    what = f"_{family}"  # the legend has it already
        ylabel = f"{METRICS[name]} ({better(name)})"
        title = f"{capitalised(METRICS[name])} against cost"
        log_y = name != "score"
        panels.append(Panel(title, "worker-seconds", ylabel, curves, log_x=True, log_y=log_y, legend=True))
        trials = joined([found[i]["trial"] for i in front])
        fronts.append(f"By {METRICS[name]}, nothing is both better and cheaper than {trials}.")
    if not panels:
        return ""
    note = "Each trial at its last rung, from few images. Hollow: not trained to the end. The front, cheapest first. "
    return f'{_panels(panels)}<p class="quiet">{note}{escape(" ".join(fronts))}</p>'


def _family_style(family: str) -> int:
    return list(FAMILY_MARKERS).index(family)
