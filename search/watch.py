"""What a person sees while a search runs: a live table of the trials with an ETA; plain lines without a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from evaluation.report_words import label
from search.records import ENDED, OPEN, Records
from search.tables import SHOWN, STATE_STYLE, reasons, trials_table


class SearchView:
    """The trials of a running search: live in a terminal, a line a finished trial elsewhere."""

    def __init__(self, console: Console, records: Records, metric: str, epochs: int, trials: int):
        self.console, self.records, self.metric, self.epochs, self.trials = console, records, metric, epochs, trials
        self.began = time.monotonic()
        self.epochs_before = sum(row.epoch for row in records)
        self.said = {row.trial: row.state for row in records}
        self.live: Live | None = None

    def summary(self) -> str:
        """Trials by state, time gone and time to go."""
        states: list[str] = [row.state for row in self.records]
        counts = ", ".join(f"{states.count(s)} {s}" for s in STATE_STYLE if states.count(s))
        elapsed = time.monotonic() - self.began
        ended = sum(state in ENDED for state in states)
        rate = (sum(row.epoch for row in self.records) - self.epochs_before) / elapsed
        eta = f", about {_clock(self._epochs_left() / rate)} to go" if rate > 0 and ended < self.trials else ""
        return f"{ended} of {self.trials} trials done ({counts}), {_clock(elapsed)} gone{eta}"

    def _epochs_left(self) -> float:
        """Epochs to be expected of the trials that have not ended: as many as of those that have, on average."""
        ended = [row.epoch for row in self.records if row.state in ("completed", "stopped")]
        length = (self.epochs + sum(ended)) / (1 + len(ended))  # the first is expected to be trained in full
        left = [row.epoch for row in self.records if row.state in OPEN]
        gone = sum(row.state in ENDED for row in self.records)
        unstarted = max(0, self.trials - gone - len(left))
        return unstarted * length + sum(max(length - epoch, 0.0) for epoch in left)

    def __rich__(self) -> Group:
        table = trials_table(self.records, self.metric, self.epochs, SHOWN)
        return Group(table, *reasons(self.records), Text(self.summary(), style="bold"))

    def changed(self) -> None:
        """Called when the record may have changed."""
        if self.live is not None:
            return  # it looks by itself, a few times a second
        for row in self.records:
            if row.state == self.said.get(row.trial):
                continue
            self.said[row.trial] = row.state
            if row.state not in OPEN:
                self.console.print(
                    f"{row.trial}  {label(vars(row))}  {row.state}" + (f": {row.reason}" if row.reason else "")
                )

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the view for the length of a with block."""
        if not self.console.is_terminal:
            yield
            self.changed()
            return
        with Live(self, console=self.console, refresh_per_second=2, transient=True) as self.live:
            yield


@contextlib.contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with an ETA in a terminal; one line elsewhere. Yields progress(done, total)."""
    if not console.is_terminal:
        console.print(what)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("to go"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
