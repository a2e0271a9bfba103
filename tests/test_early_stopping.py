"""Which trials go on: Ray's own ASHA is the oracle, and the trials table the only memory."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from search.config import EarlyStoppingConfig
from search.early_stopping import RungScheduler, beats_median, goes_on
from search.records import FILE, Records
from trainer.storage import Storage

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def scheduler(records, metric="frechet", rungs=(1, 3), epochs=9, **settings) -> RungScheduler:
    return RungScheduler(EarlyStoppingConfig(**settings), metric, list(rungs), epochs, records)


def result(epoch: int, value: float | None, metric: str = "frechet", **more):
    return {"epoch": epoch, "rung": True, metric: value, "worker_seconds": 1.0} | more


def tune_trial(key: str, folder: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(config={"trial": key}, trial_id=key, local_path=folder)


NO_TRIAL_WAITS = SimpleNamespace(get_live_trials=lambda: [])


class Hashed(SimpleNamespace):
    """Ray's rule keeps trials in sets and dicts."""

    def __init__(self, trial: SimpleNamespace):
        super().__init__(**vars(trial))

    def __hash__(self) -> int:
        return hash(self.trial_id)


def decide(mine: RungScheduler, key: str, epoch: int, value: float | None, metric: str = "frechet") -> str:
    return mine.on_trial_result(None, tune_trial(key), result(epoch, value, metric))


@pytest.fixture
def records(tmp_path, row):
    """A table with 25 running trials, t0000 to t0024."""
    keys = [f"t{index:04d}" for index in range(25)]
    return Records(Storage(tmp_path / "run"), {key: row(key) for key in keys})


@pytest.fixture
def asha(records):
    return scheduler(records)


@pytest.mark.parametrize("metric", ["frechet", "score"])
@pytest.mark.parametrize("reduction", [2.0, 3.0, 4.0, 2.7])
def test_decisions_are_those_of_ray_s_asha(records, metric, reduction):
    """Random values at Ray's own rungs, trials in random turns."""
    rng = np.random.default_rng(0)
    rungs = [int(reduction**k) for k in range(3) if reduction == int(reduction)] or [1]
    mode = "max" if metric == "score" else "min"
    theirs = AsyncHyperBandScheduler("epoch", metric, mode, rungs[-1] + 1, 1, reduction, stop_last_trials=False)
    mine = scheduler(records, metric, rungs, rungs[-1] + 1, reduction=reduction)
    at, decisions = {row.trial: 0 for row in records}, []
    for key in at:
        theirs.on_trial_add(None, tune_trial(key))
    while at:
        key = str(rng.choice(sorted(at)))
        report = result(rungs[at[key]], float(rng.normal()), metric)
        expected = theirs.on_trial_result(None, tune_trial(key), report)
        assert mine.on_trial_result(None, tune_trial(key), report) == expected
        decisions.append(expected)
        at[key] += 1
        if expected == STOP or at[key] == len(rungs):
            del at[key]
    assert {CONTINUE, STOP} <= set(decisions)


@pytest.mark.parametrize("metric", ["frechet", "score"])
def test_median_decisions_are_those_of_ray_s_rule(records, metric):
    rng = np.random.default_rng(0)
    rungs, mode = [1, 3, 6], "max" if metric == "score" else "min"
    theirs = MedianStoppingRule("epoch", metric, mode, grace_period=1, min_samples_required=3)
    mine = scheduler(records, metric, rungs, scheduler="median")
    at, decisions = {row.trial: 0 for row in records}, []
    trials = {key: tune_trial(key) for key in at}
    while at:
        key = str(rng.choice(sorted(at)))
        report = result(rungs[at[key]], float(rng.normal()), metric)
        expected = theirs.on_trial_result(NO_TRIAL_WAITS, Hashed(trials[key]), report)
        assert mine.on_trial_result(None, trials[key], report) == expected
        decisions.append(expected)
        at[key] += 1
        if expected == STOP or at[key] == len(rungs):
            del at[key]
    assert decisions.count(STOP) >= 5
    assert decisions.count(CONTINUE) >= 5


def test_the_median_rule_waits_for_three_and_keeps_a_tie():
    assert beats_median([9.0], [[1.0], [2.0]])
    assert not beats_median([9.0], [[1.0], [2.0], [3.0]])
    assert beats_median([2.0], [[1.0], [2.0], [3.0]])
    assert beats_median([2.0, 9.0], [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])  # the best so far counts, not the last
    assert beats_median([9.0], [[1.0], [2.0], [math.inf]])
    assert not beats_median([1.0, math.inf], [])


def test_the_median_rule_says_what_it_did_and_remembers_after_a_resume(records):
    for index, value in enumerate([1.0, 2.0, 3.0]):
        assert decide(scheduler(records, scheduler="median"), f"t{index:04d}", 1, value) == CONTINUE
    resumed = Records.load(records.run)
    assert decide(scheduler(resumed, scheduler="median"), "t0003", 1, 2.5) == STOP
    assert resumed["t0003"].reason == "frechet 2.5 at epoch 1 was 3 of 4 so far, worse than the median"


def test_the_first_to_come_passes_and_a_tie_with_the_limit_passes():
    assert goes_on(5.0, [], 3)
    assert goes_on(5.0, [5.0], 3)
    assert not goes_on(5.1, [5.0], 3)
    # Ray stops only what is below its limit; here the limit of 1, 2, 3, 4 with reduction 3 is 2 itself
    assert goes_on(2.0, [4.0, 3.0, 2.0, 1.0], 3)
    assert not goes_on(2.1, [4.0, 3.0, 2.0, 1.0], 3)
    assert goes_on(-3.0, [-3.0, -3.0, -3.0], 3)


def test_about_one_in_reduction_goes_on():
    values = np.random.default_rng(1).permutation(600).astype(float).tolist()
    passed = sum(goes_on(value, values[:index], 3) for index, value in enumerate(values))
    assert 180 <= passed <= 230  # a third, and the lucky early ones


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_never_passes_and_is_no_rival(value):
    assert not goes_on(value, [], 3)
    assert goes_on(5.0, [value], 3)
    assert goes_on(2.0, [3.0, value], 3)
    assert not goes_on(4.0, [3.0, value, value], 3)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_trial_without_a_value_is_stopped_with_that_reason(asha, records, value):
    assert decide(asha, "t0000", 1, value) == STOP
    assert (records["t0000"].state, records["t0000"].reason) == ("stopped", "no finite frechet at epoch 1")
    assert decide(asha, "t0001", 1, 7.0) == CONTINUE


def test_a_stopped_trial_says_its_value_and_place(asha, records):
    for index, value in enumerate([3.0, 2.0, 1.0]):
        decide(asha, f"t{index:04d}", 1, value)
    assert decide(asha, "t0003", 1, 2.5) == STOP
    assert records["t0003"].reason == "frechet 2.5 at epoch 1 was 3 of 4 so far"
    assert records["t0003"].rung(1) is not None  # the deciding one is on record


def test_between_rungs_no_trial_is_stopped(asha, records):
    decide(asha, "t0000", 1, 1.0)
    worse = {"epoch": 2, "rung": False, "worker_seconds": 1.0}
    assert asha.on_trial_result(None, tune_trial("t0001"), worse) == CONTINUE
    assert (records["t0001"].state, records["t0001"].epoch) == ("running", 2)


def test_the_last_epoch_completes_a_trial_however_bad(asha, records):
    for key, value in (("t0000", 1.0), ("t0001", 100.0), ("t0002", None)):
        assert decide(asha, key, 9, value) == CONTINUE  # its process ends by itself
        assert (records[key].state, records[key].epoch) == ("completed", 9)


def test_a_repeated_report_is_not_compared_with_itself(asha, records):
    for key, value in (("t0000", 4.0), ("t0001", 1.0), ("t0002", 1.9)):
        assert decide(asha, key, 1, value) == CONTINUE
    assert not goes_on(1.9, [4.0, 1.0, 1.9], 3)  # what a comparison with itself would come to
    assert decide(asha, "t0002", 1, 1.9) == CONTINUE
    assert decide(asha, "t0002", 1, 1.8) == CONTINUE  # trained again, with another value: the first one stands
    assert [rung["frechet"] for rung in records["t0002"].rungs] == [1.9]


def test_a_report_and_what_is_decided_by_it_are_one_write(asha, records, monkeypatch):
    """A driver that is killed between two would go on with a trial that it had not yet stopped."""
    for index, value in enumerate([3.0, 2.0, 1.0]):
        decide(asha, f"t{index:04d}", 1, value)
    writes, write = [], Storage.write
    monkeypatch.setattr(Storage, "write", lambda self, *file: (writes.append(file[0]), write(self, *file)))
    assert decide(asha, "t0003", 1, 2.5) == STOP
    assert decide(asha, "t0000", 9, 2.5) == CONTINUE
    assert writes == 2 * [FILE]
    assert [Records.load(records.run)[key].state for key in ("t0003", "t0000")] == ["stopped", "completed"]


def test_rungs_of_a_resumed_record_count(asha, records):
    for index, value in enumerate([3.0, 2.0, 1.0]):
        decide(asha, f"t{index:04d}", 1, value)
    resumed = scheduler(Records.load(records.run))
    assert decide(resumed, "t0003", 1, 2.5) == STOP
    assert decide(scheduler(Records.load(records.run)), "t0004", 3, 2.5) == CONTINUE  # none came to that rung


def test_a_higher_score_is_better(records):
    mine = scheduler(records, "score")
    assert decide(mine, "t0000", 1, 5.0, "score") == CONTINUE
    assert decide(mine, "t0001", 1, 4.0, "score") == STOP
    assert records["t0001"].reason == "score 4 at epoch 1 was 2 of 2 so far"
    assert decide(mine, "t0002", 1, 6.0, "score") == CONTINUE


def test_without_a_scheduler_no_trial_is_stopped(asha, records):
    free = scheduler(records, scheduler="none")
    assert [decide(free, f"t{index:04d}", 1, float(index)) for index in range(5)] == 5 * [CONTINUE]


def test_a_training_that_cannot_go_on_has_failed_with_its_reason(asha, records):
    assert asha.on_trial_result(None, tune_trial("t0000"), {"failure": "the loss is nan", "rung": True}) == STOP
    assert (records["t0000"].state, records["t0000"].reason) == ("failed", "the loss is nan")


def test_a_process_that_ends_without_a_report_has_failed_and_harms_no_other(asha, records):
    assert asha.on_trial_result(None, tune_trial("t0000"), {"done": True}) == STOP
    assert (records["t0000"].state, records["t0000"].reason) == ("failed", "its process ended without a report")


def test_what_breaks_after_the_last_report_changes_nothing(asha, records):
    decide(asha, "t0000", 9, 1.0)
    for late in ({"failure": "OSError: [Errno 28] No space left on device", "rung": True}, {"done": True}):
        assert asha.on_trial_result(None, tune_trial("t0000"), late) == STOP
    asha.on_trial_error(None, tune_trial("t0000"))
    assert (records["t0000"].state, records["t0000"].reason) == ("completed", None)


def test_what_a_failed_training_took_since_its_last_rung_is_on_record(asha, records):
    decide(asha, "t0000", 1, 1.0)
    asha.on_trial_result(None, tune_trial("t0000"), {"failure": "nan", "rung": True, "worker_seconds": 440.0})
    assert records["t0000"].worker_seconds == 440.0
    decide(asha, "t0001", 1, 1.0)
    asha.on_trial_result(None, tune_trial("t0001"), {"failure": "RuntimeError: ", "rung": True, "worker_seconds": 0.0})
    assert records["t0001"].worker_seconds == 1.0


@pytest.mark.parametrize("linked", [None, "train", "train/t0000"])
def test_the_checkpoint_is_kept_as_a_path_below_the_run(asha, records, tmp_path, linked):
    """Also where a folder of the run is a link to another disk: what that is called is each node's own."""
    if linked:
        place, disk = Path(records.run.root, linked), tmp_path / "another disk"
        place.parent.mkdir(parents=True)
        disk.mkdir()
        place.symlink_to(disk)
    folder = records.run.at("train", "t0000", "checkpoint_000001")
    folder.write("checkpoint.json", b"")
    asha.on_trial_result(None, tune_trial("t0000"), result(1, 1.0, checkpoint_path=folder.root))
    assert records["t0000"].checkpoint == "train/t0000/checkpoint_000001"
    assert records.run.exists(f"{records['t0000'].checkpoint}/checkpoint.json")


CUDA_FAULT = """Failure # 1 (occurred at 2026-11-27_16-00-00)
ray.exceptions.RayTaskError(AcceleratorError): ray::ImplicitFunc.train() (pid=1, ip=10.0.0.1)
  File "trial.py", line 84, in trial
    raise torch.AcceleratorError
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
DEATH = """Failure # 1 (occurred at 2026-11-27_16-00-00)
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
\tpid: 1
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Traceback\n  File x\nOSError: disk full\n\n", "OSError: disk full"),
        (CUDA_FAULT, "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),
        (DEATH, "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."),
        ("no traceback\n", "no traceback"),
    ],
)
def test_the_error_that_is_named_last_is_the_reason(asha, records, tmp_path, text, reason):
    (tmp_path / "error.txt").write_text(text)
    asha.on_trial_error(None, tune_trial("t0000", str(tmp_path)))
    assert (records["t0000"].state, records["t0000"].reason) == ("running", reason)


def test_a_trial_that_left_no_error_has_a_reason(asha, records):
    asha.on_trial_error(None, tune_trial("t0001"))
    assert records["t0001"].reason == "its process ended with an error"
