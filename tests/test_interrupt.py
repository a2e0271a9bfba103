"""The first signal is noted and said, or raised; the second is raised."""

import os
import signal

import pytest

from search.interrupt import Interrupt

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_a_first_signal_is_noted_where_it_is_awaited_and_a_second_ends(number, capsys):
    with Interrupt().handled() as interrupt, interrupt.awaited():
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert capsys.readouterr().err.count("Stopping") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert capsys.readouterr().err == ""


@SIGNALS
def test_elsewhere_the_first_signal_ends(number, capsys):
    interrupt = Interrupt()
    with interrupt.handled():
        with interrupt.awaited():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert "Stopping" in capsys.readouterr().err


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt().handled():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
