"""The report's tables: leaderboard, all trials, families, importance."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain
from statistics import median
from typing import Any

from evaluation import analysis
from evaluation.analysis import Row
from evaluation.report_words import (
    METRICS,
    NOT_KNOWN,
    STATES,
    chance,
    count,
    fixed,
    interval,
    label,
    number,
    reason,
    sampler_words,
    table,
)
from trainer import schedules


def settings(row: Row) -> str:
    """The cell that says what a trial tried."""
    rest = [f"learning rate {number(row['learning_rate'], 3)}", f"dropout {number(row['dropout'], 2)}"]
    rest += [f"{name} {value}" for name, value in (row.get("settings") or {}).items()]
    return f"<span>{escape(label(row))}<small>{escape(', '.join(rest))}</small></span>"


def leaderboard(ranking: Mapping[str, Any] | None) -> str:
    if ranking is None:
        return "<p>No trial has been scored by the final stage yet.</p>"
    images, real_n = ranking["images"], ranking["real"]["n"]
    score_name = escape(ranking["score_name"][:1].upper() + ranking["score_name"][1:])
    quantities = (score_name, "Fréchet distance")
    diverse = any(entry.get("kid") for entry in ranking["trials"])
    # A score depends on the number of images: what is measured at another number stands in columns of its own.
    numbers = [images] if real_n == images else [images, real_n]
    columns = [("", "n"), ("", "")]
    columns += [(f"{quantity}<small>{images:,} images,<br>95% CI</small>", "n") for quantity in quantities]
    columns += [("P(best)", "n"), ("Not told apart from", "")]
    columns += [("KID × 1000<small>95% CI</small>", "n"), ("Precision, recall", "n")] if diverse else []
    for n in numbers[1:]:
        columns += [(f"{quantity}<small>{n:,} images</small>", "n") for quantity in quantities]

    def diversity(values: Mapping[str, Any]) -> list[str]:
        kid = values.get("kid")
        if isinstance(kid, dict):
            ci = [1000 * end for end in kid["ci"]]
            said = f"{fixed(1000 * kid['value'])}{interval(ci, 'small')}"
        else:
            said = fixed(None if kid is None else 1000 * kid)
        return [said, f"{fixed(values.get('precision'))}, {fixed(values.get('recall'))}"] if diverse else []

    def reference(name: str, values: dict[str, Any]) -> tuple[str, list[str]]:
        pair = [fixed(values["score"]), fixed(values["frechet"])]
        main, *others = [pair if n == values["n"] else ["", ""] for n in numbers]
        return "reference", ["", f"<strong>{name}</strong>", *main, "", "", *diversity(values), *chain(*others)]

    body = [reference("Real held-out images", ranking["real"])]
    for entry in ranking["trials"]:
        score, frechet = entry["score"], entry["frechet"]
        notes = [confirmation(entry), escape(reason(entry["reason"]))]
        said = "".join(f"<small><em>{note}</em></small>" for note in notes if note)
        trial = f"<strong>{escape(entry['trial'])}</strong><small>{settings(entry)}</small>{said}"
        cells = [str(entry["rank"] or ""), trial]
        cells += [f"<strong>{fixed(score['mean'])}</strong>{interval(score['ci'], 'small')}" if score else NOT_KNOWN]
        cells += [f"{fixed(frechet['value'])}{interval(frechet['ci'], 'small')}" if frechet else NOT_KNOWN]
        cells += [escape(chance(entry["p_best"])), "<br>".join(map(escape, entry["tied_with"])) or NOT_KNOWN]
        cells += diversity(entry)
        if len(numbers) > 1:
            at = entry["at_real_n"] or {"score": None, "frechet": None}
            cells += [fixed(at["score"]), fixed(at["frechet"])]
        body.append(("", cells))
    body.append(reference("Gaussian noise", ranking["noise"]))
    return table(columns, body) + f'<p class="quiet">{escape(_judged(ranking))}</p>'


def confirmation(entry: Mapping[str, Any]) -> str:
    """Of how many trainings a row speaks; nothing where it is one."""
    seeds = entry.get("seeds") or []
    return f"confirmed: the mean of {count(len(seeds), 'new training')}" if entry["confirmed"] and seeds else ""


def _judged(ranking: Mapping[str, Any]) -> str:
    accuracy = ranking["held_out_accuracy"]
    judge = "Judged by Inception V3 with the weights of published scores."
    if accuracy is not None:
        judge = (
            f"Judged by a classifier trained on the data's own labels, {accuracy:.1%} right on real held-out images: "
            "its classifier score is the Inception Score's formula, and not comparable with published ones."
        )
    weights = "the weights as trained" if ranking.get("weights") == "raw" else "EMA weights"
    return (
        f"{judge} All trials drew from the same noise: {weights}, {sampler_words(ranking['sampler'])}. The score is "
        f"the mean over splits of {ranking['split_size']:,} images. Scores and distances compare only within one "
        "extractor, and at one number of images."
    )


def all_trials(rows: Sequence[Row], ranked: Mapping[str, Row]) -> str:
    if not rows:
        return "<p>No trial has begun yet.</p>"
    metrics = [name for name in METRICS if any(rung[name] is not None for row in rows for rung in row["rungs"])]
    headings = ["Epoch", *(METRICS[name][0].upper() + METRICS[name][1:] for name in metrics), "Worker-seconds", "Rank"]
    columns = [("", ""), ("Tried", ""), ("State", "w"), *((heading, "n") for heading in headings)]
    body = []
    for row in rows:
        last = row["rungs"][-1] if row["rungs"] else {}
        trial = f"<strong>{escape(row['trial'])}</strong><small>{escape(row['source'])}, seed {row['seed']}</small>"
        why = f"<small>{escape(reason(row['reason']))}</small>" if row["reason"] else ""
        cells = [trial, settings(row), f"<span>{escape(STATES.get(row['state']) or row['state'])}{why}</span>"]
        cells += [str(row["epoch"]), *(number(last.get(name)) for name in metrics), f"{row['worker_seconds']:,.0f}"]
        body.append(("", [*cells, str((ranked.get(row["trial"]) or {}).get("rank") or "")]))
    note = "Scores are those of the last rung reached, from few images: they decide who goes on, not who wins."
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
