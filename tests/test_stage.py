"""Laws of the final stage: what a shard depends on, what is kept, what is ranked, and what a killed worker costs."""

import io
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from scipy import stats

from evaluation import files, ranking_file, scores, stage
from evaluation.classifier import Classifier, ClassifierNet, cached_classifier
from evaluation.config import FinalStageConfig, SamplerConfig
from evaluation.reference import Reference, prepare
from evaluation.scores import FeatureStatistics
from evaluation.shards import Candidate, extraction_of, is_done, kept_images, results, shards_of
from evaluation.stage import ShardWorker
from search.config import UserError
from search.disk import full_disk_said
from trainer import checkpoint, data, model
from trainer.config import DataConfig, ModelConfig, ScheduleConfig, TrainConfig
from trainer.failures import TooLittleMemoryError
from trainer.storage import Storage

SHAPE = (1, 8, 8)
CONFIG = FinalStageConfig(images=50, split_size=20, sampler=SamplerConfig(steps=2, block_size=5))


def classifier(seed: int) -> Classifier:
    """Untrained: it tells images apart all the same."""
    torch.manual_seed(seed)
    net = ClassifierNet(1, 10, 8).eval().requires_grad_(False)
    torch.nn.init.normal_(net.head.weight, std=3.0)
    return Classifier(net, classes=10, channels=1, image_size=8, accuracy=0.1, held_out=30, seed=seed)


def reference_by(extractor: Classifier) -> Reference:
    rng = np.random.default_rng(0)
    train, held_out, noise = (rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8) for n in (60, 30, 30))
    features = extractor.extract(train).features
    key = f"data-{extractor.key}"
    return Reference(
        extractor,
        FeatureStatistics.of(features),
        features,
        FeatureStatistics.of(extractor.extract(held_out).features),
        extractor.extract(held_out),
        extractor.extract(noise),
        key,
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return reference_by(classifier(0))


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "run")


def train(run: Storage, trial: str, seed: int, confirms: str | None = None, broken: bool = False) -> Candidate:
    """A checkpoint of an untrained model, whose EMA weights are other than its raw ones."""
    config = TrainConfig(
        schedule=ScheduleConfig(family="cosine", start=0, end=1, steps=20),
        model=ModelConfig(
            channels=(4, 8), attention=(False, True), layers_per_block=1, attention_head_dim=8, norm_groups=2
        ),
    )
    raw, ema = (model.build(config.model, SHAPE, 0.0, s).state_dict() for s in (seed, seed + 100))
    if broken:
        ema = {name: value * torch.nan for name, value in ema.items()}
    meta = {"config": config.model_dump(mode="json"), "image_shape": SHAPE, "step": 1, "epoch": 1, "ema_decay": 0.9}
    path = f"train/{trial}/checkpoint_000000001"
    checkpoint.save(run.at(path), {"model": raw, "ema": {"0.9": ema}}, meta)
    return Candidate(trial, path, confirms)


def draw_here(
    run: Storage, candidates: list[Candidate], config: FinalStageConfig, reference: Reference
) -> dict[str, str]:
    """What `draw` does, without Ray."""
    reasons = {}
    worker = ShardWorker(run, config, "cpu")
    for candidate in candidates:
        for shard in shards_of(run, candidate, config, reference):
            if not is_done(run, shard, config) and (reason := worker.work(shard, reference.extractor)):
                reasons[candidate.trial] = reason
    return reasons


def test_a_shard_depends_on_checkpoint_sampler_weights_and_the_extractor_s_own_weights(run, reference):
    a, b = train(run, "a", 0), train(run, "b", 1)
    paths = {
        shards_of(run, candidate, config, of)[0].path.split("/")[2]
        for candidate, config, of in (
            (a, CONFIG, reference),
            (b, CONFIG, reference),
            (a, CONFIG.model_copy(update={"weights": "raw"}), reference),
            (a, CONFIG.model_copy(update={"sampler": CONFIG.sampler.model_copy(update={"steps": 3})}), reference),
            (a, CONFIG, reference_by(classifier(1))),
        )
    }
    assert len(paths) == 5
    same = CONFIG.model_copy(update={"images": 30, "split_size": 10, "keep_images": True, "top": 1})
    assert shards_of(run, a, same, reference_by(classifier(0)))[0] == shards_of(run, a, CONFIG, reference)[0]


def test_a_reference_of_other_classifier_weights_has_another_key(tmp_path):
    """Two machines train two classifiers on the same data: neither's shards are taken for the other's."""
    splits = data.load(DataConfig(subset=120, train_fraction=0.5))
    keys = []
    for name, seed in (("a", 0), ("b", 1), ("a", 2)):  # what is cached already is not made again
        cached_classifier(tmp_path / name, splits.key(), lambda seed=seed: classifier(seed))
        found = prepare(splits, CONFIG, tmp_path / name, "cpu", lambda what: None)
        assert found is not None
        keys.append(found.key)
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]
    assert all(key.startswith(splits.key()) for key in keys)
    assert found.train_features.shape == (60, 64)


def test_raw_weights_draw_other_images_than_the_ema(run, reference):
    candidate = train(run, "a", 0)
    raw = CONFIG.model_copy(update={"weights": "raw"})
    for config in (CONFIG, raw):
        draw_here(run, [candidate], config, reference)
    shown = [
        kept_images(run, candidate, ranking_file.ranking(run, [candidate], config, reference, {}))
        for config in (CONFIG, raw)
    ]
    assert (shown[0] != shown[1]).any()


@pytest.mark.slow
def test_a_ranking_with_another_sampler_or_weights_mixes_no_shards_with_the_first_one_s(run, reference, tmp_path):
    candidates = [train(run, "a", 0), train(run, "b", 1)]

    def ranked_with(at: Storage, config: FinalStageConfig) -> dict[str, Any]:
        assert draw_here(at, candidates, config, reference) == {}
        return ranking_file.ranking(at, candidates, config, reference, {})

    first = ranked_with(run, CONFIG)
    left = {path: path.read_bytes() for path in Path(run.root, "evaluation").rglob("*.npz")}
    for number, changes in enumerate(
        [{"sampler": {"name": "ddpm"}}, {"sampler": {"steps": 7}}, {"sampler": {"seed": 1}}, {"weights": "raw"}]
    ):
        tree = CONFIG.model_dump()
        tree |= {name: tree[name] | own if isinstance(own, dict) else own for name, own in changes.items()}
        other = FinalStageConfig.model_validate(tree)
        alone = Storage(tmp_path / f"alone{number}")
        shutil.copytree(Path(run.root, "train"), Path(alone.root, "train"))
        again = ranked_with(run, other)
        assert again == ranked_with(alone, other), f"not what a run without earlier shards gives: {changes}"
        assert again["trials"] != first["trials"]
        assert {path: path.read_bytes() for path in left} == left
    drawn = {path: path.stat().st_mtime_ns for path in left}
    assert ranked_with(run, CONFIG) == first
    assert {path: path.stat().st_mtime_ns for path in left} == drawn, "drawn twice"


def test_kept_images_are_what_was_scored_and_score_reads_them(run, reference):
    candidate = train(run, "a", 0)
    draw_here(run, [candidate], CONFIG, reference)
    before = extraction_of(run, candidate, CONFIG, reference)
    keeping = CONFIG.model_copy(update={"keep_images": True})
    shards = shards_of(run, candidate, keeping, reference)
    assert [is_done(run, shard, CONFIG) for shard in shards] == [True] * 2
    assert [is_done(run, shard, keeping) for shard in shards] == [False] * 2  # the images are still missing
    draw_here(run, [candidate], keeping, reference)
    images = files.read_images(Path(run.root, shards[0].images).parent)
    assert images.shape == (50, 8, 8, 1)
    ranked = ranking_file.ranking(run, [candidate], keeping, reference, {})
    np.testing.assert_array_equal(images, kept_images(run, candidate, ranked))
    after = reference.extractor.extract(images)
    np.testing.assert_allclose(after.probabilities, before.probabilities, rtol=1e-5)  # of other batch sizes
    np.testing.assert_allclose(after.features, before.features, rtol=1e-5, atol=1e-6)


def test_a_shard_that_is_cut_or_damaged_counts_as_absent_and_is_drawn_again(run, reference):
    candidate = train(run, "a", 0)
    draw_here(run, [candidate], CONFIG, reference)
    ranked = ranking_file.ranking(run, [candidate], CONFIG, reference, {})
    first, second = shards_of(run, candidate, CONFIG, reference)
    whole = run.read(first.path)
    rng = np.random.default_rng(0)
    damaged = [whole[:end] for end in (0, 2, 100, len(whole) - 1)]
    for place in rng.integers(len(whole), size=60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    noticed = 0
    for content in damaged:
        run.write(first.path, content)
        if is_done(run, first, CONFIG):  # the byte says nothing, such as a date
            assert ranking_file.ranking(run, [candidate], CONFIG, reference, {}) == ranked
        else:
            noticed += 1
            with pytest.raises(FileNotFoundError, match=first.path):
                kept_images(run, candidate, ranked)
    assert noticed > 50
    run.write(first.path, whole[:100])
    before = written(run, second.path)
    assert draw_here(run, [candidate], CONFIG, reference) == {}
    assert ranking_file.ranking(run, [candidate], CONFIG, reference, {}) == ranked
    assert written(run, second.path) == before


def test_kept_images_that_are_cut_or_damaged_are_drawn_again(run, reference):
    candidate, keeping = train(run, "a", 0), CONFIG.model_copy(update={"keep_images": True})
    draw_here(run, [candidate], keeping, reference)
    first, _ = shards_of(run, candidate, keeping, reference)
    whole = run.read(first.images)
    rng = np.random.default_rng(0)
    flipped = [bytearray(whole) for _ in range(60)]
    for content in flipped:
        content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    cut = [whole[:end] for end in (0, 2, 100, len(whole) - 1)]
    noticed = 0
    for content in (*cut, *map(bytes, flipped)):
        run.write(first.images, content)
        if is_done(run, first, keeping):  # the byte says nothing, such as a version
            images = files.read_images(Path(run.root, first.images))
            assert all((a == b).all() for a, b in zip(images, results(run, first)["images"], strict=False))
        else:
            noticed += 1
    assert noticed > 40
    run.write(first.images, cut[2])
    draw_here(run, [candidate], keeping, reference)
    assert run.read(first.images) == whole


def test_too_little_memory_for_a_block_asks_for_a_smaller_one_wherever_it_is_met(run, reference):
    candidate = train(run, "a", 0)
    config = CONFIG.model_copy(update={"sampler": SamplerConfig(steps=2, block_size=2**51)})
    (shard,) = shards_of(run, candidate, config, reference)
    with pytest.raises(
        TooLittleMemoryError, match=rf"final.sampler.block_size to {2**50} in {run.uri}/config.yaml"
    ) as e:
        ShardWorker(run, config, "cpu").work(shard, reference.extractor)
    # As Ray hands it on: pickled, and as the cause of an error of its own.
    sent = ray.exceptions.RayTaskError("work", "traceback", pickle.loads(pickle.dumps(e.value))).as_instanceof_cause()
    assert isinstance(sent, ray.exceptions.RayTaskError)
    assert str(sent.cause) == str(e.value)


def test_a_ranking_of_fewer_images_shows_them_as_they_were_ranked(run, reference):
    """`report` after `evaluate --images SMALLER`, when shards of both are there."""
    candidate = train(run, "a", 0)
    for count in (50, 30):
        config = CONFIG.model_copy(update={"images": count})
        draw_here(run, [candidate], config, reference)
        ranked = ranking_file.ranking(run, [candidate], config, reference, {})
        assert ranked["images"] == count
        assert len(kept_images(run, candidate, ranked)) == count
    assert (ranked["split_size"], ranked["dropped"]) == (20, 10)


def test_a_ranking_says_what_its_numbers_are_and_agrees_with_the_scores(run, reference):
    candidates = [train(run, "a", 0), train(run, "b", 1)]
    draw_here(run, candidates, CONFIG, reference)
    ranked = ranking_file.ranking(run, candidates, CONFIG, reference, {"lost": "the loss was not finite"})
    assert ranked["extractor"] == "classifier"
    assert (ranked["images"], ranked["split_size"], ranked["dropped"], ranked["steps"]) == (50, 20, 10, 2)
    assert (ranked["seed"], ranked["weights"], ranked["real_images"]) == (0, "ema", 60)
    assert (ranked["train_images"], ranked["top"]) == (60, 5)
    assert [row["trial"] for row in ranked["trials"]][2] == "lost"
    assert ranked["trials"][2]["reason"] == "the loss was not finite"
    for row, candidate in ((row, c) for row in ranked["trials"] for c in candidates if c.trial == row["trial"]):
        judged = extraction_of(run, candidate, CONFIG, reference)
        assert row["score"]["mean"] == pytest.approx(scores.inception_score(judged.probabilities, 20).mean)
        assert row["frechet"]["value"] == pytest.approx(scores.frechet_distance(judged.features, reference.train))
        held_out = scores.frechet_distance(judged.features, reference.held_out.features)
        assert row["frechet_held_out"]["value"] == pytest.approx(held_out)
        kid, influence = scores.kid_influence(judged.features, reference.train_features)
        half = stats.norm.ppf(0.975) * np.linalg.norm(influence)
        assert row["kid"]["value"] == pytest.approx(kid)
        assert row["kid"]["ci"] == pytest.approx((kid - half, kid + half))
        shares = scores.precision_recall(judged.features, reference.train_features)
        assert (row["precision"], row["recall"]) == shares
        assert row["score_pool"] == pytest.approx(scores.inception_score(judged.probabilities, 50).mean)
        same = row["at_real_n"]
        assert (same["n"], same["dropped"]) == (ranked["real"]["n"], ranked["real"]["dropped"]) == (30, 10)
        shares = scores.precision_recall(judged.features[:30], reference.train_features)
        assert (same["precision"], same["recall"]) == shares
    whole = ranking_file.ranking(
        run, candidates, CONFIG.model_copy(update={"images": 25, "split_size": 25}), reference, {}
    )
    assert whole["trials"][0]["at_real_n"]["recall"] == whole["trials"][0]["recall"]


def test_a_ranking_says_how_many_steps_were_taken_where_the_schedule_has_fewer_than_were_asked_for(run, reference):
    candidate = train(run, "a", 0)  # T = 20
    asked = CONFIG.model_copy(update={"sampler": CONFIG.sampler.model_copy(update={"steps": 1000})})
    draw_here(run, [candidate], asked, reference)
    ranked = ranking_file.ranking(run, [candidate], asked, reference, {"lost": "it diverged"})
    assert ranked["sampler"]["steps"] == 1000  # the setting, by which shards are found
    assert [ranked["steps"], *(row["steps"] for row in ranked["trials"])] == [20, 20, None]
    assert len(kept_images(run, candidate, ranked)) == 50


def test_fewer_images_than_a_split_are_one_split_that_says_its_size(run, reference):
    config = CONFIG.model_copy(update={"split_size": 5000})
    candidate = train(run, "a", 0)
    draw_here(run, [candidate], config, reference)
    ranked = ranking_file.ranking(run, [candidate], config, reference, {})
    assert (ranked["split_size"], ranked["dropped"]) == (50, 0)
    assert ranked["trials"][0]["score"]["std"] is None


@pytest.mark.slow
def test_a_confirmed_row_is_the_mean_of_its_new_seeds_and_lists_every_seed(run, reference):
    candidates = [train(run, "a", 0), train(run, "b", 50)]
    candidates += [train(run, f"b-seed{i}", 50 + i, confirms="b") for i in (1, 2, 3)]
    draw_here(run, candidates, CONFIG, reference)
    notes = {"b-seed3": "failed"}
    ranked = ranking_file.ranking(run, candidates, CONFIG, reference, notes)
    first, second = ranked["trials"]
    assert (first["trial"], first["confirmed"], first["mean_of"]) == ("b", True, ["b-seed1", "b-seed2"])
    assert [seed["trial"] for seed in first["trainings"]] == ["b", "b-seed1", "b-seed2", "b-seed3"]
    assert first["trainings"].pop() == {"n": 0, "score": None, "frechet": None, "trial": "b-seed3", "reason": "failed"}
    drawn = [extraction_of(run, candidate, CONFIG, reference).features for candidate in candidates[2:4]]
    shares = np.mean([scores.precision_recall(features, reference.train_features) for features in drawn], axis=0)
    assert (first["precision"], first["recall"]) == pytest.approx(tuple(shares))
    assert first["score"]["mean"] == pytest.approx(np.mean([seed["score"] for seed in first["trainings"][1:]]))
    assert first["best_training"] == max(first["trainings"], key=lambda seed: seed["score"])["trial"]
    assert (second["trial"], second["confirmed"], second["mean_of"]) == ("a", False, ["a"])


def test_a_model_whose_images_are_not_finite_is_listed_last_with_its_reason(run, reference):
    candidates = [train(run, "broken", 0, broken=True), train(run, "good", 1)]
    reasons = draw_here(run, candidates, CONFIG, reference)
    assert list(reasons) == ["broken"]
    assert "the model has diverged" in reasons["broken"]
    ranked = ranking_file.ranking(run, candidates, CONFIG, reference, reasons)
    assert [(row["trial"], row["rank"]) for row in ranked["trials"]] == [("good", 1), ("broken", None)]


# With Ray


def actors() -> list[int]:
    """Shard actors that this process's own Ray started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end meanwhile
            found += [child.pid] * any("ShardWorker" in part for part in child.cmdline())
    return found


def written(run: Storage, path: str) -> int:
    return Path(run.root, path).stat().st_mtime_ns


def until(condition: Callable[[], bool], thread: threading.Thread, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert thread.is_alive(), "drawing ended before its time"
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_shard_whose_worker_died_before_it_could_say_so_is_not_drawn_twice(run, reference):
    """Ray tries the task again."""
    config = CONFIG.model_copy(update={"images": 20, "sampler": SamplerConfig(steps=2, block_size=10)})
    (shard,) = shards_of(run, train(run, "good", 1), config, reference)
    stage.ShardWorker(run, config, "cpu").work(shard, reference.extractor)
    first = written(run, shard.path)
    assert stage.ShardWorker(run, config, "cpu").work(shard, reference.extractor) is None
    assert written(run, shard.path) == first


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_killed_actor_costs_the_shards_in_flight_and_a_diverged_model_only_itself(run, reference, local_ray):
    config = CONFIG.model_copy(update={"images": 1000, "sampler": SamplerConfig(steps=20, block_size=10)})
    candidates = [train(run, "broken", 0, broken=True), train(run, "good", 1)]
    shards = shards_of(run, candidates[1], config, reference)
    done: list[tuple[int, int]] = []
    reasons: list[dict[str, str]] = []

    def work() -> None:
        reasons.append(
            stage.draw(run, candidates, config, reference, 2, use_gpu=False, progress=lambda *at: done.append(at))
        )

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: sum(run.exists(shard.path) for shard in shards) >= 3, thread)
    victim = actors()[0]
    os.kill(victim, signal.SIGKILL)
    before = {shard.path: written(run, shard.path) for shard in shards if run.exists(shard.path)}
    assert len(before) < len(shards), "the kill came too late to show anything"
    thread.join(timeout=150)
    assert not thread.is_alive()
    assert list(reasons[0]) == ["broken"]
    assert victim not in actors()
    assert all(written(run, path) == at for path, at in before.items()), "drawn twice"
    assert done[0] == (0, 2000)

    # What is there is that of a worker nobody killed, to the bit; what is lost later is drawn again, and nothing else.
    lost = shards[-1]
    left = run.read(lost.path)
    run.delete(lost.path)
    assert stage.draw(run, candidates[1:], config, reference, 2, use_gpu=False) == {}
    for name in ("probabilities", "features", "images"):
        first, second = (np.load(io.BytesIO(content))[name] for content in (left, run.read(lost.path)))
        np.testing.assert_array_equal(first, second)
    assert all(written(run, path) == at for path, at in before.items() if path != lost.path)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_worker_that_has_lost_its_place_gets_that_of_one_with_nothing_to_do(run, reference, local_ray):
    """As when a node is lost: the killed worker is started again, and there is no room beside the other."""

    class Other:
        def here(self) -> bool:
            return True

    config = CONFIG.model_copy(update={"images": 600, "sampler": SamplerConfig(steps=20, block_size=10)})
    candidate = train(run, "good", 1)
    shards = shards_of(run, candidate, config, reference)
    reasons: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: reasons.append(stage.draw(run, [candidate], config, reference, 2, False)))
    thread.start()
    until(lambda: any(run.exists(shard.path) for shard in shards), thread)
    taken = ray.remote(num_cpus=1)(Other).remote()  # waits for a place, before the killed one does
    try:
        os.kill(actors()[0], signal.SIGKILL)
        assert ray.get(taken.here.remote(), timeout=60)
        thread.join(timeout=120)
        assert not thread.is_alive(), "it waits for a place that idle workers hold"
        assert reasons == [{}]
        assert all(run.exists(shard.path) for shard in shards)
    finally:
        ray.kill(taken)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_disk_that_fills_up_in_an_actor_is_said_with_the_way_on(reference, local_ray, disk):
    run = Storage(disk(2**20))
    candidate = train(run, "good", 1)
    free = os.statvfs(run.root)
    Path(run.root, "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
    with pytest.raises(UserError, match="no room is left at") as said, full_disk_said(run):
        stage.draw(run, [candidate], CONFIG, reference, 1, use_gpu=False)
    assert f"ddpm-search resume {run.uri}" in str(said.value)
