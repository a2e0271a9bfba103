"""A run has one driver; a dead one's run can be taken over."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cluster import connect
from cluster.capacity import Capacity
from search import lease, pipeline
from search.config import UserError
from search.config_file import load
from trainer.storage import Storage

HOLD = """
import sys, time
from search import lease
from trainer.storage import Storage
lease.BEAT_SECONDS = 0.3
with lease.held(Storage(sys.argv[1])):
    print("held", flush=True)
    try:
        time.sleep(60)
    finally:
        Storage(sys.argv[1]).write("written at the end", b"")
"""


@pytest.fixture
def driver(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run in tmp_path."""
    command = (sys.executable, "-c", HOLD, str(tmp_path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def stop_between_beats(run: Storage, driver: subprocess.Popen[str]) -> None:
    """Just after one: amid the next it would have read the lease, and write it when it goes on."""
    before = run.read_json(lease.FILE)
    while run.read_json(lease.FILE) == before:
        time.sleep(0.001)
    os.kill(driver.pid, signal.SIGSTOP)


def silent_since(run: Storage, seconds: float, **changes: object) -> None:
    run.write_json(lease.FILE, run.read_json(lease.FILE) | {"beat": time.time() - seconds} | changes)


def test_a_second_driver_is_refused_and_a_dead_ones_run_is_taken_over(tmp_path, driver):
    run = Storage(tmp_path)
    with pytest.raises(UserError, match=f"process {driver.pid} .* ddpm-search status"), lease.held(run):
        pass
    assert run.read_json(lease.FILE)["pid"] == driver.pid
    os.kill(driver.pid, signal.SIGKILL)
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked yet how it ended
    with lease.held(run):
        assert run.read_json(lease.FILE)["pid"] == os.getpid()
    assert not run.exists(lease.FILE)


def test_a_stopped_driver_on_this_machine_keeps_its_run_however_long_its_heart_stood_still(tmp_path, driver):
    run = Storage(tmp_path)
    os.kill(driver.pid, signal.SIGSTOP)
    silent_since(run, 3600)
    with pytest.raises(UserError, match=f"process {driver.pid} "), lease.held(run):
        pass


@pytest.mark.parametrize("change", [{"began": 1e9}, {"pids": "pid:[1]"}])
def test_another_process_of_that_number_is_not_the_driver(tmp_path, driver, change):
    """After a restart of the machine; or in another container, of the same host name."""
    run = Storage(tmp_path)
    os.kill(driver.pid, signal.SIGSTOP)
    silent_since(run, 3600, **change)
    with lease.held(run):
        assert run.read_json(lease.FILE)["pid"] == os.getpid()


def test_a_driver_that_wakes_up_when_another_has_its_run_ends_and_lets_the_lease_be(tmp_path, driver):
    run = Storage(tmp_path)
    stop_between_beats(run, driver)
    theirs = {"host": "elsewhere", "pid": 7, "token": "t", "beat": time.time()}
    run.write_json(lease.FILE, theirs)
    os.kill(driver.pid, signal.SIGCONT)
    _, said = driver.communicate(timeout=30)
    assert driver.returncode == 1
    assert "is being worked on by process 7 on elsewhere" in said
    assert run.read_json(lease.FILE) == theirs
    assert run.names() == [lease.FILE]


def test_a_driver_that_wakes_up_when_another_has_finished_its_run_writes_no_lease_and_ends(tmp_path, driver):
    """It would go on with a table of before, and write that over what the other finished."""
    run = Storage(tmp_path)
    stop_between_beats(run, driver)
    run.delete(lease.FILE)
    os.kill(driver.pid, signal.SIGCONT)
    _, said = driver.communicate(timeout=30)
    assert driver.returncode == 1
    assert "was taken over, and given back" in said
    assert not run.exists(lease.FILE)


@pytest.mark.parametrize(("age", "refused"), [(5, True), (600, False)])
def test_a_driver_on_another_machine_lives_while_its_heart_beats(tmp_path, age, refused):
    run = Storage(tmp_path)
    run.write_json(lease.FILE, {"host": "elsewhere", "pid": 1, "token": "t", "beat": time.time() - age})
    if refused:
        with pytest.raises(UserError, match="on elsewhere"), lease.held(run):
            pass
    else:
        with lease.held(run):
            pass


def test_a_driver_of_this_host_name_and_another_boot_is_on_another_machine(tmp_path):
    """Many machines are called localhost, and the first namespace of process numbers has one name on all of them."""
    run = Storage(tmp_path)
    with lease.held(run):
        mine = run.read_json(lease.FILE)
    theirs = mine | {"pid": 2**22 - 1, "beat": time.time(), "pids": mine["pids"].replace("-", "+")}
    run.write_json(lease.FILE, theirs)
    with pytest.raises(UserError, match="is being worked on"), lease.held(run):
        pass


@pytest.mark.parametrize("damaged", [b"{", b"\xffabc"])
def test_a_damaged_lease_keeps_nobody_out(tmp_path, damaged):
    Storage(tmp_path).write(lease.FILE, damaged)
    with lease.held(Storage(tmp_path)):
        assert Storage(tmp_path).read_json(lease.FILE)["pid"] == os.getpid()


def test_an_error_gives_the_lease_back(tmp_path):
    with pytest.raises(ZeroDivisionError), lease.held(Storage(tmp_path)):
        raise ZeroDivisionError
    assert not Storage(tmp_path).exists(lease.FILE)


def test_the_report_that_evaluate_writes_is_written_under_the_lease_and_a_full_disk_there_is_said(
    tmp_path, monkeypatch
):
    run, taken = Storage(tmp_path / "mine"), []

    def finish(*_) -> None:
        taken.append(run.exists(lease.FILE))
        raise OSError(errno.ENOSPC, "No space left on device")

    local = connect.Connection(dashboard="", local=True)
    monkeypatch.setattr(pipeline.connect, "connected", lambda _: contextlib.nullcontext(local))
    monkeypatch.setattr(pipeline, "_with_room", lambda *_: Capacity(()))
    monkeypatch.setattr(pipeline.began, "check_images", lambda *_: None)
    monkeypatch.setattr(pipeline, "_prepare", lambda config, *_, **__: (config, object(), None, None))
    monkeypatch.setattr(pipeline, "evaluate", lambda *_: None)
    monkeypatch.setattr(pipeline, "finish", finish)
    config = load("digits")
    with pytest.raises(UserError, match="no room is left"):
        pipeline.evaluate_again(config, config.final, run, None, "local", None)
    assert taken == [True]
