"""One driver a run: a lease with a heartbeat in the run's folder. Best effort where two start in the same moment."""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from search.config import UserError
from trainer.storage import Storage

FILE = "lease.json"
BEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0
CLOCK_SECONDS = 5.0  # a process's start is reckoned by the clock, which may be set meanwhile


class TakenError(UserError):
    """Another living driver has the run."""


@contextlib.contextmanager
def held(run: Storage) -> Iterator[None]:
    """Holds the run for the length of a with block. Raises TakenError where another living driver has it.

    A driver on this machine lives while its process does, a stopped one too; one elsewhere, while its heartbeat is
    younger than a minute. One that finds its run taken over, when it goes on, ends there and then (status 1): what it
    would still write is older than what the other has written. Its local Ray ends with it.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    mine |= {"began": psutil.Process().create_time(), "pids": _pid_namespace()}
    other = _read(run)
    if other and _lives(other):
        raise TakenError(f"{_worked_on(run, other)}; watch it with: ddpm-search status {run.uri}")
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a storage that is away for a while is no reason to end a search
                found = _read(run)
                if found is None and not run.exists(FILE):
                    lost = f"{run.uri} was taken over, and given back, while this process slept"
                elif found and found["token"] != mine["token"]:
                    lost = f"{_worked_on(run, found)} by now"
                else:
                    lost = None
                if lost:
                    shown = "\x1b[?25h" * sys.stderr.isatty()  # the cursor, which a progress bar hides
                    print(f"{shown}\n{lost}: this process ends", file=sys.stderr, flush=True)
                    os._exit(1)
                run.write_json(FILE, mine | {"beat": time.time()})

    run.write_json(FILE, mine | {"beat": time.time()})
    thread = threading.Thread(target=beat, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if (_read(run) or {}).get("token") == mine["token"]:
            run.delete(FILE)


def _worked_on(run: Storage, lease: dict[str, Any]) -> str:
    return f"{run.uri} is being worked on by process {lease['pid']} on {lease['host']}"


def _read(run: Storage) -> dict[str, Any] | None:
    try:
        found = run.read_json(FILE)
    except (FileNotFoundError, ValueError):  # no JSON, or no text at all
        return None
    return found if isinstance(found, dict) and {"host", "pid", "token", "beat"} <= found.keys() else None


def _lives(lease: dict[str, Any]) -> bool:
    if (lease["host"], lease.get("pids")) != (socket.gethostname(), _pid_namespace()):
        return time.time() - lease["beat"] < DEAD_AFTER_SECONDS
    try:
        process = psutil.Process(lease["pid"])
        # After a restart of the machine the number may be another process's.
        same = abs(process.create_time() - lease["began"]) < CLOCK_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _pid_namespace() -> str:
    """Where a process's number means anything: machines and containers may share a host name.

    Of machines the first namespace has one name everywhere, so the boot's own number is part of it.
    """
    namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    return f"{namespace.readlink()} {boot.read_text().strip()}" if namespace.is_symlink() and boot.exists() else ""
