"""What a run began with: of other images, trainings or judges nothing new would compare with what it has."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from search import began
from search.config import UserError
from search.config_file import load
from trainer import data
from trainer.config import DataConfig
from trainer.storage import Storage


def test_a_run_is_pinned_to_the_images_that_it_began_with(tmp_path, monkeypatch):
    """Values of before and after would be of two judges, and of two data sets, and nobody would see it."""
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    folder, run = tmp_path / "images", Storage(tmp_path / "run")
    folder.mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")

    def splits() -> data.Splits:
        return data.load.__wrapped__(DataConfig(name=f"folder:{folder}"))

    for _ in range(2):
        began.check_images(run, splits())
    folder = folder.rename(tmp_path / "moved")
    began.check_images(run, splits())
    (folder / "7.png").unlink()
    with pytest.raises(UserError, match=r"16 and 4 by now|15 and 4 by now, 16 and 4 then"):
        began.check_images(run, splits())
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(folder / "7.png")
    with pytest.raises(UserError, match=r"are not those that .*run began with.*delete .*run/began\.json"):
        began.check_images(run, splits())
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(folder / "7.png")
    began.check_images(run, splits())
    whole = run.read(began.FILE)
    for damaged in (b"", b"[1]", b'{"images": 16}'):
        run.write(began.FILE, damaged)
        began.check_images(run, splits())
        assert run.read(began.FILE) == whole


CLASSIFIER: Any = SimpleNamespace(key="c1", extractor=SimpleNamespace(name="classifier"))
INCEPTION: Any = SimpleNamespace(key="i1", extractor=SimpleNamespace(name="inception"))
CHANGED = {
    "train.epochs=37": "train.epochs was 36 when .* and is 37",
    "train.batch_size=32": "train.batch_size was 64 when .* and is 32",
    "train.schedule.steps=500": "train.schedule.steps was 1000 when .* and is 500",
    "train.data.horizontal_flip=true": "train.data.horizontal_flip was False when .* and is True",
    "train.model.channels=[16, 32, 64]": r"train.model.channels was \[16, 32, 32\] when .* and is \[16, 32, 64\]",
}
FREE = [
    *("trials=50", "known_points=[]", "space.dropout=null", "final.images=10", "budget.hours=3", "train.dropout=0.1"),
    *("train.micro_batch=8", "train.learning_rate=1e-4", "early_stopping.reduction=2", "train.checkpoint_seconds=5"),
]


def test_trials_of_one_run_have_their_training_in_common(records, row):
    began.check_training(records.run, records, load("digits", ["train.epochs=9"]))
    began.check_training(records.run, records, load("digits"))  # no trial has begun
    records.add(row())
    began.check_training(records.run, records, load("digits", FREE))
    for override, said in CHANGED.items():
        with pytest.raises(UserError, match=said):
            began.check_training(records.run, records, load("digits", [override]))
    began.check_training(records.run, records, load("digits"))
    older = records.run.read_json(began.FILE)
    del older["training"]["gradient_clip"]  # a version that did not have it
    records.run.write_json(began.FILE, older)
    began.check_training(records.run, records, load("digits"))


def test_rungs_of_one_run_are_judged_alike(records, row, rung):
    """A distance by Inception beside those by a classifier would stop trials, or pass them, wholesale."""
    config = load("digits")
    began.check_judge(records.run, records, config, "frechet", INCEPTION)
    began.check_judge(records.run, records, config, "frechet", CLASSIFIER)  # no rung has been judged
    records.add(row(rungs=[rung(1, 4.0)]))
    began.check_judge(records.run, records, config, "frechet", CLASSIFIER)
    block = load("digits", ["early_stopping.sampler.block_size=64"])  # the remedy where memory is too small
    began.check_judge(records.run, records, block, "frechet", CLASSIFIER)
    with pytest.raises(UserError, match="judged by extractor=classifier so far, and would be by inception"):
        began.check_judge(records.run, records, config, "frechet", INCEPTION)
    steps = load("digits", ["early_stopping.sampler.steps=20"])
    with pytest.raises(UserError, match=r"sampler\.steps=25 so far, and would be by 20"):
        began.check_judge(records.run, records, steps, "frechet", CLASSIFIER)
    for metric, reference in (("score", CLASSIFIER), ("grid_loss", None)):
        with pytest.raises(UserError, match=f"judged by metric=frechet so far, and would be by {metric}"):
            began.check_judge(records.run, records, config, metric, reference)


def test_rows_of_another_space_are_counted_from_when_it_changed(records, row):
    one, other = load("digits"), load("digits", ["space.dropout.high=0.5"])
    rate = load("digits", ["train.learning_rate=1e-4"])
    counts = []
    for config in (one, one, other, other, one, rate):
        counts.append(began.rows_of_other_spaces(records.run, records, config))
        records.add(row(f"t{len(records)}"))
    assert counts == [0, 0, 2, 2, 4, 5]


def test_the_grid_loss_is_the_same_whoever_judges_images(records, row, rung):
    """Without labels a run begins by it; Inception's weights that come into the cache later change nothing of it."""
    config = load("digits")
    records.add(row(rungs=[rung(1, None, None, 0.1)]))
    began.check_judge(records.run, records, config, "grid_loss", None)
    began.check_judge(records.run, records, config, "grid_loss", INCEPTION)
    with pytest.raises(UserError, match=r"early_stopping\.metric: grid_loss"):
        began.check_judge(records.run, records, config, "frechet", INCEPTION)
