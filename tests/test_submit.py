"""A search as a Ray job on a real cluster's dashboard."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import RayNodes, free_port

from search import cli
from search.config import UserError
from search.records import Records
from trainer.storage import Storage

SMALL = (
    "runner=train",
    "trials=2",
    "known_points=[{family: linear, start: 1.0e-4, end: 0.02}]",
    "train.epochs=15",
    "train.model.channels=[8, 16]",
    "train.model.attention=[false, true]",
    "train.model.attention_head_dim=8",
    "train.model.norm_groups=4",
    "early_stopping.images=50",
    "early_stopping.sampler.steps=5",
    "early_stopping.sampler.block_size=50",
    "final.top=1",
    "final.images=100",
    "final.split_size=50",
    "final.sampler.steps=5",
    "final.sampler.block_size=20",
)
# Ray's own guard of its dashboard, before a job whose log breaks off (the tunnel is cut) or ends (the dashboard does).
DASHBOARD = """
import asyncio, sys
import aiohttp, ray
from aiohttp import web
from ray._private.authentication.http_token_authentication import get_token_auth_middleware
async def version(request):
    return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})
async def job(request):
    return web.json_response({"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "true", "message": "at work"})
async def tail(request):
    log = web.WebSocketResponse()
    await log.prepare(request)
    await log.send_str("epoch 1\\n")
    request.transport.close() if request.match_info["job"] == "cut" else await log.close()
    return log
async def main():
    app = web.Application(middlewares=[get_token_auth_middleware(aiohttp)])
    app.router.add_get("/api/version", version)
    app.router.add_get("/api/jobs/{job}", job)
    app.router.add_get("/api/jobs/{job}/logs/tail", tail)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
asyncio.run(main())
"""
SET = [part for value in SMALL for part in ("--set", value)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits", "--storage", "runs"], "must be an absolute folder .* but is 'runs'"),
        (["digits"], "absolute folder"),
        ([], "either CONFIG, or --resume"),
        (["digits", "--resume", "/runs/a"], "either CONFIG, or --resume"),
        (["--resume", "runs/a"], "--resume must be an absolute folder"),
        (["--resume", "/runs/a", "--set", "trials=9"], "leave --set, --name and --storage out"),
    ],
)
def test_what_a_job_could_not_find_is_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        cli.app(["cluster", "submit", *arguments], standalone_mode=False)


def test_a_dashboard_that_does_not_answer_is_named():
    from cluster.connect import ConnectError

    with pytest.raises(ConnectError, match="no Ray dashboard answers at --dashboard http"):
        cli.app(
            ["cluster", "submit", "digits", "--storage", "/tmp/x", "--dashboard", f"http://127.0.0.1:{free_port()}"],
            standalone_mode=False,
        )


def with_token(home: Path, **environment: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return {**kept, "HOME": str(home), **environment}


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory) -> Iterator[str]:
    environment = with_token(tmp_path_factory.mktemp("head"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="right")
    command, pipes = (sys.executable, "-c", DASHBOARD), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


def ask(home: Path, token: str | None, *command: str) -> subprocess.CompletedProcess[str]:
    if token:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(token)
    whole = (sys.executable, "-m", "search.cli", "cluster", *command)
    return subprocess.run(whole, env=with_token(home), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_dashboard_that_asks_for_a_token_says_what_to_do(dashboard, tmp_path):
    done = ask(tmp_path, None, "submit", "digits", "--storage", "/runs", "--dashboard", dashboard)
    assert done.returncode == 2, done.stderr
    assert "asks for another token than this machine has; copy the head's" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("job", ["cut", "ended"])
def test_a_log_is_read_with_the_token_that_lies_here_and_its_breaking_off_ends_no_job(dashboard, tmp_path, job):
    done = ask(tmp_path, "right", "logs", job, "--dashboard", dashboard)
    assert done.stdout == "epoch 1\n"
    assert done.returncode == 2
    assert f"the job goes on; see it again with: ddpm-search cluster logs {job} --dashboard {dashboard}" in done.stderr
    assert "Traceback" not in done.stderr


def wait_for_metrics(address: str, *wanted: str) -> None:
    end = time.monotonic() + 150
    while time.monotonic() < end:
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
        if all(name in text for name in wanted):
            return
        time.sleep(0.5)
    raise AssertionError(f"not all of {wanted} at {address}")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_submitted_search_runs_on_one_cpu_to_its_end_and_is_seen_in_the_dashboard(tmp_path, tmp_path_factory):
    runs = tmp_path / "runs"
    with RayNodes(tmp_path / "home", tmp_path_factory.mktemp("r"), head_cpus=1) as cluster:
        asked = ("--dashboard", cluster.dashboard)
        left = cluster.run(
            "cluster", "submit", "digits", "--name", "job", "--storage", str(runs), *asked, "--detach", *SET
        )
        assert left.returncode == 0, left.stderr
        job = re.search(r"Job: +(\S+)", left.stdout).group(1)
        wait_for_metrics(
            f"http://127.0.0.1:{cluster.metrics_port}/metrics",
            "ddpm_search_trials{", "ddpm_search_images_per_second{", 'state="running"', 'metric="frechet"',
        )  # fmt: skip
        followed = cluster.run("cluster", "logs", job, *asked)
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert "Searching: 2 trials of 15 epochs, 1 at once" in followed.stdout
        assert "Export:" in followed.stdout
        state = json.loads(cluster.run("cluster", "status", job, *asked, "--json").stdout)
        assert state["status"] == "SUCCEEDED"
        run = Storage(runs / "job")
        states = [row.state for row in Records.load(run)]
        assert len(states) == 2
        assert set(states) <= {"completed", "stopped"}
        assert not run.exists("lease.json")

        token = (tmp_path / "home" / ".ray" / "auth_token").read_text()
        request = urllib.request.Request(
            f"{cluster.dashboard}/api/train/v2/runs/v1", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            shown = {train["name"] for train in json.loads(answer.read())["train_runs"]}
        assert {row.trial for row in Records.load(run)} <= shown

        lost = cluster.run("cluster", "status", "no-such-job", *asked)
        assert lost.returncode == 2
        assert "no job no-such-job" in lost.stderr
