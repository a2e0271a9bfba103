"""What a run needs before it starts: the images that it began with, and who reads them."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from search import prepare
from search.config import UserError
from search.config_file import load
from trainer import data
from trainer.config import DataConfig
from trainer.storage import Storage

QUIET = Console(file=io.StringIO())


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
        prepare.check_same_images(run, splits())
    folder = folder.rename(tmp_path / "moved")
    prepare.check_same_images(run, splits())
    (folder / "7.png").unlink()
    with pytest.raises(UserError, match=r"16 and 4 by now|15 and 4 by now, 16 and 4 then"):
        prepare.check_same_images(run, splits())
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(folder / "7.png")
    with pytest.raises(UserError, match=r"are not those that .*run began with.*delete .*run/images\.json"):
        prepare.check_same_images(run, splits())
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(folder / "7.png")
    prepare.check_same_images(run, splits())
    whole = run.read(prepare.IMAGES)
    for damaged in (b"", b"[1]", b'{"train": 16}'):
        run.write(prepare.IMAGES, damaged)
        prepare.check_same_images(run, splits())
        assert run.read(prepare.IMAGES) == whole


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_with_a_gpu_reads_the_real_images_where_the_driver_has_none(tmp_path, monkeypatch, tmp_path_factory):
    """Ray is told of a GPU that is none: what is shown is who reads, and that it comes to the same."""
    import ray

    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 150 * 1024**2}
    ray.init(num_cpus=1, num_gpus=1, _temp_dir=str(tmp_path_factory.mktemp("r")), **quiet)
    try:
        config = load("digits", ["train.data.subset=200"])
        splits, run = data.load(config.train.data), Storage(tmp_path / "run")
        monkeypatch.setattr(prepare.reference, "prepare", lambda *_: pytest.fail("the driver read them"))
        there = prepare.reference_of(config, splits, QUIET, run, gpu_elsewhere=True)
        monkeypatch.undo()
        monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
        here = prepare.reference_of(config, splits, QUIET, run)
        assert there is not None
        assert here is not None
        assert there.key == here.key
        assert np.allclose(there.train.covariance, here.train.covariance)
        assert str(there.extractor.net.head.weight.device) == "cpu"
        others = dataclasses.replace(splits, meta=splits.meta | {"key": "another"})
        with pytest.raises(UserError, match="a node has other images there"):
            prepare.reference_of(config, others, QUIET, run, gpu_elsewhere=True)
    finally:
        ray.shutdown()
