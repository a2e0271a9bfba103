"""A search of many short trials, of which something random is killed every 20 s for 15 minutes: what is lost?

    python -m benchmarks.soak [--minutes 15] [--every 20]

Killed are a training's worker, a trial's own process, or the driver with its whole local Ray, which is then resumed.
Then the search comes to its own end, its budget spent. Fails where it does not, where a trial is left open, lacks a
rung or its checkpoint, or failed though it was started again three times at most; where it trained more epochs twice
than it met kills, or keeps more than 3 checkpoints; where the driver's memory grows by more than 1 MiB a trial (of ten
or more), or a process is left.
"""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmarks.common import provenance, write
from search.records import ENDED, OPEN, Records, Row
from trainer import checkpoint
from trainer.storage import Storage

EPOCHS, RUNGS = 4, [1, 2, 4]
SETTINGS = (
    "runner=train", "trials=100000", f"train.epochs={EPOCHS}", "train.checkpoint_seconds=0.01",
    "train.data.labels=false",
    "early_stopping.scheduler=none", "early_stopping.rungs=[0.25, 0.5]", "train.data.subset=160",
    "train.model.channels=[8, 16]", "train.model.attention=[false, true]", "train.model.attention_head_dim=8",
    "train.model.norm_groups=4",
)  # fmt: skip
STARTED_AGAIN = 3  # times, a trial's own process
VICTIMS = ("ray::RayTrainWorker", "ray::ImplicitFunc", "driver")


def start(run: Path, log: Path, minutes: float) -> psutil.Popen:
    command = [sys.executable, "-m", "search.cli"]
    if (run / "config.yaml").exists():
        command += ["resume", str(run)]
    else:
        command += ["run", "digits", "--name", run.name, "--storage", str(run.parent)]
        settings = (*SETTINGS, f"budget.hours={minutes / 60}", "budget.reserve=0")
        command += [part for setting in settings for part in ("--set", setting)]
    with log.open("a") as out:
        return psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def ray_of(driver: psutil.Popen) -> list[psutil.Process]:
    """The processes of the driver's local Ray."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return driver.children(recursive=True)
    return []


def kill(driver: psutil.Popen, victim: str, chance: random.Random) -> bool:
    """Whether there was such a process."""
    if victim == "driver":
        end([*ray_of(driver), driver])
        driver.wait()
        return True
    found = []
    for process in ray_of(driver):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] * (victim in " ".join(process.cmdline()))
    end(found and [chance.choice(found)])
    return bool(found)


def growth(memory: Sequence[tuple[int, int, float]]) -> list[dict[str, float]]:
    """Of each life of the driver, from samples (life, trials ended, its MiB): what it grew by after its first trial."""
    lives = []
    for _, samples in groupby(memory, key=lambda sample: sample[0]):
        of_life = list(samples)
        later = [sample for sample in of_life if sample[1] > of_life[0][1]] or of_life[-1:]
        lives.append({"trials": later[-1][1] - later[0][1], "mib": later[0][2], "grown": later[-1][2] - later[0][2]})
    return lives


def trained(run: Storage) -> dict[str, list[int]]:
    """trial → epochs as its workers logged them; one that was trained twice is there twice."""
    done: dict[str, list[int]] = {}
    for trial in run.names("tensorboard"):
        for file in Path(run.root, "tensorboard", trial).glob("*tfevents*"):
            for event in EventFileLoader(str(file)).Load():
                if any(value.tag == "train/loss" for value in event.summary.value):
                    done.setdefault(trial, []).append(event.step)
    return done


class Soak:
    """One search: what was killed of it, what it met, and how it ended."""

    def __init__(self, run: Path, log: Path, minutes: float, every: float, seed: int):
        self.run, self.log, self.minutes, self.every, self.chance = run, log, minutes, every, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.met: Counter[str] = Counter()  # by trial, the kills while it ran
        self.memory: list[tuple[int, int, float]] = []
        self.ended = "it did not end within ten minutes of its budget"
        self.left: list[str] = []

    def victim(self) -> str:
        return self.chance.choices(VICTIMS, weights=(4, 4, 1))[0]

    def go(self) -> None:
        driver = start(self.run, self.log, self.minutes)
        own: set[psutil.Process] = set()
        over = time.monotonic() + self.minutes * 60
        victim, following = self.victim(), time.monotonic() + self.every
        try:
            while time.monotonic() < over + 600:
                time.sleep(1)
                own.update(ray_of(driver))
                if driver.poll() is not None:
                    early = "before its budget was spent, " if time.monotonic() < over else ""
                    self.ended = f"{early}exit status {driver.returncode}"
                    break
                rows = list(Records.load(Storage(self.run)))
                if any(row.state in OPEN for row in rows):  # what comes after the search is no growth
                    with contextlib.suppress(psutil.NoSuchProcess):
                        size = driver.memory_info().rss / 2**20
                        self.memory.append((self.kills["driver"], sum(row.state in ENDED for row in rows), size))
                # It waits for its victim: another one would be a driver that has begun nothing, again and again.
                if following < time.monotonic() < over and kill(driver, victim, self.chance):
                    self.kills[victim] += 1
                    self.met.update(row.trial for row in rows if row.state == "running")
                    if victim == "driver":
                        driver = start(self.run, self.log, self.minutes)
                    victim, following = self.victim(), time.monotonic() + self.every
            _, alive = psutil.wait_procs(own, timeout=20)
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.left.append(" ".join(process.cmdline())[:80])
        finally:
            end([*own, driver])

    def is_whole(self, place: Storage, row: Row) -> bool:
        """Whether a trial that ended has every rung up to its last epoch, and the checkpoint of that."""
        if row.state == "failed":
            return self.met[row.trial] > STARTED_AGAIN
        if row.state not in ENDED:
            return True
        if [rung["epoch"] for rung in row.rungs] != [epoch for epoch in RUNGS if epoch <= row.epoch]:
            return False
        if row.state == "completed" and row.epoch != EPOCHS:
            return False
        try:
            return not row.rungs or checkpoint.load(place.at(str(row.checkpoint))).meta["epoch"] == row.epoch
        except checkpoint.BrokenCheckpointError:
            return False

    def result(self) -> tuple[dict[str, Any], dict[str, bool]]:
        """What came of it, and what of that is wrong."""
        place = Storage(self.run)
        rows = list(Records.load(place))
        states = Counter(row.state for row in rows)
        broken = [row.trial for row in rows if not self.is_whole(place, row)]
        twice = {trial: len(done) - len(set(done)) for trial, done in trained(place).items()}
        kept = [len(checkpoint.names(place.at("train", trial))) for trial in place.names("train")]
        lives = growth(self.memory)
        grown, over = (sum(life[what] for life in lives) for what in ("grown", "trials"))
        result = {
            "minutes": self.minutes,
            "ended": self.ended,
            "kills": dict(self.kills),
            "trials": dict(states),
            "broken_trials": broken,
            "epochs_trained_twice": sum(twice.values()),
            "driver_mib": {
                "largest": max((size for *_, size in self.memory), default=0.0),
                "grown": grown,
                "over_trials": over,
                "lives": lives,
            },
            "most_checkpoints_kept_of_a_trial": max(kept, default=0),
            "processes_left": self.left,
        }
        return result, {
            "it did not end by itself": self.ended != "exit status 0",
            "failed or broken trials": bool(broken),
            "trials left open": any(states[state] for state in OPEN),
            "more than an epoch a kill twice": any(count > self.met[trial] for trial, count in twice.items()),
            "memory grows": over >= 10 and grown > over,
            "checkpoints pile up": max(kept, default=0) > 3,
            "processes left": bool(self.left),
            "no trial completed": not states["completed"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder, "soak"), Path(folder, "log"), options.minutes, options.every, options.seed)
        try:
            soak.go()
        finally:
            result, wrong = soak.result()
            missed = [name for name, is_so in wrong.items() if is_so]
            write("soak", provenance(options.seed) | result | {"missed": missed})
        if missed:
            raise SystemExit(f"missed: {', '.join(missed)}; the search said last:\n{soak.log.read_text()[-3000:]}")


if __name__ == "__main__":
    main()
