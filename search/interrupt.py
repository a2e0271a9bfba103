"""Ctrl-C and SIGTERM: the first says at once that the work is ending, the second ends it there and then."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from types import FrameType


def resume_command(uri: str, address: str | None = None) -> str:
    """The command for a shell that goes on with a run where it was cut, on the same cluster."""
    cluster = () if address in (None, "local") else ("--address", str(address))
    return shlex.join(("ddpm-search", "resume", uri, *cluster))


class Interrupt:
    """Raises KeyboardInterrupt at the first signal; within `awaited`, only notes it for the work to see."""

    def __init__(self) -> None:
        self.requested = False
        self._awaited = False

    @contextlib.contextmanager
    def handled(self) -> Iterator["Interrupt"]:
        """Takes the signals for the length of a with block, in the main thread; after ray.init, which takes them."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within this the work looks at `requested` itself, and ends between two steps."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if not again:
            print("\nStopping; what is finished is kept. Once more to end at once.", file=sys.stderr, flush=True)
        if again or not self._awaited:
            raise KeyboardInterrupt
