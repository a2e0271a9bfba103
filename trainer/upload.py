"""Storing checkpoints while training goes on."""

import threading
from collections.abc import Callable
from typing import Self


class Uploader:
    """One thread that stores one thing at a time, in order.

    Errors of the thread are raised where the training meets it next: at `start`, at `finish` and at the end of the with
    block, which waits for what is being stored however it ends, unless by KeyboardInterrupt or SystemExit.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._then: Callable[[], None] = lambda: None

    def ready(self) -> bool:
        """Whether `start` would not have to wait."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, store: Callable[[], None], then: Callable[[], None]) -> None:
        """Calls store() on the thread; then() is called on this one, by the next `start` or `finish`."""
        self.finish()

        def run() -> None:
            try:
                store()
            except BaseException as error:
                self._error = error

        self._then = then
        # A daemon: the second Ctrl-C ends the process at once, and a checkpoint that is cut is none.
        self._thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self._thread.start()

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
