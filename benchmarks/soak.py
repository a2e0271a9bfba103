"""A search of many short trials, of which something random is killed every 20 s for 15 minutes: what is lost?

    python -m benchmarks.soak [--minutes 15] [--every 20]

Killed are a training's worker, a trial's own process, or the driver with its whole local Ray, which is then resumed.
Fails where a finished trial lacks a rung or its checkpoint, where more than an epoch a kill was trained twice, where
the driver's memory grows by more than 1 MiB a trial, or where more than 3 checkpoints of a trial are kept.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmarks.common import provenance, write
from search.records import Records
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
VICTIMS = ("ray::RayTrainWorker", "ray::ImplicitFunc", "driver")


def start(run: Path, log: Path) -> psutil.Popen:
    command = [sys.executable, "-m", "search.cli"]
    if (run / "config.yaml").exists():
        command += ["resume", str(run)]
    else:
        command += ["run", "digits", "--name", run.name, "--storage", str(run.parent)]
        command += [part for setting in SETTINGS for part in ("--set", setting)]
    with log.open("a") as out:
        return psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def kill(driver: psutil.Popen, victim: str) -> bool:
    """Whether there was such a process."""
    if victim == "driver":
        for process in (driver, *driver.children(recursive=True)):
            process.kill()
        driver.wait()
        return True
    for process in driver.children(recursive=True):
        if victim in " ".join(process.cmdline()):
            process.kill()
            return True
    return False


def trained(run: Storage) -> dict[str, list[int]]:
    """trial → epochs as its workers logged them; one that was trained twice is there twice."""
    done: dict[str, list[int]] = {}
    for trial in run.names("tensorboard"):
        for file in Path(run.root, "tensorboard", trial).glob("*tfevents*"):
            for event in EventFileLoader(str(file)).Load():
                if any(value.tag == "train/loss" for value in event.summary.value):
                    done.setdefault(trial, []).append(event.step)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kills: Counter[str] = Counter()
    memory: list[tuple[int, int, float]] = []  # life of the driver, trials in it, MiB

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        run, log = Path(folder, "soak"), Path(folder, "log")
        driver = start(run, log)
        end, following = time.monotonic() + options.minutes * 60, time.monotonic() + options.every
        while time.monotonic() < end:
            time.sleep(1)
            if driver.poll() is not None:
                raise SystemExit(f"the search ended by itself with {driver.returncode}:\n{log.read_text()[-3000:]}")
            ended = sum(row.state != "running" for row in Records.load(Storage(run)))
            memory.append((kills["driver"], ended, driver.memory_info().rss / 2**20))
            if time.monotonic() > following:
                victim = chance.choices(VICTIMS, weights=(4, 4, 1))[0]
                try:
                    kills[victim] += kill(driver, victim)
                except psutil.NoSuchProcess:
                    continue  # it ended by itself meanwhile
                if victim == "driver":
                    driver = start(run, log)
                following = time.monotonic() + options.every
        driver.send_signal(signal.SIGINT)
        driver.wait(120)

        place = Storage(run)
        rows = list(Records.load(place))
        states = Counter(row.state for row in rows)
        broken, epochs = [], trained(place)
        for row in rows:
            if row.state == "completed":
                whole = checkpoint.load(place.at(str(row.checkpoint))).meta["epoch"] == EPOCHS
                if not whole or [rung["epoch"] for rung in row.rungs] != RUNGS:
                    broken.append(row.trial)
        twice = sum(count - 1 for done in epochs.values() for count in Counter(done).values())
        at_once = psutil.cpu_count()
        kept = {trial: len(checkpoint.names(place.at("train", trial))) for trial in place.names("train")}

    growth = []
    for life in sorted({life for life, _, _ in memory}):
        own = [(ended, size) for number, ended, size in memory if number == life][10:]  # the start is no growth
        if len(own) > 1 and own[-1][0] > own[0][0]:
            growth.append((own[-1][1] - own[0][1]) / (own[-1][0] - own[0][0]))
    result = {
        **provenance(options.seed),
        "minutes": options.minutes,
        "kills": dict(kills),
        "trials": dict(states),
        "broken_trials": broken,
        "epochs_trained_twice": twice,
        "driver_mib": {"largest": max(size for *_, size in memory), "growth_a_trial": max(growth, default=0.0)},
        "most_checkpoints_kept_of_a_trial": max(kept.values(), default=0),
    }
    write("soak", result)
    wrong = {
        "failed or broken trials": bool(broken) or states["failed"] > 0,
        "more than an epoch a kill and trial twice": twice > sum(kills.values()) * at_once,
        "memory grows": max(growth, default=0.0) > 1.0,
        "checkpoints pile up": max(kept.values(), default=0) > 3,
        "no trial ended": not states["completed"],
    }
    if any(wrong.values()):
        raise SystemExit("missed: " + ", ".join(name for name, is_so in wrong.items() if is_so))


if __name__ == "__main__":
    main()
