"""What images are judged by, made of a data set as it is trained on."""

import numpy as np
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
        judge = reference.prepare(splits, FinalStageConfig(), tmp_path / "cache", "cpu", lambda what: None)
        assert judge is not None
        assert judge.accuracy is not None
        return judge.accuracy

    assert accuracy(mirrored=False) == 1.0
    assert accuracy(mirrored=True) < 0.9
    assert accuracy(mirrored=False) == 1.0
