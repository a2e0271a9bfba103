"""The tables of a terminal: a search's trials, and its ranking."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from evaluation.report_words import chance, label, sampler_words, what_intervals_say
from search.records import Row

SHOWN = 16  # rows of the live table
WRAPPED_WIDTH = 24  # characters that a column of several lines needs at least
STATE_STYLE = {
    "waiting": "dim", "running": "cyan", "completed": "green", "stopped": "yellow", "reused": "blue",
    "screened": "magenta", "failed": "red",
}  # fmt: skip
METRIC_TITLES = {"frechet": "Fréchet", "score": "score", "grid_loss": "grid loss"}


@dataclass(frozen=True)
class Column:
    """`leaves` says in which order columns are left out of a narrow terminal; 0: never. `wraps`: over several lines."""

    title: str
    justify: Literal["left", "right"] = "right"
    leaves: int = 0
    wraps: bool = False


class FittedTable:
    """A table that leaves out its least important columns where not all of them fit, rather than cut every one."""

    def __init__(self, *columns: Column):
        self.columns = columns
        self.rows: list[tuple[tuple[str | Text, ...], str]] = []

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        self.rows.append((cells, style))

    def _width(self, index: int) -> int:
        column = self.columns[index]
        texts = [column.title, *(str(cells[index]) for cells, _ in self.rows if index < len(cells))]
        widest = max(cell_len(line) for text in texts for line in text.split("\n"))
        return min(widest, WRAPPED_WIDTH) if column.wraps else widest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = list(range(len(self.columns)))
        while sum(self._width(i) for i in shown) + 2 * (len(shown) - 1) > options.max_width:
            droppable = [i for i in shown if self.columns[i].leaves]
            if not droppable:
                break
            shown.remove(min(droppable, key=lambda i: self.columns[i].leaves))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in (self.columns[i] for i in shown):
            table.add_column(column.title, justify=column.justify, no_wrap=not column.wraps)
        for cells, style in self.rows:
            table.add_row(*(cells[i] for i in shown if i < len(cells)), style=style)
        yield table


def trials_table(rows: Iterable[Row], metric: str, epochs: int, limit: int | None = None) -> FittedTable:
    """The trials, best first."""
    rows, both = list(rows), metric != "score"
    varied = any(row.settings for row in rows)
    table = FittedTable(
        Column("trial", "left"), Column("schedule", "left"), Column("lr", leaves=4), Column("dropout", leaves=3),
        *([Column("settings", "left", leaves=6, wraps=True)] if varied else []),
        Column("epoch"), Column(METRIC_TITLES[metric]), *([Column("score", leaves=5)] if both else []),
        Column("worker-seconds", leaves=2), Column("state", "left"), Column("reason", "left", leaves=1, wraps=True),
    )  # fmt: skip
    ordered = in_order(rows, metric)
    for row in ordered[:limit]:
        last = row.rungs[-1] if row.rungs else {}
        settings = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        values = [last.get(metric)] + ([last.get("score")] if both else [])
        table.add_row(
            row.trial, label(vars(row)), f"{row.learning_rate:.1e}", f"{row.dropout:.2f}",
            *([settings] if varied else []), f"{row.epoch}/{epochs}",
            *("–" if value is None else f"{value:.4g}" for value in values), f"{row.worker_seconds:.0f}",
            Text(row.state, style=STATE_STYLE.get(row.state, "")), Text(row.reason or "", style="dim"),
        )  # fmt: skip
    if limit is not None and len(ordered) > limit:
        table.add_row(f"+ {len(ordered) - limit} more")
    return table


def in_order(rows: Iterable[Row], metric: str) -> list[Row]:
    """Best first: by how far a trial came, then by its last value there; screened and failed ones last."""

    def key(row: Row) -> tuple[Any, ...]:
        if not row.rungs:
            return row.state in ("reused", "screened", "failed"), 0, 0.0, row.trial
        value = row.rungs[-1][metric]
        sign = -1 if metric == "score" else 1
        return (
            row.state == "failed",
            -row.rungs[-1]["epoch"],
            float("inf") if value is None else sign * value,
            row.trial,
        )

    return sorted(rows, key=key)


def reasons(rows: Iterable[Row]) -> list[Text]:
    """A line for each trial that was never ranked, since a table has room for reasons in wide terminals only."""
    told = [row for row in rows if row.state in ("reused", "screened", "failed")]
    return [Text(f"{row.trial} {row.state}: {row.reason}", style="dim") for row in told[-SHOWN:]]


def ranking_table(ranking: dict[str, Any]) -> FittedTable:
    """ranking.json as a table, with the real images above and the noise below."""
    score_name = ranking["score_name"]
    table = FittedTable(
        Column("rank"), Column("trial", "left"), Column("schedule", "left"), Column("lr", leaves=6),
        Column("dropout", leaves=5), Column(score_name.replace(" ", "\n")), Column("95% CI", leaves=8),
        Column("Fréchet"), Column("95% CI", leaves=3), Column("KID", leaves=2),
        Column("precision\nrecall", leaves=1), Column("P(best)", leaves=9),
        Column("ahead of the\nnext, 95% CI", leaves=4), Column("tied with", "left", leaves=7, wraps=True),
    )  # fmt: skip
    real, noise = ranking["real"], ranking["noise"]

    def reference(name: str, row: dict[str, Any]) -> None:
        n = "" if row["n"] == ranking["images"] else f"N {row['n']:,}"
        score, frechet = f"{row['score']:.3f}", f"{row['frechet']:.2f}"
        table.add_row("", name, n, "", "", score, "", frechet, "", *_diversity(row, row.get("kid")), style="dim")

    reference("real, held out", real)
    for row in ranking["trials"]:
        start = [
            str(row["rank"] or "–"),
            row["trial"],
            label(row),
            f"{row['learning_rate']:.1e}",
            f"{row['dropout']:.2f}",
        ]
        if row["score"] is None:
            table.add_row(*start, "–", "", "–", "", "", "", "", "", row["reason"] or "")
            continue
        score, frechet = row["score"], row["frechet"]
        table.add_row(
            *start, f"{score['mean']:.3f}", f"{score['ci'][0]:.3f}–{score['ci'][1]:.3f}",
            f"{frechet['value']:.2f}", f"{frechet['ci'][0]:.2f}–{frechet['ci'][1]:.2f}",
            *_diversity(row.get("at_real_n") or row, (row.get("kid") or {}).get("value")), chance(row["p_best"]),
            _lead(row.get("to_next")), ", ".join(row["tied_with"]) or "–",
        )  # fmt: skip
    reference("Gaussian noise", noise)
    return table


def _lead(to_next: dict[str, Any] | None) -> str:
    """0.121 ±0.080: the interval has the difference in its middle."""
    return "–" if to_next is None else f"{to_next['score']:.3f} ±{to_next['ci'][1] - to_next['score']:.3f}"


def _diversity(row: dict[str, Any], kid: float | None) -> tuple[str, str]:
    """KID, and precision / recall (which depends on the number of images), of a row that may have none."""
    shares = row.get("precision"), row.get("recall")
    return (
        "–" if kid is None else f"{kid:.3g}",
        " / ".join("–" if share is None else f"{share:.2f}" for share in shares),
    )


def ranking_notes(ranking: dict[str, Any]) -> str:
    """What the numbers of a ranking depend on, in a line or two."""
    # Fewer than the sampler's were taken where a schedule has no more; a ranking of an earlier version does not say.
    drawn = ranking["sampler"] | {name: ranking[name] for name in ("steps",) if name in ranking}
    dropped = f", {ranking['dropped']} images left over" if ranking.get("dropped") else ""
    real_n = f"; precision and recall at {ranking['real']['n']:,}" if ranking["real"]["n"] != ranking["images"] else ""
    return (
        f"{ranking['score_name']} of {ranking['images']:,} images in splits of {ranking['split_size']:,}{dropped}"
        f"{real_n}; extractor {ranking['extractor']}; {ranking.get('weights', 'ema')} weights; "
        f"{sampler_words(drawn)}.\n" + what_intervals_say(ranking)
    )
