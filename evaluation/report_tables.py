"""The report's tables: ranking, all trials, families, importance."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from evaluation import analysis
from evaluation.analysis import Row
from evaluation.report_words import (
    METRICS,
    NOT_KNOWN,
    STATES,
    capitalised,
    chance,
    count,
    fixed,
    interval,
    label,
    number,
    reason,
    sampler_words,
    table,
    whole_splits,
)
from trainer import schedules


def settings(row: Row) -> str:
    """The cell that says what a trial tried."""
    # A line breaks between settings, not in one.
    rest = [f"learning\xa0rate\xa0{number(row['learning_rate'], 3)}", f"dropout\xa0{number(row['dropout'], 2)}"]
    rest += [f"{name} {value}" for name, value in (row.get("settings") or {}).items()]
    return f"<span>{escape(label(row))}<small>{escape(', '.join(rest))}</small></span>"


def ranking_table(ranking: Mapping[str, Any] | None) -> str:
    if ranking is None:
        return "<p>No trial has been scored by the final stage yet.</p>"
    images, real_n = ranking["images"], ranking["real"]["n"]
    score_name = escape(capitalised(ranking["score_name"]))
    distances = [entry["kid"]["value"] for entry in ranking["trials"] if entry.get("kid")]
    diverse = bool(distances)
    # Inception's are some thousandths, a classifier's of small images may be above 1.
    scale, kid_name = (1000, "KID × 1000") if max(distances, default=0) < 0.1 else (1, "KID")
    led = any(entry.get("to_next") for entry in ranking["trials"])

    def of_images(n: int, dropped: int, more: str) -> list[tuple[str, str]]:
        said = [(score_name, whole_splits(n, dropped)), ("Fréchet distance", count(n, "image"))]
        return [(f"{quantity}<small>{number}{more}</small>", "n") for quantity, number in said]

    # A score depends on the number of images: what is measured at another number stands in columns of its own.
    columns = [("", "n"), ("", "")]
    columns += of_images(images, ranking.get("dropped", 0), ",<br>95% CI")
    columns += [("P(best)", "n")]
    columns += [("Ahead of the next<small>95% CI</small>", "n")] if led else []
    columns += [("Tied with", "")]
    columns += [(f"{kid_name}<small>{count(images, 'image')},<br>95% CI</small>", "n")] if diverse else []
    columns += of_images(real_n, ranking["real"].get("dropped", 0), "") if real_n != images else []
    columns += [(f"Precision, recall<small>{count(real_n, 'image')}</small>", "n")] if diverse else []

    def at_real_n(values: Mapping[str, Any]) -> list[str]:
        """At one number of images for all: recall grows with it."""
        cells = [fixed(values.get("score")), fixed(values.get("frechet"))] if real_n != images else []
        return cells + [f"{fixed(values.get('precision'))}, {fixed(values.get('recall'))}"] * diverse

    def reference(name: str, values: dict[str, Any]) -> tuple[str, list[str]]:
        main = [fixed(values["score"]), fixed(values["frechet"])] if real_n == images else ["", ""]
        kid = fixed(None if values.get("kid") is None else scale * values["kid"])
        kid += f"<small>{count(real_n, 'image')}</small>" if real_n != images else ""
        cells = ["", f"<strong>{name}</strong>", *main, "", *[""] * led, ""]
        return "reference", [*cells, *[kid] * diverse, *at_real_n(values)]

    body = [reference("Real held-out images", ranking["real"])]
    for entry in ranking["trials"]:
        notes = [confirmation(entry), reason(entry["reason"])]
        said = "".join(f"<small><em>{escape(note)}</em></small>" for note in notes if note)
        cells = [
            str(entry["rank"] or ""),
            f"<strong>{escape(entry['trial'])}</strong><small>{settings(entry)}</small>{said}",
        ]
        cells += [_estimate(entry["score"], "mean", strong=True) + _splits(entry), _estimate(entry["frechet"], "value")]
        cells += [escape(chance(entry["p_best"])), *[_estimate(entry.get("to_next"), "score")] * led]
        cells += ["<br>".join(map(escape, entry["tied_with"])) or NOT_KNOWN]
        cells += [_estimate(entry.get("kid"), "value", scale)] * diverse
        body.append(("", cells + at_real_n(entry["at_real_n"] or {})))
    body.append(reference("Gaussian noise", ranking["noise"]))
    return table(columns, body) + f'<p class="quiet">{escape(_judged(ranking))}</p>'


def _estimate(found: Mapping[str, Any] | None, name: str, scale: float = 1.0, strong: bool = False) -> str:
    """A value with its interval."""
    if not found:
        return NOT_KNOWN
    value = fixed(scale * found[name])
    ends = interval([scale * end for end in found["ci"]], "small")
    return f"<strong>{value}</strong>{ends}" if strong else value + ends


def _splits(entry: Mapping[str, Any]) -> str:
    """How far splits differ (no confidence interval), and what all images score as one; nothing where they are one."""
    score, pool = entry["score"], entry.get("score_pool")
    if score is None or pool is None or math.isclose(pool, score["mean"]):
        return ""
    spread = "" if score["std"] is None else f"<small>± {fixed(score['std'])} between splits</small>"
    return f"{spread}<small>one pool {fixed(pool)}</small>"


def confirmation(entry: Mapping[str, Any]) -> str:
    """Of how many trainings a row speaks, and why not of more; nothing where it is one."""
    again = [own for own in entry.get("trainings") or [] if own["trial"] != entry["trial"]]
    failed = [own for own in again if own["score"] is None]
    reasons = "; ".join(dict.fromkeys(reason(own["reason"]) for own in failed))
    if entry["confirmed"] and entry.get("mean_of"):
        said = f"confirmed: the mean of {count(len(entry['mean_of']), 'new training')}"
        return f"{said} ({len(failed)} of {len(again)} failed: {reasons})" if failed else said
    return f"not confirmed: {len(failed)} of {len(again)} new trainings failed: {reasons}" if failed else ""


def _judged(ranking: Mapping[str, Any]) -> str:
    accuracy = ranking["held_out_accuracy"]
    said = "Judged by Inception V3 with the weights of published scores."
    if accuracy is not None:
        said = (
            f"Judged by a classifier trained on the data's own labels, {accuracy:.1%} right on real held-out images: "
            "its classifier score is the Inception Score's formula, and not comparable with published ones."
        )
    taken = sorted({entry["steps"] for entry in ranking["trials"] if entry.get("steps")})  # a schedule may have fewer
    sampler = sampler_words(ranking["sampler"] | ({"steps": " or ".join(map(str, taken))} if taken else {}))
    weights = "the weights as trained" if ranking.get("weights") == "raw" else "EMA weights"
    real = ""
    if "train_images" in ranking:
        some, every = ranking["real_images"], ranking["train_images"]
        real = f" Fréchet distances are to all {every:,} training images; KID, precision and recall to "
        real += "them as well." if some == every else f"{some:,} of them."
    return (
        f"{said} All trials drew from the same noise: {weights}, {sampler}. The score is "
        f"the mean over splits of {ranking['split_size']:,} images.{real} Scores and distances compare only within one "
        "extractor, and at one number of images. Trials are tied where the interval of their difference holds 0."
    )


def all_trials(rows: Sequence[Row], ranked: Mapping[str, Row]) -> str:
    if not rows:
        return "<p>No trial has begun yet.</p>"
    metrics = analysis.measured(rows)
    headings = ["Epoch", *(capitalised(METRICS[name]) for name in metrics), "Worker-seconds", "Rank"]
    columns = [("", ""), ("Tried", ""), ("State", "w"), *((heading, "n") for heading in headings)]
    body = []
    for row in rows:
        last = row["rungs"][-1] if row["rungs"] else {}
        trial = f"<strong>{escape(row['trial'])}</strong><small>{escape(row['source'])}, seed {row['seed']}</small>"
        why = f"<small>{escape(reason(row['reason']))}</small>" if row["reason"] else ""
        cells = [trial, settings(row), f"<span>{escape(STATES.get(row['state']) or row['state'])}{why}</span>"]
        cells += [str(row["epoch"]), *(number(last.get(name)) for name in metrics), f"{row['worker_seconds']:,.0f}"]
        body.append(("", [*cells, str((ranked.get(row["trial"]) or {}).get("rank") or "")]))
    note = "Values are those of the last rung reached, from few images: they decide who goes on, not who wins."
    return f'<p class="quiet">{note}</p>' + table(columns, body)


def families(rows: Sequence[Row], ranked: Mapping[str, Row], metric: str, epoch: int | None) -> str:
    """One line a family: how far its trials came, and what they scored at one epoch, which all of them reached."""
    values = analysis.at_epoch(rows, metric, epoch) if epoch is not None else {}
    at = "" if epoch is None else f"<small>at epoch {epoch}</small>"
    name = METRICS[metric]
    states = [state for state in ("completed", *STATES, "failed") if any(row["state"] == state for row in rows)]
    columns = [("Family", ""), ("Tried", "n")]
    columns += [(STATES.get(state, state).capitalize(), "n") for state in states]
    columns += [(f"Best {name}{at}", "n"), (f"Median {name}{at}", "n"), ("Best rank", "n"), ("Worker-seconds", "n")]
    body = []
    for family in (f for f in schedules.FAMILIES if any(row["family"] == f for row in rows)):
        own = [row for row in rows if row["family"] == family]
        found = sorted((values[r["trial"]] for r in own if r["trial"] in values), reverse=metric == "score")
        ranks = [ranked[row["trial"]]["rank"] for row in own if (ranked.get(row["trial"]) or {}).get("rank")]
        cells = [family, str(len(own)), *(str(sum(row["state"] == state for row in own)) for state in states)]
        cells += [number(found[0]), number(median(found))] if found else [NOT_KNOWN, NOT_KNOWN]
        spent = sum(row["worker_seconds"] for row in own)
        body.append(("", [*cells, str(min(ranks, default=NOT_KNOWN)), f"{spent:,.0f}"]))
    return table(columns, body)


def importance(rows: Sequence[Row], space: Mapping[str, Any], metric: str, epoch: int | None) -> str:
    """What moved the result at an epoch, over all families and within each; a sentence where trials are too few."""
    values = analysis.at_epoch(rows, metric, epoch) if epoch is not None else {}
    least = analysis.MIN_TRIALS
    if len(values) < least:
        return (
            f"<p>Too few trials to say: it takes at least {least} that were measured at the same epoch, and there are "
            f"{len(values)}. From fewer, the shares would be noise.</p>"
        )
    html, few = "", []
    for family in (None, *space["families"]):
        name = family or "All families"
        used, found = analysis.importances(rows, values, space, family)
        if not found:
            if used < least:
                few.append(f"{name} ({used})")
            continue
        columns = [("Parameter", ""), ("", ""), ("Share", "n"), ("By chance up to", "n"), ("Beyond chance", "")]
        body = []
        for each in found:
            bar = f'<i style="width:{each.share:.1%}"></i><b style="left:{each.by_chance:.1%}"></b>'
            beyond = "yes" if each.share > each.by_chance else "no"
            shares = [f"{each.share:.0%}", f"{each.by_chance:.0%}"]
            body.append(
                ("", [escape(each.parameter.replace("_", " ")), f'<div class="bar">{bar}</div>', *shares, beyond])
            )
        html += f"<h4>{escape(name)}, {count(used, 'trial')}</h4>{table(columns, body)}"
    note = (
        f"The share of the variation in the {METRICS[metric]} at epoch {epoch} (in the trials' order by it) that each "
        "parameter explains: fANOVA, Hutter et al. 2014. The black line is the largest share that it got in "
        f"{analysis.SHUFFLES} shuffles of the results: a bar that does not pass it may be chance."
    )
    left = f'<p class="quiet">Fewer than {least} trials, so left out: {escape(", ".join(few))}.</p>' if few else ""
    return f'<p class="quiet">{note}</p>{html}{left}'
