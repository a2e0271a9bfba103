"""The laws of training: workers, restarts, parts and measurements change nothing that is learned."""

import copy
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer import checkpoint, loop
from trainer.checkpoint import Checkpoint
from trainer.config import DataConfig, ModelConfig, SpeedConfig, TrainConfig
from trainer.data import Images, batch_indices, epoch_end
from trainer.ema import EMA
from trainer.failures import failure_report
from trainer.step import TrainStep, Worker
from trainer.storage import Storage

CPU = Worker(torch.device("cpu"))
TINY = TrainConfig(
    model=ModelConfig(
        channels=(4, 8), attention=(False, True), layers_per_block=1, attention_head_dim=8, norm_groups=2
    ),
    epochs=3,
    batch_size=7,
    learning_rate=1e-3,
    lr_decay_epochs=1,
    dropout=0.0,
    ema_decays=(0.99,),
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on tiny tensors are many times slower than one where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_images(count: int = 24) -> Images:
    rng = np.random.default_rng(0)
    return Images(rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8), np.arange(count) % 3)


def record(config: TrainConfig, worker: Worker = CPU, **arguments) -> dict:
    """Trains and returns {metrics: by epoch, states: checkpoints' state by step}."""
    seen: dict = {"metrics": {}, "states": {}, "metas": {}}

    def report(metrics, snapshot):
        taken = snapshot()
        seen["states"][metrics["step"]], seen["metas"][metrics["step"]] = taken.state, taken.meta

    images = arguments.pop("images", toy_images())
    arguments.setdefault("log", lambda metrics, samples: seen["metrics"].__setitem__(metrics["epoch"], dict(metrics)))
    loop.train(config, images, worker, report, **arguments)
    return seen


def assert_same_tensors(first, second) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_tensors(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_tensors(a, b)
    else:
        assert first == second


def test_an_epoch_visits_every_image_once():
    for size in (1, 5, 7, 24):
        steps = epoch_end(size, 24, size)  # `size` epochs end at a whole number of batches
        visited = torch.cat([batch_indices(3, step, 24, size) for step in range(steps)])
        assert torch.equal(torch.bincount(visited, minlength=24), torch.full((24,), size))


def test_batches_depend_on_seed_and_step_alone():
    assert torch.equal(batch_indices(3, 11, 24, 7), batch_indices(3, 11, 24, 7))
    assert not torch.equal(batch_indices(3, 11, 24, 7), batch_indices(4, 11, 24, 7))


def test_the_learning_rate_falls_by_its_factor_after_its_epochs():
    seen = record(TINY.model_copy(update={"lr_decay": 0.5, "lr_decay_epochs": 2, "epochs": 5}))
    rates = [seen["metrics"][epoch]["learning_rate"] for epoch in range(1, 6)]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])


def test_the_same_seed_trains_the_same_model_and_another_seed_another():
    first, again = record(TINY), record(TINY)
    assert_same_tensors(first["states"], again["states"])
    other = record(TINY.model_copy(update={"seed": 1}))
    assert first["metrics"][1]["train_loss"] != other["metrics"][1]["train_loss"]


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 6, 8])  # epochs end after steps 3, 6 and 10
def test_resumed_run_equals_uninterrupted_run(tmp_path, cut):
    config = TINY.model_copy(update={"dropout": 0.3, "data": DataConfig(horizontal_flip=True)})
    whole = record(config, rungs=[1, 2])
    steps_done = iter(range(1, 100))
    part: dict = {}

    def report(metrics, snapshot):
        taken = snapshot()
        checkpoint.save(Storage(tmp_path / "cut"), taken.state, taken.meta)
        part.update(metrics)

    with pytest.raises(loop.InterruptedTrainingError):
        loop.train(config, toy_images(), CPU, report, rungs=[1, 2], stop=lambda: next(steps_done) >= cut)
    assert part["step"] == cut
    torch.manual_seed(999)  # whatever a new process has drawn before
    resumed = record(config, rungs=[1, 2], resume=checkpoint.load(Storage(tmp_path / "cut")))
    assert_same_tensors(resumed["states"][10], whole["states"][10])
    for epoch, metrics in resumed["metrics"].items():
        for name in ("step", "train_loss", "learning_rate", "gradient_norm", "ema_decay"):
            assert metrics[name] == whole["metrics"][epoch][name], (epoch, name)
    told = [[(rung["epoch"], rung["train_loss"]) for rung in run["metas"][10]["rungs"]] for run in (resumed, whole)]
    assert told[0] == told[1]
    assert [epoch for epoch, _ in told[0]] == [1, 2, 3]  # whatever noted them: see search/trial.py


def test_scoring_at_rungs_changes_nothing_that_is_learned():
    def score(denoiser, config, device):
        torch.randn(1000)
        torch.manual_seed(5)
        denoiser(torch.randn(2, 1, 8, 8), torch.zeros(2))
        return {"frechet": 1.0, "objective": 1.0}

    scored = record(TINY.model_copy(update={"dropout": 0.3}), score=score, rungs=[1, 2])
    plain = record(TINY.model_copy(update={"dropout": 0.3}))
    assert_same_tensors(scored["states"][10]["model"], plain["states"][10]["model"])
    assert [scored["metrics"][epoch].get("frechet") for epoch in (1, 2, 3)] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_the_gradient_of_parts_is_the_gradient_of_the_batch():
    whole = record(TINY)
    for size in (1, 3, 7):
        parts = record(TINY.model_copy(update={"micro_batch": size}))
        for epoch in (1, 2, 3):
            assert parts["metrics"][epoch]["train_loss"] == pytest.approx(
                whole["metrics"][epoch]["train_loss"], rel=1e-5
            )


def test_memory_format_and_fused_optimiser_change_only_rounding():
    plain = record(TINY.model_copy(update={"speed": SpeedConfig(channels_last=False, fused_adam=False)}))
    fast = record(TINY)
    for epoch in (1, 2, 3):
        assert fast["metrics"][epoch]["train_loss"] == pytest.approx(plain["metrics"][epoch]["train_loss"], rel=1e-5)


def test_bf16_learns_as_fp32_does_within_its_precision():
    half = record(TINY.model_copy(update={"speed": SpeedConfig(bf16=True)}))
    full = record(TINY)
    assert half["metrics"][3]["train_loss"] == pytest.approx(full["metrics"][3]["train_loss"], rel=0.02)
    assert half["metrics"][3]["train_loss"] != full["metrics"][3]["train_loss"]


def test_a_training_that_is_read_from_a_memory_map_is_the_same(tmp_path):
    np.save(tmp_path / "pixels.npy", toy_images().pixels)
    mapped = Images(np.load(tmp_path / "pixels.npy", mmap_mode="r"), None)
    assert_same_tensors(record(TINY, images=mapped)["states"], record(TINY)["states"])


# Adam's first step is learning_rate / 0.1 long: too long for a float32, so that the first step breaks every weight.
BREAKS = TINY.model_copy(update={"learning_rate": 1e39, "batch_size": 24, "checkpoint_seconds": None, "epochs": 2})


def test_a_loss_that_is_not_finite_stops_with_its_step_and_the_last_finite_one():
    """Of the epoch before, too: an epoch is one step here."""
    loss = TrainStep(BREAKS, toy_images(), CPU)(0)[0].item()
    with pytest.raises(loop.TrainingFailedError) as failed:
        record(BREAKS)
    assert str(failed.value) == f"the loss is nan at step 2 (epoch 2); the last finite one was {loss:.4g}"
    assert 0 < failed.value.worker_seconds < 60  # what it took until then


@pytest.mark.parametrize(
    "changes", [{"epochs": 1}, {"checkpoint_epochs": 1}, {"batch_size": 8, "checkpoint_seconds": 0}]
)
def test_weights_that_the_last_step_broke_are_neither_scored_nor_stored(changes, monkeypatch):
    """The loss is of the weights before."""
    monkeypatch.setattr(loop, "CHECK_STEPS", 1)
    with pytest.raises(loop.TrainingFailedError) as failed:
        loop.train(
            BREAKS.model_copy(update=changes),
            toy_images(),
            CPU,
            lambda metrics, snapshot: pytest.fail("stored"),
            score=lambda *of: pytest.fail("scored"),
        )
    assert re.fullmatch(
        r"weights are not finite after step 1 \(epoch 1\), whose loss was still [01]\.\d+", str(failed.value)
    )
    assert 0 < failed.value.worker_seconds < 60


@pytest.mark.parametrize("where", ["report", "log"])
def test_what_a_training_took_is_known_however_it_ends(where):
    def fails(metrics, what):
        raise OSError(28, "No space left on device")

    handed = {"report": lambda metrics, snapshot: None} | {where: fails}
    with pytest.raises(OSError, match="No space") as failed:
        loop.train(TINY, toy_images(), CPU, **handed)
    report = failure_report(failed.value)
    assert report["failure"] == "OSError: [Errno 28] No space left on device"
    assert 0 < report["worker_seconds"] < 60


def test_a_score_that_is_no_number_is_none():
    """As of weights that are finite and huge: JSON has no word for it, and the checkpoint would not be stored."""

    def score(denoiser, config, device):
        return {"grid_loss": float("nan"), "frechet": float("inf"), "score": 1.0, "objective": float("inf")}

    metrics = record(TINY.model_copy(update={"ema_decays": (0.5, 0.9)}), score=score)["metrics"][3]
    assert (metrics["grid_loss"], metrics["frechet"], metrics["score"]) == (None, None, 1.0)
    assert metrics["ema_objectives"] == {"0.5": None, "0.9": None}


def test_a_training_is_not_resumed_with_another_number_of_images():
    taken = record(TINY, rungs=[1])
    begun = Checkpoint(taken["metas"][3], taken["states"][3])
    for other in (toy_images(12), toy_images(40)):
        with pytest.raises(loop.TrainingFailedError, match=f"{len(other)} training images by now, but .* began with"):
            record(TINY, resume=begun, images=other)


def test_a_resumed_training_knows_the_last_loss_of_the_one_before():
    taken = record(TINY, rungs=[1])
    advance = TrainStep(TINY, toy_images(), CPU)
    losses = [advance(step)[0].item() for step in range(3)]  # an epoch
    state, meta = taken["states"][3], taken["metas"][3]
    state["model"]["conv_out.bias"][:] = torch.nan
    with pytest.raises(loop.TrainingFailedError) as failed:
        record(TINY, resume=Checkpoint(meta, state))
    assert str(failed.value) == f"the loss is nan at step 4 (epoch 2); the last finite one was {losses[-1]:.4g}"


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(loop.TrainingFailedError, match="batch_size must be at most the number of training images, 24"):
        record(TINY.model_copy(update={"batch_size": 25}))


def test_ema_follows_its_recursion_with_warm_up():
    weight = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(weight, 0.9)
    expected = weight.weight.item()
    for n in range(200):
        with torch.no_grad():
            weight.weight.fill_(math.sin(n))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * math.sin(n)
        ema.update(weight)
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_several_averages_are_each_what_a_training_of_their_own_gives_and_the_best_is_kept(tmp_path):
    decays = (0.2, 0.3, 0.99)  # the warm-up reaches 0.53 in ten steps
    alone = {decay: record(TINY.model_copy(update={"ema_decays": (decay,)}))["states"][10]["ema"] for decay in decays}
    wanted = alone[0.3]["0.3"]["conv_out.bias"]

    def score(denoiser, config, device):
        is_wanted = torch.equal(denoiser.state_dict()["conv_out.bias"], wanted)
        return {"frechet": 0.0 if is_wanted else 1.0, "objective": 0.0 if is_wanted else 1.0}

    together = record(TINY.model_copy(update={"ema_decays": decays}), score=score)
    for decay in decays:
        assert_same_tensors(together["states"][10]["ema"][str(decay)], alone[decay][str(decay)])
    assert together["metrics"][3]["ema_objectives"] == {"0.2": 1.0, "0.3": 0.0, "0.99": 1.0}
    checkpoint.save(Storage(tmp_path), together["states"][10], together["metas"][10])
    kept = checkpoint.load(Storage(tmp_path)).denoiser()
    assert torch.equal(kept.state_dict()["conv_out.bias"], wanted)


def test_checkpoints_come_by_the_clock_by_epochs_at_rungs_and_at_the_end():
    for seconds, epochs, steps in ((60.0, None, [6, 10]), (0.0, None, [3, 6, 10]), (None, 1, [3, 6, 10])):
        config = TINY.model_copy(update={"checkpoint_seconds": seconds, "checkpoint_epochs": epochs})
        assert list(record(config, rungs=[2])["states"]) == steps, (seconds, epochs)


def test_a_resumed_training_may_change_what_changes_nothing_that_is_learned():
    free = {"micro_batch": 2, "workers": 3, "min_workers": 1, "checkpoint_epochs": 1, "speed": SpeedConfig(bf16=True)}
    assert TINY.model_copy(update=free).learned() == TINY.learned()
    elsewhere = TINY.data.model_copy(update={"root": "/mnt", "download": True, "name": "folder:/mnt/images"})
    assert TINY.model_copy(update={"data": elsewhere}).learned() == TINY.learned()
    other = TINY.data.model_copy(update={"seed": 1})
    assert TINY.model_copy(update={"data": other}).learned() != TINY.learned()
    for name, value in {"batch_size": 8, "seed": 1, "learning_rate": 1.0, "ema_decays": (0.5,)}.items():
        assert TINY.model_copy(update={name: value}).learned() != TINY.learned(), name


PLAIN, AUTO = SpeedConfig(channels_last=False, fused_adam=False), SpeedConfig()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"speed": PLAIN}, {"speed": AUTO}),
        ({"speed": AUTO}, {"speed": PLAIN}),
        ({"speed": AUTO}, {"speed": SpeedConfig(channels_last=False)}),
        ({"speed": AUTO}, {"speed": SpeedConfig(fused_adam=False)}),
        ({"micro_batch": 2}, {"micro_batch": 3}),
        ({}, {"checkpoint_seconds": 0.0, "checkpoint_epochs": 1, "hang_seconds": 5}),
    ],
)
def test_a_training_resumed_with_other_settings_that_change_nothing_learns_the_same(before, after):
    config = TINY.model_copy(update={"epochs": 8})
    whole = record(config)
    steps_done = iter(range(1, 100))
    taken: dict = {}

    def report(metrics, snapshot):
        taken["checkpoint"] = snapshot()

    with pytest.raises(loop.InterruptedTrainingError):
        loop.train(config.model_copy(update=before), toy_images(), CPU, report, stop=lambda: next(steps_done) >= 14)
    resumed = record(config.model_copy(update=after), resume=taken["checkpoint"])
    for epoch, metrics in resumed["metrics"].items():
        assert metrics["train_loss"] == pytest.approx(whole["metrics"][epoch]["train_loss"], rel=1e-4), epoch
    (group,) = resumed["states"][27]["optimizer"]["param_groups"]
    assert group["fused"] == (after.get("speed", AUTO).fused_adam == "auto")


def test_a_checkpoint_of_the_clock_waits_until_it_can_be_stored():
    config = TINY.model_copy(update={"epochs": 4, "checkpoint_seconds": 0.0})
    answers = iter([False, True, False, False])
    assert list(record(config, ready=lambda: next(answers))["states"]) == [6, 13]


def _worker(rank: int, world_size: int, folder: str, config: TrainConfig) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    seen = record(config, Worker(torch.device("cpu"), rank, world_size), rungs=[1])
    torch.save({"metrics": seen["metrics"], "state": seen["states"][10]["model"]}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_loss_curve_does_not_depend_on_the_number_of_workers(tmp_path, micro_batch):
    """Batch 7 on 1, 2 and 3 workers, dropout 0: sums in another order, so within 1e-5 after ten steps."""
    config = TINY.model_copy(update={"micro_batch": micro_batch})
    one = record(config, rungs=[1])
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        mp.spawn(_worker, (world_size, str(folder), config), nprocs=world_size)
        ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
        for epoch in (1, 2, 3):
            assert ranks[0]["metrics"][epoch]["train_loss"] == pytest.approx(
                one["metrics"][epoch]["train_loss"], rel=1e-5
            )
            assert ranks[0]["metrics"][epoch]["gradient_norm"] == pytest.approx(
                one["metrics"][epoch]["gradient_norm"], rel=1e-4
            )
        for name, value in ranks[0]["state"].items():
            for other in ranks[1:]:
                assert torch.equal(value, other["state"][name]), f"ranks differ in {name}"
            # Adam makes steps of 1e-3 out of gradients that are nothing but rounding
            torch.testing.assert_close(value, one["states"][10]["model"][name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_training_begun_by_two_workers_goes_on_with_one(tmp_path):
    """What an elastic trial does when it loses a node: the curve goes on as if nothing had happened."""
    whole = record(TINY, rungs=[1])
    mp.spawn(_first_epochs, (2, str(tmp_path)), nprocs=2)
    resumed = record(TINY, rungs=[1], resume=checkpoint.load(Storage(tmp_path / "cut")))
    assert sorted(resumed["metrics"]) == [2, 3]
    for epoch in (2, 3):
        assert resumed["metrics"][epoch]["train_loss"] == pytest.approx(whole["metrics"][epoch]["train_loss"], rel=1e-5)


def _first_epochs(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)

    def report(metrics, snapshot):
        if rank == 0 and metrics["epoch"] == 1:
            taken = snapshot()
            checkpoint.save(Storage(Path(folder) / "cut"), taken.state, taken.meta)

    loop.train(TINY, toy_images(), Worker(torch.device("cpu"), rank, world_size), report, rungs=[1])
    dist.destroy_process_group()


def test_one_step_is_what_plain_pytorch_does():
    """An independent step: same batch, same noise, textbook formulas, torch's own Adam."""
    images, config = toy_images(), TINY.model_copy(update={"gradient_clip": 0.05})
    advance = TrainStep(config, images, CPU)
    reference = copy.deepcopy(advance.network)
    loss, norm = advance(0)

    from trainer.step import step_seed

    generator = torch.Generator().manual_seed(step_seed(config.seed, 0))
    t = torch.randint(1000, (7,), generator=generator)
    noise = torch.randn((7, 1, 8, 8), generator=generator)
    x_0 = torch.from_numpy(images.pixels[batch_indices(config.seed, 0, 24, 7).numpy()]).permute(0, 3, 1, 2) / 127.5 - 1
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    x_t = (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise).float()
    expected = torch.nn.functional.mse_loss(reference(x_t, t).sample, noise)
    optimizer = torch.optim.Adam(reference.parameters(), lr=config.learning_rate)
    expected.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    optimizer.step()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(advance.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
