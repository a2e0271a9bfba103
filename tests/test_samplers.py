"""Any sampler of Optuna's may suggest, and what cannot is refused before anything starts."""

import math
from functools import partial

import numpy as np
import optuna
import pytest
from optuna import samplers as optuna_samplers
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from search import samplers, space
from search.config import UserError
from search.config_file import load
from search.records import Records
from search.searcher import HonestOptunaSearch
from trainer.storage import Storage

ON_A_GRID = (
    "space={families: {cosine: {start: 0.2, end: 1, tau: 1}}, learning_rate: 0.001, dropout: 0.1, "
    "train: {batch_size: [32, 64]}}"
)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("tpe", "TPESampler"),
        ("random", "RandomSampler"),
        ("QMCSampler", "QMCSampler"),
        ("NSGAIISampler", "NSGAIISampler"),
    ],
)
def test_samplers_are_had_by_name(name, sampler):
    config = load("digits", [f"searcher={name}"])
    assert isinstance(samplers.make(config, 0), getattr(optuna_samplers, sampler))
    samplers.check(config)


def test_tpe_knows_of_families_and_of_running_trials_by_default():
    sampler = samplers.make(load("digits"), 0)
    assert (sampler._multivariate, sampler._group, sampler._constant_liar) == (True, True, True)
    plain = samplers.make(load("digits", ["searcher.options={multivariate: false, group: false}"]), 0)
    assert (plain._multivariate, plain._group, plain._constant_liar) == (False, False, True)


@pytest.mark.slow
def test_each_family_s_parameters_are_drawn_as_optuna_s_own_tpe_draws_them():
    """Only the random numbers are other ones: the means over many draws agree, family by family.

    In a space of which everything passes the screen.
    """
    config = load("digits", ["known_points=[]", "space.families.linear.end={low: 0.02, high: 0.05}"])
    suggest = space.define_by_run(config)
    drawn = []
    for make in (partial(samplers.FamilyTPE, config), optuna_samplers.TPESampler):
        study = optuna.create_study(sampler=make(seed=0, **samplers.DEFAULTS["TPESampler"]))
        rng = np.random.default_rng(0)
        for _ in range(60):  # the same past for both
            family = str(rng.choice(list(config.space.families)))
            searched = space.distributions(config, family)
            fixed = optuna.trial.FixedTrial({n: _uniform(rng, d) for n, d in searched.items()} | {"family": family})
            suggest(fixed)
            value = fixed.params["learning_rate"] * 1e3 + fixed.params["dropout"]
            study.add_trial(optuna.trial.create_trial(params=fixed.params, distributions=searched, value=value))
        drawn.append([])
        for _ in range(200):
            trial = study.ask()
            drawn[-1].append(suggest(trial))
            assert trial.params.keys() == space.distributions(config, trial.params["family"]).keys()
            study.tell(trial, state=TrialState.FAIL)  # it says nothing to those after it
    often = 0
    for family in config.space.families:
        ours, theirs = ([params for params in draws if params["family"] == family] for draws in drawn)
        assert abs(len(ours) - len(theirs)) <= 4 * (len(ours) + len(theirs)) ** 0.5
        if min(len(ours), len(theirs)) < 20:  # TPE may take a family for a bad one
            continue
        often += 1
        for name in ours[0].keys() - {"family"}:
            a, b = (np.array([params[name] for params in draws], float) for draws in (ours, theirs))
            error = np.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5)
            assert abs(a.mean() - b.mean()) <= 4.5 * error + 1e-9, (family, name)
    assert often >= 2


def test_of_what_tpe_would_draw_the_best_that_passes_the_screen_is_suggested():
    """The best trials were just within the screen, so that a third of what Optuna's own TPE draws fails it."""
    config = load("digits", ["known_points=[]", "space.families={linear: {}, cosine: {}}"])
    suggest, failing = space.define_by_run(config), []
    for make in (partial(samplers.FamilyTPE, config), optuna_samplers.TPESampler):
        study = optuna.create_study(sampler=make(seed=0, **samplers.DEFAULTS["TPESampler"]))
        for index in range(30):
            fixed = {"family": "linear", "linear.start": 1e-4, "linear.end": 0.01 + 0.001 * index}
            fixed |= {"learning_rate": 1e-3 + 1e-4 * index, "dropout": 0.005 * index}
            of = space.distributions(config, "linear")
            study.add_trial(optuna.trial.create_trial(params=fixed, distributions=of, value=float(index)))
        drawn = []
        for _ in range(40):
            trial = study.ask()
            drawn.append(suggest(trial))
            study.tell(trial, state=TrialState.FAIL)
        linear = [params for params in drawn if params["family"] == "linear"]
        failing.append(sum(space.screen(config, params) is not None for params in linear) / len(linear))
    assert failing[0] == 0 < 0.15 < failing[1], failing


@pytest.mark.parametrize("options", ["{group: false}", "{multivariate: false, group: false}", "{n_startup_trials: 1}"])
@pytest.mark.parametrize(
    "families", ["{linear: {}}", "{linear: {end: 0.006}, cosine: {tau: 1}}", "{sigmoid: {}, linear: {start: 1.0e-4}}"]
)
def test_tpe_of_other_options_or_partly_fixed_families_still_suggests(options, families):
    searcher = f"searcher={{name: tpe, options: {options}}}"
    config = load(
        "digits", ["known_points=[]", searcher, f"space.families={families}", "space.train={batch_size: [32, 64]}"]
    )
    study, suggest = optuna.create_study(sampler=samplers.make(config, 0)), space.define_by_run(config)
    for index in range(15):
        trial = study.ask()
        params = suggest(trial)
        assert space.contains(config, params)
        study.tell(trial, float(index))


def test_one_family_is_drawn_to_the_value_as_optuna_s_own_tpe_draws_it():
    config = load("digits", ["known_points=[]", "space.families={cosine: {}}", "space.train={batch_size: [32, 64]}"])
    suggest, drawn = space.define_by_run(config), []
    for make in (partial(samplers.FamilyTPE, config), optuna_samplers.TPESampler):
        study = optuna.create_study(sampler=make(seed=0, **samplers.DEFAULTS["TPESampler"]))
        drawn.append([])
        for _ in range(30):
            trial = study.ask()
            drawn[-1].append(suggest(trial))
            study.tell(trial, abs(math.log(100 * trial.params["learning_rate"] * trial.params["cosine.tau"])))
    assert drawn[0] == drawn[1]


def test_a_family_of_which_nothing_passes_the_screen_does_not_end_the_search_of_the_others(tmp_path):
    families = "space.families={linear: {end: {low: 0.002, high: 0.006}}, cosine: {}}"
    config = load("digits", ["known_points=[]", families, "same_alpha_bar=0"])
    records = Records(Storage(tmp_path))
    search = HonestOptunaSearch(config, "frechet", records, None)
    for index in range(40):
        suggested = search.suggest(f"{index}")
        assert isinstance(suggested, dict), search.ended
        report = {"epoch": 36, "rung": True, "frechet": suggested["train"]["learning_rate"], "worker_seconds": 1.0}
        records.report(suggested["trial"], report, None, lambda row: {"state": "completed"})
        search.on_trial_complete(f"{index}")
    assert sum(row.state == "screened" for row in records) < 40


def test_choices_are_screened_as_what_they_stand_for():
    """To Optuna a choice is its number: a batch of 0 images would be refused."""
    searched = ["space.families={cosine: {start: 0, end: 1, tau: 1}}", "space.learning_rate=0.001", "space.dropout=0"]
    options = "searcher={name: tpe, options: {multivariate: false, group: false}}"
    config = load("digits", ["known_points=[]", *searched, options, "space.train={batch_size: [16, 32, 64]}"])
    study, suggest = optuna.create_study(sampler=samplers.make(config, 0)), space.define_by_run(config)
    sizes = []
    for _ in range(40):
        trial = study.ask()
        sizes.append(suggest(trial)["train.batch_size"])
        study.tell(trial, float(sizes[-1]))
    assert sizes[20:].count(16) > 10


def _uniform(rng, distribution):
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return float(rng.uniform(distribution.low, distribution.high))


def test_a_brute_force_search_suits_a_space_of_choices():
    samplers.check(load("digits", ["searcher=BruteForceSampler", ON_A_GRID]))


@pytest.mark.slow
def test_a_brute_force_search_tries_every_point_of_a_large_grid_once(tmp_path):
    space = ON_A_GRID.replace("[32, 64]", str(list(range(1, 331))))
    config = load("digits", ["searcher=BruteForceSampler", space, "known_points=[]", "trials=1000"])
    records = Records(Storage(tmp_path))
    search = HonestOptunaSearch(config, "frechet", records, None)
    while isinstance(suggested := search.suggest(f"{len(records)}"), dict):
        report = {"epoch": 36, "rung": True, "frechet": 1.0, "worker_seconds": 1.0}
        records.report(suggested["trial"], report, None, lambda row: {"state": "completed"})
        search.on_trial_complete(f"{len(records) - 1}")
    rows = list(records)
    assert {row.state for row in rows} == {"completed"}
    assert sorted(row.settings["batch_size"] for row in rows) == list(range(1, 331))


@pytest.mark.parametrize(
    "searcher",
    ["tpe", "random", "QMCSampler", "NSGAIISampler", "{name: tpe, options: {seed: 3}}",
     "{name: random, options: {seed: 3}}", "{name: QMCSampler, options: {seed: 3, scramble: true}}",
     "{name: random, options: {seed: 4294967295}}"],
)  # fmt: skip
def test_a_resumed_search_suggests_nothing_again(tmp_path, searcher):
    one = "space={families: {cosine: {}}}"
    config = load("digits", [f"searcher={searcher}", one, "known_points=[]", "same_alpha_bar=0"])
    for life in range(2):
        records = Records.load(Storage(tmp_path))
        search = HonestOptunaSearch(config, "frechet", records, None)
        for index in range(12):
            trial = search.suggest(f"{life}.{index}")["trial"]
            report = {"epoch": 45, "rung": True, "frechet": float(index % 5), "worker_seconds": 1.0}
            records.report(trial, report, None, lambda row: {"state": "completed"})
            search.on_trial_complete(f"{life}.{index}")
    rows = list(Records.load(Storage(tmp_path)))
    assert len({(row.start, row.end, row.tau, row.learning_rate, row.dropout) for row in rows}) == len(rows) >= 24


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["searcher=bayes"], ["searcher must be tpe, random", "GPSampler", "'bayes'"]),
        (["searcher=BaseSampler"], ["'BaseSampler'"]),
        (["searcher.options.startup=3"], ["searcher.options.startup", "n_startup_trials"]),
        (["searcher={name: NSGAIISampler, options: {population_size: 1}}"], ["NSGAIISampler", "population_size"]),
        (["searcher=PartialFixedSampler"], ["PartialFixedSampler", "fixed_params"]),
        (["searcher.options.n_ei_candidates=0"], ["cannot search this space"]),  # met by the first that is not random
        (["searcher.options={n_startup_trials: 60.0, n_ei_candidates: 0}"], ["cannot search this space"]),
        (["searcher=BruteForceSampler"], ["cannot search this space", "step"]),
        (["searcher={name: GridSampler, options: {search_space: {dropout: [0.1]}}}"], ["BruteForceSampler"]),
    ],
)
def test_a_refusal_says_what_is_wrong(settings, parts):
    with pytest.raises(UserError) as refused:
        samplers.check(load("digits", settings))
    assert [part for part in parts if part not in str(refused.value)] == [], refused.value
