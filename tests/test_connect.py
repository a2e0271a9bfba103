"""A local Ray is this machine's alone; a cluster gets the code from here."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.runtime_env.runtime_env import _merge_runtime_env
from ray_nodes import RayNodes

from cluster import connect, nodes
from cluster.nodes import Node

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
# Ray's own guard of a gRPC server, before the question that a driver asks first. It ends with its standard input.
HEAD = """
import sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from ray._private.authentication.grpc_authentication_server_interceptor import SyncAuthenticationServerInterceptor
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
class Nodes(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    def GetClusterId(self, request, context):
        return gcs_service_pb2.GetClusterIdReply()
server = grpc.server(ThreadPoolExecutor(2), interceptors=[SyncAuthenticationServerInterceptor()])
gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Nodes(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
"""
KNOCK = """
import os, sys
from cluster import connect
try:
    connect._check_answers(sys.argv[1])
    print(os.environ.get("RAY_AUTH_MODE"))
except connect.ConnectError as error:
    print(error)
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


def test_a_ray_client_s_address_is_refused_with_what_to_do():
    with pytest.raises(connect.ConnectError, match="--address auto"), connect.connected("ray://127.0.0.1:10001"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379"])
def test_an_address_where_nothing_answers_is_refused_at_once(address):
    with pytest.raises(connect.ConnectError, match="leave --address out"), connect.connected(address):
        pass


@pytest.mark.slow
def test_a_ray_that_does_not_start_here_is_said_in_a_line(tmp_path):
    """Its sockets' paths may not be longer than 107 bytes."""
    deep = tmp_path / ("d" * 110)
    deep.mkdir()
    start = (sys.executable, "-m", "search.cli", "cluster", "capacity")
    env = os.environ | {"TMPDIR": str(deep), "RAY_TMPDIR": str(deep)}
    done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Ray did not start on this machine" in done.stderr
    assert str(deep) in done.stderr
    assert "Traceback" not in done.stderr


def guarded(home: Path, **environment: str) -> dict[str, str]:
    """This process's environment, without its token and with another home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return {**kept, "HOME": str(home), **environment}


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Addresses of a head that asks for the token `right`, and of one that asks for none."""
    home = tmp_path_factory.mktemp("head")
    asked = {"open": guarded(home), "guarded": guarded(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="right")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {n: subprocess.Popen((sys.executable, "-c", HEAD), env=env, **pipes) for n, env in asked.items()}
    yield {name: f"127.0.0.1:{process.stdout.readline().strip()}" for name, process in running.items()}
    for process in running.values():
        process.communicate()


@pytest.mark.parametrize(
    ("head", "token", "mode", "said"),
    [
        ("guarded", "right", {}, "token"),
        ("guarded", "wrong", {}, "asks for another token than this machine has; copy the head's"),
        ("guarded", None, {"RAY_AUTH_MODE": "token"}, "asks for another token than this machine has; copy the head's"),
        ("open", "right", {}, "None"),
    ],
)
def test_a_token_is_shown_where_it_is_asked_for_and_nowhere_else(heads, tmp_path, head, token, mode, said):
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    knock = (sys.executable, "-c", KNOCK, heads[head])
    done = subprocess.run(knock, env=guarded(tmp_path, **mode), capture_output=True, text=True, timeout=60, check=True)
    assert said in done.stdout
    assert "Token authentication" not in done.stderr


@pytest.mark.parametrize("given", [{}, {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "7", "OTHER": "x"}, connect.ENVIRONMENT])
def test_a_job_that_others_started_has_the_environment_of_a_search(monkeypatch, given):
    """Ray's own merging is the oracle: it gives None where one thing is given twice."""
    job = {"working_dir": "gcs://code.zip", "env_vars": given} if given else {}
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": job, "metadata": {}}))
    merged = _merge_runtime_env(job, connect.driver_env())
    assert merged is not None
    assert merged["env_vars"] == {**connect.ENVIRONMENT, **given}
    assert merged.get("working_dir") == job.get("working_dir")


def test_nodes_that_join_later_are_compared_too_and_each_once(monkeypatch):
    here, asked = nodes.versions(), []
    torch = {"joins-last": "2.9.0"}

    def on_each(found, function):
        asked.extend(node.id for node in found)
        lost = TimeoutError("no answer")
        return [lost if n.id == "lost" else here | ({"torch": torch[n.id]} if n.id in torch else {}) for n in found]

    monkeypatch.setattr(nodes, "on_each", on_each)
    connection = connect.Connection("", local=False)
    for living in (["head"], ["head", "joins"], ["joins", "lost"]):
        monkeypatch.setattr(nodes, "living", lambda living=living: [Node(name, name, 0) for name in living])
        connection.check_versions()
    assert asked == ["head", "joins", "lost"]
    monkeypatch.setattr(nodes, "living", lambda: [Node(name, name, 0) for name in ("joins", "joins-last")])
    for _ in range(2):  # it stays refused
        with pytest.raises(connect.ConnectError, match=r"but joins-last has torch 2\.9\.0 instead of"):
            connection.check_versions()
    assert asked[3:] == ["joins-last"] * 2
    monkeypatch.setattr(nodes, "living", lambda: [Node("lost", "lost", 0)])
    with pytest.raises(connect.ConnectError, match="lost cannot run this code"):
        connect.Connection("", local=False).check_versions()
    monkeypatch.setattr(nodes, "on_each", lambda found, function: [nodes.NodeGoneError()])
    connect.Connection("", local=False).check_versions()  # it died before this search began


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


@pytest.mark.slow
def test_a_reused_process_waits_for_what_a_stopped_trial_still_stores(tmp_path):
    """Tune's own function trainable; by itself it waits for 2 s, and then fails the next trial."""
    command = (sys.executable, "-c", REUSED, str(tmp_path))
    done = subprocess.run(command, env=os.environ | connect.ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.slow
@pytest.mark.faults
def test_a_node_that_has_just_died_is_no_reason_to_refuse_a_cluster(tmp_path, tmp_path_factory):
    """Ray still names it among the living."""
    asks = (
        "import sys; from cluster import connect, nodes\n"
        "with connect.connected(sys.argv[1], check_versions=False) as ray:\n"
        "    print('connected', flush=True); input()\n"
        "    print(len(nodes.living()))\n"
        "    ray.check_versions()"
    )
    with RayNodes(tmp_path, tmp_path_factory.mktemp("r"), 1) as cluster:
        node = cluster.add(1)
        command, pipe = (sys.executable, "-c", asks, cluster.address), subprocess.PIPE
        with subprocess.Popen(command, env=cluster.environment, stdin=pipe, stdout=pipe, text=True) as driver:
            assert driver.stdout.readline() == "connected\n"
            cluster.kill(node)
            said, _ = driver.communicate("\n", timeout=200)
    assert said.startswith("2\n"), "Ray noticed it at once: this shows nothing"
    assert driver.returncode == 0
