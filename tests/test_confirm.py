"""Laws of search/confirm.py that need no training; tests/test_end_to_end.py has one that is cut and goes on."""

from typing import Any

from rich.console import Console

from cluster.capacity import Placement
from evaluation.config import ConfirmConfig
from search import confirm, tuner
from search.config import SearchConfig
from search.interrupt import Interrupt
from search.records import Records
from search.searcher import HonestOptunaSearch

CONFIG = SearchConfig(name="x", trials=2)
CONFIG = CONFIG.model_copy(update={"final": CONFIG.final.model_copy(update={"confirm": ConfirmConfig(top=1)})})


def test_each_new_seed_is_a_training_of_the_same_configuration(records, row):
    chosen = [row("t0001-cosine", learning_rate=3e-4, seed=7, state="completed", checkpoint="train/a/c")]
    records.add(chosen[0])
    again, parents, settings = confirm.plan(CONFIG, records.run, chosen)
    assert parents == {f"t0001-cosine-seed{seed}": "t0001-cosine" for seed in (8, 9, 10)}
    assert len(records) == 1  # the search's own table and budget stay
    assert tuner.trials_left(settings, again) == 3
    searcher = HonestOptunaSearch(settings, "frechet", again, None)
    started = [searcher.suggest("tune0")]
    assert [row.state for row in again] == ["running", "waiting", "waiting"]
    started += [searcher.suggest(f"tune{i}") for i in (1, 2)]
    assert [trial["trial"] for trial in started] == list(parents)
    assert [trial["train"]["seed"] for trial in started] == [8, 9, 10]
    assert {trial["train"]["learning_rate"] for trial in started} == {3e-4}
    assert settings.early_stopping.scheduler == "none"
    assert confirm.plan(CONFIG, records.run, chosen)[1] == parents
    assert len(Records.load(records.run.at("confirm"))) == 3  # asked again, nothing is added


def test_new_seeds_of_the_largest_seed_begin_again_at_0(records, row):
    chosen = [row("a", seed=2**32 - 2, state="completed", checkpoint="train/a/c")]
    records.add(chosen[0])
    again, parents, settings = confirm.plan(CONFIG, records.run, chosen)
    assert [row.seed for row in again] == [2**32 - 1, 0, 1]
    assert list(parents) == [f"a-seed{row.seed}" for row in again]
    searcher = HonestOptunaSearch(settings, "frechet", again, None)
    assert [searcher.suggest(f"tune{i}")["train"]["seed"] for i in range(3)] == [2**32 - 1, 0, 1]


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
    assert [(c.trial, c.repeats) for c in candidates] == [(name, "a") for name in parents]
    assert candidates[0].checkpoint == "confirm/train/a-seed1/checkpoint_000000001"
    assert failed == {"a-seed3": "the loss is nan at step 3"}
    rows = {r.trial: r for r in confirm.all_rows(records.run, records)}
    assert rows["a"].checkpoint == "train/a/c"
    assert rows["a-seed2"].checkpoint == "confirm/train/a-seed2/checkpoint_000000001"
    assert rows["a-seed3"].checkpoint is None
