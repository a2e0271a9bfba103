"""One driver a run: a lease with a heartbeat in the run's folder. Best effort where two start in the same moment."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from search.config import UserError
from trainer.storage import Storage

FILE = "lease.json"
BEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0


@contextlib.contextmanager
def held(run: Storage) -> Iterator[None]:
    """Holds the run for the length of a with block. Raises UserError where another living driver has it.

    A driver on this machine lives while its process does; one elsewhere, while its heartbeat is younger than a minute.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    other = _read(run)
    if other and _lives(other):
        raise UserError(
            f"{run.uri} is being worked on by process {other['pid']} on {other['host']}; "
            f"watch it with: ddpm-search status {run.uri}"
        )
    over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError):  # a storage that is away for a while is no reason to end a search
                run.write_json(FILE, mine | {"beat": time.time()})
            if over.wait(BEAT_SECONDS):
                return

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


def _read(run: Storage) -> dict[str, Any] | None:
    try:
        found = run.read_json(FILE)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "token", "beat"} <= found.keys() else None


def _lives(lease: dict[str, Any]) -> bool:
    if lease["host"] != socket.gethostname():
        return time.time() - lease["beat"] < DEAD_AFTER_SECONDS
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # After a restart of the machine the number may be another process's, which does not beat.
    return time.time() - lease["beat"] < DEAD_AFTER_SECONDS
