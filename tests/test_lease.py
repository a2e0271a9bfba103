"""A run has one driver; a dead one's run can be taken over."""

import os
import signal
import subprocess
import sys
import time

import pytest

from search import lease
from search.config import UserError
from trainer.storage import Storage

HOLD = """
import sys, time
from search import lease
from trainer.storage import Storage
with lease.held(Storage(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_refused_and_a_dead_ones_run_is_taken_over(tmp_path):
    run = Storage(tmp_path)
    with subprocess.Popen((sys.executable, "-c", HOLD, str(tmp_path)), stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {driver.pid} .* ddpm-search status"), lease.held(run):
            pass
        assert run.read_json(lease.FILE)["pid"] == driver.pid
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    with lease.held(run):
        assert run.read_json(lease.FILE)["pid"] == os.getpid()
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


def test_a_damaged_lease_keeps_nobody_out(tmp_path):
    Storage(tmp_path).write(lease.FILE, b"{")
    with lease.held(Storage(tmp_path)):
        assert Storage(tmp_path).read_json(lease.FILE)["pid"] == os.getpid()


def test_an_error_gives_the_lease_back(tmp_path):
    with pytest.raises(ZeroDivisionError), lease.held(Storage(tmp_path)):
        raise ZeroDivisionError
    assert not Storage(tmp_path).exists(lease.FILE)
