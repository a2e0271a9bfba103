"""What ends a search early: its share of the clock and of the workers, over all the times that it was resumed."""

from types import SimpleNamespace

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from cluster.capacity import Placement
from evaluation import analysis
from search import budget, tuner
from search.budget import Budget
from search.config import BudgetConfig, EarlyStoppingConfig, SearchConfig
from search.config_file import load
from search.early_stopping import RungScheduler
from search.interrupt import Interrupt
from search.records import Records
from search.searcher import HonestOptunaSearch
from trainer.storage import Storage


def of(records: Records, **limits: float) -> Budget:
    return Budget(BudgetConfig(**limits), records.run, records)


def test_without_limits_nothing_is_ever_spent(records, row):
    records.add(row(worker_seconds=1e12))
    assert of(records).spent() is None


@pytest.mark.parametrize(("seconds", "spent"), [(3000, False), (3059, False), (3061, True), (9999, True)])
def test_the_clock_goes_on_where_the_last_driver_s_stopped_and_the_final_stage_keeps_its_share(records, seconds, spent):
    records.run.write_json(budget.FILE, {"seconds": seconds, "ended": None})  # of 3600, 15 % are the final stage's
    reason = of(records, hours=1).spent()
    assert (reason is not None) is spent
    if spent:
        assert reason == "the search's share of budget.hours, 0.85 of 1, was spent"
    assert (of(records, hours=1, reserve=0).spent() is not None) is (seconds > 3600)


def test_the_clock_is_on_record(records):
    records.run.write_json(budget.FILE, {"seconds": 100.0, "ended": None})
    counting = of(records)
    counting.note("all is done")
    noted = budget.read(records.run)
    assert noted["ended"] == "all is done"
    assert 100 <= noted["seconds"] <= counting.seconds() + 0.1 < 110
    counting.tick()  # within ten seconds: nothing
    assert budget.read(records.run) == noted


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_a_damaged_clock_begins_anew(records, content):
    records.run.write(budget.FILE, content)
    assert of(records, hours=1).spent() is None


def test_worker_hours_are_those_of_all_trials(records, row):
    records.add(row("t0000-cosine", state="stopped", worker_seconds=2000.0))
    limited = of(records, worker_hours=1)
    assert limited.spent() is None
    records.add(row("t0001-cosine", worker_seconds=1100.0))
    assert limited.spent() == "the search's share of budget.worker_hours, 0.85 of 1, was spent"


@pytest.mark.parametrize("kind", ["asha", "none"])
def test_a_running_trial_ends_at_its_next_rung_and_one_past_the_last_is_finished(records, row, kind):
    records.add(row("t0000-cosine"))
    records.add(row("t0001-cosine"))
    limited = of(records, worker_hours=1)
    mine = RungScheduler(EarlyStoppingConfig(scheduler=kind), "frechet", [1, 3], 9, records, limited)

    def decide(key: str, epoch: int, seconds: float) -> str:
        report = {"epoch": epoch, "rung": True, "frechet": 1.0, "worker_seconds": seconds}
        return mine.on_trial_result(None, SimpleNamespace(config={"trial": key}), report)

    assert decide("t0000-cosine", 1, 1000.0) == TrialScheduler.CONTINUE
    assert decide("t0000-cosine", 3, 3000.0) == TrialScheduler.CONTINUE
    assert decide("t0001-cosine", 1, 1000.0) == TrialScheduler.STOP
    assert records["t0001-cosine"].state == "stopped"
    assert "budget.worker_hours" in str(records["t0001-cosine"].reason)
    assert decide("t0000-cosine", 9, 9000.0) == TrialScheduler.CONTINUE
    assert records["t0000-cosine"].state == "completed"


def test_a_spent_search_begins_nothing_and_stops_what_was_left_unfinished(records):
    config = SearchConfig.model_validate(load("digits").model_dump() | {"same_alpha_bar": 0.01})
    first = HonestOptunaSearch(config, "frechet", records, None)
    for index in range(2):
        assert isinstance(first.suggest(f"id{index}"), dict)
    records.report(
        next(iter(records)).trial, {"epoch": 5, "rung": True, "frechet": 7.0, "worker_seconds": 4000.0}, None
    )
    again = HonestOptunaSearch(config, "frechet", records, None, of(records, worker_hours=1))
    assert again.suggest("new0") == again.FINISHED
    assert "budget.worker_hours" in str(again.ended)
    assert [row.state for row in records] == 2 * ["stopped"]
    assert all("not resumed: " in str(row.reason) for row in records)
    told = again._ot_study.get_trials()
    assert [(one.state, one.intermediate_values) for one in told] == [
        (TrialState.PRUNED, {5: 7.0}), (TrialState.FAIL, {})
    ]  # fmt: skip
    assert tuner.trials_left(config, records) == config.trials - 2


def test_what_the_budget_stops_is_known_by_its_reason(records, row):
    records.add(row(worker_seconds=4000.0))
    assert str(of(records, worker_hours=1).spent()).startswith(analysis.SHARE_SPENT)


def test_a_trial_past_its_last_rung_is_finished_by_a_resumed_search_that_has_nothing_left_to_spend(records):
    config = SearchConfig.model_validate(load("digits").model_dump() | {"same_alpha_bar": 0})
    first = HonestOptunaSearch(config, "frechet", records, None)
    past, short = (first.suggest(f"id{index}")["trial"] for index in range(2))
    for trial, epoch in ((past, 5), (past, 15), (short, 5)):
        records.report(trial, {"epoch": epoch, "rung": True, "frechet": 7.0, "worker_seconds": 2000.0}, None)
    again = HonestOptunaSearch(config, "frechet", records, None, of(records, worker_hours=1))
    assert again.over() is None
    assert (records[past].state, records[short].state) == ("running", "stopped")
    assert str(records[short].reason).startswith(analysis.NOT_RESUMED)
    assert again.suggest("new0")["trial"] == past
    assert again.suggest("new1") == again.FINISHED
    assert "budget.worker_hours" in str(again.over())


def test_a_spent_search_that_tune_was_told_to_end_stops_what_it_had_begun_but_what_is_past_its_last_rung(records):
    config = SearchConfig.model_validate(load("digits").model_dump() | {"same_alpha_bar": 0})
    limited = of(records, hours=1)
    search = HonestOptunaSearch(config, "frechet", records, None, limited)
    past, short = (search.suggest(f"id{index}")["trial"] for index in range(2))
    records.report(past, {"epoch": 15, "rung": True, "frechet": 7.0, "worker_seconds": 2000.0}, None)
    assert search.left() is None
    limited._before = 3600.0
    assert "budget.hours" in str(search.left())
    assert (records[past].state, records[short].state) == ("running", "stopped")
    assert str(records[short].reason).startswith(analysis.NOT_RESUMED)


def test_what_a_killed_driver_left_of_ended_trials_is_tidied_by_the_next(tmp_path, row):
    """One that it had stopped, and one that is stopped only now, since the budget is spent: no Ray is begun."""
    rung = {"epoch": 5, "frechet": 9.0, "score": 1.0, "grid_loss": 0.1}
    rows = {
        name: row(name, state=state, epoch=5, rungs=[rung], checkpoint=f"train/{name}/checkpoint_000000100")
        for name, state in (("t0000-cosine", "stopped"), ("t0001-cosine", "running"))
    }
    run = Storage(tmp_path)
    for name in rows:
        for step in (100, 120, 150):
            run.write(f"train/{name}/checkpoint_{step:09d}/state.pt", b"x")
    run.write_json(budget.FILE, {"seconds": 3500, "ended": None})
    records = Records(run, rows)
    config = load("digits", ["known_points=[]", "budget.hours=1"])
    ended = tuner.search(
        config, run, records, SimpleNamespace(metric="frechet"), Placement(1, {"CPU": 1}),
        Budget(config.budget, run, records), Interrupt(), Console(quiet=True),
    )  # fmt: skip
    assert "budget.hours" in ended
    assert [records[name].state for name in rows] == 2 * ["stopped"]
    assert [run.names(f"train/{name}") for name in rows] == 2 * [["checkpoint_000000100"]]


@pytest.mark.parametrize("damage", ["lost", "short"])
def test_the_study_of_a_search_that_is_over_is_written_where_it_is_lost_or_short(tmp_path, row, damage):
    run, config = Storage(tmp_path), load("digits")
    rung = {"epoch": 45, "frechet": 4.0, "score": 1.0, "grid_loss": 0.1}
    tried = dict(start=0.1, learning_rate=2e-3, dropout=0.05, state="completed", epoch=45, rungs=[rung])
    records = Records(run, {name: row(name, **tried) for name in ("t0000-cosine", "t0001-cosine")})
    tuner.mend_study(config, run, records, "frechet")
    whole = run.read(tuner.JOURNAL)
    if damage == "lost":
        run.delete(tuner.JOURNAL)
    else:
        run.write(tuner.JOURNAL, whole[: whole.rstrip().rindex(b"\n") + 1])
    tuner.mend_study(config, run, records, "frechet")
    study = optuna.load_study(
        study_name=config.name, storage=JournalStorage(JournalFileBackend(f"{tmp_path}/{tuner.JOURNAL}"))
    )
    assert [trial.value for trial in study.trials] == [4.0, 4.0]


def test_what_is_left_is_for_confirming_the_reserve_included(tmp_path, row):
    run = Storage(tmp_path)
    records = Records(run, {"a": row("a", worker_seconds=3600.0), "b": row("b", worker_seconds=1800.0)})
    run.write_json(budget.FILE, {"seconds": 7200, "ended": None})
    assert budget.left(BudgetConfig(), run, records) == BudgetConfig(reserve=0)
    rest = budget.left(BudgetConfig(hours=3, worker_hours=2, reserve=0.5), run, records)
    assert rest == BudgetConfig(hours=1, worker_hours=0.5, reserve=0)
    assert budget.left(BudgetConfig(hours=2), run, records) is None
    assert budget.left(BudgetConfig(worker_hours=1.5), run, records) is None
