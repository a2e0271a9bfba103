"""The report a person reads: one HTML page that needs no network, no script and no file beside it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import chain
from typing import Any

import numpy as np
import yaml

from evaluation.report_figures import (
    METRICS,
    NOT_KNOWN,
    Curves,
    Row,
    fixed,
    label,
    learning_curves,
    name_curves,
    sample_grids,
    schedule_plots,
)

CSS = """
:root{--line:#d5d9de;--soft:#f4f6f8;--quiet:#56606b}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1b1f24;background:#fff;
 max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.6rem 0 .6rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p,ul{max-width:46rem}p{margin:.5rem 0}.quiet,figcaption{color:var(--quiet);font-size:.875rem}
.verdict{background:var(--soft);border-left:4px solid #0072B2;padding:.8rem 1.1rem;margin:1.2rem 0;font-size:1.06rem;
 max-width:50rem}
.scroll{overflow-x:auto;margin:.8rem 0;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;font-size:.875rem;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td,th small{white-space:nowrap}td small em{white-space:normal}
tr:last-child td{border-bottom:0}thead th{background:var(--soft);font-weight:600;vertical-align:bottom}
.n{text-align:right}td.w{white-space:normal;min-width:15rem}tr.reference td{background:var(--soft)}
small{color:var(--quiet);display:block;font-size:.8rem}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:.8rem;margin:.8rem 0}
.panels svg{display:block;width:100%;height:auto;max-width:32rem}
.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(clamp(9.5rem,22%,18rem),1fr));gap:1rem;margin:.8rem 0}
figure{margin:0;break-inside:avoid}.grids img{width:100%;image-rendering:pixelated;display:block;margin-bottom:.4rem}
.legend{list-style:none;padding:0;margin:.4rem 0;display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;font-size:.875rem;
 max-width:none}.legend li{display:flex}.legend svg{flex:none;width:36px;height:10px;margin:.45rem .5rem 0 0}
pre{background:var(--soft);padding:.8rem 1rem;border-radius:6px;overflow-x:auto;font-size:.84rem;line-height:1.45}
summary{cursor:pointer}
@media print{body{max-width:none;padding:0;font-size:11px}.scroll{overflow:visible;border:0}h2{break-after:avoid}
 table{font-size:8px}th,td{white-space:normal;padding:.25rem .3rem}td.w{min-width:0}
 .panels{grid-template-columns:repeat(3,1fr)}
 .grids{grid-template-columns:repeat(4,1fr)}pre{white-space:pre-wrap}tr{break-inside:avoid}}
"""


def render(
    run_name: str,
    config: dict[str, Any],
    rows: Sequence[Row],
    ranking: dict[str, Any] | None,
    samples: dict[str, np.ndarray],
    real_samples: np.ndarray | None,
    curves: dict[str, Curves],
    commands: Sequence[str],
    versions: dict[str, str],
) -> str:
    """The page as text. What is not there yet is said in a sentence in its place.

    config: the resolved config.yaml. rows: trials.parquet as dicts, in its order. ranking: ranking.json, or None before
    the final stage. samples: trial → (n, H, W, C) uint8, image i of every trial from the same noise; real_samples:
    held-out images of that shape. curves: trial → `read_curves`. commands: the lines that make this run again.
    versions: package → version. All text is escaped.
    """
    ranked = {entry["trial"]: entry for entry in (ranking or {}).get("trials", [])}
    named = name_curves(rows, ranked)
    title = f"Search {run_name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _summary(config, rows),
        f'<div class="verdict">{_verdict(ranking)}</div>',
        "<h2>Leaderboard</h2>",
        _leaderboard(ranking),
        "<h2>Images</h2>",
        sample_grids(rows, ranked, samples, real_samples),
        "<h2>Noise schedules</h2>",
        schedule_plots(config, rows, named),
        "<h2>How the trials learned</h2>",
        learning_curves(config, rows, named, curves),
        "<h2>All trials</h2>",
        _all_trials(rows, ranked),
        "<h2>Cost</h2>",
        _cost(config, rows),
        "<h2>Do it again</h2>",
        _again(config, commands, versions),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
    ) + "\n".join([*sections, "</body></html>\n"])


def savings(rows: Iterable[Row], epochs: int) -> tuple[float, float]:
    """Worker-seconds spent, and those that stopping early saved: epochs left times the mean cost of an epoch.

    Screened, failed and reused trials count as neither: nothing was stopped for being weak.
    """
    rows = list(rows)
    spent = sum(row["worker_seconds"] for row in rows)
    done = sum(row["epoch"] for row in rows if row["worker_seconds"])
    left = sum(max(0, epochs - row["epoch"]) for row in rows if row["state"] == "stopped")
    return spent, left * spent / done if done else 0.0


def _num(value: float | None, digits: int = 4) -> str:
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _interval(ci: Sequence[float], tag: str = "span") -> str:
    return f"<{tag}>{fixed(ci[0])} to {fixed(ci[1])}</{tag}>"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table(columns: Sequence[tuple[str, str]], body: Iterable[tuple[str, Sequence[str]]]) -> str:
    """columns: (heading, class), n for numbers and w for text that wraps; body: (class, cells). All of it is HTML."""

    def line(tag: str, kind: str, cells: Iterable[str]) -> str:
        filled = (f'<{tag} class="{name}">{cell}</{tag}>' for (_, name), cell in zip(columns, cells, strict=True))
        return f'<tr class="{kind}">{"".join(filled)}</tr>'

    head = line("th", "", (heading for heading, _ in columns))
    lines = "".join(line("td", kind, cells) for kind, cells in body)
    # tabindex: a box that scrolls must be reachable from the keyboard
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>'


def _settings(row: Row) -> str:
    """The cell that says what a trial tried."""
    rest = f"learning rate {_num(row['learning_rate'], 3)}, dropout {_num(row['dropout'], 2)}"
    rest += "".join(f", {name} {value}" for name, value in (row.get("settings") or {}).items())
    return f"{escape(label(row))}<small>{escape(rest)}</small>"


def _summary(config: dict[str, Any], rows: Sequence[Row]) -> str:
    names = {"stopped": "stopped early", "screened": "screened out before training"}
    counts = Counter(row["state"] for row in rows)
    parts = ", ".join(f"{n:,} {names.get(state, state)}" for state, n in counts.most_common())
    data = escape(config["train"]["data"]["name"])
    return f'<p class="quiet">{_count(len(rows), "trial")} on {data}: {escape(parts) or "none yet"}.</p>'


def _verdict(ranking: dict[str, Any] | None) -> str:
    if ranking is None:
        return "<p>There is no ranking yet: the final stage has not scored any trial.</p>"
    scored = [entry for entry in ranking["trials"] if entry["rank"] is not None]
    if not scored:
        return "<p>There is no winner: the final stage could score none of the trials. The table says why.</p>"
    best = scored[0]
    text = (
        f"<p><strong>{escape(best['trial'])}, {escape(label(best))}</strong> with learning rate "
        f"{_num(best['learning_rate'], 3)} and dropout {_num(best['dropout'], 2)} has the highest "
        f"{escape(ranking['score_name'])}: <strong>{fixed(best['score']['mean'])}</strong> "
        f"(95% confidence interval {_interval(best['score']['ci'])}) from {ranking['images']:,} images. "
    )
    if len(scored) == 1:
        text += "No other trial was ranked.</p>"
    else:
        text += f"It is the best of the {len(scored)} ranked with probability {fixed(best['p_best'])}; "
        tied = ", ".join(map(escape, best["tied_with"]))
        text += f"it cannot be told apart from {tied}.</p>" if tied else "it can be told apart from every other.</p>"
    real, same = ranking["real"], best["at_real_n"]
    text += (
        f"<p>The ceiling: {real['n']:,} real held-out images score {fixed(real['score'])}, as many of the winner's "
        f"{fixed(same['score'])}; their Fréchet distances are {fixed(real['frechet'])} and "
        f"{fixed(same['frechet'])}.</p>"
    )
    scope = (
        "The intervals include the spread between training seeds: they speak of the configuration."
        if best["confirmed"]
        else "The intervals speak of these trained models only: trained again from another seed, a configuration may "
        "score differently by more than that."
    )
    return text + f'<p class="quiet">{scope}</p>'


def _leaderboard(ranking: dict[str, Any] | None) -> str:
    if ranking is None:
        return "<p>No trial has been scored by the final stage yet.</p>"
    images, real_n = ranking["images"], ranking["real"]["n"]
    quantities = (escape(ranking["score_name"][:1].upper() + ranking["score_name"][1:]), "Fréchet distance")
    # A score depends on the number of images: what is measured at another number stands in columns of its own.
    numbers = [images] if real_n == images else [images, real_n]
    columns = [("", "n"), ("Trial", "")]
    columns += [(f"{quantity}<small>{images:,} images,<br>95% CI</small>", "n") for quantity in quantities]
    columns += [("P(best)", "n"), ("Not told apart from", "")]
    for n in numbers[1:]:
        columns += [(f"{quantity}<small>{n:,} images</small>", "n") for quantity in quantities]

    def reference(label: str, values: dict[str, Any]) -> tuple[str, list[str]]:
        pair = [fixed(values["score"]), fixed(values["frechet"])]
        main, *others = [pair if n == values["n"] else ["", ""] for n in numbers]
        return "reference", ["", f"<strong>{label}</strong>", *main, "", "", *chain(*others)]

    body = [reference("Real held-out images", ranking["real"])]
    for entry in ranking["trials"]:
        score, frechet = entry["score"], entry["frechet"]
        reason = f"<small><em>{escape(entry['reason'])}</em></small>" if entry["reason"] else ""
        trial = f"<strong>{escape(entry['trial'])}</strong><small>{_settings(entry)}</small>{reason}"
        cells = [str(entry["rank"] or ""), trial]
        cells += [f"<strong>{fixed(score['mean'])}</strong>{_interval(score['ci'], 'small')}" if score else NOT_KNOWN]
        cells += [f"{fixed(frechet['value'])}{_interval(frechet['ci'], 'small')}" if frechet else NOT_KNOWN]
        cells += [fixed(entry["p_best"]), "<br>".join(map(escape, entry["tied_with"])) or NOT_KNOWN]
        if len(numbers) > 1:
            at = entry["at_real_n"] or {"score": None, "frechet": None}
            cells += [fixed(at["score"]), fixed(at["frechet"])]
        body.append(("", cells))
    body.append(reference("Gaussian noise", ranking["noise"]))

    sampler = ", ".join(f"{key} {value}" for key, value in ranking["sampler"].items())
    accuracy = ranking["held_out_accuracy"]
    notes = [
        f"Judged by: {ranking['extractor']}.",
        "" if accuracy is None else f"It names {accuracy:.1%} of the real held-out images rightly.",
        f"The score is the mean over splits of {ranking['split_size']:,} images.",
        f"All trials drew from the same noise: {sampler}.",
        "Scores and distances compare only within one extractor, and at one number of images.",
    ]
    return _table(columns, body) + f'<p class="quiet">{escape(" ".join(filter(None, notes)))}</p>'


def _all_trials(rows: Sequence[Row], ranked: dict[str, Row]) -> str:
    if not rows:
        return "<p>No trial has begun yet.</p>"
    numbers = ("Epoch", "Fréchet", "Score", "Grid loss", "Worker-hours", "Rank")
    columns = [("Trial", ""), ("Tried", ""), ("State", "w"), *((heading, "n") for heading in numbers)]
    body = []
    for row in rows:
        last = row["rungs"][-1] if row["rungs"] else {}
        cells = [f"{escape(row['trial'])}<small>{escape(row['source'])}, seed {row['seed']}</small>", _settings(row)]
        reason = f"<small>{escape(row['reason'])}</small>" if row["reason"] else ""
        cells += [escape(row["state"]) + reason, str(row["epoch"])]
        cells += [*(_num(last.get(metric)) for metric in METRICS), _num(row["worker_seconds"] / 3600, 3)]
        body.append(("", [*cells, str((ranked.get(row["trial"]) or {}).get("rank") or "")]))
    note = (
        "Fréchet, score and grid loss are those of the last rung reached, from few images: they decide who goes on, "
        "not who wins."
    )
    return f'<p class="quiet">{note}</p>' + _table(columns, body)


def _cost(config: dict[str, Any], rows: Sequence[Row]) -> str:
    spent, saved = savings(rows, config["train"]["epochs"])
    stopped = sum(row["state"] == "stopped" for row in rows)
    trained = sum(row["worker_seconds"] > 0 for row in rows)
    text = f"<p>Training, with the scores at rungs, took <strong>{_num(spent / 3600, 3)} worker-hours</strong>."
    if not spent:
        text = "<p>No training time has been spent yet."
    elif stopped:
        text += (
            f" {_count(stopped, 'trial')} of {trained:,} stopped early: in full they would have taken about "
            f"{_num(saved / 3600, 3)} worker-hours more, so stopping saved {saved / (spent + saved):.0%} of the "
            "training (epochs left, at the mean cost of an epoch)."
        )
    else:
        text += " No trial was stopped early, so nothing was saved."
    return text + " The final stage's sampling is not counted.</p>"


def _again(config: dict[str, Any], commands: Sequence[str], versions: dict[str, str]) -> str:
    lines = escape("\n".join(commands))
    used = escape(", ".join(f"{name} {version}" for name, version in versions.items()))
    text = escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100))
    return (
        f"<pre>{lines}</pre><p>Seed {config['seed']}. Versions: {used}.</p>"
        f"<details><summary>The whole configuration (config.yaml)</summary><pre>{text}</pre></details>"
    )
