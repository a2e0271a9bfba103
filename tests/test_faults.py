"""Searches on clusters of several Ray nodes, parts of which are killed. Prints a table of what each fault cost."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray_nodes import RayNodes
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from search.records import Records
from trainer import checkpoint
from trainer.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]
EPOCHS, TRIALS = 12, 2
EPOCHS_OF = {"train": EPOCHS, "reuse": 200}  # an epoch is over sooner where nothing stands between
# Nothing judges these images, so that a search is its trainings alone; a checkpoint every epoch.
SETTINGS = (
    f"trials={TRIALS}",
    "train.checkpoint_seconds=0.01",
    "early_stopping.scheduler=none",
    "early_stopping.rungs=[0.25, 0.5, 0.75]",
    "known_points=[{family: linear, start: 1.0e-4, end: 0.02}, {family: cosine, start: 0, end: 1}]",
    "train.data.labels=false",
    "train.data.subset=160",
    "train.batch_size=16",
    "train.dropout=0.0",
    "space.dropout=0.0",
    "train.model.channels=[8, 16]",
    "train.model.attention=[false, true]",
    "train.model.attention_head_dim=8",
    "train.model.norm_groups=4",
)
LEFT = """
import json, ray, sys
from ray.util.state import list_actors, list_placement_groups
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
here = ray.get_runtime_context().gcs_address
groups = [g.placement_group_id for g in list_placement_groups(address=here) if g.state != "REMOVED"]
KEPT = {"TrainStateActor", "_AutoscalingCoordinatorActor", "DatasetManager"}  # Ray's own, one a cluster
alive = list_actors(address=here, filters=[("state", "!=", "DEAD")], limit=1000)
actors = [a.class_name for a in alive if a.class_name not in KEPT]
print(json.dumps(groups + actors))
"""


class Poison:
    """What a pickle can do to who loads it."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.touched,)


class Search:
    """A run of the command line on a cluster, and what it left."""

    def __init__(self, cluster: RayNodes, folder: Path, epochs: int = EPOCHS):
        self.epochs_asked = epochs
        self.cluster, self.place, self.log = cluster, Storage(folder / "runs" / "f"), folder / "log"
        self.faults = 0
        self.began = time.monotonic()

    @contextmanager
    def command(self, *arguments: str) -> Iterator[psutil.Popen]:
        with self.log.open("a") as log:
            process = psutil.Popen(
                (sys.executable, "-m", "search.cli", *arguments, "--address", self.cluster.address),
                env=self.cluster.environment,
                stdout=log,
                stderr=log,
            )
            try:
                yield process
            finally:
                if process.is_running():
                    process.kill()
                    process.wait()

    def begun(self, workers: int, runner: str = "train") -> "contextmanager[psutil.Popen]":
        asked = (*SETTINGS, f"runner={runner}", f"train.workers={workers}", f"train.epochs={self.epochs_asked}")
        settings = [part for value in asked for part in ("--set", value)]
        return self.command("run", "digits", "--name", "f", "--storage", str(Path(self.place.root).parent), *settings)

    def epochs(self) -> dict[str, list[int]]:
        """Every training of an epoch, as the workers logged it: trial → epochs, one that was done twice twice."""
        done: dict[str, list[int]] = {}
        for trial in self.place.names("tensorboard"):
            for file in sorted(Path(self.place.root, "tensorboard", trial).glob("*tfevents*")):
                for event in EventFileLoader(str(file)).Load():
                    if any(value.tag == "train/loss" for value in event.summary.value):
                        done.setdefault(trial, []).append(event.step)
        return done

    def wait_for(self, count: int, process: psutil.Popen) -> None:
        """Until so many epochs are trained in all."""
        self.wait_until(lambda: sum(map(len, self.epochs().values())) >= count, process)

    def wait_until(self, happened: Callable[[], bool], process: psutil.Popen) -> None:
        end = time.monotonic() + 200
        while not happened():
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"nothing happens: {self.epochs()}\n{self.log.read_text()}"
            time.sleep(0.1)

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes with such a title."""
        found = [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]
        own = {
            child.pid for node in self.cluster.started if node.is_running() for child in node.children(recursive=True)
        }
        return [process for process in found if process.pid in own]

    def kill(self, name: str) -> None:
        """kill -9 of one of them."""
        victims = self.processes(name)
        assert victims, f"no {name}"
        victims[0].kill()
        self.faults += 1

    def check(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        rows = list(Records.load(self.place))
        assert [(row.state, row.source, row.epoch) for row in rows] == [
            ("completed", "known", self.epochs_asked)
        ] * TRIALS, rows
        for row in rows:
            assert [rung["epoch"] for rung in row.rungs] == [
                self.epochs_asked * quarter // 4 for quarter in (1, 2, 3, 4)
            ]
            assert checkpoint.load(self.place.at(str(row.checkpoint))).meta["epoch"] == self.epochs_asked
        epochs = self.epochs()
        assert all(set(done) == set(range(1, self.epochs_asked + 1)) for done in epochs.values()), epochs
        twice = {trial: sum(n - 1 for n in Counter(done).values()) for trial, done in epochs.items()}
        assert all(count <= self.faults for count in twice.values()), f"more than an epoch a fault: {epochs}"
        assert not self.place.exists("lease.json")
        left = subprocess.run(
            (sys.executable, "-c", LEFT, self.cluster.address),
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(left.stdout.splitlines()[-1]) == []
        with capsys.disabled():
            seconds = time.monotonic() - self.began
            print(
                f"\n| {name} | {len(rows)} of {TRIALS} trials | {sum(twice.values())} epochs twice | {seconds:.0f} s |"
            )


@pytest.fixture
def cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RayNodes]]:
    """cluster(nodes, cpus): a head without CPUs, and so many nodes of so many."""
    made: list[RayNodes] = []

    def make(nodes: int, cpus: int = 1, options: tuple[str, ...] = ()) -> RayNodes:
        made.append(RayNodes(tmp_path / "home", tmp_path_factory.mktemp("r"), head_cpus=0, options=options))
        for _ in range(nodes):
            made[-1].add(cpus, options=options)
        return made[-1]

    yield make
    for one in made:
        one.__exit__()


def test_a_worker_and_then_the_trial_s_own_process_are_killed(cluster, tmp_path, capsys):
    search = Search(cluster(1, cpus=2), tmp_path)
    with search.begun(workers=2) as driver:
        search.wait_for(3, driver)
        search.kill("ray::RayTrainWorker")
        search.wait_for(7, driver)
        search.kill("ray::ImplicitFunc")
        assert driver.wait(240) == 0, search.log.read_text()
    search.check("kill -9 a worker, later a trial's actor", capsys)


def test_a_trial_s_own_process_is_killed_as_its_worker_starts(cluster, tmp_path, capsys):
    """Ray Train has a worker's place watched only once it runs: the one CPU would be reserved by nobody for ever."""
    search = Search(cluster(1), tmp_path)
    with search.begun(workers=1) as driver:
        search.wait_until(lambda: bool(search.processes("ray::RayTrainWorker")), driver)
        search.kill("ray::ImplicitFunc")
        assert driver.wait(300) == 0, search.log.read_text()
    search.check("a trial's own process, as its worker starts", capsys)


def test_a_trial_s_process_that_others_are_to_take_over_is_killed_again_and_again(cluster, tmp_path, capsys):
    search = Search(cluster(1, cpus=2), tmp_path, EPOCHS_OF["reuse"])
    with search.begun(workers=1, runner="reuse") as driver:
        for epochs in (3, 40, 80):
            search.wait_for(epochs, driver)
            search.kill("ray::ImplicitFunc")
        assert driver.wait(240) == 0, search.log.read_text()
    search.check("runner: reuse; kill -9 a trial's process, three times", capsys)


@pytest.mark.parametrize(("workers", "runner"), [(2, "train"), (1, "reuse")])
def test_a_node_with_a_worker_dies_and_then_the_driver(cluster, tmp_path, capsys, workers, runner):
    nodes = cluster(2)
    search = Search(nodes, tmp_path, EPOCHS_OF[runner])
    with search.begun(workers, runner) as driver:
        search.wait_for(3, driver)
        nodes.kill(nodes.started[-1])
        search.faults += 1
        nodes.add(1)
        search.wait_for(7, driver)
        os.kill(driver.pid, signal.SIGKILL)
        search.faults += 1
        driver.wait()
    with search.command("resume", search.place.uri) as driver:
        assert driver.wait(240) == 0, search.log.read_text()
    which = "one of two workers" if workers == 2 else "a trial's process (runner: reuse)"
    search.check(f"a node with {which}; later kill -9 the driver, and resume", capsys)


def test_a_node_with_only_a_trial_s_own_process_dies(cluster, tmp_path, capsys):
    nodes = cluster(1, options=("--memory=0",))  # a trial's own process reserves memory: it finds room on the next node
    nodes.add(0)
    search = Search(nodes, tmp_path)
    with search.begun(workers=1) as driver:
        search.wait_for(3, driver)
        titles = [" ".join(process.cmdline()) for process in nodes.started[-1].children(recursive=True)]
        assert any("ray::ImplicitFunc" in title for title in titles)
        assert not any("ray::RayTrainWorker" in title for title in titles)
        nodes.kill(nodes.started[-1])
        search.faults += 1
        nodes.add(0)
        assert driver.wait(240) == 0, search.log.read_text()
    search.check("a node with only a trial's own process", capsys)


@pytest.mark.parametrize("runner", ["train", "reuse"])
def test_the_head_dies_with_the_driver_and_another_cluster_goes_on(cluster, tmp_path, capsys, runner):
    first = cluster(1)
    search = Search(first, tmp_path, EPOCHS_OF[runner])
    with search.begun(1, runner) as driver:
        search.wait_for(3, driver)
        first.kill(first.head)
        driver.kill()
        driver.wait()
    search.faults += 1
    first.__exit__()
    search.cluster = cluster(1)
    pickles = list(Path(search.place.root).rglob("*.pkl"))
    assert pickles, "Tune keeps its state no longer: this shows nothing"
    for file in pickles:
        file.write_bytes(pickle.dumps(Poison(tmp_path / "unpickled")))
    with search.command("resume", search.place.uri) as driver:
        assert driver.wait(240) == 0, search.log.read_text()
    assert not (tmp_path / "unpickled").exists()
    search.check(f"the head and the driver; another cluster and resume (runner: {runner})", capsys)


@pytest.mark.parametrize("runner", ["train", "reuse"])
def test_a_cluster_grows_and_two_processes_are_killed_at_once(cluster, tmp_path, capsys, runner):
    nodes = cluster(1)
    search = Search(nodes, tmp_path, epochs=160 if runner == "train" else 400)
    with search.begun(1, runner) as driver:
        search.wait_for(2, driver)
        assert [row.state for row in Records.load(search.place)] == ["running"], "there is room for one"
        nodes.add(1)
        search.wait_until(lambda: len(search.epochs()) == 2, driver)
        assert [row.state for row in Records.load(search.place)] == ["running"] * 2, "the new node was not used"
        for name in ("ray::RayTrainWorker", "ray::ImplicitFunc") if runner == "train" else 2 * ("ray::ImplicitFunc",):
            search.kill(name)
        assert driver.wait(240) == 0, search.log.read_text()
    search.check(f"a node joins; two processes of trials at once (runner: {runner})", capsys)
