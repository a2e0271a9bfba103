"""The model card: what was trained, on what and under which licence, and how good it is."""

import json
from typing import Any

import pytest
import torch

from evaluation.card import LICENCES, model_card, published
from trainer import model
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.published import PUBLISHED

ROW = {"trial": "t0003-cosine", "seed": 7, "epoch": 90, "state": "completed", "worker_seconds": 7200.0}


def trained(**settings: Any) -> Checkpoint:
    """A checkpoint as far as a card looks at it; weights of 3 x 5 and 7 numbers."""
    schedule = {"family": "cosine", "start": 0, "end": 1, "steps": 200}
    config = TrainConfig.model_validate({"schedule": schedule, **settings})
    meta = {"config": config.model_dump(mode="json"), "image_shape": (1, 8, 12)}
    return Checkpoint(meta, {"model": {"weight": torch.zeros(3, 5), "bias": torch.zeros(7)}})


def card(ranking: dict[str, Any] | None, entry: dict[str, Any] | None, **how: Any) -> str:
    return model_card("a search", ROW, trained(), ranking, entry, **how)


def table_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The card's first table: name → value."""
    lines = model_card("a search", ROW, checkpoint, None, None).split("## Quality")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| |")]
    return dict(row for row in rows if len(row) == 2)


def test_card_states_what_was_trained_and_the_model():
    said = table_of(
        trained(
            model={"channels": [64, 128], "attention": [False, True], "attention_head_dim": 64, "layers_per_block": 1},
            **{"batch_size": 32, "learning_rate": 3e-4, "dropout": 0.25},
            data={"name": "cifar10", "subset": 6250, "seed": 3},
        )
    )
    assert said["Noise schedule"] == "cosine(0, 1, tau 1)"
    assert (said["Diffusion steps T"], said["Batch size"]) == ("200", "32")
    assert (said["Learning rate"], said["Dropout"]) == ("0.0003", "0.25")
    assert said["Model"] == (
        "U-Net, channels 64, 128, 1 layers a block, self-attention at level 2 and in the middle (64 channels a head)"
    )
    assert said["Parameters"] == "22"
    assert said["Images"] == "12 × 8, grey"
    assert said["Data"] == "cifar10, 6,250 images drawn by seed 3; trained on 80% of them, the rest held out"
    assert said["Training cost"] == "2 worker-hours for this trial"


def test_a_schedule_read_as_beta_is_labelled_so_wherever_that_was_set():
    """`space: beta` may be the base training's, of which the trials table says nothing."""
    schedule = {"family": "cosine", "start": 0, "end": 1, "steps": 200, "space": "beta"}
    assert table_of(trained(schedule=schedule))["Noise schedule"] == "cosine(0, 1, tau 1) as beta"


def test_stored_weights_are_the_model_s_parameters():
    config = trained().config.model
    network = model.build(config.model_copy(update={"channels": (64, 64), "attention": (False, True)}), (1, 8, 8), 0, 0)
    stored = sum(weight.numel() for weight in network.state_dict().values())
    assert stored == sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize("name", ["digits", *PUBLISHED])
def test_the_data_s_licence_is_said_of_every_data_set_that_is_known_by_name(name):
    assert table_of(trained(data={"name": name}))["Licence of the data"] == LICENCES[name]


@pytest.mark.parametrize("name", ["folder:/data/mine", "parquet:/data/mine/train-*.parquet"])
def test_of_a_user_s_own_data_nothing_is_claimed(name):
    assert table_of(trained(data={"name": name}))["Licence of the data"] == "the licence of your own data applies"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("folder:/home/me/secret/birds", "folder:birds"),
        ("folder:~/secret/birds/", "folder:birds"),
        ("parquet:/home/me/secret/train-*.parquet", "parquet:train-*.parquet"),
        ("cifar10", "cifar10"),
    ],
)
def test_an_export_that_is_published_names_no_folder_of_its_maker_s(name, shown):
    own = trained(data={"name": name, "root": "/home/me/secret"})
    said = model_card("a search", ROW, own, None, None)
    assert f"# DDPM of {shown}: " in said
    assert table_of(own)["Data"].startswith(f"{shown}; trained on 80%")
    for text in (said, json.dumps(published(own.meta))):
        assert "secret" not in text
        assert shown in text


def test_scores_of_other_weights_are_not_put_on_a_card():
    entry = {"rank": 1, "trial": "t0003-cosine"}
    said = card({"weights": "ema"}, entry, weights="raw")
    assert "the ranking is of the ema weights" in said


def test_card_of_a_confirmed_configuration_names_every_seed_and_this_one():
    estimate = {"mean": 8.9, "value": 7.0, "ci": [8.5, 9.3]}
    trainings = [
        {"trial": "t0003-cosine", "seed": 7, "score": 9.4, "frechet": 6.0},
        {"trial": "t0003-cosine-seed8", "seed": 8, "score": 8.9, "frechet": 7.0},
        {"trial": "t0003-cosine-seed9", "seed": 9, "score": None, "frechet": None, "reason": "the loss is nan"},
    ]
    entry = {
        **{"rank": 1, "trial": "t0003-cosine", "score": estimate, "frechet": estimate, "p_best": 0.8, "tied_with": []},
        **{"confirmed": True, "reason": None, "mean_of": ["t0003-cosine-seed8"] * 3, "trainings": trainings},
        "at_real_n": {"n": 360, "score": 8.8, "frechet": 8.0},
    }
    real = {"n": 360, "score": 9.7, "frechet": 1.0}
    ranking = {
        **{
            "score_name": "classifier score",
            "images": 1000,
            "real": real,
            "trials": [entry],
            "extractor": "classifier",
        },
        **{"split_size": 500, "sampler": {"name": "ddim"}, "weights": "ema"},
    }
    said = card(ranking, entry)
    assert "| the configuration, mean of 3 new seeds, 1,000 images | 8.900 [8.500, 9.300] |" in said
    assert "Seed 7 (t0003-cosine): classifier score 9.400, Fréchet distance 6.000; **this model**." in said
    assert "Seed 8 (t0003-cosine-seed8): classifier score 8.900, Fréchet distance 7.000." in said
    assert "Seed 9 (t0003-cosine-seed9): no score: the loss is nan." in said
    assert "intervals, of the configuration." in said

    entry = {**entry, "confirmed": False, "trial": "t0003-cosine-seed8", "mean_of": ["t0003-cosine-seed8"]}
    said = card(ranking, entry)
    assert "| its first training, t0003-cosine-seed8, 1,000 images | 8.900 [8.500, 9.300] |" in said
    assert "Seed 7 (t0003-cosine): classifier score 9.400, Fréchet distance 6.000; **this model**." in said
    assert "intervals, of t0003-cosine-seed8, not of its configuration." in said


def test_card_states_parameters_scores_with_intervals_and_cost():
    entry = {
        **{"rank": 1, "score": {"mean": 9.5, "ci": [9.4, 9.6]}, "frechet": {"value": 5.0, "ci": [4.8, 5.2]}},
        **{"at_real_n": {"n": 360, "score": 9.2, "frechet": 7.9}, "p_best": 0.999, "trial": "t0003-cosine"},
        **{"tied_with": ["t0"], "confirmed": False, "steps": 20},
    }
    ranking = {
        **{"score_name": "classifier score", "images": 10_000, "split_size": 5_000},
        "sampler": {"name": "ddim", "steps": 50, "eta": 0.0, "seed": 3},
        **{"extractor": "classifier of digits", "real": {"n": 360, "score": 9.77, "frechet": 1.25}, "trials": [entry]},
    }
    said = card(ranking, entry)
    assert said.startswith("---\nlibrary_name: diffusers\n")
    for part in ("cosine(0, 1, tau 1)", "| Training seed | 7 |", "9.500 [9.400, 9.600]", "5.000 [4.800, 5.200]"):
        assert part in said
    assert "| real held-out images, 360 | 9.770 | 1.250 |" in said
    assert "2 worker-hours" in said
    assert "best with probability > 0.99; tied with t0." in said  # a simulation is never sure
    assert "splits of 5,000 images; DDIM, 20 steps, eta 0, seed 3." in said  # T has no more


def test_a_card_says_what_is_left_over_by_whole_splits_and_no_number_of_images_twice():
    entry = {
        **{"rank": 1, "score": {"mean": 6.3, "ci": [5.9, 6.8]}, "frechet": {"value": 30.5, "ci": [27.5, 33.6]}},
        **{"at_real_n": {"n": 250, "score": 6.3, "frechet": 30.5}, "p_best": 0.6, "trial": "t0003-cosine"},
        **{"tied_with": [], "confirmed": False},
    }
    ranking = {
        **{"score_name": "classifier score", "images": 250, "split_size": 101, "dropped": 48},
        **{"extractor": "classifier", "real": {"n": 250, "score": 9.6, "frechet": 0.7}, "trials": [entry]},
        "sampler": {"name": "ddim"},
    }
    said = card(ranking, entry)
    assert "splits of 101 images, 48 left over; DDIM" in said
    assert said.count("| this model, 250 images |") == 1


def test_card_of_a_trial_that_was_not_scored_says_so():
    assert "Not scored by the final stage." in card(None, None)
    failed = {"rank": None, "reason": "it diverged"}
    assert "Not scored by the final stage: it diverged." in card({}, failed)
