"""What Optuna is told, and that a search rebuilt from its record is the search it was."""

import math
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from search import pipeline, samplers, searcher, space
from search.config import SearchConfig, UserError
from search.config_file import load
from search.records import Records
from search.searcher import HonestOptunaSearch
from search.space_config import KnownPoint
from search.tuner import trials_left
from trainer import schedules
from trainer.config import TrainConfig
from trainer.data import ON_NODE
from trainer.storage import Storage

CONFIG = load("digits")
SCREENED = KnownPoint(family="linear", start=1e-4, end=5e-3)  # in the space; leaves 0.058 bits a dimension in x_T
OUTSIDE = KnownPoint(family="cosine", start=0.5, end=1)  # the space has start <= 0.3
INSIDE = KnownPoint(family="cosine", start=0.2, end=1)
EPOCHS = CONFIG.train.epochs


@pytest.fixture
def records(tmp_path):
    return Records(Storage(tmp_path / "run"))


def near(point: KnownPoint = INSIDE, **changes: float) -> KnownPoint:
    return point.model_copy(update=changes)


def make(records: Records, known=(), metric="frechet", storage=None, **changes: Any) -> HonestOptunaSearch:
    tree = CONFIG.model_dump() | {"known_points": tuple(known), **changes}
    return HonestOptunaSearch(SearchConfig.model_validate(tree), metric, records, storage)


def suggest(search: HonestOptunaSearch, trial_id: str) -> str:
    """The key of the row that the next trial trains."""
    config = search.suggest(trial_id)
    assert config is not None
    TrainConfig.model_validate(config["train"])
    return config["trial"]


def finish(search: HonestOptunaSearch, trial_id: str, state: str, *values: float | None, error: bool = False) -> None:
    """Reports values at epochs 5, 15 and the last, as the scheduler notes them, and ends the trial."""
    key = search._keys[trial_id]
    epochs = [5, 15, EPOCHS][: len(values)] if state != "completed" else [5, 15, EPOCHS][-len(values) :]
    for epoch, value in zip(epochs, values, strict=True):
        report = {"epoch": epoch, "rung": True, "frechet": value, "score": value, "worker_seconds": 1.0}
        search.records.report(key, report, None)
    if state != "running":
        search.records.update(key, state=state)
    search.on_trial_complete(trial_id, error=error)


def told(search: HonestOptunaSearch) -> list[optuna.trial.FrozenTrial]:
    return search._ot_study.get_trials(deepcopy=False)


def summary(study: optuna.Study) -> list[tuple[Any, ...]]:
    """What TPE learns from, in an order of its own."""
    return sorted(
        (sorted(one.params.items(), key=str), one.state.name, str(one.value), sorted(one.intermediate_values.items()))
        for one in study.get_trials()
        if one.state.is_finished()
    )


def test_known_points_come_first_and_in_order(records):
    search = make(records, CONFIG.known_points)
    for index, point in enumerate(CONFIG.known_points):
        row = records[suggest(search, f"id{index}")]
        assert (row.source, row.family, row.start, row.end, row.tau) == (
            "known", point.family, point.start, point.end, point.tau,
        )  # fmt: skip
        assert (row.learning_rate, row.dropout) == (CONFIG.train.learning_rate, CONFIG.train.dropout)
    assert records[suggest(search, "next")].source == "suggested"


def test_a_row_is_on_record_before_its_trial_starts(records):
    search = make(records)
    key = suggest(search, "id0")
    row = Records.load(records.run)[key]
    config = search.config
    assert row.state == "running"
    assert told(search)[0].params.items() <= space.params_of(row.params()).items()
    assert space.contains(config, space.params_of(row.params()))


def test_a_known_point_that_fails_the_screen_costs_nothing_and_the_next_one_comes(records):
    search = make(records, [SCREENED, INSIDE])
    key = suggest(search, "id0")
    screened, started = records
    assert (screened.state, screened.epoch, screened.worker_seconds) == ("screened", 0, 0.0)
    assert "prior KL must be below 0.01" in str(screened.reason)
    assert "0.058" in str(screened.reason)
    assert (started.trial, started.start, started.state) == (key, 0.2, "running")


def test_degenerate_suggestions_are_recorded_with_their_reason_and_never_started(records):
    wide = {"sigmoid": {"start": {"low": -3, "high": 3}, "end": {"low": -3, "high": 3}}}
    search = make(records, space={"families": wide})
    started = {suggest(search, f"id{index}") for index in range(6)}
    screened = [row for row in records if row.state == "screened"]
    assert started == {row.trial for row in records if row.state == "running"}
    assert any("schedule.start < schedule.end must hold" in str(row.reason) for row in screened)
    assert all(row.start < row.end for row in records if row.state == "running")
    failed = [trial for trial in told(search) if trial.state == TrialState.FAIL]
    assert len(failed) == len(screened)
    assert all(trial.value is None and not trial.intermediate_values for trial in failed)


def test_a_space_that_holds_nothing_worth_training_is_the_user_s_error(records, monkeypatch):
    monkeypatch.setattr(searcher, "MAX_UNTRAINED_IN_A_ROW", 3)
    weak = {"linear": {"start": {"low": 1e-5, "high": 2e-5}, "end": {"low": 3e-5, "high": 4e-5}}}
    search = make(records, space={"families": weak})
    with pytest.raises(UserError, match=r"3 configurations in a row.*prior KL.*narrow space\.families"):
        search.suggest("id0")
    assert [row.state for row in records] == 3 * ["screened"]


def test_a_stopped_trial_is_pruned_with_every_rung_the_deciding_one_included(records):
    search = make(records)
    suggest(search, "id0")
    finish(search, "id0", "stopped", 9.0, 8.0)
    (trial,) = told(search)
    assert (trial.state, trial.intermediate_values) == (TrialState.PRUNED, {5: 9.0, 15: 8.0})


def test_a_completed_trial_is_complete_with_its_last_value(records):
    search = make(records)
    suggest(search, "id0")
    finish(search, "id0", "completed", 9.0, 3.0, 4.0)
    (trial,) = told(search)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 4.0)
    assert trial.intermediate_values == {5: 9.0, 15: 3.0, EPOCHS: 4.0}


def test_a_failed_trial_is_failed(records):
    search = make(records)
    suggest(search, "id0")
    finish(search, "id0", "failed", 9.0)
    suggest(search, "id1")
    finish(search, "id1", "running", error=True)  # Tune gave up on its process
    assert [trial.state for trial in told(search)] == 2 * [TrialState.FAIL]
    assert [row.state for row in records] == 2 * ["failed"]


def test_a_trial_that_an_interrupt_ended_is_not_told_and_stays_running(records):
    search = make(records)
    suggest(search, "id0")
    finish(search, "id0", "running", 9.0)
    assert told(search)[0].state == TrialState.RUNNING
    assert Records.load(records.run)["t0000-" + next(iter(records)).family].state == "running"


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("state", ["completed", "stopped"])
def test_a_trial_without_a_finite_value_is_told_no_value_and_does_not_stay_running(records, state, value):
    search = make(records)
    suggest(search, "id0")
    finish(search, "id0", state, value)
    (trial,) = told(search)
    assert trial.state == TrialState.FAIL  # TPE would take a PRUNED one without a value for the best there is
    assert not trial.intermediate_values
    assert summary(make(Records.load(records.run))._ot_study) == summary(search._ot_study)


def test_an_early_value_is_not_taken_for_a_final_one_as_by_ray_s_own_search(records):
    """A trial stopped at rung 5 with 3.0 beside a trained one with 4.0: Ray's search calls the stopped one the best."""
    ours = make(records)
    rays = OptunaSearch(space.define_by_run(CONFIG), metric="frechet", mode="min", seed=0)
    for trial_id in ("trained", "stopped"):
        suggest(ours, trial_id)
        rays.suggest(trial_id)
    rays.on_trial_complete("trained", {"frechet": 4.0, "training_iteration": 3})
    rays.on_trial_complete("stopped", {"frechet": 3.0, "training_iteration": 1})  # as Tune does for an ASHA stop
    finish(ours, "trained", "completed", 4.0)
    finish(ours, "stopped", "stopped", 3.0)
    assert [trial.state.name for trial in rays._ot_study.trials] == ["COMPLETE", "COMPLETE"]
    assert rays._ot_study.best_value == 3.0
    assert [trial.state.name for trial in told(ours)] == ["COMPLETE", "PRUNED"]
    assert ours._ot_study.best_value == 4.0


def test_tpe_looks_where_trials_ended_well_and_not_where_they_began_well(records):
    """Dropout above 0.25 draws well at once and is stopped; below 0.05 it draws less well at first, and ends better."""
    known = [near(dropout=index / 400 if index % 2 else 0.3 - index / 400) for index in range(20)]
    fixed = {"families": {"cosine": {"start": 0.2, "end": 1, "tau": 1}}, "learning_rate": CONFIG.train.learning_rate,
             "dropout": {"low": 0.0, "high": 0.3}}  # fmt: skip
    ours = make(records, known, space=fixed, same_alpha_bar=0)
    rays = OptunaSearch(
        space.define_by_run(ours.config), metric="frechet", mode="min", sampler=samplers.make(ours.config, 0),
        points_to_evaluate=[{"family": "cosine", "dropout": point.dropout} for point in known],
    )  # fmt: skip
    chosen: tuple[list[float], list[float]] = ([], [])
    for index in range(len(known) + 10):
        mine, theirs = records[suggest(ours, f"id{index}")].dropout, rays.suggest(f"id{index}")["dropout"]
        fast = [dropout > 0.15 for dropout in (mine, theirs)]
        finish(ours, f"id{index}", *(("stopped", 3.0) if fast[0] else ("completed", 9.0, 6.0, 4.0)))
        rays.on_trial_complete(f"id{index}", {"frechet": 3.0 if fast[1] else 4.0, "training_iteration": 3})
        chosen[0].append(mine)
        chosen[1].append(theirs)
    assert chosen[0][:20] == chosen[1][:20] == [point.dropout for point in known]
    assert sum(dropout < 0.15 for dropout in chosen[0][20:]) >= 8
    assert sum(dropout < 0.15 for dropout in chosen[1][20:]) <= 2  # where a stop is told as an end


def test_a_search_by_brute_force_ends_when_all_is_tried(records):
    fixed = {"families": {"cosine": {"start": 0.2, "end": 1, "tau": 1}}, "learning_rate": 1e-3, "dropout": 0.1,
             "train": {"batch_size": [32, 64]}}  # fmt: skip
    search = make(records, space=fixed, searcher="BruteForceSampler")
    for index in range(2):
        suggest(search, f"id{index}")
        finish(search, f"id{index}", "completed", 4.0)
    assert search.suggest("id2") == search.FINISHED
    assert sorted(row.settings["batch_size"] for row in records) == [32, 64]
    assert [one.state for one in told(search)] == 2 * [TrialState.COMPLETE]
    again = make(Records.load(records.run), space=fixed, searcher="BruteForceSampler", same_alpha_bar=0)
    assert again.suggest("new0") == again.FINISHED
    assert len(again.records) == 2


def test_a_score_is_made_large_and_a_distance_small(records, tmp_path):
    assert make(records, metric="score")._ot_study.direction == optuna.study.StudyDirection.MAXIMIZE
    other = Records(Storage(tmp_path / "other"))
    assert make(other, metric="grid_loss")._ot_study.direction == optuna.study.StudyDirection.MINIMIZE


@pytest.fixture
def crashed(records):
    """A search of known points, a screened and an outside one among them, that died with two trials running."""
    search = make(records, [INSIDE, SCREENED, OUTSIDE, INSIDE.model_copy(update={"tau": 2.0})])
    for index in range(7):
        suggest(search, f"id{index}")
    finish(search, "id0", "completed", 9.0, 5.0, 4.0)
    finish(search, "id1", "stopped", 9.5)  # the one outside the space
    finish(search, "id3", "stopped", 9.5, 9.0)
    finish(search, "id4", "failed")
    finish(search, "id5", "completed", 8.0, 5.0, math.nan)
    return search  # id2 (known) and id6 were running


def test_a_rebuilt_study_is_the_one_that_crashed(crashed):
    rebuilt = make(Records.load(crashed.records.run), crashed.config.known_points)
    finished = summary(crashed._ot_study)
    assert summary(rebuilt._ot_study) == finished
    assert [state for _, state, *_ in finished].count("COMPLETE") == 1
    assert len(crashed.records) - len(finished) == 3  # two are running, one is outside the space
    assert [trial.intermediate_values for trial in rebuilt._ot_study.trials][:2] == [{5: 9.0, 15: 5.0, EPOCHS: 4.0}, {}]


def test_unfinished_trials_come_first_with_their_own_key_and_parameters(crashed):
    before = list(crashed.records)
    records = Records.load(crashed.records.run)
    rebuilt = make(records, crashed.config.known_points)
    unfinished = [row for row in before if row.state == "running"]
    assert len(unfinished) == 2
    for index, row in enumerate(unfinished):
        config = rebuilt.suggest(f"new{index}")
        assert config is not None
        assert config["trial"] == row.trial
        training = TrainConfig.model_validate(config["train"])
        assert (training.schedule.start, training.schedule.tau) == (row.start, row.tau)
        assert (training.learning_rate, training.dropout, training.seed) == (row.learning_rate, row.dropout, row.seed)
        last = told(rebuilt)[-1]
        assert last.state == TrialState.RUNNING
        assert last.params.items() <= space.params_of(row.params()).items()
    assert list(records) == before  # no row more
    finish(rebuilt, "new0", "completed", 3.0)
    assert rebuilt._ot_study.best_value == 3.0


def test_no_known_point_is_tried_twice(crashed):
    records = Records.load(crashed.records.run)
    search = make(records, [*crashed.config.known_points, INSIDE.model_copy(update={"tau": 3.0})])
    for index in range(4):
        suggest(search, f"new{index}")
    assert [row.source for row in records] == 4 * ["known"] + 4 * ["suggested"] + ["known", "suggested"]
    assert [row.tau for row in records if row.source == "known"] == [1.0, 1.0, 1.0, 2.0, 3.0]
    assert len({row.trial for row in records}) == len(records)


def test_known_points_that_were_tried_are_known_by_what_they_are_and_not_by_their_number(records):
    first, second, third = (INSIDE.model_copy(update={"tau": tau}) for tau in (0.6, 1.2, 2.0))
    search = make(records, [first, second])
    for index in range(2):
        suggest(search, f"id{index}")
        finish(search, f"id{index}", "completed", 4.0)
    space = CONFIG.model_dump()["space"] | {"train": {"lr_decay": [CONFIG.train.lr_decay, 0.5]}}
    assert make(Records.load(records.run), [first, second], space=space)._known == []  # the same trainings, named whole
    edited = make(Records.load(records.run), [third, second])
    assert edited.records[suggest(edited, "new0")].tau == 2.0
    assert edited.records[suggest(edited, "new1")].source == "suggested"


def test_a_known_point_outside_the_space_is_tried_but_not_told(records):
    search = make(records, [OUTSIDE])
    assert records[suggest(search, "id0")].start == 0.5
    finish(search, "id0", "completed", 4.0)
    assert told(search) == []
    assert told(make(Records.load(records.run), [OUTSIDE])) == []


def test_the_same_seed_gives_the_same_suggestions(tmp_path):
    def suggestions(name: str, seed: int) -> list[dict[str, Any]]:
        records = Records(Storage(tmp_path / name))
        search = make(records, CONFIG.known_points, seed=seed)
        for index in range(14):  # TPE's own model begins after 10
            suggest(search, f"{name}{index}")
            finish(search, f"{name}{index}", "completed", float(index % 5))
        return [row.params() for row in records]

    first = suggestions("first", 0)
    assert suggestions("again", 0) == first
    assert suggestions("other", 1)[len(CONFIG.known_points) :] != first[len(CONFIG.known_points) :]


def test_screened_suggestions_do_not_draw_more_of_their_kind_while_nothing_has_a_value(records):
    """A large cluster starts hundreds of trials before the first one ends."""
    search = make(records)
    for index in range(150):
        suggest(search, f"id{index}")
    assert 0 < sum(row.state == "screened" for row in records) < 40  # of random draws, one in sixteen


def test_the_journal_opens_with_plain_optuna(records, tmp_path):
    file = str(tmp_path / "study.journal")
    search = make(records, [INSIDE], storage=JournalStorage(JournalFileBackend(file)))
    for index, state in enumerate(("completed", "stopped")):
        suggest(search, f"id{index}")
        finish(search, f"id{index}", state, 5.0 - index)
    study = optuna.load_study(study_name=CONFIG.name, storage=JournalStorage(JournalFileBackend(file)))
    assert summary(study) == summary(search._ot_study)
    assert (study.best_value, study.best_params["cosine.start"]) == (5.0, 0.2)


def test_a_configuration_that_is_the_same_but_for_rounding_is_not_trained_twice(records):
    search = make(records, [INSIDE, near(start=0.203)])
    suggest(search, "id0")
    finish(search, "id0", "completed", 9.0, 3.0, 4.0)
    key = suggest(search, "id1")  # a suggestion, for the second known point is no news
    first, reused, suggested = records
    assert (reused.state, reused.same_as, reused.source) == ("reused", first.trial, "known")
    assert first.trial in str(reused.reason)
    assert (reused.rungs, reused.checkpoint, reused.worker_seconds) == ([], None, 0.0)
    assert (suggested.trial, suggested.source) == (key, "suggested")
    assert [(one.state, one.value) for one in told(search)[:2]] == 2 * [(TrialState.COMPLETE, 4.0)]
    assert told(search)[1].params["cosine.start"] == 0.203
    assert trials_left(search.config, records) == search.config.trials - 1  # it counts in no budget
    for row in (first, suggested):
        records.report(row.trial, {"epoch": EPOCHS, "rung": True, "frechet": 5.0, "worker_seconds": 1.0}, "somewhere")
        records.update(row.trial, state="completed")
    ranked = [one.trial for one in pipeline._candidates(search.config, records)]
    assert ranked == [first.trial, suggested.trial]  # the same thing is not ranked twice


def test_a_final_stage_takes_the_best_by_what_the_search_measured(records):
    """Of images that nothing could judge then that is the grid loss, also where Inception's weights came later."""
    search = make(records, [INSIDE, near(start=0.4)], metric="grid_loss")
    for index, loss in enumerate((0.5, 0.4)):
        key = suggest(search, f"id{index}")
        records.report(key, {"epoch": EPOCHS, "rung": True, "grid_loss": loss, "worker_seconds": 1.0}, "somewhere")
        records.update(key, state="completed")
    first, second = records
    assert [one.trial for one in pipeline._candidates(search.config, records)] == [second.trial, first.trial]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"start": 0.203}, True),
        ({"start": 0.22}, False),  # alpha_bar differs by 0.0103
        ({"learning_rate": CONFIG.train.learning_rate * 1.0199}, True),
        ({"learning_rate": CONFIG.train.learning_rate * 1.0203}, False),
        ({"learning_rate": CONFIG.train.learning_rate / 1.0203}, False),
        ({"dropout": 0.0049}, True),
        ({"dropout": 0.0051}, False),
        ({"start": 0.203, "learning_rate": CONFIG.train.learning_rate * 1.03}, False),
    ],
)
def test_what_is_the_same_is_what_the_limits_say(records, change, same):
    search = make(records, [INSIDE, near(**change)])
    suggest(search, "id0")
    suggest(search, "id1")
    assert [row.state for row in records][1] == ("reused" if same else "running")
    curves = [schedules.alpha_bar(schedules.betas("cosine", start, 1)) for start in (0.2, change.get("start", 0.2))]
    assert (schedules.largest_difference(*curves) < 0.01) is (change.get("start", 0.2) != 0.22)


@pytest.mark.parametrize(
    ("limit", "states"), [(0.01, ["running", "running", "reused"]), (0.014, ["running", *2 * ["reused"]])]
)
def test_one_curve_under_two_names_is_one_trial(records, limit, states):
    """sigmoid is a function of start / tau and end / tau; cosine(0, 1) lies 0.0132 beside sigmoid(-3, 3, 0.95)."""
    sigmoid = KnownPoint(family="sigmoid", start=-3, end=3, tau=0.95)
    scaled = KnownPoint(family="sigmoid", start=-6, end=6, tau=1.9)
    search = make(records, [KnownPoint(family="cosine", start=0, end=1), sigmoid, scaled], same_alpha_bar=limit)
    for index in range(3):
        suggest(search, f"id{index}")
    assert [row.state for row in records][:3] == states


@pytest.mark.parametrize("changes", [{"same_alpha_bar": 0}, {"seed": 7}])
def test_another_seed_or_a_limit_of_zero_trains_it_again(records, changes):
    known = [INSIDE, INSIDE]
    suggest(make(records, known), "id0")
    seed = changes.pop("seed", 0)
    train = CONFIG.train.model_copy(update={"seed": seed})
    search = make(Records.load(records.run), known, train=train, **changes)
    suggest(search, "id0")  # the unfinished one
    suggest(search, "id1")
    assert [row.state for row in search.records] == 2 * ["running"]


def test_another_batch_size_is_another_trial_and_a_resumed_search_knows_both(records):
    varied = {"train": {"batch_size": [32, 64], "model": [{"norm_groups": 4}, {"norm_groups": 8}]}}
    known = [INSIDE, near(train={"batch_size": 32}), near(train={"batch_size": 64})]
    search = make(records, known, space=CONFIG.space.model_dump() | varied)
    for index in range(2):
        suggest(search, f"id{index}")
        finish(search, f"id{index}", "completed", 4.0 + index)
    suggest(search, "id2")
    rows = list(records)
    assert [(row.state, row.settings["batch_size"]) for row in rows[:3]] == [
        ("completed", 64), ("completed", 32), ("reused", 64)
    ]  # fmt: skip
    rebuilt = make(Records.load(records.run), known, space=CONFIG.space.model_dump() | varied)
    assert summary(rebuilt._ot_study) == summary(search._ot_study)
    assert len(summary(rebuilt._ot_study)) == 3
    suggest(rebuilt, "new0")
    assert list(rebuilt.records) == rows


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_stopped_trial_is_reused_as_stopped_and_a_failed_one_is_trained_anew(records, state):
    search = make(records, [INSIDE, INSIDE])
    suggest(search, "id0")
    finish(search, "id0", state, 9.0, 8.0)
    suggest(search, "id1")
    if state == "stopped":
        assert [one.state for one in told(search)[:2]] == 2 * [TrialState.PRUNED]
        assert told(search)[1].intermediate_values == {5: 9.0, 15: 8.0}
    else:
        assert [row.state for row in records] == ["failed", "running"]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("completed", (TrialState.COMPLETE, 4.0)),
        ("stopped", (TrialState.PRUNED, 4.0)),
        ("failed", (TrialState.FAIL, None)),
    ],
)
def test_what_equals_a_running_trial_waits_for_its_end_and_is_told_that(records, state, expected):
    search = make(records, [INSIDE, near(start=0.203)])
    suggest(search, "id0")
    suggest(search, "id1")
    assert [one.state for one in told(search)] == 3 * [TrialState.RUNNING]
    finish(search, "id0", state, 9.0, 3.0, 4.0)
    assert [(one.state, one.value) for one in told(search)[:2]] == 2 * [expected]
    search.on_trial_complete("id0")  # a second call changes nothing
    assert len(told(search)) == 3


@pytest.mark.parametrize("resumed", [False, True])
def test_where_a_trial_fails_the_first_that_equals_it_is_trained_and_speaks_for_the_rest(records, resumed):
    search = make(records, [INSIDE, near(start=0.203), near(start=0.202), OUTSIDE])
    suggest(search, "id0")
    suggest(search, "id1")
    finish(search, "id0", "failed")
    first, heir, other, _ = records
    assert (first.state, heir.state, heir.same_as) == ("failed", "waiting", None)
    assert (other.state, other.same_as) == ("reused", heir.trial)
    assert str(other.reason).startswith(f"the same as {heir.trial}:")
    if resumed:
        search = make(Records.load(records.run), search.config.known_points)
        assert suggest(search, "id2") == heir.trial
        assert suggest(search, "id1") == list(search.records)[3].trial
    else:
        assert suggest(search, "id2") == heir.trial
    assert search.records[heir.trial].state == "running"
    assert len(search.records) == 4
    finish(search, "id2", "completed", 4.0)
    ended = [(one.state, one.value) for one in told(search) if one.state.is_finished()]
    assert ended.count((TrialState.COMPLETE, 4.0)) == 2  # the heir's, and that of the one that equals it
    assert (TrialState.FAIL, None) in ended


class Killed(BaseException):
    """The driver."""


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_after_a_kill_at_any_write_what_equals_a_failed_trial_is_trained_in_its_place(records, monkeypatch, writes):
    known = [INSIDE, near(start=0.203), near(start=0.202)]
    search = make(records, known)
    failed, _ = suggest(search, "id0"), suggest(search, "id1")
    records.update(failed, state="failed", reason="the loss is nan")
    left, update = [writes], Records.update

    def until_killed(self: Records, trial: str, **changes: Any) -> Any:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return update(self, trial, **changes)

    with monkeypatch.context() as patched:
        patched.setattr(Records, "update", until_killed)
        if writes == 2:
            search.on_trial_complete("id0")
        else:
            with pytest.raises(Killed):
                search.on_trial_complete("id0")
    again = Records.load(records.run)
    rebuilt = make(again, known)
    heir, other = list(again)[1:3]
    assert (heir.state, heir.same_as, other.state, other.same_as) == ("waiting", None, "reused", heir.trial)
    assert suggest(rebuilt, "new0") == heir.trial
    assert suggest(rebuilt, "new1") == list(again)[3].trial
    finish(rebuilt, "new0", "completed", 4.0)
    assert [(one.params["cosine.start"], one.value) for one in told(rebuilt) if one.value == 4.0] == [
        (0.203, 4.0), (0.202, 4.0)
    ]  # fmt: skip


def test_what_equalled_a_failed_trial_but_not_one_another_is_each_trained(records):
    search = make(records, [INSIDE, near(start=0.215), near(start=0.185), near(start=0.213)])
    suggest(search, "id0")
    suggest(search, "id1")
    assert [row.state for row in records][:4] == ["running", *3 * ["reused"]]
    finish(search, "id0", "failed")
    rows = list(records)[:4]
    assert [row.state for row in rows] == ["failed", "waiting", "waiting", "reused"]  # 0.0158 from another
    assert rows[3].same_as == rows[1].trial
    curves = [schedules.alpha_bar(schedules.betas("cosine", row.start, 1)) for row in (rows[1], rows[3])]
    assert f"differs by {schedules.largest_difference(*curves):.2g} at most" in str(rows[3].reason)


def test_where_no_training_is_left_what_equals_a_failed_trial_stays_as_it_is(records):
    search = make(records, [INSIDE, near(start=0.203)], trials=1)
    suggest(search, "id0")
    suggest(search, "id1")
    finish(search, "id0", "failed")
    assert [row.state for row in records][:2] == ["failed", "reused"]


@pytest.mark.parametrize("ended", [True, False])
def test_a_rebuilt_study_knows_what_was_reused(records, ended):
    search = make(records, [INSIDE, near(start=0.203)])
    suggest(search, "id0")
    suggest(search, "id1")
    if ended:
        finish(search, "id0", "stopped", 9.0, 8.0)
    rebuilt = make(Records.load(records.run), search.config.known_points)
    if not ended:  # the first goes on, and speaks for both when it ends
        assert told(rebuilt) == []
        assert suggest(rebuilt, "new0") == next(iter(records)).trial
        finish(rebuilt, "new0", "stopped", 9.0, 8.0)
        finish(search, "id0", "stopped", 9.0, 8.0)
    assert summary(rebuilt._ot_study) == summary(search._ot_study)
    assert len(summary(rebuilt._ot_study)) == 2


def test_where_nothing_new_is_found_one_that_equals_a_failed_trial_is_trained_in_its_place(records, monkeypatch):
    monkeypatch.setattr(searcher, "MAX_UNTRAINED_IN_A_ROW", 5)
    fixed = {"families": {"cosine": {"start": 0.2, "end": 1, "tau": 1}}, "learning_rate": 1e-3, "dropout": 0.0}
    search = make(records, space=fixed)
    suggest(search, "id0")
    assert search.suggest("id1") is None
    finish(search, "id0", "failed")
    heir = suggest(search, "id1")
    assert records[heir].state == "running"
    assert [row.state for row in records] == ["failed", "running", *4 * ["reused"]]
    assert search.suggest("id2") is None
    finish(search, "id1", "completed", 4.0)
    assert search.suggest("id2") == search.FINISHED
    assert "5 suggestions held nothing new" in str(search.left())


GRID = {
    "searcher": {"name": "BruteForceSampler"},
    "space": {"families": {"cosine": {"start": 0.2, "end": 1, "tau": 1}}, "learning_rate": 1e-3, "dropout": 0.0}
    | {"train": {"batch_size": [32, 64]}},
}


def test_a_grid_that_is_exhausted_still_trains_what_was_begun(records):
    """Outside of it, too: a known point that an earlier driver had begun."""
    search = make(records, [OUTSIDE], **GRID)
    for index in range(3):
        suggest(search, f"id{index}")
    for index in (1, 2):
        finish(search, f"id{index}", "completed", 4.0)
    assert "BruteForceSampler has suggested all there is" in str(search.over())
    rebuilt = make(Records.load(records.run), [OUTSIDE], **GRID)
    assert rebuilt.over() is None
    assert suggest(rebuilt, "new0") == next(iter(records)).trial
    finish(rebuilt, "new0", "completed", 4.0)
    assert rebuilt.suggest("new1") == rebuilt.FINISHED
    assert [row.state for row in rebuilt.records] == 3 * ["completed"]
    assert "BruteForceSampler has suggested all there is" in str(rebuilt.left())


def test_a_grid_with_more_workers_than_points_is_exhausted_at_once(records):
    search = make(records, **GRID)
    for index in range(2):
        suggest(search, f"id{index}")
    assert search.suggest("id2") == search.FINISHED
    assert [row.state for row in records] == 2 * ["running"]
    rebuilt = make(Records.load(records.run), **GRID)
    for index in range(2):
        suggest(rebuilt, f"new{index}")
    assert rebuilt.suggest("new2") == rebuilt.FINISHED
    assert len(rebuilt.records) == 2


def test_a_grid_s_confirmations_are_all_trained_though_it_is_exhausted(records, row):
    points = [{"batch_size": 32}, {"batch_size": 64}]
    for number in range(6):
        params = {"start": 0.2, "learning_rate": 1e-3, "dropout": 0.0, "settings": points[number // 3]}
        records.add(row(f"t{number // 3}-seed{number % 3}", seed=number, state="waiting", **params))
    search = make(records, trials=6, **GRID)
    for index in range(6):  # one at a time
        suggest(search, f"id{index}")
        finish(search, f"id{index}", "completed", 4.0)
    assert [r.state for r in records] == 6 * ["completed"]


def test_trials_that_fail_alike_end_the_search_and_leave_the_others_to_be_trained(records):
    def fail(search: HonestOptunaSearch, index: int, reason: str) -> None:
        trial = suggest(search, f"id{index}")
        records.update(trial, state="failed", reason=reason.format(trial) + f"{ON_NODE}node{index})")
        search.on_trial_complete(f"id{index}")

    full = "OSError: No space left: train/{}/state.pt"
    search = make(records, trials=50)
    running = suggest(search, "runs")
    for index in range(2):
        fail(search, index, full)
    search.on_trial_result("runs", {"epoch": 5})  # one can be trained
    fail(search, 2, full)
    fail(search, 3, "the loss is nan at step 7")
    for index in range(4, 6):
        fail(search, index, full)
    assert search.over() is None
    fail(search, 6, full)
    assert search.suggest("id7") == search.FINISHED
    said = "3 trials in a row failed alike: OSError: No space left: train/TRIAL/state.pt; mend that, and resume"
    assert search.over() == search.left() == said
    assert records[running].state == "running"
    search.on_trial_result("runs", {"epoch": 15})  # too late: Tune was told that nothing more comes
    assert search.left() == said
    assert make(Records.load(records.run), trials=50).over() is None


def test_a_rung_that_is_told_again_is_not_come_to_once_more(records):
    """Of unfinished trials that are resumed where none fits, three fail and the others are left to be trained."""
    search = make(records, trials=50)
    for index in range(5):
        trial = suggest(search, f"id{index}")
        records.report(trial, {"epoch": 5, "frechet": 9.0, "worker_seconds": 1.0}, None)
    resumed = make(Records.load(records.run), trials=50)
    for index in range(3):
        trial = suggest(resumed, f"new{index}")
        for _ in range(2):  # Tune tries again
            resumed.on_trial_result(f"new{index}", {"epoch": 5})
        resumed.records.update(trial, state="failed", reason="too little memory")
        resumed.on_trial_complete(f"new{index}")
    assert resumed.suggest("new3") == resumed.FINISHED
    assert [row.state for row in resumed.records] == 3 * ["failed"] + 2 * ["running"]


def test_a_trial_that_is_stopped_at_its_first_rung_came_to_one(records):
    """Of such a one Tune tells its end alone, not its result."""
    search = make(records, trials=50)
    for index in range(0, 8, 2):
        trial = suggest(search, f"id{index}")
        records.update(trial, state="failed", reason="too little memory")
        search.on_trial_complete(f"id{index}")
        suggest(search, f"id{index + 1}")
        finish(search, f"id{index + 1}", "stopped", 9.0)
        assert search.over() is None


def test_failures_alike_end_a_search_though_one_waits_for_them_whose_equal_waits_too(records):
    search = make(records, [INSIDE, near(start=0.203), near(start=0.204)], trials=50)
    trials = [suggest(search, f"id{index}") for index in range(3)]
    assert [row.state for row in records] == ["running", "reused", "reused", "running", "running"]
    for index, trial in reversed(list(enumerate(trials))):
        records.update(trial, state="failed", reason="too little memory")
        search.on_trial_complete(f"id{index}")
    assert [row.state for row in records] == ["failed", "waiting", "reused", "failed", "failed"]
    assert search.suggest("id3") == search.FINISHED  # not None, for which Tune would ask for ever
    assert "failed alike" in str(search.left())


def test_a_search_that_finds_nothing_new_ends_and_so_does_a_resumed_one(records, monkeypatch):
    monkeypatch.setattr(searcher, "MAX_UNTRAINED_IN_A_ROW", 5)
    fixed = {"families": {"cosine": {"start": 0.2, "end": 1, "tau": 1}}, "learning_rate": 1e-3, "dropout": 0.0}
    search = make(records, space=fixed)
    suggest(search, "id0")
    assert search.suggest("id1") is None  # where the first failed, another would be trained in its place
    assert "5 suggestions held nothing new" in str(search.over())
    assert [row.state for row in records] == ["running", *5 * ["reused"]]
    finish(search, "id0", "completed", 4.0)
    assert search.suggest("id1") == search.FINISHED
    assert [(one.state, one.value) for one in told(search)] == 6 * [(TrialState.COMPLETE, 4.0)]
    rebuilt = make(Records.load(records.run), space=fixed)
    assert rebuilt.over() == search.over()  # without Tune
    assert rebuilt.suggest("new0") == search.FINISHED
    assert len(rebuilt.records) == 6
    assert len(told(rebuilt)) == 6
    # What another space held says nothing of this one.
    wider = SearchConfig.model_validate(
        rebuilt.config.model_dump() | {"space": fixed | {"dropout": {"low": 0, "high": 0.3}}}
    )
    edited = HonestOptunaSearch(wider, "frechet", Records.load(records.run), None, old_rows=6)
    suggest(edited, "newer0")
    assert list(edited.records)[-1].dropout > 0.0
