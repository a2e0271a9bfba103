"""Ray Train around the loop, through what can happen to its workers: real processes, stopped and killed."""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.train
import torch
import torch.multiprocessing as mp
from ray.cluster_utils import Cluster
from ray.train.v2.api.callback import UserCallback
from ray.util.placement_group import placement_group_table

from cluster.connect import ENVIRONMENT
from trainer import checkpoint, data, local, ray_worker
from trainer.config import DataConfig, ModelConfig, TrainConfig
from trainer.storage import Storage

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

CONFIG = TrainConfig(
    data=DataConfig(subset=64, train_fraction=0.5),
    model=ModelConfig(
        channels=(4, 8), attention=(False, True), layers_per_block=1, attention_head_dim=8, norm_groups=2
    ),
    epochs=12,
    batch_size=8,
    dropout=0.0,
    ema_decays=(0.9,),
    workers=2,
    checkpoint_seconds=0.0,  # between rungs too, while training goes on
)
RUNGS = (2, 4, 6, 8, 10)


class Probe:
    """A scorer that notes who scored, and at the third rung of its first life waits for what happens to it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, denoiser: Any, config: TrainConfig, device: torch.device) -> dict[str, Any]:
        with (self.folder / "scored").open("a") as file:
            file.write(f"{os.getpid()} {ray.train.get_context().get_world_size()}\n")
        lives = self.pids()
        if len(lives) == 3 and len(set(lives)) == 1:
            time.sleep(120)  # ended by the test long before
        return {"frechet": 1.0, "objective": 1.0}

    def noted(self) -> list[list[int]]:
        file = self.folder / "scored"
        return [[int(number) for number in line.split()] for line in file.open()] if file.exists() else []

    def pids(self) -> list[int]:
        return [pid for pid, _ in self.noted()]

    def world_sizes(self) -> list[int]:
        return [size for _, size in self.noted()]


@contextmanager
def a_cluster(temporary: str, **environment: str) -> Iterator[Cluster]:
    """A head without workers."""
    os.environ |= ENVIRONMENT | {"RAY_TMPDIR": temporary} | environment
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def a_node(of: Cluster) -> Any:
    """One more, of one worker."""
    return of.add_node(num_cpus=1, object_store_memory=100 * 2**20)


@contextmanager
def cluster_of_two(temporary: str) -> Iterator[list[Any]]:
    """A head without workers and two nodes of one worker each, which are given."""
    with a_cluster(temporary, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="8") as made:
        yield [a_node(made) for _ in range(2)]


class Heard(UserCallback):
    """What the search hears of a training: each report, as RungReportCallback has it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with (self.folder / "heard").open("a") as file:
            file.write(json.dumps(metrics[0]) + "\n")


# On the head, which lives: what dies here are workers
@ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})
def train_in_a_task(config: dict[str, Any], run: str, probe: Probe, images: str | None = None) -> dict[str, Any]:
    ray_worker.ELASTIC_START_SECONDS = 10
    return ray_worker.fit(
        TrainConfig.model_validate(config),
        "trial",
        Storage(run),
        score=probe,
        rungs=RUNGS,
        callbacks=[Heard(probe.folder)],
        images=images,
    )


def uninterrupted(tmp_path: Path) -> dict[int, float]:
    """Train loss by epoch of one process that nothing happens to."""
    losses: dict[int, float] = {}
    alone = CONFIG.model_copy(update={"workers": 1})
    torch.set_num_threads(1)
    local.fit(
        alone,
        data.load(alone.data).train,
        Storage(tmp_path / "alone"),
        Storage(tmp_path / "alone"),
        torch.device("cpu"),
        report=lambda metrics, folder: None,
        log=lambda metrics: losses.__setitem__(metrics["epoch"], metrics["train_loss"]),
    )
    return losses


def wait_for_third_rung(probe: Probe, training: ray.ObjectRef) -> None:
    end = time.monotonic() + 120
    while len(probe.pids()) < 3:
        done, _ = ray.wait([training], timeout=0)
        assert not done, f"ended before its time: {ray.get(training)}"
        assert time.monotonic() < end, "no third rung within 120 s"
        time.sleep(0.2)


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status


def final_loss(run: Storage) -> float:
    found = checkpoint.latest(run.at("train", "trial"))
    assert found is not None
    assert found[1].meta["epoch"] == CONFIG.epochs
    return found[1].meta["metrics"]["train_loss"]


def scenario(_: int, folder: str, temporary: str, sign: int) -> None:
    """In a process of its own: Ray's threads must not outlive a test in the process of all tests."""
    tmp_path = Path(folder)
    probe, run = Probe(tmp_path), Storage(tmp_path / "run")
    with cluster_of_two(temporary):
        training = train_in_a_task.remote(CONFIG.model_dump(mode="json"), run.uri, probe)
        wait_for_third_rung(probe, training)
        victim = probe.pids()[0]
        os.kill(victim, sign)
        metrics = ray.get(training, timeout=150)
        assert metrics["epoch"] == CONFIG.epochs
        assert victim not in probe.pids()[3:]
        assert len(probe.pids()) <= 3 + 4, "more than one rung was trained twice"
        assert not is_alive(victim)
        assert final_loss(run) == pytest.approx(uninterrupted(tmp_path)[CONFIG.epochs], rel=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_worker_that_dies_or_hangs_is_replaced_and_the_curve_goes_on(tmp_path, tmp_path_factory, sign):
    """A hung one answers no health check; then all end and start again from the last checkpoint."""
    mp.spawn(scenario, (str(tmp_path), str(tmp_path_factory.mktemp("r")), int(sign)), nprocs=1)
    assert final_loss(Storage(tmp_path / "run")) > 0


def lose_node_of(pid: int, nodes: list[Any]) -> None:
    """As a machine that loses its power: everything on it at once."""
    for node in nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        if pid in [process.pid for process in processes]:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return
    raise AssertionError(f"process {pid} is on no node")


def scenario_of_a_lost_node(_: int, folder: str, temporary: str) -> None:
    tmp_path = Path(folder)
    probe, run = Probe(tmp_path), Storage(tmp_path / "run")
    with cluster_of_two(temporary) as nodes:
        config = CONFIG.model_copy(update={"min_workers": 1})
        training = train_in_a_task.remote(config.model_dump(mode="json"), run.uri, probe)
        wait_for_third_rung(probe, training)
        lose_node_of(probe.pids()[0], nodes)
        metrics = ray.get(training, timeout=200)
        assert metrics["epoch"] == CONFIG.epochs
        assert probe.world_sizes()[:3] == [2, 2, 2]
        assert set(probe.world_sizes()[3:]) == {1}
        assert len(probe.pids()) <= 3 + 4, "more than one rung was trained twice"
        assert final_loss(run) == pytest.approx(uninterrupted(tmp_path)[CONFIG.epochs], rel=1e-4)


@pytest.mark.faults
def test_a_training_whose_node_is_lost_goes_on_with_fewer_workers_and_the_same_curve(tmp_path, tmp_path_factory):
    mp.spawn(scenario_of_a_lost_node, (str(tmp_path), str(tmp_path_factory.mktemp("r"))), nprocs=1)
    assert final_loss(Storage(tmp_path / "run")) > 0


class Squeeze:
    """A scorer that leaves its process too little memory for the next step, and notes its life."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, denoiser: Any, config: TrainConfig, device: torch.device) -> dict[str, Any]:
        with (self.folder / "scored").open("a") as file:
            file.write(f"{os.getpid()}\n")
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 60 * 2**20, resource.RLIM_INFINITY))
        return {"frechet": 1.0, "objective": 1.0}


def scenario_of_too_little_memory(_: int, folder: str, temporary: str) -> None:
    tmp_path = Path(folder)
    run = Storage(tmp_path / "run")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # what a step frees is the system's again, and limited
    with cluster_of_two(temporary):
        big = {"data": DataConfig(image_size=32), "batch_size": 1024, "checkpoint_seconds": None}
        config = CONFIG.model_copy(update=big).model_dump(mode="json")
        ray.get(train_in_a_task.remote(config, run.uri, Squeeze(tmp_path)), timeout=200)


@pytest.mark.faults
def test_too_little_memory_for_one_of_two_workers_is_the_reason_and_is_not_tried_again(tmp_path, tmp_path_factory):
    mp.spawn(scenario_of_too_little_memory, (str(tmp_path), str(tmp_path_factory.mktemp("r"))), nprocs=1)
    last = json.loads((tmp_path / "heard").read_text().splitlines()[-1])
    assert last["failure"].startswith("memory is too small for 512 images at once (train.batch_size=1024, ")
    assert "set train.micro_batch to 256 (" in last["failure"]
    assert len((tmp_path / "scored").read_text().split()) == 1, "it was tried again"
    assert not Storage(tmp_path / "run").exists("train/trial/gave_up.json")


def scenario_of_other_images(_: int, folder: str, temporary: str) -> None:
    tmp_path = Path(folder)
    with a_cluster(temporary) as made:
        a_node(made)
        config = CONFIG.model_copy(update={"workers": 1}).model_dump(mode="json")
        run, probe = str(tmp_path / "run"), Probe(tmp_path)
        ray.get(train_in_a_task.remote(config, run, probe, images="of another copy"), timeout=200)


@pytest.mark.faults
def test_other_images_on_a_node_are_the_reason_and_are_not_tried_again(tmp_path, tmp_path_factory):
    mp.spawn(scenario_of_other_images, (str(tmp_path), str(tmp_path_factory.mktemp("r"))), nprocs=1)
    (heard,) = (tmp_path / "heard").read_text().splitlines()
    assert "give all nodes the same" in json.loads(heard)["failure"]


def scenario_of_no_room(_: int, folder: str, temporary: str) -> None:
    tmp_path = Path(folder)
    run = Storage(tmp_path / "run")
    with a_cluster(temporary, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="0.5") as made:
        config = CONFIG.model_copy(update={"workers": 1, "epochs": 1})
        training = train_in_a_task.remote(config.model_dump(mode="json"), run.uri, Probe(tmp_path))
        end = time.monotonic() + 120
        while sum(group["state"] == "REMOVED" for group in placement_group_table().values()) < 3 * 4:
            done, _ = ray.wait([training], timeout=0.1)
            assert not done, f"it ended where there is no room: {ray.get(training)}"
            assert time.monotonic() < end, "it is tried no more"
        a_node(made)
        ray.get(training, timeout=120)


@pytest.mark.faults
def test_a_training_that_finds_no_room_waits_until_a_node_comes(tmp_path, tmp_path_factory):
    """Ray Train tries four times, and then calls it failed."""
    mp.spawn(scenario_of_no_room, (str(tmp_path), str(tmp_path_factory.mktemp("r"))), nprocs=1)
    assert checkpoint.latest(Storage(tmp_path / "run/train/trial"))[1].meta["epoch"] == 1
