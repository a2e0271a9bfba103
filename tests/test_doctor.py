"""What the doctor finds in clusters that are as they should be, and in those that are not."""

import json
import subprocess
import sys
import time

import pytest
from ray_nodes import RayNodes

from cluster.doctor import check_storage, judge_clock, judge_devices
from cluster.nodes import Node
from trainer.storage import Storage

LEAVE_A_GROUP = """
import ray, sys
from ray.util.placement_group import placement_group
ray.init(address=sys.argv[1], log_to_driver=False)
ray.get(placement_group([{"CPU": 1}], lifetime="detached", name="left").ready())
"""


@pytest.mark.parametrize(("skew", "verdict"), [(0.5, "pass"), (-5, "warn"), (45, "fail"), (-45, "fail")])
def test_a_clock_is_judged_by_how_far_it_is_off(skew, verdict):
    finding = judge_clock("node", skew, 0.1)
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != "pass")


def test_a_slow_answer_is_no_wrong_clock():
    assert judge_clock("node", 2.4, 0.5).verdict == "pass"


def gpu(name="H100", free=78.0, rate=600.0):
    return {"name": name, "memory": [free, 79.0], "rate": rate}


@pytest.mark.parametrize(
    ("told", "devices", "verdict", "says"),
    [
        (1, [gpu()], "pass", "H100, 600 TFLOP/s, 78 of 79 GiB free; CUDA 12.8, driver 570"),
        (2, [gpu()], "fail", "told of 2 GPUs, torch sees 1"),
        (0, [gpu()], "warn", "sees 1 GPUs, Ray was told of 0"),
        (1, [{"name": "CPU", "rate": 0.1}], "fail", "torch sees 0"),
        (1, [gpu(free=40.0)], "warn", "40 of 79"),
        (1, [gpu(rate=200.0)], "warn", "slower than its like"),
        (0, [{"name": "CPU", "rate": 0.1}], "pass", "CPU, 0.1 TFLOP/s"),
    ],
)
def test_devices_are_judged_by_what_ray_was_told_and_by_their_like(told, devices, verdict, says):
    seen = {"devices": devices, "cuda": "12.8", "driver": "570"}
    finding = judge_devices(Node("id", "node", told), seen, {"H100": 610.0, "CPU": 0.1})
    assert finding.verdict == verdict
    assert says in finding.found
    assert bool(finding.remedy) == (verdict != "pass")


def test_a_storage_that_cannot_be_written_is_no_storage(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = check_storage(Storage(tmp_path / "file" / "runs"), [])
    assert finding.verdict == "fail"
    assert finding.remedy


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(600)
def test_what_is_wrong_with_a_cluster_is_found_and_nothing_else(tmp_path, tmp_path_factory):
    """A node with another torch, whose /run/… is not shared; a data set that is nowhere; a group that was left."""
    unshared, older = tmp_path / "runs", tmp_path / "older"
    unshared.mkdir()
    (older / "torch-2.9.0.dist-info").mkdir(parents=True)
    (older / "torch-2.9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    own_disk = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {unshared} && exec "$0" "$@"')
    if subprocess.run((*own_disk, "true"), check=False).returncode:
        pytest.skip("needs the right to mount")
    with RayNodes(tmp_path / "home", tmp_path_factory.mktemp("r"), head_cpus=1) as cluster:
        stranger = cluster.run("cluster", "capacity", "--address", cluster.address, home=tmp_path)
        assert stranger.returncode == 2
        assert "asks for another token" in stranger.stderr

        good = cluster.run(
            "cluster", "doctor", "digits", "--address", cluster.address, "--storage", str(unshared), "--json"
        )
        found = json.loads(good.stdout)
        assert [f for f in found["findings"] if f["verdict"] != "pass"] == [], good.stdout
        assert good.returncode == 0
        checks = {f["check"] for f in found["findings"]}
        assert checks == {"versions", "devices", "storage", "clock", "security", "data", "placement groups"}

        subprocess.run(
            (sys.executable, "-c", LEAVE_A_GROUP, cluster.address), env=cluster.environment, check=True, timeout=60
        )
        cluster.add(1, own_disk, {"PYTHONPATH": str(older)})
        asked = ("--address", cluster.address, "--set", f"train.data.name=folder:{tmp_path}/none", "--json")
        bad = cluster.run("cluster", "doctor", "digits", "--storage", str(unshared), *asked)
        assert bad.returncode == 1
        assert not bad.stderr
        wrong = [f for f in json.loads(bad.stdout)["findings"] if f["verdict"] == "fail"]
        assert all(f["remedy"] for f in wrong)
        by_check = {check: [f["found"] for f in wrong if f["check"] == check] for check in checks}
        assert by_check["versions"] == ["torch 2.9.0 instead of " + torch_here()]
        assert len(by_check["storage"]) == 2
        assert all("is not shared with" in said for said in by_check["storage"])
        assert len(by_check["data"]) == 2
        assert by_check["placement groups"] == ["1 left by runs that are over"]
        assert not by_check["clock"] + by_check["devices"] + by_check["security"]
        assert list(unshared.iterdir()) == []

        refused = cluster.run("cluster", "capacity", "--address", cluster.address)
        assert refused.returncode == 2
        assert "torch 2.9.0 instead of" in refused.stderr
        run = ("run", "digits", "--address", cluster.address, "--storage", str(unshared), "--set", "runner=reuse")
        assert cluster.run(*run).returncode == 2
        cluster.kill(cluster.started[-1])
        cluster.add(1, own_disk)
        said, end = "", time.monotonic() + 90
        while "is not seen on" not in said and time.monotonic() < end:  # Ray takes the killed node for alive a while
            refused = cluster.run(*run, timeout=120)
            assert refused.returncode == 2
            said = refused.stderr
        assert "is not seen on" in said
        assert list(unshared.iterdir()) == [unshared / "digits"]


def torch_here() -> str:
    import torch

    return torch.__version__.partition("+")[0]
