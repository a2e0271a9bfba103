"""What a run needs before it starts: who reads its images."""

import contextlib
import dataclasses
import io
import platform

import numpy as np
import pytest
from rich.console import Console

from cluster import connect
from search import pipeline, prepare
from search.config import UserError
from search.config_file import load
from search.runs import CONFIG
from trainer import data
from trainer.storage import Storage

QUIET = Console(file=io.StringIO())


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


@pytest.mark.ray
def test_a_node_that_has_other_images_is_refused_before_anything_trains(local_ray, tmp_path, monkeypatch):
    joined = contextlib.nullcontext(connect.Connection("", local=False))  # local_ray, as if it were elsewhere
    monkeypatch.setattr(connect, "connected", lambda address: joined)
    config, run = load("digits", ["final.confirm.top=1"]), Storage(tmp_path / "run")
    run.write(CONFIG, b"")
    splits = data.load(config.train.data)
    prepare.check_nodes(run, splits, True, QUIET)
    others = dataclasses.replace(splits, meta=splits.meta | {"key": "of another copy"})
    said = r"on node .*: train\.data\.name: digits has other images than .* give all nodes the same$"
    prepare.check_nodes(run, others, False, QUIET)
    with pytest.raises(UserError, match=said):
        pipeline.go(config, run, others, "auto", QUIET)
    with pytest.raises(UserError, match=said):
        pipeline.evaluate_again(config, config.final, run, others, "auto", QUIET)


def test_a_trial_refuses_other_images_than_its_search_has():
    config = load("digits").train.data
    key = data.load(config).key()
    assert data.load_same(config, key).key() == data.load_same(config, None).key() == key
    with pytest.raises(ValueError, match="give all nodes the same"):
        data.load_same(config, "of another copy")
    with pytest.raises(ValueError, match=f"there is no folder /nope.*on node {platform.node()}"):
        data.load_same(config.model_copy(update={"name": "folder:/nope"}), key)
