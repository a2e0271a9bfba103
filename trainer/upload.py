"""Storing checkpoints while training goes on."""

import threading
from collections.abc import Callable
from typing import Any, Self

from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.storage import Storage

KEPT_CHECKPOINTS = 2  # the one before is what is left where the newest is damaged


class Uploader:
    """A thread that stores one checkpoint at a time, and deletes those that are no longer wanted.

    Its errors are raised where the training meets it next: at `start`, at `finish` and at the end of the with block,
    which waits for what is being stored however it ends, unless by KeyboardInterrupt or SystemExit.
    """

    def __init__(self, checkpoints: Storage) -> None:
        self.checkpoints = checkpoints
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._then: Callable[[], None] = lambda: None

    def ready(self) -> bool:
        """Whether `start` would not have to wait."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, taken: Checkpoint, then: Callable[[Storage], None]) -> None:
        """Stores a checkpoint; then(its folder) is called on this thread, by the next `start` or `finish`."""
        self.finish()
        name = checkpoint.name_of(taken.meta["step"])

        def store() -> None:
            try:
                checkpoint.save(self.checkpoints.at(name), taken.state, taken.meta)
                self._delete_older_than(name, taken.config)
            except BaseException as error:
                self._error = error

        self._then = lambda: then(self.checkpoints.at(name))
        # A daemon: a second Ctrl-C ends the process at once, and a checkpoint that is cut is none.
        self._thread = threading.Thread(target=store, daemon=True, name="checkpoint")
        self._thread.start()

    def _delete_older_than(self, newest: str, config: TrainConfig) -> None:
        """Two stay, and the last two rungs': the trials table names the one before until it is told of the last.

        Those that were cut short count as none, and so do those of another configuration: a training that goes on
        passes over them.
        """
        names = [name for name in checkpoint.names(self.checkpoints) if name <= newest]
        described = {name: self._meta(name) for name in names}
        own = [name for name in names if checkpoint.is_of(described[name], config)]
        rungs = [name for name in own if described[name].get("metrics", {}).get("rung")]
        for name in set(names) - set(own[-KEPT_CHECKPOINTS:]) - set(rungs[-2:]):
            self.checkpoints.delete(name)

    def _meta(self, name: str) -> dict[str, Any]:
        """What checkpoint.json says; nothing where it is broken."""
        try:
            meta = self.checkpoints.read_json(f"{name}/checkpoint.json")
        except (FileNotFoundError, ValueError):
            return {}
        return meta if isinstance(meta, dict) else {}

    def finish(self) -> None:
        """Waits for what is being stored. Raises its error."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        self._then()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self.finish()
