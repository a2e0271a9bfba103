"""A local Ray is this machine's alone; a cluster gets the code from here."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import connect

LOCAL = """
import json, os, psutil
from cluster import connect
with connect.connected():
    import ray
    ray.get(ray.remote(num_cpus=0)(lambda: None).remote())
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c.laddr.ip for p in own for c in p.net_connections("tcp") if c.status == "LISTEN"]
    print(json.dumps([sorted(set(listening)), os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"]]))
"""
REUSED = """
import sys, time
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune.trainable.function_trainable import wrap_function

class Here(StorageContext):  # without a Ray there is no session's folder
    trial_driver_staging_path = trial_working_directory = sys.argv[1]

def trial(config):
    try:
        tune.report({"epoch": 1})  # where it is stopped
    finally:
        time.sleep(3)  # for what it still stores

def place(name):
    return Here(sys.argv[1], "tune", storage_filesystem=LocalFileSystem(), trial_dir_name=name)

process = wrap_function(trial)(config={}, storage=place("stopped"))
process.train()
print(process.reset({}, storage=place("next")))
"""
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_what_nodes_are_sent_is_the_code_and_little_more():
    sent = [Path(folder) for folder in connect.runtime_env()["py_modules"]]
    assert {"search", "evaluation", "trainer", "cluster"} <= {folder.name for folder in sent}
    assert any(folder.name.endswith(".dist-info") for folder in sent)
    files = [file for folder in sent for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files) < 1_000_000


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379"])
def test_an_address_where_nothing_answers_is_refused_at_once(address):
    with pytest.raises(connect.ConnectError, match="leave --address out"), connect.connected(address):
        pass


def test_an_existing_token_is_taken_from_others_and_kept(tmp_path, monkeypatch):
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    connect._keep_token_private()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == "secret"


@pytest.mark.slow
@pytest.mark.ray
def test_a_local_ray_listens_on_loopback_alone_and_asks_for_a_token(tmp_path, tmp_path_factory):
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path_factory.mktemp("r"))}
    done = subprocess.run(
        (sys.executable, "-c", LOCAL), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    listening, mode, usage = json.loads(done.stdout.splitlines()[-1])
    assert listening
    assert set(listening) <= LOOPBACK
    assert mode == "token"
    assert usage == "0"
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_a_reused_process_waits_for_what_a_stopped_trial_still_stores(tmp_path):
    """Tune's own function trainable; by itself it waits for 2 s, and then fails the next trial."""
    command = (sys.executable, "-c", REUSED, str(tmp_path))
    done = subprocess.run(command, env=os.environ | connect.ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"
