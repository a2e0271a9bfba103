"""A search as a Ray job on a real cluster's dashboard."""

import json
import re
import time
import urllib.request

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
