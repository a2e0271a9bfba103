"""Does one driver keep up? The project's searcher, scheduler and trials table with 8 to 1,000 simulated workers.

    python -m benchmarks.simulate_scale [--workers 500 --trials 5000]

The clock is simulated, the driver's CPU seconds are real ones of this machine and count on that clock: replay.py. A
full training takes 10 minutes. Model of a training: the recorded curve of the nearest configuration
(curves/digits.parquet), each value times a lognormal of 0.1, and the seconds of the whole times another, so that a
configuration that comes twice differs and workers drift apart. What Tune itself takes is not in it: see
orchestration.py.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from benchmarks import curves, replay
from benchmarks.common import RESULTS, peak_memory_mib, provenance, write
from search.early_stopping import RungScheduler
from search.records import Records
from search.searcher import HonestOptunaSearch
from search.watch import SearchView
from trainer.storage import Storage

CELLS = ((8, 200), (64, 500), (500, 5000), (1000, 5000))
FULL_SECONDS, SPREAD = 600.0, 0.1
GAP_SECONDS = 1.0  # from a trial's start to its first step; what orchestration.py holds the runner to
LIMITS = {"workers": 500, "busy": 0.95, "driver_share": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help="one cell alone, written into the others' table")
    parser.add_argument("--trials", type=int)
    asked = parser.parse_args()
    cells = [cell for cell in CELLS if asked.workers in (None, cell[0])]
    path = RESULTS / "simulate_scale.json"
    old = json.loads(path.read_text())["cells"] if path.exists() and asked.workers else []
    done = [cell for cell in old if cell["workers"] != asked.workers]
    for workers, trials in cells:
        done.append(simulate(workers, asked.trials or trials))
        print(json.dumps(done[-1]))
    model = {"full_seconds": FULL_SECONDS, "spread": SPREAD, "gap_seconds": GAP_SECONDS, "limits": LIMITS}
    write("simulate_scale", provenance(0) | model | {"cells": sorted(done, key=lambda cell: cell["workers"])})
    judged = [cell for cell in done if cell["workers"] == LIMITS["workers"]]
    if any(c["busy"] < LIMITS["busy"] or c["driver_share"] > LIMITS["driver_share"] for c in judged):
        raise SystemExit(f"missed: {LIMITS}")


def simulate(workers: int, trials: int) -> dict[str, Any]:
    """One search of so many trials on so many workers."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = curves.settings((f"trials={trials}",))
    recorded = [c for c in curves.load(curves.FILE) if c.failure is None and c.seed == curves.POOL_SEED]
    nearest = curves.Nearest(recorded)
    rng = np.random.default_rng(0)

    def steps(suggestion: dict[str, Any]) -> replay.Steps:
        training = suggestion["train"]
        params = training["schedule"] | {name: training[name] for name in ("learning_rate", "dropout")}
        place = nearest(params)
        assert place is not None
        full = FULL_SECONDS * rng.lognormal(0, SPREAD)
        scored = [epoch for epoch in recorded[place].epochs if epoch["frechet"] is not None]
        return [
            (
                full * epoch["epoch"] / curves.EPOCHS,
                {"epoch": epoch["epoch"], "rung": True, "worker_seconds": full * epoch["epoch"] / curves.EPOCHS}
                | {name: epoch[name] * rng.lognormal(0, SPREAD) for name in ("frechet", "score", "grid_loss")},
            )
            for epoch in scored
        ]

    began_with = peak_memory_mib()
    with (
        tempfile.TemporaryDirectory(prefix="simulate-scale-") as folder,
        Path(folder, "log").open("w") as log,
    ):
        records = Records(Storage(folder))
        journal = optuna.storages.JournalStorage(JournalFileBackend(f"{folder}/study.journal"))
        rungs, epochs = config.rung_epochs(), config.train.epochs
        view = SearchView(Console(file=log), records, "frechet", epochs, trials)
        done = replay.run(
            HonestOptunaSearch(config, "frechet", records, journal),
            RungScheduler(config.early_stopping, "frechet", rungs, epochs, records),
            steps,
            workers,
            trials,
            gap_seconds=GAP_SECONDS,
            driver_counts=True,
            changed=view.changed,
        )
        records.flush()  # or it is written while the folder is being removed
        states = [row.state for row in records]
    suggestions = np.array(done.driver["suggest"])
    tenths = [1e3 * float(part.mean()) for part in np.array_split(suggestions, 10)]
    in_all = done.driver_seconds
    return {
        "workers": workers,
        "trials": len(done.trials),
        "states": {state: states.count(state) for state in sorted(set(states))},
        "simulated_hours": done.seconds / 3600,
        "busy": done.busy_until_spent,
        "driver_share": done.driver_share_until_spent,
        "driver_ms_an_event": 1e3 * in_all / sum(len(done.driver[call]) for call in ("suggest", "result")),
        "driver_seconds": {call: sum(taken) for call, taken in done.driver.items()},
        "suggestion_ms_by_tenth_of_the_search": tenths,
        "suggestion_share_of_driver": float(suggestions.sum()) / in_all,
        "memory_mib": peak_memory_mib() - began_with,
    }


if __name__ == "__main__":
    main()
