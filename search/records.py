"""The trials table, the authority on a run: one row a trial, in memory and as trials.parquet."""

import dataclasses
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.config import Metric
from trainer.storage import Storage

FILE = "trials.parquet"
State = Literal["waiting", "running", "completed", "stopped", "screened", "reused", "failed"]
OPEN = ("waiting", "running")  # still to be trained: not begun, and begun
ENDED = ("completed", "stopped", "failed")  # of those that were trained
UNTRAINED = ("screened", "reused")  # listed, and not counted in `trials`
NOT_CHOSEN = "not among those that the newest ranking confirms"  # why a confirmation waits: it may be chosen again
RUNG_METRICS = get_args(Metric)
SMALL = 200  # rows; a larger table takes longer to write, and is not written at every change
PART = 100  # rows that are turned into Arrow together
PAUSE = 20  # times as long as a write took is waited before the next: at most a twentieth of the driver's time
MOST_PAUSE_SECONDS = 10.0  # where a storage was away for a while, a write may have taken minutes

TEXT, NUMBER, COUNT = pa.string(), pa.float64(), pa.int64()
RUNG = pa.struct([("epoch", COUNT), *((name, NUMBER) for name in RUNG_METRICS)])
COLUMNS = {
    "trial": TEXT, "source": TEXT, "family": TEXT, "start": NUMBER, "end": NUMBER, "tau": NUMBER,
    "learning_rate": NUMBER, "dropout": NUMBER, "settings": TEXT, "seed": COUNT, "state": TEXT, "reason": TEXT,
    "same_as": TEXT, "epoch": COUNT, "rungs": pa.list_(RUNG), "worker_seconds": NUMBER, "checkpoint": TEXT,
}  # fmt: skip
MAY_BE_NULL = ("reason", "same_as", "rungs", "checkpoint")
SCHEMA = pa.schema([pa.field(name, kind, nullable=name in MAY_BE_NULL) for name, kind in COLUMNS.items()])


@dataclass(frozen=True)
class Row:
    """One trial. `epoch` is the last that was reported, `rungs` every scored one, the last epoch's among them."""

    trial: str
    source: Literal["known", "suggested"]
    family: str
    start: float
    end: float
    tau: float
    learning_rate: float
    dropout: float
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)  # more of the training's, as space.train names them; JSON
    state: State = "running"
    reason: str | None = None
    same_as: str | None = None  # of a reused row: the trial that was trained for it
    epoch: int = 0
    rungs: list[dict[str, Any]] = field(default_factory=list)
    worker_seconds: float = 0.0
    checkpoint: str | None = None  # path below the run, such as train/t0003-cosine/checkpoint_000040

    def rung(self, epoch: int) -> dict[str, Any] | None:
        """The scores at an epoch, or None."""
        for rung in self.rungs:  # next() of a generator takes twice as long, and a long search asks millions of times
            if rung["epoch"] == epoch:
                return rung
        return None

    def params(self) -> dict[str, Any]:
        """As in the tables: family, start, end, tau, learning_rate, dropout, settings."""
        names = ("family", "start", "end", "tau", "learning_rate", "dropout", "settings")
        return {name: getattr(self, name) for name in names}


class DamagedError(Exception):
    """The table is there, and is none."""


class Records:
    """The rows of a run. A new row is on disk before the call returns, and so is every change of a small table.

    Changes of one of more than 200 rows are on disk within 20 times the seconds that a write takes, and ten seconds at
    most. What a killed driver loses of them, trials report again from their checkpoints when they are resumed.
    """

    def __init__(self, run: Storage, rows: dict[str, Row] | None = None):
        self.run = run
        self._rows = rows or {}
        self._writing, self._later, self._pause_over = threading.RLock(), False, 0.0
        self._parts: dict[int, tuple[list[Row], pa.Table]] = {}

    @classmethod
    def load(cls, run: Storage) -> "Records":
        """The rows of a run; none where it has no table yet. Raises DamagedError."""
        if not run.exists(FILE):
            return cls(run)
        content = io.BytesIO(run.read(FILE))
        try:
            # read_table would import pandas, 0.3 s; and a pool of threads for a small table aborts the process at its
            # end ("terminate called without an active exception") about once in a hundred times.
            file = pq.ParquetFile(content, pre_buffer=False, page_checksum_verification=True)
            table = file.read(use_threads=False)
            known = [name for name in SCHEMA.names if name in table.column_names]  # another version's may differ
            rows = table.select(known).to_pylist()
            made = [Row(**row | {"settings": json.loads(row.get("settings") or "{}")}) for row in rows]
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:  # as Arrow says of a damaged file
            raise DamagedError(str(error)) from error
        return cls(run, {row.trial: row for row in made})

    def __iter__(self) -> Iterator[Row]:
        return iter(list(self._rows.values()))  # one step of the interpreter: another thread may add a row

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, trial: str) -> Row:
        return self._rows[trial]

    def add(self, row: Row) -> None:
        assert row.trial not in self._rows, row.trial
        self._rows[row.trial] = row
        self._write()

    def update(self, trial: str, **changes: Any) -> Row:
        row = dataclasses.replace(self._rows[trial], **changes)
        self._rows[trial] = row
        pause = self._pause_over - time.monotonic()
        if len(self._rows) <= SMALL or pause <= 0:
            self._write()
        elif not self._later:
            self._write_later(pause)
        return row

    def report(
        self,
        trial: str,
        metrics: dict[str, Any],
        run_checkpoint: str | None,
        decide: Callable[[Row], dict[str, Any]] = lambda row: {},
    ) -> Row:
        """Notes a report. An epoch that comes twice, since a worker died after it, changes nothing.

        A score that is not finite is none: it cannot be ranked, nor told to Optuna, nor written as JSON.
        decide(row with the report) gives what else is changed by it: both are on disk, or neither.
        """
        row = self._rows[trial]
        rungs = row.rungs
        if metrics.get("rung") and row.rung(metrics["epoch"]) is None:
            scores = {name: _finite(metrics.get(name)) for name in RUNG_METRICS}
            rungs = sorted([*rungs, {"epoch": metrics["epoch"], **scores}], key=lambda rung: rung["epoch"])
        row = dataclasses.replace(
            row,
            rungs=rungs,
            epoch=max(row.epoch, metrics["epoch"]),
            worker_seconds=max(row.worker_seconds, metrics["worker_seconds"]),
            checkpoint=run_checkpoint if run_checkpoint and metrics["epoch"] >= row.epoch else row.checkpoint,
        )
        with self._writing:
            self._rows[trial] = row
            return self.update(trial, **decide(row))

    def flush(self) -> None:
        """Writes what was put off; called before another driver may have the run."""
        with self._writing:  # or it is being written, and may be refused
            if self._later:
                self._write()

    def _write_later(self, pause: float) -> None:
        def write() -> None:
            try:
                self.flush()
            except OSError:  # nobody waits for it here, and flush() says it at the end where it is still so
                self._write_later(MOST_PAUSE_SECONDS)

        self._later = True
        timer = threading.Timer(pause, write)
        timer.daemon = True
        timer.start()

    def _write(self) -> None:
        with self._writing:
            began = time.monotonic()
            self._later = False  # a change that comes from now on is perhaps not in it
            buffer = io.BytesIO()
            pq.write_table(self._table(), buffer, write_page_checksum=True)
            try:
                self.run.write(FILE, buffer.getvalue())
            except BaseException:
                self._later = True
                raise
            pause = min(PAUSE * (time.monotonic() - began), MOST_PAUSE_SECONDS)
            self._pause_over = time.monotonic() + pause

    def _table(self) -> pa.Table:
        """All rows; those parts of the table in which no row has changed are as they were."""
        rows, parts = list(self._rows.values()), []
        for first in range(0, max(1, len(rows)), PART):
            part = rows[first : first + PART]
            kept, table = self._parts.get(first, ([], None))
            if table is None or kept != part:
                # vars(), for dataclasses.asdict() copies deeply: of 5,000 rows 250 ms instead of 15
                table = pa.Table.from_pylist([_as_stored(row) for row in part], schema=SCHEMA)
                self._parts[first] = part, table
            parts.append(table)
        return pa.concat_tables(parts)


def _as_stored(row: Row) -> dict[str, Any]:
    return vars(row) | {"settings": json.dumps(row.settings)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
