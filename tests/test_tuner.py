"""What the search does while nodes come and go."""

import io
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from ray.tune.experiment import Trial
from ray.tune.search import ConcurrencyLimiter
from rich.console import Console

from cluster.capacity import Capacity, Placement, Resources
from evaluation.analysis import SHARE_SPENT
from search import budget
from search.config import BudgetConfig
from search.config_file import load
from search.interrupt import Interrupt
from search.searcher import HonestOptunaSearch
from search.tuner import _Room, _Stop, _Watcher, why_over
from trainer.config import TrainConfig


@pytest.fixture
def said():
    return Console(file=io.StringIO(), width=200)


HEAD, GPUS = Resources(16, 0), Resources(16, 4)
NONE_LEFT, GROWN = Capacity((HEAD,)), Capacity((HEAD, GPUS, GPUS))
OF_A_GPU = Capacity((HEAD, GPUS)).worker()


@pytest.fixture
def begun(records, said):
    """begun(count, fit, workers): the room of a search that has begun so many trials, of which so many fitted."""

    def make(count: int, fit: int, **workers: int) -> _Room:
        searcher = HonestOptunaSearch(load("digits", []), "frechet", records, InMemoryStorage())
        limiter = ConcurrencyLimiter(searcher, max_concurrent=fit)
        assert all(limiter.suggest(str(number)) for number in range(count))
        return _Room(limiter, Placement(fit, OF_A_GPU), TrainConfig(**workers), said)

    return make


@pytest.mark.parametrize("count", [1, 4])
def test_where_the_node_with_gpus_is_lost_none_is_begun_on_the_head_s_cpus_and_it_is_said_once(begun, said, count):
    room = begun(count, fit=count)
    for _ in range(2):
        room.look(NONE_LEFT)
        assert room.limiter.suggest("next") is None
    line = f"{count} of {count} trials wait: the cluster has GPUs for none by now; they go on when it has\n"
    assert said.file.getvalue() == line
    room.look(GROWN)
    assert room.limiter.suggest("next")
    assert said.file.getvalue() == line


def test_a_cluster_that_has_room_for_none_begins_one_that_waits(begun):
    """Tune, where no trial is left, asks for the next one up to 600 s without looking at anything else."""
    room = begun(0, fit=4)
    room.look(NONE_LEFT)
    assert room.limiter.suggest("first")
    assert room.limiter.suggest("second") is None


@pytest.mark.parametrize("cluster", [NONE_LEFT, Capacity((HEAD, GPUS))], ids=["none left", "some left"])
@pytest.mark.parametrize("seconds", [3000, 4000])
def test_a_search_whose_budget_is_spent_while_all_its_trials_wait_for_nodes_ends(begun, records, cluster, seconds):
    """No trial comes to a rung, where it would be stopped: it would wait for ever."""
    room = begun(4, fit=4)
    records.run.write_json(budget.FILE, {"seconds": seconds, "ended": None})  # of 3600
    stop = _Stop(Interrupt(), room, budget.Budget(BudgetConfig(hours=1), records.run, records))
    assert not stop.stop_all()
    room.look(cluster)
    assert stop.stop_all() is (cluster is NONE_LEFT and seconds == 4000)


def test_a_trial_that_goes_on_with_fewer_workers_does_not_wait(begun, said):
    for least, words in ((2, ""), (None, "1 of 1 trials wait")):
        begun(1, 1, workers=8, min_workers=least).look(Capacity((HEAD, GPUS)))
        assert said.file.getvalue().startswith(words)
        assert bool(said.file.getvalue()) is bool(words)


def test_a_trial_whose_process_could_not_be_reused_has_failed_and_gives_its_place_back(begun, records):
    """As TuneController._on_trial_reset leaves it: no scheduler, searcher or callback has heard of it."""
    room = begun(1, fit=1)
    (row,) = records
    never: Any = None
    spared = budget.Budget(BudgetConfig(), records.run, records)
    watcher = _Watcher(records.run, records, Path("journal"), lambda: None, spared, room, never, never)
    trial = Trial("stub", trial_id="0", config={"trial": row.trial}, stub=True)
    watcher.on_step_end(1, [trial])
    assert records[row.trial].state == "running"
    trial.set_status(Trial.ERROR)
    for _ in range(2):
        watcher.on_step_end(2, [trial])
        assert records[row.trial].state == "failed"
        assert "was lost" in str(records[row.trial].reason)
        assert not room.limiter.live_trials
    assert isinstance(room.limiter.suggest("next"), dict)


def test_a_budget_that_cut_the_last_trials_is_why_the_search_ended(records, row):
    config, spent = load("digits", ["trials=2"]), f"{SHARE_SPENT}hours, 1 of 1, was spent"
    records.add(row("t0", state="completed"))
    assert why_over(config, records, None) is None
    assert why_over(config, records, spent) == spent
    records.add(row("t1", state="stopped", reason="2.1 is over 1.9"))
    for ended in (None, spent):  # one that was spent while the last ones came to their end cut nothing
        assert why_over(config, records, ended) == "all 2 trials are done"
    records.update("t1", reason=spent)
    assert why_over(config, records, spent) == spent
    assert why_over(config, records, None) == "all 2 trials are done"
