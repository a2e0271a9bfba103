"""Laws of search/confirm.py that need no training; tests/test_end_to_end.py has one that is cut and goes on."""

from typing import Any

import pytest
from rich.console import Console

from cluster.capacity import Placement
from evaluation.config import ConfirmConfig
from search import confirm, tuner
from search.config import SearchConfig, UserError
from search.interrupt import Interrupt
from search.records import Records
from search.searcher import HonestOptunaSearch
from trainer import checkpoint

CONFIG = SearchConfig(name="x", trials=2)
CONFIG = CONFIG.model_copy(update={"final": CONFIG.final.model_copy(update={"confirm": ConfirmConfig(top=1)})})


def test_each_new_seed_is_a_training_of_the_same_configuration(records, row):
    chosen = [row("t0001-cosine", learning_rate=3e-4, seed=7, state="completed", checkpoint="train/a/c")]
    records.add(chosen[0])
    again, parents, settings = confirm.plan(CONFIG, records.run, chosen)
    assert parents == {f"t0001-cosine-seed{number}": "t0001-cosine" for number in (1, 2, 3)}
    assert len(records) == 1  # the search's own table and budget stay
    assert tuner.trials_left(settings, again) == 3
    searcher = HonestOptunaSearch(settings, "frechet", again, None)
    started = [searcher.suggest("tune0")]
    assert [row.state for row in again] == ["running", "waiting", "waiting"]
    started += [searcher.suggest(f"tune{i}") for i in (1, 2)]
    assert [trial["trial"] for trial in started] == list(parents)
    assert [trial["train"]["seed"] for trial in started] == [repeat.seed for repeat in again]
    assert {trial["train"]["learning_rate"] for trial in started} == {3e-4}
    assert settings.early_stopping.scheduler == "none"
    assert confirm.plan(CONFIG, records.run, chosen)[1] == parents
    assert len(Records.load(records.run.at("confirm"))) == 3  # asked again, nothing is added


def test_no_two_trainings_have_a_seed_in_common(records, row):
    """The ranking takes the spread between seeds of one configuration for independent of another's."""
    chosen = [row(f"t{number:04d}-cosine", seed=seed) for number, seed in enumerate((0, 0, 0, 1, 2**32 - 1) * 4)]
    seeds = [again.seed for again in confirm.plan(CONFIG, records.run, chosen)[0]]
    assert len({*seeds, 0, 1, 2**32 - 1}) == 20 * 3 + 3
    assert max(seeds) < 2**31


def test_a_configuration_s_seeds_depend_on_nothing_but_its_name_and_its_first_seed(records, row):
    first, second = row("t0001-cosine"), row("t0002-sigmoid")
    alone = [again.seed for again in confirm.plan(CONFIG, records.run, [second])[0]]
    other = confirm.plan(CONFIG, records.run.at("other"), [first, second])[0]
    assert [again.seed for again in other if again.trial.startswith(second.trial)] == alone
    # Golden: NumPy promises SeedSequence's words for ever.
    assert alone == [570683684, 795434381, 667469567]


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4])
def test_of_a_run_that_has_repeats_only_those_that_are_missing_are_trained(records, row, done):
    """Earlier versions named a repeat by its seed, and gave every configuration the same ones."""
    chosen = [row("t0001-cosine", seed=1)]
    table = Records(records.run.at("confirm"))
    for seed in range(2, 2 + done):
        table.add(row(f"t0001-cosine-seed{seed}", seed=seed, state="completed"))
    again, parents, settings = confirm.plan(CONFIG, records.run, chosen)
    assert len(again) == len(parents) == len({repeat.seed for repeat in again} - {1}) == max(3, done)
    assert [repeat.seed for repeat in again][:done] == [*range(2, 2 + done)]
    assert tuner.trials_left(settings, again) == max(0, 3 - done)


def test_what_is_no_longer_asked_for_is_not_trained_and_waits_to_be_chosen_again(records, row):
    """`evaluate` ranked by another setting, or fewer seeds are asked for, while earlier new trainings were not done."""
    first, second = row("t0001-cosine"), row("t0002-cosine")
    more = ConfirmConfig(top=1, seeds=4)
    more = CONFIG.model_copy(update={"final": CONFIG.final.model_copy(update={"confirm": more})})
    again, _, _ = confirm.plan(more, records.run, [first])
    again.update("t0001-cosine-seed1", state="completed")
    again.update("t0001-cosine-seed2", state="running", epoch=3)

    def trained(config: SearchConfig, chosen: list[Any]) -> list[str]:
        table, parents, settings = confirm.plan(config, records.run, chosen)
        searcher = HonestOptunaSearch(settings, "frechet", table, None)
        left = tuner.trials_left(settings, table)
        begun = [searcher.suggest(f"tune{number}") for number in range(left)]
        assert {trial["trial"] for trial in begun} <= parents.keys()
        return [trial["trial"].removeprefix("t000") for trial in begun]

    assert trained(CONFIG, [second]) == [f"2-cosine-seed{number}" for number in (1, 2, 3)]
    assert trained(CONFIG, [first]) == ["1-cosine-seed2", "1-cosine-seed3"]
    assert trained(more, [first]) == ["1-cosine-seed2", "1-cosine-seed3", "1-cosine-seed4"]
    assert Records.load(records.run.at("confirm"))["t0001-cosine-seed2"].epoch == 3


def test_what_the_budget_cut_is_trained_on_where_there_is_one_again(records, row):
    chosen = [row("t0001-cosine")]
    again, parents, settings = confirm.plan(CONFIG, records.run, chosen)
    first, second, third = parents
    again.update(first, state="completed")
    again.update(second, state="stopped", reason="the search's share of worker_hours, 0.1 of 0.1, was spent", epoch=3)
    again.update(third, state="stopped", reason="not resumed: the search's share of worker_hours was spent")
    table, _, settings = confirm.plan(CONFIG, records.run, chosen, goes_on=False)
    assert tuner.trials_left(settings, table) == 0
    assert table[second].reason.endswith("was spent")
    table, _, settings = confirm.plan(CONFIG, records.run, chosen)
    assert tuner.trials_left(settings, table) == 2
    assert [(one.state, one.reason) for one in table] == [("completed", None), ("waiting", None), ("waiting", None)]
    assert table[second].epoch == 3


def test_what_waits_to_be_chosen_again_keeps_its_checkpoints(records, row):
    again, _, _ = confirm.plan(CONFIG, records.run, [row("t0001-cosine")])
    place = records.run.at("confirm")
    place.write("train/t0001-cosine-seed1/checkpoint_000000040/state.pt", b"x")
    again.update("t0001-cosine-seed1", state="running", epoch=4)
    again, _, _ = confirm.plan(CONFIG, records.run, [row("t0002-cosine")])
    tuner.tidy(place, again)
    assert checkpoint.names(place.at("train/t0001-cosine-seed1")) == ["checkpoint_000000040"]


def test_a_damaged_table_of_confirmations_is_said(records):
    records.run.write("confirm/trials.parquet", b"PAR1")
    with pytest.raises(UserError, match=r"confirm/trials\.parquet is damaged"):
        confirm.all_rows(records.run, records)


def test_the_search_that_confirms_is_another_than_the_one_it_confirms(records, row):
    """By its name Prometheus, Optuna's dashboard and Ray's tell them apart."""
    assert confirm.plan(CONFIG, records.run, [row()])[2].name not in (CONFIG.name, "")


def test_what_is_trained_already_is_not_trained_again_and_a_failure_is_told(records, row):
    chosen = [row("a", seed=0, state="completed", checkpoint="train/a/c")]
    records.add(chosen[0])
    again, parents, _ = confirm.plan(CONFIG, records.run, chosen)
    for name in list(parents)[:2]:
        again.update(name, state="completed", checkpoint=f"train/{name}/checkpoint_000000001")
    again.update("a-seed3", state="failed", reason="the loss is nan at step 3")
    scorer: Any = None
    candidates, failed = confirm.train_again(
        CONFIG, records.run, records, chosen, scorer, Placement(1, {"CPU": 1}), Console(), Interrupt()
    )
    assert [(c.trial, c.confirms) for c in candidates] == [(name, "a") for name in parents]
    assert candidates[0].checkpoint == "confirm/train/a-seed1/checkpoint_000000001"
    assert failed == {"a-seed3": "the loss is nan at step 3"}
    rows = {r.trial: r for r in confirm.all_rows(records.run, records)}
    assert rows["a"].checkpoint == "train/a/c"
    assert rows["a-seed2"].checkpoint == "confirm/train/a-seed2/checkpoint_000000001"
    assert rows["a-seed3"].checkpoint is None
