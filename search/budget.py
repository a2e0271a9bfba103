"""What a search may spend beside its number of trials: hours by the clock and worker-hours, however often resumed."""

import contextlib
import json
import time
from typing import Any

from evaluation.analysis import SHARE_SPENT
from search.config import BudgetConfig
from search.driver_only import DriverOnly
from search.records import Records
from trainer.storage import Storage

FILE = "search.json"  # {seconds: spent by the clock until the search ended, ended: why, or null}
NOTED_EVERY_SECONDS = 10.0


class Budget(DriverOnly):
    """Counts from where it is made: a search's clock goes on where the last driver's stopped."""

    def __init__(self, config: BudgetConfig, run: Storage, records: Records):
        self.config, self.run, self.records = config, run, records
        self._before = float(read(run).get("seconds", 0.0))
        self._began = self._noted = time.monotonic()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def spent(self) -> str | None:
        """Why nothing more may be begun: the search's share of what is allowed is used up. None: it may."""
        for name, allowed, used in (
            ("hours", self.config.hours, self.seconds() / 3600),
            ("worker_hours", self.config.worker_hours, sum(row.worker_seconds for row in self.records) / 3600),
        ):
            share = (1 - self.config.reserve) * allowed if allowed is not None else float("inf")
            if used >= share:
                return f"{SHARE_SPENT}{name}, {share:.3g} of {allowed:.3g}, was spent"
        return None

    def tick(self) -> None:
        """Puts the clock on record, every ten seconds."""
        if time.monotonic() - self._noted > NOTED_EVERY_SECONDS:
            with contextlib.suppress(OSError):  # a storage that is away for a while is no reason to end a search
                self.note(None)

    def note(self, ended: str | None) -> None:
        self._noted = time.monotonic()
        self.run.write_json(FILE, {"seconds": round(self.seconds(), 1), "ended": ended})


def left(config: BudgetConfig, run: Storage, records: Records) -> BudgetConfig | None:
    """What a run's search has left of its budget, the reserve included; None where that is nothing."""
    used = {
        "hours": float(read(run).get("seconds", 0.0)) / 3600,
        "worker_hours": sum(row.worker_seconds for row in records) / 3600,
    }
    allowed = config.model_dump(exclude={"reserve"})
    rest = {name: None if hours is None else hours - used[name] for name, hours in allowed.items()}
    return None if any(h is not None and h <= 0 for h in rest.values()) else BudgetConfig(**rest, reserve=0)


def read(run: Storage) -> dict[str, Any]:
    """What is on record; nothing where it is lost."""
    try:
        found = run.read_json(FILE)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
