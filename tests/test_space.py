"""The conditional space: only the chosen family's parameters, and names that go back and forth."""

import dataclasses

import optuna
import pytest
from pydantic import ValidationError

from search import space
from search.config import UserError
from search.config_file import load
from search.space_config import FAMILIES, KNOWN_POINTS, KnownPoint, Range

CONFIG = load("digits")
DEFINED = space.define_by_run(CONFIG)


def asked(seed: int, config=CONFIG) -> tuple[optuna.Trial, space.Params]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    trial = study.ask()
    return trial, space.define_by_run(config)(trial)


def test_only_the_chosen_family_s_parameters_are_suggested():
    families = set()
    for seed in range(20):
        trial, params = asked(seed)
        family = params["family"]
        families.add(family)
        assert {name.split(".")[0] for name in trial.params if "." in name} <= {family}
        assert trial.distributions == space.distributions(CONFIG, family)
        assert params.keys() == space.parameters(CONFIG, family).keys() | {"family"}
        assert space.contains(CONFIG, params)
    assert families == {"linear", "polynomial", "cosine", "sigmoid"}


def test_a_number_fixes_a_parameter_and_is_not_suggested():
    config = load("digits", ["space.dropout=0.25", "space.families={cosine: {start: 0.1, end: 1, tau: 2}}"])
    trial, params = asked(0, config)
    assert set(trial.params) == {"family", "learning_rate"}
    assert {name: params[name] for name in ("dropout", "cosine.start", "cosine.end", "cosine.tau")} == {
        "dropout": 0.25, "cosine.start": 0.1, "cosine.end": 1.0, "cosine.tau": 2.0,
    }  # fmt: skip


def test_a_linear_schedule_has_no_tau():
    assert "linear.tau" not in space.parameters(CONFIG, "linear")
    assert space.flat(space.known_params(CONFIG, KNOWN_POINTS[0]))["tau"] == 1.0


def test_columns_and_optuna_s_names_are_inverse():
    for seed in range(10):
        _, params = asked(seed)
        assert space.params_of(space.flat(params)) == params
    for point in KNOWN_POINTS:
        params = space.known_params(CONFIG, point)
        assert space.params_of(space.flat(params)) == params


def test_a_known_point_takes_what_it_leaves_out_from_the_base_training():
    left_out = space.known_params(CONFIG, KNOWN_POINTS[1])
    assert (left_out["learning_rate"], left_out["dropout"]) == (CONFIG.train.learning_rate, CONFIG.train.dropout)
    given = KnownPoint(family="cosine", start=0, end=1, learning_rate=5e-3, dropout=0.0)
    assert space.known_params(CONFIG, given)["learning_rate"] == 5e-3
    assert space.known_params(load("digits", ["train.dropout=0.3"]), given)["dropout"] == 0.0


@pytest.mark.parametrize(
    ("change", "inside"),
    [
        ({}, True),
        ({"cosine.start": 0.3}, True),  # a range holds its ends
        ({"cosine.start": 0.31}, False),
        ({"cosine.end": 0.9}, False),  # fixed at 1
        ({"learning_rate": 1.0}, False),
        ({"dropout": 0.25}, False),
    ],
)
def test_contains_is_the_ranges_with_their_ends(change, inside):
    assert space.contains(CONFIG, space.known_params(CONFIG, KNOWN_POINTS[1]) | change) is inside


def test_a_family_that_is_not_searched_is_outside():
    config = load("digits", ["space.families={linear: {start: 1e-4, end: 0.02}}"])
    assert not space.contains(config, space.known_params(config, KNOWN_POINTS[1]))
    assert space.contains(config, space.known_params(config, KNOWN_POINTS[0]))


def test_what_a_row_says_is_trained(row):
    config = load("digits", ["train.schedule.steps=500"])
    mine = row(family="sigmoid", start=-3.0, end=3.0, tau=0.9, learning_rate=2e-3, dropout=0.2, seed=7)
    training = space.train_config(config, dataclasses.asdict(mine))
    schedule = training.schedule
    assert (schedule.family, schedule.start, schedule.end, schedule.tau) == ("sigmoid", -3.0, 3.0, 0.9)
    assert (schedule.steps, training.learning_rate, training.dropout, training.seed) == (500, 2e-3, 0.2, 7)
    unchanged = {"epochs", "batch_size", "model", "data", "workers"}
    assert training.model_dump(include=unchanged) == config.train.model_dump(include=unchanged)


def test_a_row_whose_schedule_breaks_a_law_is_no_training(row):
    with pytest.raises(ValidationError, match=r"start < schedule\.end"):
        space.train_config(CONFIG, dataclasses.asdict(row(family="sigmoid", start=3.0, end=3.0)))


VARIED = ["train.batch_size=64", "space.train={batch_size: [32, 64], model.channels: [[16, 32, 32], [32, 32, 32]]}"]


def test_further_settings_are_choices_that_reach_the_training():
    config = load("digits", VARIED)
    seen = set()
    for seed in range(12):
        trial, params = asked(seed, config)
        columns = space.flat(params)
        training = space.train_config(config, columns | {"seed": 0})
        assert columns["settings"]["batch_size"] == training.batch_size
        assert tuple(columns["settings"]["model.channels"]) == training.model.channels
        assert trial.distributions == space.distributions(config, params["family"])
        assert space.params_of(columns) == params
        assert space.contains(config, params)
        seen.add((training.batch_size, training.model.channels))
    assert len(seen) == 4


def test_a_group_of_settings_is_laid_over_the_base_training_s():
    config = load("digits", ["space.train.model=[{channels: [16, 32], attention: [false, true]}, {norm_groups: 4}]"])
    two, three = (config.training({"model": value}) for value in config.space.train["model"])
    assert (two.model.channels, two.model.norm_groups) == ((16, 32), config.train.model.norm_groups)
    assert (three.model.channels, three.model.norm_groups) == (config.train.model.channels, 4)


def test_a_setting_may_be_named_part_by_part():
    config = load("digits", ["space.train.model.channels=[[16, 32, 32], [32, 32, 32]]"])
    assert config.space.train == {"model.channels": ([16, 32, 32], [32, 32, 32])}


def test_a_known_point_has_the_base_training_s_choices_or_its_own():
    config = load("digits", VARIED)
    params = space.known_params(config, KNOWN_POINTS[1])
    assert space.flat(params)["settings"] == {"batch_size": 64, "model.channels": [16, 32, 32]}
    assert space.contains(config, params)
    mine = KNOWN_POINTS[1].model_copy(update={"train": {"batch_size": 32}})
    assert space.flat(space.known_params(config, mine))["settings"]["batch_size"] == 32
    # a base training that is none of the choices is outside the space
    outside = load("digits", [*VARIED, "train.batch_size=8"])
    assert not space.contains(outside, space.known_params(outside, KNOWN_POINTS[1]))


def test_an_override_narrows_one_parameter_and_drops_one_family():
    config = load("digits", ["space.families.cosine.start=0.1", "space.families.linear=null", "space.dropout.high=0.1"])
    assert list(config.space.families) == ["polynomial", "cosine", "sigmoid"]
    assert config.space.families["cosine"].start == 0.1
    assert config.space.families["cosine"].tau == FAMILIES["cosine"].tau
    assert config.space.dropout == Range(low=0.0, high=0.1)
    only = load("digits", ["space.families={cosine: {tau: {low: 1, high: 2}}}"]).space.families
    assert only == {"cosine": FAMILIES["cosine"].model_copy(update={"tau": Range(low=1, high=2)})}


def test_a_dropped_rate_is_the_base_training_s():
    config = load("digits", ["space.learning_rate=null", "train.learning_rate=3e-3"])
    trial, params = asked(0, config)
    assert params["learning_rate"] == 3e-3
    assert "learning_rate" not in trial.params


def test_where_the_base_training_reads_schedules_as_beta_every_row_says_so():
    as_beta = "train.schedule={family: cosine, start: 0, end: 1, space: beta}"
    with pytest.raises(UserError, match=r"(?<!space\.)train\.schedule\.space: linear .*space\.families\.linear: null"):
        load("digits", [as_beta])
    config = load("digits", [as_beta, "space.families.linear=null"])
    known = [space.known_params(config, point) for point in config.known_points if point.family != "linear"]
    for params in (asked(0, config)[1], *known):
        assert space.flat(params)["settings"] == {"schedule.space": "beta"}
        assert space.contains(config, params)
    assert all("schedule.space" not in space.flat(asked(0, load("digits"))[1])["settings"] for _ in range(3))


def test_both_readings_are_searched_though_the_base_training_s_schedule_is_a_line():
    both = "space.train.schedule.space=[alpha_bar, beta]"
    with pytest.raises(UserError, match=r"space\.families\.linear: null"):
        load("digits", [both])
    config = load("digits", [both, "space.families.linear=null"])
    assert config.train.schedule.family == "linear"
    known = [space.known_params(config, point) for point in config.known_points]
    assert all(space.flat(params)["settings"] == {"schedule.space": "alpha_bar"} for params in known)
    drawn = [asked(seed, config)[1] for seed in range(40)]
    assert {(params["family"], space.flat(params)["settings"]["schedule.space"]) for params in drawn} == {
        (family, reading) for family in config.space.families for reading in ("alpha_bar", "beta")
    }
    assert all(space.contains(config, params) for params in drawn)
    assert any(space.screen(config, params) is None for params in drawn)


def test_a_known_point_s_settings_are_laid_over_its_own_schedule():
    """cosine read as beta, though the base training's linear schedule cannot be."""
    config = load("study-digits")
    params = [space.known_params(config, point) for point in config.known_points]
    rows = [space.flat(p) | {"seed": 3} for p in params]
    assert [space.params_of(row) for row in rows] == params
    trainings = [space.train_config(config, row) for row in rows]
    assert [t.schedule.space for t in trainings] == ["alpha_bar"] * 6 + ["beta"]
    assert [t.ema_decays for t in trainings] == [(0.995,)] * 2 + [(0,)] + [(0.995,)] * 4
    assert all(t.seed == 3 and t.schedule.steps == 100 for t in trainings)
