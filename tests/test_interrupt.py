"""The first signal is noted and said, or raised; the second is raised."""

import os
import shlex
import signal

import pytest

from search import cli, pipeline
from search.config_file import load
from search.interrupt import Interrupt
from trainer.storage import Storage

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


@pytest.mark.parametrize(("address", "cluster"), [("local", []), ("10.0.0.1:6379", ["--address", "10.0.0.1:6379"])])
@pytest.mark.parametrize("folder", ["runs/my run", "runs/$HOME;ls"])
def test_the_line_to_go_on_is_the_command_as_a_shell_reads_it(monkeypatch, capsys, tmp_path, address, cluster, folder):
    def interrupted(*whatever: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "go", interrupted)
    run = Storage(tmp_path / folder)
    with pytest.raises(SystemExit, match="130"):
        cli._go(load("digits", []), run, None, address)
    line = capsys.readouterr().err.strip().partition("Go on with: ")[2]
    assert shlex.split(line) == ["ddpm-search", "resume", run.uri, *cluster]
