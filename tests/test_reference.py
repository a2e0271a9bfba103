"""What images are judged by, made of a data set as it is trained on."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from evaluation import reference
from evaluation.config import FinalStageConfig
from trainer import data
from trainer.config import DataConfig


def test_where_training_mirrors_images_the_judge_takes_mirror_images_for_the_same(tmp_path, monkeypatch):
    """Two classes, each the other's mirror image: told apart unless images are mirrored, in one cache."""
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(48):
        pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
        pixels[:, 4 * (i % 2) : 4 * (i % 2) + 4] += 180
        place = tmp_path / "images" / ("left", "right")[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)

    def accuracy(mirrored: bool) -> float:
        splits = data.load(DataConfig(name=f"folder:{tmp_path}/images", train_fraction=0.5, horizontal_flip=mirrored))
        found = reference.prepare(splits, FinalStageConfig(), tmp_path / "cache", "cpu", lambda what: None)
        assert found is not None
        assert found.accuracy is not None
        return found.accuracy

    assert accuracy(mirrored=False) == 1.0
    assert accuracy(mirrored=True) < 0.9
    assert accuracy(mirrored=False) == 1.0


def test_a_class_of_broken_images_alone_is_no_class_of_the_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, count in {"dark": 20, "faint": 1, "light": 20}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8) + np.uint8(150 * (name == "light"))
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "faint" / "0.png").write_bytes(b"no image")
    splits = data.load(DataConfig(name=f"folder:{tmp_path}/images", train_fraction=0.5, skip_broken=True))
    assert splits.train.labels is not None
    assert set(splits.train.labels) == {0, 2}
    judge = reference.prepare(splits, FinalStageConfig(), tmp_path / "cache", "cpu", lambda what: None)
    assert judge is not None
    assert judge.held_out.probabilities.shape[1] == 2
    assert judge.accuracy == 1.0


def test_classes_of_one_image_each_are_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    for i in range(20):
        (tmp_path / "images" / f"{i}").mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(tmp_path / "images" / f"{i}" / "0.png")
    splits = data.load(DataConfig(name=f"folder:{tmp_path}/images", train_fraction=0.5))
    with pytest.raises(ValueError, match=r"more images of each class, or set train.data.labels to false"):
        reference.prepare(splits, FinalStageConfig(), tmp_path / "cache", "cpu", lambda what: None)


@pytest.mark.parametrize(("share", "what"), [(0.99, "held out"), (0.01, "to train on")])
def test_a_single_image_to_judge_by_is_refused_with_a_remedy(tmp_path, monkeypatch, share, what):
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    splits = data.load(DataConfig(subset=20, train_fraction=max(0.05, min(share, 0.95)), labels=False))
    monkeypatch.setattr(reference, "_extractor", lambda *_: object())  # is not asked
    with pytest.raises(ValueError, match=rf"2 images {what} .*train.data.train_fraction=0..5 leaves 1 of 20; change"):
        reference.prepare(splits, FinalStageConfig(), tmp_path / "cache", "cpu", lambda what: None)


@pytest.mark.parametrize("extractor", ["auto", "inception", "classifier"])
def test_weights_that_are_given_judge_labelled_images_too(tmp_path, monkeypatch, extractor):
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    splits = data.load(DataConfig(subset=120, train_fraction=0.5))
    config = FinalStageConfig(extractor=extractor, inception_weights=str(tmp_path / "none.pth"))
    asked: list[str] = []

    def of_cache(*_: object) -> None:
        asked.append("classifier")

    monkeypatch.setattr(reference, "cached_classifier", of_cache)
    with contextlib.suppress(FileNotFoundError):  # of Inception, which looks for its weights
        reference._extractor(splits, config, tmp_path, "key", "cpu", print, None)
        assert extractor == "classifier"
    assert asked == (["classifier"] if extractor == "classifier" else [])


def test_weights_are_at_the_place_that_was_meant_wherever_they_are_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert FinalStageConfig(inception_weights="w.pth").inception_weights == str(tmp_path / "w.pth")
    for same in (str(tmp_path / "w.pth"), "~/w.pth", None):
        assert FinalStageConfig(inception_weights=same).inception_weights == same


@pytest.mark.slow
def test_statistics_are_of_all_images_and_what_is_compared_one_by_one_of_a_draw_from_all_classes(tmp_path, monkeypatch):
    """Files in the order of their classes, more of them than are compared: in blocks as at once, to the last bits."""
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(160):
        pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8) + np.uint8(190 * (i // 80))
        place = tmp_path / "images" / ("dark", "light")[i // 80] / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    splits = data.load(DataConfig(name=f"folder:{tmp_path}/images", train_fraction=0.5))
    config = FinalStageConfig(images=30, split_size=10)

    def found() -> reference.Reference:
        made = reference.prepare(splits, config, tmp_path / "cache", "cpu", lambda what: None)
        assert made is not None
        return made

    whole = found()
    assert len(whole.train_features) == len(whole.held_out.features) == len(whole.noise.features) == 80
    monkeypatch.setattr(reference, "REAL_IMAGES", 25)
    monkeypatch.setattr(reference, "NOISE_AT_ONCE", 7)
    blocks = found()
    for name in ("train", "held_out_statistics"):
        one, other = getattr(whole, name), getattr(blocks, name)
        assert one.n == other.n == 80
        np.testing.assert_allclose(other.covariance, one.covariance, rtol=1e-4, atol=1e-6)
    assert len(blocks.train_features) == 25
    assert len(blocks.held_out.features) == len(blocks.noise.features) == 30
    np.testing.assert_allclose(blocks.held_out.features, whole.held_out.features[:30], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(blocks.noise.features, whole.noise.features[:30], rtol=1e-4, atol=1e-5)
    light = blocks.held_out.probabilities.argmax(axis=1)
    np.testing.assert_array_equal(light, splits.held_out.labels[splits.held_out.drawn(30)])
    assert 5 < light.sum() < 25
    probe = reference.rung_scorer(splits, blocks, 30, config.sampler, "frechet").probe
    assert 0.2 < (probe.mean(axis=(1, 2, 3)) > 127).mean() < 0.8
