"""How the report says things: one name for each quantity, numbers, tables."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.config import ScheduleConfig

NOT_KNOWN = "–"
METRICS = {"frechet": "Fréchet distance", "score": "score", "grid_loss": "grid loss"}
STATES = {
    "stopped": "stopped early", "screened": "screened out", "reused": "reused", "running": "unfinished",
    "waiting": "not begun",
}  # fmt: skip
SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "dpm++": "DPM-Solver++"}


def label(row: Mapping[str, Any]) -> str:
    """cosine(0, 1, tau 1): the schedule of a row of the trials table or of ranking.json."""
    # A screened schedule may break a law, and is named like any other: so its values are not checked.
    space = (row.get("settings") or {}).get("schedule.space", "alpha_bar")
    own = {name: row[name] for name in ("family", "start", "end", "tau")}
    return ScheduleConfig.model_construct(**own | {"space": space}).label()


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def better(metric: str) -> str:
    return "higher is better" if metric == "score" else "lower is better"


def reason(text: str | None) -> str:
    """A reason of the trials table in the report's words."""
    return re.sub(r"\b(frechet|grid_loss)\b", lambda found: METRICS[found[0]], text or "")


def sampler_words(sampler: Mapping[str, Any]) -> str:
    """Of a sampler's settings, those that it looks at."""
    parts = [SAMPLERS.get(sampler["name"], sampler["name"]), f"{sampler.get('steps')} steps"]
    if sampler["name"] == "ddim":
        parts.append(f"eta {number(sampler.get('eta'))}")
    if sampler["name"] == "ddpm":
        parts.append(str(sampler.get("variance", "")).replace("_", "-") + " variance")
    if sampler.get("spacing", "trailing") != "trailing":
        parts.append(f"{sampler['spacing']} spacing")
    if sampler.get("bf16") is True:
        parts.append("bf16")
    return ", ".join([*parts, f"seed {sampler.get('seed')}"])


def searched_words(value: Any) -> str:
    """0.5 to 3 (log): a range, a list of choices, or what a parameter is fixed to."""
    if isinstance(value, dict):
        return f"{value['low']:g} to {value['high']:g}" + (" (log)" if value["log"] else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float | None, digits: int = 4) -> str:
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def fixed(value: float | None) -> str:
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:.2f}"


def chance(probability: float | None) -> str:
    """Of a simulation, which is never sure."""
    if probability is None:
        return NOT_KNOWN
    return "> 0.99" if probability > 0.99 else "< 0.01" if probability < 0.01 else fixed(probability)


def interval(ci: Sequence[float], tag: str = "span") -> str:
    return f"<{tag}>{fixed(ci[0])} to {fixed(ci[1])}</{tag}>"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def whole_splits(n: int, dropped: int, noun: str = "image") -> str:
    """The images that a score is of, where `dropped` of n are left over by whole splits."""
    return count(n - dropped, noun) + (f" ({dropped:,} left over)" if dropped else "")


def joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def what_intervals_say(ranking: Mapping[str, Any]) -> str:
    """Whether a ranking's intervals are of its trained models or, confirmed, of configurations: of each row."""
    scored = [entry for entry in ranking["trials"] if entry["score"] is not None]
    confirmed = [entry["trial"] for entry in scored if entry["confirmed"]]
    only = (
        "speak of the trained models only: trained again from another seed, a configuration may score differently by "
        "more than that"
    )
    if not confirmed:
        return f"The intervals {only} (final.confirm tries it)."
    if len(confirmed) == len(scored):
        return "The intervals include the spread between training seeds: they speak of the configurations."
    return (
        f"The intervals of {joined(confirmed)} include the spread between training seeds: they speak of the "
        f"configuration. Those of the others {only}."
    )


def table(columns: Sequence[tuple[str, str]], body: Iterable[tuple[str, Sequence[str]]]) -> str:
    """columns: (heading, class), n for numbers and w for text that wraps; body: (class, cells). All of it is HTML.

    On a narrow screen a row is a card, and each cell says its column's heading.
    """
    labels = [re.sub(r"(<[^>]*>|\s)+", " ", heading).strip() for heading, _ in columns]
    names = [f' class="{name}"' if name else "" for _, name in columns]
    head = "".join(f"<th{name}>{heading}</th>" for (heading, _), name in zip(columns, names, strict=True))
    rows = ""
    for kind, cells in body:
        line = ""
        for cell, name, text in zip(cells, names, labels, strict=True):
            line += f"<td{name}{f' data-label={chr(34)}{text}{chr(34)}' if text else ''}>{cell}</td>"
        rows += f'<tr class="{kind}">{line}</tr>' if kind else f"<tr>{line}</tr>"
    # tabindex: a box that scrolls must be reachable from the keyboard
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
