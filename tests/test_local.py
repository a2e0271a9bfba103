"""One training in this process: its checkpoints are stored while it goes on, whatever the storage does."""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import torch
import torch.multiprocessing as mp
from fsspec.implementations.local import LocalFileSystem
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import CPU, TINY, assert_same_tensors, record, toy_images

from evaluation.config import SamplerConfig
from evaluation.rung import RungScorer
from trainer import checkpoint, local, loop
from trainer.config import SpeedConfig
from trainer.event_log import EventLog
from trainer.storage import Storage

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
EVERY_EPOCH = TINY.model_copy(update={"checkpoint_seconds": None, "checkpoint_epochs": 1})  # steps 3, 6 and 10


DROPPED = EVERY_EPOCH.model_copy(update={"dropout": 0.3})


class HeldFiles(LocalFileSystem):
    """A real file system of pyarrow's, where writing waits for `go_on`, and fails where `broken` is set."""

    protocol = "held"
    cachable = False
    go_on, broken = threading.Event(), threading.Event()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode:
            if not self.go_on.wait(timeout=30):
                raise TimeoutError("training waited for the storage")
            if self.broken.is_set():
                raise OSError(28, "No space left on device")
        return super()._open(path, mode, **options)


@pytest.fixture
def held(tmp_path) -> Iterator[Storage]:
    fsspec.register_implementation("held", HeldFiles, clobber=True)
    HeldFiles.go_on.clear()
    HeldFiles.broken.clear()
    yield Storage(f"fsspec+held://{tmp_path}/checkpoints")
    HeldFiles.go_on.set()


def fit(checkpoints: Storage, config=EVERY_EPOCH, **arguments: Any) -> list[int]:
    """Trains, and returns the steps of the checkpoints in the order in which they were reported."""
    steps: list[int] = []

    def report(metrics: loop.Metrics, folder: Storage) -> None:
        assert checkpoint.load(folder).meta["step"] == metrics["step"], "reported before it was stored"
        steps.append(metrics["step"])

    events = arguments.pop("events", Storage(checkpoints.root).at("events"))
    local.fit(config, toy_images(), checkpoints, events, CPU.device, report, **arguments)
    return steps


def _in_a_new_process(_: int, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    fit(Storage(folder), DROPPED)


@pytest.mark.slow
def test_a_process_that_has_trained_others_trains_as_a_new_one_to_the_bit(tmp_path):
    """As with `runner: reuse`: no seed, type, thread or memory format of a trial reaches the next."""
    mp.spawn(_in_a_new_process, (str(tmp_path / "new"), torch.get_num_threads()), nprocs=1)
    others = (
        DROPPED.model_copy(update={"seed": 5, "batch_size": 5, "speed": SpeedConfig(bf16=True, channels_last=False)}),
        DROPPED.model_copy(update={"dropout": 0.5, "micro_batch": 3, "ema_decays": (0.5, 0.9)}),
    )
    for index, other in enumerate(others):
        fit(Storage(tmp_path / f"other{index}"), other)
    fit(Storage(tmp_path / "reused"), DROPPED)
    new, reused = (checkpoint.latest(Storage(tmp_path / name)) for name in ("new", "reused"))
    assert new is not None
    assert reused is not None
    assert_same_tensors(reused[1].state, new[1].state)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_nothing_of_a_training_is_held_once_its_garbage_is_collected(tmp_path, device):
    """As a reused process does before the next one: networks, their averages and the optimiser's moments are gone."""

    def large() -> int:  # tensors of the size of a weight; the images of the data set stay
        gc.collect()
        tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        return sum(tensor.numel() > 1000 and tensor.is_floating_point() for tensor in tensors)

    def train(name: str) -> int:
        own, held = Storage(tmp_path / name), [0]

        def report(metrics: loop.Metrics, folder: Storage) -> None:
            held.append(large())

        local.fit(DROPPED, toy_images(), own, own.at("events"), torch.device(device), report)
        local.release_memory()
        return max(held)

    train("first")  # what the process keeps for ever, such as a workspace, is made by now
    before, memory = large(), torch.cuda.memory_allocated() if device == "cuda" else 0
    assert train("second") > before  # it would be seen
    assert large() == before
    assert device == "cpu" or torch.cuda.memory_allocated() <= memory


def stored() -> bool:
    """Waits for what is being stored. As a training's stop() it does so between any two steps."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    return False


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_stored(held):
    def log(metrics: loop.Metrics) -> None:
        if metrics["epoch"] == 2:
            HeldFiles.go_on.set()  # the checkpoint of epoch 1 was waiting for this

    assert fit(held, log=log) == [3, 10]  # epoch 2 came while that of epoch 1 was being stored
    found = checkpoint.latest(held)
    assert found is not None
    assert_same_tensors(found[1].state, record(EVERY_EPOCH)["states"][10])


@pytest.mark.slow
def test_a_training_takes_over_nothing_of_another_configuration(tmp_path):
    """As of a trial of the same name, where the trials table was restored from a copy older than the folders."""
    other = EVERY_EPOCH.model_copy(update={"learning_rate": 3e-3})
    assert fit(Storage(tmp_path), other, stop=stored) == [3, 6, 10]
    assert fit(Storage(tmp_path), stop=stored) == [3, 6, 10]
    assert_same_tensors(checkpoint.latest(Storage(tmp_path))[1].state, record(EVERY_EPOCH)["states"][10])


@pytest.mark.slow
def test_what_the_storage_refuses_ends_the_training_and_the_one_before_is_gone_on_from(held):
    HeldFiles.go_on.set()

    def log(metrics: loop.Metrics) -> None:
        stored()
        if metrics["epoch"] == 2:
            HeldFiles.broken.set()

    with pytest.raises(OSError, match="No space left on device"):
        fit(held, log=log)
    stored()
    assert checkpoint.latest(held)[1].meta["step"] == 3
    HeldFiles.broken.clear()
    assert fit(held, stop=stored) == [3, 6, 10]  # the first again: nobody knows whether it was heard of
    assert_same_tensors(checkpoint.latest(held)[1].state, record(EVERY_EPOCH)["states"][10])


def test_an_interrupted_training_ends_when_all_its_checkpoints_are_stored(held):
    asked = iter(range(1, 100))

    def stop() -> bool:
        if next(asked) < 5:
            return False
        HeldFiles.go_on.set()  # until here that of epoch 1 is held
        return True

    with pytest.raises(loop.InterruptedTrainingError):
        fit(held, stop=stop)
    assert checkpoint.names(held) == ["checkpoint_000000003", "checkpoint_000000005"]
    assert checkpoint.latest(held)[1].meta["step"] == 5


def test_a_failed_training_leaves_the_checkpoint_that_was_being_stored(held):
    def fail(metrics: loop.Metrics) -> None:
        if metrics["epoch"] == 2:
            HeldFiles.go_on.set()
            raise loop.TrainingFailedError("as a loss that is not finite does")

    with pytest.raises(loop.TrainingFailedError):
        fit(held, log=fail)
    assert checkpoint.latest(held)[1].meta["step"] == 3


def test_two_checkpoints_are_kept_and_the_last_two_rungs_and_broken_ones_are_not_counted(tmp_path):
    checkpoints, kept = Storage(tmp_path), []
    checkpoints.write("checkpoint_000000011/state.pt", b"a process was killed here")

    def log(metrics: loop.Metrics) -> None:
        stored()
        kept.append([int(name[-2:]) for name in checkpoint.names(checkpoints)])

    config = EVERY_EPOCH.model_copy(update={"epochs": 5})  # ends at steps 3, 6, 10, 13 and 17
    assert fit(checkpoints, config, rungs=[1, 2], log=log, stop=stored) == [3, 6, 10, 13, 17]
    assert kept == [[11], [3, 11], [3, 6, 11], [3, 6, 10, 11], [3, 6, 10, 13]]
    assert [int(name[-2:]) for name in checkpoint.names(checkpoints)] == [6, 13, 17]


def test_a_training_resumed_within_a_second_logs_into_a_file_that_is_read_later(tmp_path):
    for first_epoch in (1, 2):
        EventLog(Storage(tmp_path), TINY, first_epoch).close()
    first, second = sorted(tmp_path.glob("*tfevents*"), key=lambda file: file.stat().st_mtime_ns)
    assert int(first.name.split(".")[3]) < int(second.name.split(".")[3])


@pytest.mark.slow
def test_what_is_to_be_watched_is_in_the_events(tmp_path):
    """Of a training that was cut in its second epoch and resumed: every epoch once."""
    images = toy_images()
    sampler = SamplerConfig(steps=2, block_size=4)
    scorer = RungScorer(
        extractor=None, reference=None, probe=images.pixels[:4], images=4, sampler=sampler, metric="grid_loss"
    )
    events, calls = Storage(tmp_path / "events"), iter(range(1, 100))
    settings: dict[str, Any] = {"score": scorer, "rungs": [1, 2], "events": events}
    with pytest.raises(loop.InterruptedTrainingError):
        fit(Storage(tmp_path / "run"), stop=lambda: next(calls) >= 5, **settings)
    fit(Storage(tmp_path / "run"), **settings)

    found = EventAccumulator(str(tmp_path / "events")).Reload()
    scalars = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    epochs = {1, 2, 3}
    for tag in ("train/loss", "train/learning_rate", "train/gradient_norm", "train/ema_decay", "rung/grid_loss"):
        assert set(scalars[tag]) == epochs, tag
    for tag in ("speed/images_per_second", "speed/epoch_seconds"):
        assert set(scalars[tag]) == epochs, tag
        assert all(value > 0 for value in scalars[tag].values()), tag
    assert scalars["train/ema_decay"] == pytest.approx({1: 4 / 13, 2: 7 / 16, 3: 11 / 20})
    assert scalars["train/learning_rate"] == pytest.approx({1: 1e-3, 2: 0.85e-3, 3: 0.85**2 * 1e-3})
    assert {image.step for image in found.Images("samples")} <= epochs
    whole = record(TINY)["metrics"]
    assert scalars["train/loss"] == pytest.approx({epoch: whole[epoch]["train_loss"] for epoch in epochs})
