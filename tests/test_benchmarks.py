"""The benchmarks' own arithmetic: the simulated clock, the nearest curve, and the page that is made of the results."""

import importlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from scipy import stats

from benchmarks import common, curves, replay, soak, study, study_units, tables
from search.config_file import load
from search.records import Records
from trainer.storage import Storage


class Endless:
    """Suggests the next number for ever."""

    def __init__(self):
        self.suggested, self.completed = 0, []

    def suggest(self, trial_id):
        self.suggested += 1
        return {"number": self.suggested}

    def on_trial_result(self, trial_id, result):
        pass

    def on_trial_complete(self, trial_id, result):
        self.completed.append(result["number"])


class StopsOdd(FIFOScheduler):
    def on_trial_result(self, tune_controller, trial, result):
        return TrialScheduler.STOP if result["number"] % 2 else TrialScheduler.CONTINUE


def two_reports(config):
    return [(10.0, config), (30.0, config)]


def test_without_a_driver_s_time_the_clock_is_the_trainings_alone():
    searcher = Endless()
    done = replay.run(searcher, FIFOScheduler(), two_reports, workers=3, trials=12, gap_seconds=2.0)
    assert done.seconds == 4 * (2.0 + 30.0)
    assert sorted(searcher.completed) == list(range(1, 13))
    assert done.busy_until_spent == pytest.approx(3 * 30.0 / (3 * 32.0 + 2.0))


def test_a_stopped_trial_makes_way_at_its_report():
    done = replay.run(Endless(), StopsOdd(), two_reports, workers=1, trials=4)
    assert [trial.ended for trial in done.trials] == [10.0, 40.0, 50.0, 80.0]


def test_a_search_ends_when_it_has_enough():
    done = replay.run(
        Endless(), FIFOScheduler(), two_reports, 2, 100, ended=lambda replay, trial: len(replay.trials) > 5
    )
    assert len(done.trials) == 6


def test_workers_wait_for_a_slow_driver():
    """Eight trials that end at once, and a driver that takes a hundredth of a second for each."""

    class Slow(Endless):
        def suggest(self, trial_id):
            began = time.process_time()
            while time.process_time() < began + 0.01:
                pass
            return super().suggest(trial_id)

    done = replay.run(Slow(), FIFOScheduler(), lambda config: [(0.1, config)], 8, 32, driver_counts=True)
    assert done.driver_seconds >= 0.32
    assert done.seconds >= 0.1 + 0.32
    assert done.busy_until_spent < 1


@pytest.fixture(scope="module")
def recorded():
    return curves.load(curves.FILE)


def test_a_recorded_configuration_is_its_own_nearest(recorded):
    nearest = curves.Nearest(recorded)
    places = range(0, len(recorded), 7)
    assert [nearest(recorded[place].params()) for place in places] == list(places)
    first = recorded[0].params()
    assert nearest(first, {0}) not in (0, None)
    assert nearest(first, set(range(len(recorded)))) is None


def test_near_is_by_what_a_schedule_does_and_not_by_its_name(recorded):
    """sigmoid(-3, 3, 1.1) and cosine(0, 1, 1) are much the same curve, linear(1e-4, 0.02) is another."""
    by_family = {c.family: c for c in reversed(recorded) if c.source == "known"}
    nearest = curves.Nearest([by_family["linear"], by_family["sigmoid"]])
    cosine = recorded[0].params() | {"family": "cosine", "start": 0.0, "end": 1.0, "tau": 1.0}
    place = nearest(cosine)
    assert place is not None
    assert nearest.curves[place].family == "sigmoid"


def test_the_page_is_made_of_the_results():
    assert tables.PAGE.read_text() == tables.page(), "python -m benchmarks.tables"


def test_a_process_s_peak_is_not_its_parent_s():
    """What getrusage tells of a fresh process is what its parent had, and three loops would seem to take the same."""
    here = np.ones(40 * 2**20)  # 320 MiB
    said = subprocess.run(
        (sys.executable, "-c", "from benchmarks.common import peak_memory_mib; print(peak_memory_mib())"),
        cwd=tables.RESULTS.parents[1],
        capture_output=True,
        check=True,
    )
    assert float(said.stdout) < here.nbytes / 2**20 < common.peak_memory_mib()


def test_where_code_came_from_is_told_with_and_without_git_and_ray(tmp_path, monkeypatch):
    assert common.installed("torch") == torch.__version__.partition("+")[0]
    assert common.installed("a-package-that-nobody-has") is None
    assert common.provenance(3)["seed"] == 3
    monkeypatch.setattr(common, "RESULTS", tmp_path / "docs" / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "docs").mkdir()
    assert common.provenance(3)["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert common.provenance(3)["commit"] is None


@pytest.mark.parametrize("name", ["train_throughput", "sampling_throughput", "study_units"])
def test_what_a_gpu_alone_is_measured_by_needs_no_ray(name):
    script = f"import sys; sys.modules['ray'] = None; import benchmarks.{name}"
    subprocess.run((sys.executable, "-c", script), cwd=tables.RESULTS.parents[1], check=True)


@pytest.mark.parametrize(("page", "made"), [(tables.TRAINING, tables.training), (tables.MEASURE, tables.measure)])
def test_every_throughput_and_every_coverage_that_a_document_shows_is_of_its_results(page, made):
    assert made(page.read_text()) == page.read_text(), "python -m benchmarks.tables"


def test_the_study_s_table_is_made_of_its_results():
    document, results = study.DOCUMENT.read_text(), sorted(study.RESULTS.glob("study_*.json"))
    assert results
    for path in results:
        result = json.loads(path.read_text())
        assert study.page(document, path.stem, result) == document, f"python -m benchmarks.study of {path.name}"


def units_of(scores: dict[int, list[float]]) -> list[dict]:
    """Units of rows of these scores, as `study_units` writes them."""
    alike = dict.fromkeys(study_units.SHARED, 1) | {"score_name": "score", "held_out_accuracy": 0.9, "classes": 10}
    alike |= {name: {"n": 10, "score": 9.0, "frechet": 0.1} for name in ("real", "noise")}
    own = {
        "frechet_variance": 0.01,
        "score_variance": 1e-4,
        "plain": True,
        "commit": "c",
        "device": "CPU",
        "seconds": {},
    }
    return [
        alike | own | {"row": row, "seed": seed, "label": f"row {row}", "score": score, "frechet": 20 - score}
        for row, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_single_trainings_are_joined_to_the_study_s_table():
    config = load("study-cifar10")
    result = study_units.joined(config, units_of({1: [5.0, 5.2, 5.1], 2: [8.0, 8.1, 7.9], 3: [8.05, 8.1, 8.0]}))
    assert [row["trial"] for row in result["rows"]] == ["3", "2", "1"]
    assert result["rows"][0]["tied_with"] == ["2"]
    assert result["rows"][2]["tied_with"] == []
    last = result["rows"][2]["frechet"]
    spread = np.mean([np.var(values, ddof=1) for values in ([5.0, 5.2, 5.1], [8.0, 8.1, 7.9], [8.05, 8.1, 8.0])])
    half = stats.t.ppf(0.975, 6) * np.sqrt(spread / 3)  # three alike spreads are one, of six degrees of freedom
    assert last["ci"] == pytest.approx([20 - 5.1 - half, 20 - 5.1 + half])
    assert study.table(result).count("\n") == 6
    elsewhere = [unit | {"commit": None} for unit in units_of({1: [5.1]})]
    assert study_units.joined(config, units_of({1: [5.0]}) + elsewhere)["rows"][0]["commits"] == [None, "c"]
    apart = study_units.joined(config, units_of({1: [2.0, 9.5]}))["rows"][0]
    assert apart["score"]["ci"] == [1, 10]  # no score is outside, and no distance below 0
    assert apart["frechet"]["ci"][0] == 0
    differing = units_of({1: [5.0]}) + [unit | {"images": 2} for unit in units_of({2: [6.0]})]
    with pytest.raises(SystemExit, match="differ in images"):
        study_units.joined(config, differing)


@pytest.mark.slow
def test_a_single_training_of_a_study_is_trained_drawn_and_scored(tmp_path):
    small = (
        "train.epochs=1",
        "train.data.subset=400",
        "final.images=60",
        "final.split_size=30",
        "final.sampler.steps=3",
    )
    config = load("study-digits", list(small))
    units = []
    for row, seed in ((1, 1), (3, 1)):
        unit, images = study_units.unit(config, row, seed, Storage(tmp_path))
        units.append(json.loads(json.dumps(unit)))
        assert images.shape == (24, 8, 8, 1)
        assert unit["score_variance"] > 0
    assert units[0]["reference"] == units[1]["reference"]
    assert (tmp_path / "extractor").is_dir()  # another machine would train another
    assert [unit["label"] for unit in units] == ["linear(0.0001, 0.02)", "cosine(0, 1, tau 1), no EMA"]
    table = study.table(study_units.joined(config, units))
    assert "no EMA" in table
    assert "5.597" in table


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(study.RESULTS.parents[1].glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_asked_what_it_does_and_does_nothing_then(path, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{path.stem}")
    if "__main__" in path.read_text():
        monkeypatch.setattr(sys, "argv", [path.name, "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        first = module.__doc__.split()[:8]
        assert " ".join(first) in " ".join(capsys.readouterr().out.split())


def test_a_driver_s_memory_is_counted_from_the_first_trial_that_ends_in_its_life():
    starts = [(0, 0, 50.0), (0, 0, 300.0)]  # its start is no growth
    flat = [(0, ended, 300.0) for ended in range(1, 30)]
    grows = [(1, 29, 100.0), *((1, 30 + number, 300.0 + 2 * number) for number in range(30))]
    first = {"trials": 28, "mib": 300.0, "grown": 0.0}
    assert soak.growth(starts) == [{"trials": 0, "mib": 300.0, "grown": 0.0}]
    assert soak.growth(starts + flat) == [first]
    assert soak.growth(starts + flat + grows) == [first, {"trials": 29, "mib": 300.0, "grown": 2.0 * 29}]


def test_a_soak_says_what_was_lost(tmp_path, row, rung):
    records = Records(Storage(tmp_path))
    ended = soak.Soak(tmp_path, tmp_path / "log", 1, 1, 0)
    ended.ended = "exit status 0"
    ended.met.update({"t4": 4, "t5": 3})
    rows = [
        ("completed", [1, 4], 4), ("stopped", [1], 2), ("stopped", [], 0), ("running", [1, 2], 2),
        ("failed", [1], 1), ("failed", [1], 1),
    ]  # fmt: skip
    for number, (state, rungs, epoch) in enumerate(rows):
        records.add(
            row(f"t{number}", state=state, rungs=tuple(map(rung, rungs)), epoch=epoch, checkpoint=f"train/t{number}/c")
        )
    records.flush()
    result, wrong = ended.result()
    assert result["broken_trials"] == ["t0", "t1", "t5"]
    assert {name for name, is_so in wrong.items() if is_so} == {"failed or broken trials", "trials left open"}
