"""What a run leaves, and what it is judged by wherever it is looked at: no Ray."""

import io
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from PIL import Image
from rich.console import Console

from evaluation import pictures, ranking_file, sampling
from evaluation.classifier import Classifier, ClassifierNet, cached_classifier
from evaluation.shards import Candidate, is_done, kept_images, shards_of
from evaluation.stage import ShardWorker
from search import outcome, prepare
from search.config import SearchConfig, UserError
from search.config_file import load
from search.records import Records
from search.runs import CONFIG, RANKING
from trainer import checkpoint, data, model
from trainer.storage import Storage

SETTINGS = (
    "train.model={channels: [4, 8], attention: [false, true], attention_head_dim: 8, norm_groups: 2}", "name=mine",
    "train.batch_size=16", "train.data.subset=120", "train.data.train_fraction=0.5", "train.schedule.steps=20",
    "final={images: 50, split_size: 20, sampler: {steps: 2, block_size: 5}}",
)  # fmt: skip
QUIET = Console(quiet=True)


def a_judge_in(cache: Path, config: SearchConfig, seed: int) -> None:
    """A machine whose cache has a classifier of its own: untrained, it tells images apart all the same."""

    def make() -> Classifier:
        torch.manual_seed(seed)
        net = ClassifierNet(1, 10, 8).eval().requires_grad_(False)
        torch.nn.init.normal_(net.head.weight, std=3.0)
        return Classifier(net, classes=10, channels=1, image_size=8, accuracy=0.1, held_out=60, seed=seed)

    cached_classifier(cache, data.load(config.train.data).key(), make)


@pytest.fixture
def finished(tmp_path: Path, row, rung, monkeypatch) -> tuple[SearchConfig, Storage]:
    """A run with a final stage of one of its two trials, judged by the classifier of the machine that ran it."""
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    config, run = load("digits", list(SETTINGS)), Storage(tmp_path / "runs" / "mine")
    run.write(CONFIG, yaml.safe_dump(config.model_dump(mode="json")).encode())
    records = Records(run)
    for seed, trial in enumerate(("t0000-cosine", "t0001-cosine")):
        training = config.training({"schedule": {"family": "cosine", "start": 0, "end": 1, "steps": 20}})
        weights = model.build(training.model, (1, 8, 8), 0.0, seed).state_dict()
        meta = {"config": training.model_dump(mode="json"), "image_shape": (1, 8, 8), "step": 1, "epoch": 1}
        place = f"train/{trial}/checkpoint_000000001"
        state = {"model": weights, "ema": {"0.9": weights}}
        checkpoint.save(run.at(place), state, meta | {"ema_decay": 0.9})
        records.add(row(trial, state="completed", epoch=1, rungs=[rung(1, 4.4, 8.8, 0.1)], checkpoint=place))
    a_judge_in(tmp_path / "cache", config, seed=0)
    reference = prepare.reference_of(config, data.load(config.train.data), QUIET, run)
    assert reference is not None
    candidate = Candidate("t0000-cosine", str(records["t0000-cosine"].checkpoint))
    worker = ShardWorker(run, config.final, "cpu")
    for shard in shards_of(run, candidate, config.final, reference):
        assert worker.work(shard, reference.extractor) is None
    ranked = ranking_file.ranking(run, [candidate], config.final, reference, {})
    for entry in ranked["trials"]:
        entry |= records[entry["trial"]].params() | {"checkpoint": candidate.checkpoint}
    run.write_json(RANKING, ranked)
    return config, run


@pytest.mark.slow
def test_a_run_keeps_its_judge_on_a_machine_whose_cache_has_another(finished, tmp_path, monkeypatch):
    config, run = finished
    splits = data.load(config.train.data)
    before = prepare.reference_of(config, splits, QUIET, run)
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "elsewhere"))
    a_judge_in(tmp_path / "elsewhere", config, seed=1)
    after, without = (prepare.reference_of(config, splits, QUIET, place) for place in (run, None))
    assert before is not None
    assert after is not None
    assert without is not None
    assert after.key == before.key != without.key
    candidate = Candidate("t0000-cosine", "train/t0000-cosine/checkpoint_000000001")
    assert all(is_done(run, shard, config.final) for shard in shards_of(run, candidate, config.final, after))
    outcome.report_again(run.uri, QUIET)
    page = run.read(outcome.REPORT).decode()
    assert "<br>score " in page  # the caption of a ranked trial's images
    assert "evaluate</code> draws" not in page


@pytest.mark.slow
def test_finishing_a_scored_run_samples_nothing(finished, monkeypatch):
    config, run = finished

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("images that are there were drawn again")

    monkeypatch.setattr(outcome, "Sampler", refuse)
    outcome.finish(config, run, Records.load(run), data.load(config.train.data), QUIET)
    with Image.open(Path(run.root, "samples.png")) as picture:
        shown = np.asarray(picture)
    candidate = Candidate("t0000-cosine", "train/t0000-cosine/checkpoint_000000001")
    drawn = kept_images(run, candidate, run.read_json(RANKING))
    assert len(drawn) == 50
    np.testing.assert_array_equal(shown, pictures.image_grid(drawn)[..., 0])


def test_an_export_of_a_trial_that_was_not_scored_is_sampled_in_a_block_no_larger_than_needed(finished, tmp_path):
    config, run = finished
    asked: list[int] = []
    drawing = sampling.Sampler.block

    def noted(sampler: sampling.Sampler, index: int) -> np.ndarray:
        asked.append(sampler.config.block_size)
        return drawing(sampler, index)

    ranked = run.read_json(RANKING)
    ranked["sampler"]["block_size"] = 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.Sampler, "block", noted)
        for trial, weights in (("t0001-cosine", None), ("t0000-cosine", "raw")):
            out = tmp_path / trial
            outcome.export_trial(config, run, Records.load(run), ranked, trial, out, QUIET, weights)
            assert (out / "samples.png").is_file()
    assert asked == [64, 64]


def test_a_trial_that_has_trained_on_is_not_exported_with_the_score_of_its_earlier_checkpoint(finished, tmp_path):
    config, run = finished
    records, trial = Records.load(run), "t0000-cosine"
    scored, newer = (f"train/{trial}/checkpoint_00000000{number}" for number in (1, 2))
    for name in ("state.pt", "checkpoint.json"):
        run.write(f"{newer}/{name}", run.read(f"{scored}/{name}"))
    for path, ranked in ((scored, True), (newer, False)):
        records.update(trial, checkpoint=path)
        outcome.export_trial(config, run, records, run.read_json(RANKING), trial, tmp_path / path, QUIET)
        assert ("Not scored" not in (tmp_path / path / "README.md").read_text()) is ranked


def test_an_export_of_a_model_that_has_diverged_says_why_it_has_no_samples(finished, tmp_path, monkeypatch):
    config, run = finished

    def diverged(*_: object) -> None:
        raise FloatingPointError("sampling gave NaN or infinite pixels in block 0: the model has diverged")

    monkeypatch.setattr(sampling.Sampler, "block", diverged)
    said = io.StringIO()
    trial, console = "t0001-cosine", Console(file=said, width=200)
    outcome.export_trial(config, run, Records.load(run), run.read_json(RANKING), trial, tmp_path / "out", console)
    assert "No samples: sampling gave NaN" in said.getvalue()
    assert "Samples:" not in said.getvalue()
    assert not (tmp_path / "out/samples.png").exists()


def test_an_export_draws_with_the_sampler_of_the_ranking(finished, tmp_path):
    config, run = finished
    ranked = run.read_json(RANKING)
    for variance in ("fixed_small", "fixed_large"):
        ranked["sampler"]["variance"] = variance
        outcome.export_trial(config, run, Records.load(run), ranked, "t0000-cosine", tmp_path / "out", QUIET)
        scheduler = DDPMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
        assert scheduler.config.variance_type == variance


def test_a_run_s_damaged_judge_is_replaced_by_the_machine_s_own(finished, caplog):
    config, run = finished
    splits = data.load(config.train.data)
    before = prepare.reference_of(config, splits, QUIET, run)
    (name,) = run.names("extractor")
    run.write(f"extractor/{name}/weights.safetensors", b"cut")
    after = prepare.reference_of(config, splits, QUIET, run)
    assert "damaged" in caplog.text
    assert before is not None
    assert after is not None
    assert after.key == before.key
    assert Classifier.load(run.at("extractor", name)).seed == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "deleted"])
def test_ranked_images_that_are_gone_are_said_to_be_gone(finished, how):
    _, run = finished
    if how == "cut":
        for path in Path(run.root).glob("evaluation/*/*/*.npz"):
            os.truncate(path, path.stat().st_size // 2)
    else:
        run.delete("evaluation")
    outcome.report_again(run.uri, QUIET)
    page = run.read(outcome.REPORT).decode()
    assert "drawn no images yet" not in page
    assert "no longer at hand" in page
    assert "<code>ddpm-search evaluate</code>" in page


@pytest.mark.slow
def test_a_report_of_a_damaged_checkpoint_is_drawn_and_names_the_trial(finished):
    _, run = finished
    place = "train/t0000-cosine/checkpoint_000000001"
    for content in (b"", b"{}", b"[1]", b"\xff"):
        run.write(f"{place}/checkpoint.json", content)
        with pytest.raises(FileNotFoundError, match=f"checkpoint {place} cannot be read"):
            kept_images(run, Candidate("t0000-cosine", place), run.read_json(RANKING))
    run.delete(f"{place}/checkpoint.json")
    outcome.report_again(run.uri, QUIET)
    page = run.read(outcome.REPORT).decode()
    assert "<li>t0000-cosine: checkpoint train/t0000-cosine/checkpoint_000000001 cannot be read: " in page
    assert "no longer at hand" in page
    assert run.root not in page.partition("no longer at hand")[2].partition("<h2")[0]


@pytest.mark.slow
def test_a_winner_whose_weights_are_damaged_has_a_report_and_a_remedy(finished):
    """Its images were drawn before, so that the ranking has it."""
    config, run = finished
    run.write("train/t0000-cosine/checkpoint_000000001/state.pt", b"cut")
    with pytest.raises(UserError, match=r"winner, t0000-cosine, .*is damaged.*ddpm-search export .* --trial"):
        outcome.finish(config, run, Records.load(run), data.load(config.train.data), QUIET)
    assert run.exists(outcome.REPORT)


@pytest.mark.slow
def test_a_report_says_by_which_command_its_ranking_was_made(finished):
    config, run = finished
    outcome.report_again(run.uri, QUIET)
    assert "ddpm-search evaluate" not in run.read(outcome.REPORT).decode()
    ranked = run.read_json(RANKING)
    ranked |= {"sampler": ranked["sampler"] | {"name": "ddpm", "steps": 25}, "steps": 20, "weights": "raw"}
    run.write_json(RANKING, ranked)
    outcome.report_again(run.uri, QUIET)
    page = run.read(outcome.REPORT).decode()
    assert "ddpm-search evaluate runs/mine-again --weights raw --sampler ddpm --steps 25\n" in page
    assert f"name: {config.final.sampler.name}\n" in page  # config.yaml as it is, below the commands


@pytest.mark.parametrize(
    ("ranks", "said"),
    [(None, "no trial came to a checkpoint"), ([None, None], "no trial has a score"), ([1, None], "")],
)
def test_a_run_of_which_nothing_could_be_ranked_has_failed(ranks, said, tmp_path):
    run = Storage(tmp_path)
    if ranks is not None:
        trials = [{"trial": f"t{n}", "rank": rank} for n, rank in enumerate(ranks)]
        run.write_json(RANKING, {"trials": trials, "score_name": "score", "images": 9, "split_size": 9})
    if not said:
        outcome.check_ranked(run)
        return
    with pytest.raises(SystemExit, match=said):
        outcome.check_ranked(run)


def test_a_report_s_commands_are_a_shell_s_also_where_a_folder_s_name_has_spaces(tmp_path):
    home = tmp_path / "my runs"
    commands = outcome._commands(load("digits", name="mine"), Storage(home), None)
    assert [shlex.split(command)[2] for command in commands] == [f"{home}/config.yaml", str(home)]
    bucket = "s3://bucket/mine?endpoint_override=localhost:1"
    commands = outcome._commands(load("digits", name="mine"), Storage(bucket), None)
    assert shlex.split(commands[0])[2] == "s3://bucket/mine/config.yaml?endpoint_override=localhost:1"


def test_the_name_to_do_it_again_by_is_no_longer_than_a_name_may_be(tmp_path):
    command = outcome._commands(load("digits", name="n" * 64), Storage(tmp_path), None)[0]
    assert load("digits", name=shlex.split(command)[-1])
