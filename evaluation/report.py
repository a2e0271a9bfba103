"""The report a person reads: one HTML page that needs no network, no script and no file beside it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evaluation import analysis, report_figures, report_images, report_tables
from evaluation.analysis import Row
from evaluation.config import rung_epochs
from evaluation.events import Events
from evaluation.report_words import (
    METRICS,
    STATES,
    chance,
    count,
    fixed,
    interval,
    joined,
    label,
    number,
    sampler_words,
    searched_words,
    what_intervals_say,
    whole_splits,
)


def render(
    run_name: str,
    config: dict[str, Any],
    rows: Sequence[Row],
    ranking: dict[str, Any] | None,
    samples: Mapping[str, np.ndarray],
    lost: Mapping[str, str],
    real_samples: np.ndarray | None,
    events: Mapping[str, Events],
    commands: Sequence[str],
    versions: Mapping[str, str],
    ended: str | None = None,
    confirming_seconds: float = 0.0,
) -> str:
    """The page as text. What is not there yet is said in a sentence in its place.

    config: the resolved config.yaml. rows: trials.parquet as dicts, in its order. ranking: ranking.json, or None before
    the final stage. samples: trial → (n, H, W, C) uint8, image i of every trial from the same noise; lost: trial → why
    there are none of it; real_samples: held-out images of that shape. events: trial → `events.read`. commands: the
    lines that make this run again. versions: package → version. ended: why the search ended, where it did.
    confirming_seconds: workers' time that the trainings from new seeds took. All text is escaped.
    """
    ranked = {entry["trial"]: entry for entry in (ranking or {}).get("trials", [])}
    metric = analysis.deciding_metric(config, rows)
    best = next((trial for trial, entry in ranked.items() if entry["rank"] == 1), _leader(rows, metric))
    named = report_figures.name_curves(rows, ranked)
    epoch = analysis.comparable_epoch(rows, metric)
    title = f"Search {run_name}"
    sections = {
        "What was asked": _asked(config, rows, real_samples, metric),
        "Ranking": report_tables.ranking_table(ranking),
        "Images": report_images.final_grids(rows, ranked, samples, lost, real_samples)
        + report_images.rung_grids(config, rows, best, metric, events),
        "Noise schedules": report_figures.schedule_plots(
            config, rows, named, None if real_samples is None else real_samples[0]
        ),
        "How the trials learned": report_figures.learning_curves(config, rows, named, events, metric),
        "Families": report_tables.families(rows, ranked, metric, epoch)
        + ("" if epoch is None else report_figures.family_plot(rows, metric, epoch)),
        "Which parameters mattered": report_tables.importance(rows, config["space"], metric, epoch),
        "Cost": _cost(config, rows, events, confirming_seconds) + report_figures.cost_plots(rows, metric),
        "All trials": report_tables.all_trials(rows, ranked),
        "Do it again": _again(config, commands, versions),
    }
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    contents = " ".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items())
    verdict = _verdict(ranking) if ranking else _no_ranking(rows, best, metric)
    style = Path(__file__).with_name("report.css").read_text()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'{_summary(config, rows, ended)}\n<div class="verdict">{verdict}</div>\n<nav>{contents}</nav>\n'
        + "\n".join(f'<h2 id="{anchors[name]}">{name}</h2>\n{html}' for name, html in sections.items())
        + "\n</body></html>\n"
    )


def _leader(rows: Sequence[Row], metric: str) -> str | None:
    """Who was best at the last rung that any came to."""
    epochs = {rung["epoch"] for row in rows for rung in row["rungs"]}
    found = [values for epoch in sorted(epochs) if (values := analysis.at_epoch(rows, metric, epoch))]
    values = found[-1] if found else {}
    return (max if metric == "score" else min)(values, key=lambda trial: values[trial], default=None)


def _summary(config: Mapping[str, Any], rows: Sequence[Row], ended: str | None) -> str:
    counts = Counter(row["state"] for row in rows)
    parts = ", ".join(f"{n:,} {STATES.get(state, state)}" for state, n in counts.most_common())
    data = escape(config["train"]["data"]["name"])
    text = f"{count(len(rows), 'configuration')} on {data}: {escape(parts) or 'none yet'}."
    done = sum(counts[state] for state in ("completed", "stopped", "failed"))
    if ended:
        text += f" The search ended: {escape(ended)}."
    elif done < config["trials"]:
        text += (
            f" The search is not at its end: {done:,} of {count(config['trials'], 'trial')} ended. Where it was cut, "
            "<code>ddpm-search resume</code> goes on."
        )
    return f'<p class="quiet">{text}</p>'


def _no_ranking(rows: Sequence[Row], best: str | None, metric: str) -> str:
    why = "There is no ranking yet: the final stage has not scored any trial."
    if metric == "grid_loss" and analysis.measured(rows) == ["grid_loss"]:
        why = "There is no ranking: nothing could judge the images (no labels, and no Inception weights)."
    text = f"<p>{why}</p>"
    if best is not None:
        row = next(row for row in rows if row["trial"] == best)
        last = row["rungs"][-1]
        text += (
            f"<p>So far <strong>{escape(best)}, {escape(label(row))}</strong> is best by the {METRICS[metric]}: "
            f"{number(last[metric])} at epoch {last['epoch']:,}. That is one number from few images, without an "
            "interval.</p>"
        )
    return text


def _verdict(ranking: Mapping[str, Any]) -> str:
    scored = [entry for entry in ranking["trials"] if entry["rank"] is not None]
    if not scored:
        return "<p>There is no winner: the final stage could score none of the trials. The table says why.</p>"
    best = scored[0]
    among = " of those trained again from new seeds" if best["confirmed"] else ""
    text = (
        f"<p><strong>{escape(best['trial'])}, {escape(label(best))}</strong> with learning rate "
        f"{number(best['learning_rate'], 3)} and dropout {number(best['dropout'], 2)} has the highest "
        f"{escape(ranking['score_name'])}{among}: <strong>{fixed(best['score']['mean'])}</strong> "
        f"(95% confidence interval {interval(best['score']['ci'])}) from "
        f"{whole_splits(ranking['images'], ranking.get('dropped', 0))}. "
    )
    if len(scored) == 1:
        text += "No other trial was ranked.</p>"
    else:
        text += f"It is the best of the {len(scored)} ranked with probability {escape(chance(best['p_best']))}; "
        tied = joined([escape(trial) for trial in best["tied_with"]]) if best["tied_with"] else ""
        text += f"it is tied with {tied or 'no other'}.</p>"
    real, same = ranking["real"], best["at_real_n"]
    dropped = real.get("dropped", 0)
    theirs = f"The Fréchet distances of all {real['n']:,}" if dropped else "Their Fréchet distances"
    text += (
        f"<p>The ceiling: {whole_splits(real['n'], dropped, 'real image')}, held out from training, score "
        f"{fixed(real['score'])}; as many images of the winner score {fixed(same['score'])}. {theirs} to the training "
        f"images are {fixed(real['frechet'])} and {fixed(same['frechet'])}.</p>"
    )
    return text + f'<p class="quiet">{escape(what_intervals_say(ranking))}</p>'


def _asked(config: Mapping[str, Any], rows: Sequence[Row], real_samples: np.ndarray | None, metric: str) -> str:
    train, stopping, final, space = (config[name] for name in ("train", "early_stopping", "final", "space"))

    families = []
    for family, own in space["families"].items():
        names = [name for name in ("start", "end", "tau") if family != "linear" or name != "tau"]
        families.append(f"{family} ({', '.join(f'{name} {searched_words(own[name])}' for name in names)})")
    common = [name for name in ("learning_rate", "dropout") if space.get(name) is not None]
    rest = [f"{name.replace('_', ' ')} {searched_words(space[name])}" for name in common]
    rest += [
        f"{name.replace('_', ' ')} of {', '.join(map(str, choices))}"
        for name, choices in (space.get("train") or {}).items()
    ]
    data = [train["data"]["name"]]
    if real_samples is not None:
        _, height, width, channels = real_samples.shape
        data += [f"{width} × {height} pixels", "grey" if channels == 1 else "colour"]
    rungs = [str(epoch) for epoch in rung_epochs(stopping["rungs"], train["epochs"])]
    rule = {"asha": "successive halving", "median": "the median rule"}.get(stopping["scheduler"])
    judged = "held-out images" if metric == "grid_loss" else f"{stopping['images']:,} images"
    stopped = f"{rule} on the {METRICS[metric]} of {judged} after epoch {joined(rungs)}"
    budget = [count(config["trials"], "trial")]
    budget += [
        f"{number(v)} {n.replace('_', '-')}" for n, v in (config.get("budget") or {}).items() if v and "hours" in n
    ]
    known = [f"{count(len(config['known_points']), 'known point')} first"] if config["known_points"] else []
    searched = "; ".join([*families, *rest])
    if config["trials"] <= len(config["known_points"]) and all(row["source"] == "known" for row in rows):
        searched = "nothing: the known points alone"
    asked = {
        "Data": ", ".join(data),
        "Training": f"{train['epochs']:,} epochs of batches of {train['batch_size']:,}, T = "
        f"{train['schedule']['steps']:,}, U-Net of {', '.join(map(str, train['model']['channels']))} channels",
        "Searched": searched,
        "Budget": ", ".join(budget + known),
        "Stopped early": stopped if rule and rungs else "never",
        "Final stage": f"the best {final['top']:,}, {final['images']:,} images each: {sampler_words(final['sampler'])}",
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in asked.items()) + "</dl>"


def _cost(
    config: Mapping[str, Any], rows: Sequence[Row], events: Mapping[str, Events], confirming_seconds: float
) -> str:
    spent, saved = analysis.savings(rows, config["train"]["epochs"])
    if not spent:
        return "<p>No training time has been spent yet.</p>"
    stopped = len(analysis.stopped_early(rows))
    cut = sum(row["state"] == "stopped" for row in rows) - stopped
    trained = sum(row["worker_seconds"] > 0 for row in rows)
    text = f"<p>Training, with its rungs, took <strong>{_hours(spent)}</strong> of workers' time."
    if stopped:
        text += (
            f" {count(stopped, 'trial')} of {trained:,} stopped early: in full they would have taken about "
            f"{_hours(saved)} more, so stopping saved {saved / (spent + saved):.0%} of the training (epochs left, at "
            "the mean cost of an epoch)."
        )
    else:
        text += " No trial was stopped early, so nothing was saved."
    if cut:
        text += f" {count(cut, 'trial')} more ended unfinished, by the budget or since not resumed: that saved nothing."
    spans = [span for row in rows if row["trial"] in events for span in events[row["trial"]].spans]
    busy = analysis.occupation(spans, config["train"]["workers"], spent)
    if busy:
        text += (
            f" The search ran for {_hours(busy.seconds)} with at most {count(busy.at_once, 'trial')} at once; workers "
            f"were idle for <strong>{busy.idle:.0%}</strong> of it (starting, waiting, or doing again what a crash "
            "lost)."
        )
    if confirming_seconds:
        text += f" Training the best again from new seeds took <strong>{_hours(confirming_seconds)}</strong> more."
    return text + " The final stage's sampling is not counted.</p>"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds / 60:.3g} minutes"


def _again(config: Mapping[str, Any], commands: Sequence[str], versions: Mapping[str, str]) -> str:
    lines = escape("\n".join(commands))
    used = escape(", ".join(f"{name} {version}" for name, version in versions.items()))
    text = escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100))
    return (
        f"<pre>{lines}</pre><p>Seed {config['seed']}. Versions: {used}.</p>"
        f"<details><summary>The whole configuration (config.yaml)</summary><pre>{text}</pre></details>"
    )
