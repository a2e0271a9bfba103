"""What a dry run forecasts: closed forms, and sizes that are those of real files."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from search import disk, plan
from search.config_file import load
from search.trial_cost import Measured
from trainer import data, local
from trainer.storage import Storage

HOUR = Measured(0.0, step_seconds=3.6, rung_seconds=0.0, checkpoint_bytes=1000, image_seconds=0.36, image_bytes=10)


def forecast(*settings: str, measured: Measured = HOUR, at_once: int = 1, slots: int = 1):
    """100 images of batch 1, and 10 epochs: a trial in full is 1,000 steps, an hour with HOUR."""
    base = ["train.epochs=10", "train.batch_size=1", "early_stopping.rungs=[0.1, 0.4]", "trials=9", "final.images=1000"]
    return plan.forecast(load("digits", [*base, *settings]), measured, 100, at_once, slots)


def test_without_stopping_a_search_is_its_trials_one_after_another():
    cost = forecast("early_stopping.scheduler=none")
    assert cost["trial_hours"] == pytest.approx(1)
    assert cost["expected"] == cost["at_most"] == pytest.approx({"search": 9, "workers": 9})
    assert forecast("early_stopping.scheduler=none", at_once=3)["expected"]["search"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("settings", "hours"),
    [([], 0.1 + 0.3 / 3 + 0.6 / 9), (["early_stopping.scheduler=median"], 0.1 + 0.3 / 2 + 0.6 / 4)],
)
def test_of_the_trials_at_a_rung_a_share_goes_on(settings, hours):
    cost = forecast(*settings)
    assert cost["expected"]["search"] == pytest.approx(9 * hours)
    assert cost["at_most"]["search"] == pytest.approx(9)


def test_a_search_takes_no_less_than_the_one_that_is_trained_in_full_and_unstopped_trials_whole_rounds():
    cost = forecast(at_once=9)
    assert cost["expected"]["search"] == cost["at_most"]["search"] == pytest.approx(1)
    assert cost["expected"]["workers"] == pytest.approx(9 * (0.1 + 0.3 / 3 + 0.6 / 9))
    assert forecast(at_once=8)["at_most"] == pytest.approx({"search": 2, "workers": 9})
    slow = dataclasses.replace(HOUR, start_seconds=360.0)
    for runner in ("train", "reuse"):
        one = forecast(f"runner={runner}", "trials=1", measured=slow, at_once=8)
        assert one["at_most"]["search"] == pytest.approx(1.1)


def test_scores_and_the_start_of_processes_are_counted():
    slow = Measured(360.0, 3.6, 36.0, 1000, 0.36, 10)
    reused = forecast("early_stopping.scheduler=none", measured=slow, at_once=3)
    assert reused["expected"]["search"] == pytest.approx((9 * (1 + 3 * 0.01) + 3 * 0.1) / 3)
    grouped = forecast("early_stopping.scheduler=none", "runner=train", measured=slow, at_once=3)
    assert grouped["expected"]["search"] == pytest.approx(9 * (1 + 3 * 0.01 + 0.1) / 3)
    assert grouped["expected"]["workers"] == pytest.approx(9 * (1 + 3 * 0.01))


def test_a_budget_cuts_the_search_and_leaves_the_final_stage_its_share():
    assert forecast("early_stopping.scheduler=none", "budget.hours=2")["expected"]["search"] == pytest.approx(1.7)
    cost = forecast("early_stopping.scheduler=none", "budget.worker_hours=4", "budget.reserve=0.25", at_once=3)
    assert cost["expected"] == pytest.approx({"search": 1, "workers": 3})
    assert forecast("budget.hours=1000")["at_most"]["search"] == pytest.approx(9)


def test_the_final_stage_is_drawn_by_all_workers():
    assert forecast("final.top=2", slots=2)["final_stage_hours"] == pytest.approx(0.1)


def test_confirming_takes_as_long_as_the_trainings_that_cannot_be_made_at_once():
    three = "final.confirm={top: 1, seeds: 3}"
    assert [forecast(three, at_once=n)["confirm_hours"] for n in (1, 2, 3, 8)] == pytest.approx([3, 2, 1, 1])
    assert forecast("final.confirm={top: 0, seeds: 3}")["confirm_hours"] == 0


def test_the_disk_has_room_for_the_largest_choice():
    levels = "channels: [32, 64, 64], attention: [false, true, true], layers_per_block: 1"
    wide = f"{{{levels}, attention_head_dim: 16, norm_groups: 8}}"
    plain, choice, base = (
        disk.expected_checkpoint_bytes(load("digits", settings), (1, 8, 8))
        for settings in ([], [f"space.train.model=[{wide}]"], [f"train.model={wide}"])
    )
    assert plain < choice == base
    both = [f"space.train.model=[{wide}]", "space.train.ema_decays=[[0.9], [0.9, 0.99]]"]
    assert disk.expected_checkpoint_bytes(load("digits", both), (1, 8, 8)) == pytest.approx(base * 5 / 4)


def test_the_disk_holds_one_checkpoint_of_each_ended_trial_and_more_of_running_ones():
    assert forecast("final.top=2")["disk_bytes"] == 1000 * (8 + 5) + 2 * 1000 * 10
    assert disk.disk_bytes(load("digits", ["trials=2", "train.epochs=1"]), 1000, at_once=8) == 2 * 5 * 1000


@pytest.mark.slow
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(tmp_path):
    config = load(
        "digits", ["train.ema_decays=[0.9, 0.99]", "train.data.subset=64", "train.batch_size=16", "train.epochs=1"]
    )
    images = data.load(config.train.data).train
    local.fit(
        config.train, images, Storage(tmp_path), Storage(tmp_path), torch.device("cpu"), lambda metrics, folder: None
    )
    (file,) = tmp_path.glob("checkpoint_*/state.pt")
    assert disk.expected_checkpoint_bytes(config, images.shape) == pytest.approx(file.stat().st_size, rel=0.1)


def test_too_little_room_is_said(tmp_path):
    place = Storage(tmp_path / "not" / "yet" / "there")
    free = disk.free_bytes(place)
    assert free is not None
    assert disk.shortage(0, place) is None
    assert "of disk, but" in str(disk.shortage(free + 10**12, place))


def test_the_plan_names_the_space_and_what_becomes_of_the_known_points():
    screened = "known_points+={family: linear, start: 1.0e-4, end: 0.001}"
    again = "known_points+={family: cosine, start: 0, end: 1, tau: 1.001}"
    described = plan.describe(load("digits", [screened, again, "space.train.batch_size=[32, 64]"]), "frechet")
    assert described["space"]["cosine"]["cosine.end"] == 1.0
    assert described["space"]["linear"].keys() == {"linear.start", "linear.end", "learning_rate", "dropout"}
    assert described["choices"] == {"batch_size": [32, 64]}
    assert "prior KL" in described["known_points"][6]["screened"]
    assert "t0001-cosine" in described["known_points"][7]["reused"]
    assert [point.get("reused") for point in described["known_points"][:6]] == 6 * [None]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1.5e9, "1.5 GB"), (2.34e15, "2.34e+03 TB")])
def test_sizes_are_read_by_people(count, text):
    assert disk.size(count) == text


def test_a_plan_is_read_by_people(tmp_path):
    config = load(
        "digits", ["known_points+={family: linear, start: 1.0e-4, end: 0.001}", "space.train.batch_size=[32, 64]"]
    )
    shown = plan.describe(config, "frechet") | {
        "run": "runs/mine", "trials": 12, "trials_at_once": 2, "epochs": 45, "steps": 1010, "rungs": [5, 15],
        "metric": "frechet", "measured": dataclasses.asdict(HOUR), "free_bytes": 10**9, "warning": "Warning: no room",
        "forecast": plan.forecast(config, HOUR, 100, 2, 2),
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=160)
    plan.show(shown, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "start 1e-05 to 0.001 (log)", "end 1, ", "dropout         0 to 0.2", "batch_size      [32, 64]",
        "linear(0.0001, 0.02)            passes the screen", "screened: prior KL must be below 0.01",
        "12, 2 at once, 1,010 steps (45 epochs) each", "after epochs 5, 15, by frechet", "3.6e+03 ms a step",
        "1 GB free", "Warning: no room",
    ):  # fmt: skip
        assert part in text, text
