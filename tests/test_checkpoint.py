"""Checkpoints: whole or not at all, verified, and nothing in them is unpickled."""

import pickle

import pytest
import torch

from trainer import checkpoint, model
from trainer.checkpoint import Checkpoint
from trainer.config import ModelConfig, TrainConfig
from trainer.storage import Storage
from trainer.upload import Uploader

CONFIG = TrainConfig(model=ModelConfig(channels=(4, 8), attention=(False, True), attention_head_dim=8, norm_groups=2))


@pytest.fixture
def folder(tmp_path) -> Storage:
    network = model.build(CONFIG.model, (1, 8, 8), 0.0, seed=3)
    weights = network.state_dict()
    averaged = {name: value + 1 for name, value in weights.items()}
    meta = {
        "step": 5,
        "epoch": 1,
        "image_shape": [1, 8, 8],
        "ema_decay": 0.99,
        "config": CONFIG.model_dump(mode="json"),
    }
    state = {"model": weights, "ema": {"0.99": averaged}, "optimizer": {}}
    for name in ("checkpoint_000000005", "checkpoint_000000010"):
        checkpoint.save(Storage(tmp_path / name), state, meta)
    return Storage(tmp_path)


def test_a_checkpoint_comes_back_as_it_was(folder):
    found = checkpoint.load(folder.at("checkpoint_000000005"))
    assert found.config == CONFIG
    assert found.meta["step"] == 5
    raw, averaged = found.denoiser("raw"), found.denoiser()
    for ours, theirs in zip(averaged.parameters(), raw.parameters(), strict=True):
        assert torch.equal(ours, theirs + 1)
    assert not averaged.training


def test_the_newest_whole_one_is_found_and_broken_ones_are_named(folder, capsys):
    newest = "checkpoint_000000010"
    assert checkpoint.latest(folder)[0].uri.endswith(newest)
    content = folder.read(f"{newest}/state.pt")
    for broken in (content[: len(content) // 2], content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]):
        folder.write(f"{newest}/state.pt", broken)
        with pytest.raises(checkpoint.BrokenCheckpointError, match=newest):
            checkpoint.load(folder.at(newest))
        assert checkpoint.latest(folder)[0].uri.endswith("checkpoint_000000005")
        assert newest in capsys.readouterr().out


def test_those_of_another_configuration_are_named_and_passed_over(folder, capsys):
    assert checkpoint.latest(folder, of=CONFIG)[0].uri.endswith("checkpoint_000000010")
    assert checkpoint.latest(folder, of=CONFIG.model_copy(update={"workers": 2})) is not None  # changes nothing learned
    assert checkpoint.latest(folder, of=CONFIG.model_copy(update={"learning_rate": 1e-5})) is None
    said = capsys.readouterr().out
    assert said.count("of another configuration") == 2
    assert "checkpoint_000000005" in said
    found = checkpoint.load(folder.at("checkpoint_000000010"))
    del found.meta["sha256"]
    settings = CONFIG.model_dump(mode="json") | {"of_another_version": 1}
    checkpoint.save(folder.at("checkpoint_000000010"), found.state, found.meta | {"config": settings})
    assert checkpoint.latest(folder, of=CONFIG)[0].uri.endswith("checkpoint_000000005")


def test_ray_trains_own_file_beside_them_is_no_checkpoint(folder):
    folder.write("checkpoint_manager_snapshot.json", b"{}")
    assert checkpoint.names(folder) == ["checkpoint_000000005", "checkpoint_000000010"]
    assert checkpoint.latest(folder)[0].uri.endswith("checkpoint_000000010")


def test_a_write_that_was_cut_before_its_end_is_no_checkpoint(folder):
    folder.delete("checkpoint_000000010/checkpoint.json")
    assert checkpoint.latest(folder)[0].uri.endswith("checkpoint_000000005")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 2}'])
def test_a_damaged_description_is_a_broken_checkpoint(folder, text):
    folder.write("checkpoint_000000010/checkpoint.json", text.encode())
    with pytest.raises(checkpoint.BrokenCheckpointError):
        checkpoint.load(folder.at("checkpoint_000000010"))


def test_a_changed_byte_of_the_description_is_noticed(folder):
    text = folder.read("checkpoint_000000010/checkpoint.json")
    folder.write("checkpoint_000000010/checkpoint.json", text.replace(b'"step": 5', b'"step": 7'))
    with pytest.raises(checkpoint.BrokenCheckpointError, match="does not match"):
        checkpoint.load(folder.at("checkpoint_000000010"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_checkpoint_is_executed(folder, tmp_path):
    import os

    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)

    content = pickle.dumps(Harmful())
    meta = folder.read_json("checkpoint_000000005/checkpoint.json")
    folder.write("checkpoint_000000005/state.pt", content)
    del meta["sha256"]
    folder.write_json("checkpoint_000000005/checkpoint.json", meta | {"sha256": checkpoint._digest(meta, content)})
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(folder.at("checkpoint_000000005"))
    assert not (tmp_path / "harm").exists()


def test_the_newest_of_a_rung_is_found_behind_a_newer_one(folder):
    found = checkpoint.load(folder.at("checkpoint_000000005"))
    assert checkpoint.latest(folder, of_a_rung=True) is None
    del found.meta["sha256"]
    for step, rung in ((5, True), (10, False)):
        metrics = {"epoch": 1, "rung": rung}
        checkpoint.save(folder.at(f"checkpoint_{step:09d}"), found.state, found.meta | {"metrics": metrics})
    assert checkpoint.latest(folder, of_a_rung=True)[0].uri.endswith("checkpoint_000000005")
    assert checkpoint.latest(folder)[0].uri.endswith("checkpoint_000000010")


def test_those_of_another_configuration_are_not_kept_in_place_of_ours(folder):
    """As where a trial's folder holds what an earlier search of that name left."""
    found = checkpoint.load(folder.at("checkpoint_000000005"))
    for name in checkpoint.names(folder):
        folder.delete(name)

    def store(step: int, rung: bool, **changes) -> None:
        config = CONFIG.model_copy(update=changes).model_dump(mode="json")
        meta = {name: value for name, value in found.meta.items() if name != "sha256"}
        taken = Checkpoint(meta | {"step": step, "config": config, "metrics": {"rung": rung}}, found.state)
        if changes:
            checkpoint.save(folder.at(checkpoint.name_of(step)), taken.state, taken.meta)
        else:
            with Uploader(folder) as uploader:
                uploader.start(taken, then=lambda folder: None)

    for step, rung in ((8, True), (11, False), (99, True)):
        store(step, rung, learning_rate=1e-5)
    for step, rung in ((3, True), (6, False), (10, False), (12, False)):
        store(step, rung)
    assert [int(name[-2:]) for name in checkpoint.names(folder)] == [3, 10, 12, 99]
