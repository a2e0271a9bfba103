"""How much of a cluster's time goes into training: the same search by each runner, on two cores.

    python -m benchmarks.orchestration [train reuse reuse-asha plain]

24 trials of the digits demo (12 by worker groups), as long as take about 10 s each. When a trial's first step was and
when its last scoring ended is read from its TensorBoard events, its seconds of training and scoring from the trials
table. `plain` is the limit: the same trainings one after the other in two processes without Ray, three each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import tables
from benchmarks.common import RESULTS, provenance, write
from evaluation import reference
from search import config_file
from search.records import Records, Row
from trainer import data, local
from trainer.data_cache import cache_folder
from trainer.storage import Storage

TRIALS, EPOCHS, AT_ONCE = 24, 9, 2
SETTINGS = [f"trials={TRIALS}", f"train.epochs={EPOCHS}", "final.top=1", "final.images=100", "final.split_size=100"]
SETTINGS += ["early_stopping.rungs=[0.23, 0.45]"]  # not the first epoch: its event would be logged after its scoring
NONE = ["early_stopping.scheduler=none"]
RUNNERS = {
    "train": ["runner=train", *NONE, f"trials={TRIALS // 2}"],  # a worker group takes long to start
    "reuse": ["runner=reuse", *NONE],
    "reuse-asha": ["runner=reuse"],  # most trials are stopped before their end
}
LIMITS = {"median_gap_seconds": 1.0, "busy": 0.85, "first_step_seconds": 25.0}  # of `runner: reuse`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runners", nargs="*", default=[*RUNNERS, "plain"], help="all, where none is named")
    asked = parser.parse_args().runners
    path = RESULTS / "orchestration.json"
    results = json.loads(path.read_text())["runners"] if path.exists() and len(asked) <= len(RUNNERS) else {}
    for name in asked:
        results[name] = plain() if name == "plain" else search(RUNNERS[name])
        print(name, json.dumps(results[name]), flush=True)
        found = provenance(0) | {"trials": TRIALS, "limits": LIMITS, "runners": results}
        write("orchestration", found)
    if missed := tables.aims_missed(found):
        raise SystemExit("missed by reuse: " + ", ".join(missed))


def search(settings: list[str]) -> dict[str, Any]:
    """One search by the command, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
        overrides = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        command = (sys.executable, "-m", "search.cli", "run", "digits", "--name", "run", "--storage", folder)
        began = time.time()
        with (
            Path(folder, "out").open("w") as out,
            subprocess.Popen((*command, *overrides), stdout=out, stderr=out) as process,
        ):
            samples = _Samples(process.pid)
            process.wait()
            samples.stop()
        if process.returncode:
            raise SystemExit(Path(folder, "out").read_text())
        run = Storage(f"{folder}/run")
        rows = [row for row in Records.load(run) if row.rungs]
        spans = sorted(_span(run, row) for row in rows)
    first, last = spans[0][0], max(end for _, end in spans)
    gaps = _gaps(spans)
    trained = sum(row.worker_seconds for row in rows)
    return {
        "trials": len(rows),
        "stopped": sum(row.state == "stopped" for row in rows),
        "first_step_seconds": first - began,
        "seconds": last - first,
        "training_seconds_a_trial": trained / len(rows),
        "busy": trained / (AT_ONCE * (last - first)),
        "median_gap_seconds": float(np.median(gaps)),
        "largest_gap_seconds": float(np.max(gaps)),
        **samples.between(first, last),
    }


def _span(run: Storage, row: Row) -> tuple[float, float]:
    """When its first step began and when its last epoch, scoring and all, was logged. Seconds since 1970."""
    events = EventAccumulator(f"{run.root}/tensorboard/{row.trial}").Reload()
    seconds, losses = events.Scalars("speed/epoch_seconds"), events.Scalars("train/loss")
    assert seconds[0].step == 1
    return losses[0].wall_time - seconds[0].value, losses[-1].wall_time


def _gaps(spans: list[tuple[float, float]]) -> list[float]:
    """From each trial's first step back to the end of the one whose core it took: the one that was free the longest."""
    free, gaps = [end for _, end in spans[:AT_ONCE]], []
    for start, end in spans[AT_ONCE:]:
        free.sort()
        gaps.append(start - free[0])
        free[0] = end
    return gaps


class _Samples:
    """CPU seconds and memory of a process, and memory of all it started, twice a second."""

    def __init__(self, pid: int):
        self.root = psutil.Process(pid)
        self.taken: list[tuple[float, float, int, int, int]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            try:
                cpu, own = self.root.cpu_times(), self.root.memory_info().rss
                below = self.root.children(recursive=True)
            except psutil.NoSuchProcess:
                return
            in_all = own
            for process in below:
                try:
                    memory = process.memory_info()
                    in_all += memory.rss - memory.shared
                except psutil.NoSuchProcess:
                    continue
            self.taken.append((time.time(), cpu.user + cpu.system, own, in_all, len(below)))

    def between(self, first: float, last: float) -> dict[str, float]:
        taken = [sample for sample in self.taken if first <= sample[0] <= last]
        return {
            "driver_cpu_seconds": taken[-1][1] - taken[0][1],
            "driver_memory_mib": max(sample[2] for sample in taken) / 2**20,
            # of a driver that has seen a third of the trials, by the other two thirds
            "driver_memory_grown_mib": (taken[-1][2] - taken[len(taken) // 3][2]) / 2**20,
            "memory_of_all_processes_mib": max(sample[3] for sample in taken) / 2**20,
            "processes": max(sample[4] for sample in taken),
        }


def plain() -> dict[str, Any]:
    """The limit: seconds of a training in each of two processes that do nothing else."""
    with ProcessPoolExecutor(AT_ONCE) as pool:
        seconds = [one for process in pool.map(_train, range(AT_ONCE)) for one in process]
    return {"training_seconds_a_trial": float(np.mean(seconds)), "seconds": float(np.mean(seconds)) * TRIALS / AT_ONCE}


def _train(process: int) -> list[float]:
    os.nice(15)  # as Ray's workers are
    torch.set_num_threads(1)
    search = config_file.load("digits", [*SETTINGS])
    splits = data.load(search.train.data)
    judge = reference.prepare(splits, search.final, cache_folder(), "cpu", lambda what: None)
    settings = search.early_stopping
    scorer = reference.rung_scorer(splits, judge, settings.images, settings.sampler, "frechet")
    taken: list[float] = []
    for index in range(3):
        with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
            at = Storage(folder)
            local.fit(
                search.train.model_copy(update={"seed": index}),
                splits.train,
                at.at("train"),
                at.at("tensorboard"),
                torch.device("cpu"),
                lambda metrics, checkpoint: (
                    taken.append(metrics["worker_seconds"]) if metrics["epoch"] == EPOCHS else None
                ),
                score=scorer,
                rungs=search.rung_epochs(),
            )
    return taken


if __name__ == "__main__":
    main()
