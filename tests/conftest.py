"""What several test files share."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from search.records import Records, Row
from trainer.storage import Storage

optuna.logging.set_verbosity(optuna.logging.ERROR)
torch.set_num_threads(1)  # tensors of tests are small: two threads wait for each other, much longer on a busy machine
ended: list[int] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    ended.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends with the tests' own status: native threads of pyarrow and torch have crashed the interpreter's shutdown."""
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """The empty trials table of a new run."""
    return Records(Storage(tmp_path / "run"))


@pytest.fixture
def row() -> Callable[..., Row]:
    """row(trial, **changes): a row of the trials table."""

    def make(trial: str = "t0000-cosine", **changes: Any) -> Row:
        plain: dict[str, Any] = dict(
            source="suggested", family="cosine", start=0.0, end=1.0, tau=1.0, learning_rate=1e-3, dropout=0.1, seed=0
        )
        return Row(trial=trial, **(plain | changes))

    return make


@pytest.fixture
def rung() -> Callable[..., dict[str, Any]]:
    """rung(epoch, frechet): the scores of a rung."""

    def make(epoch: int, frechet: float | None = None, score: float | None = None, grid_loss: float | None = None):
        return {"epoch": epoch, "frechet": frechet, "score": score, "grid_loss": grid_loss}

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """disk(bytes): the folder of a file system of that size."""
    folder = tmp_path / "disk"

    def make(size: int) -> Path:
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"may not mount a small file system: {done.stderr.decode()}")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def local_ray(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of two CPUs. Tests that use it are marked `ray`."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=150 * 1024**2,
        log_to_driver=False,
        _temp_dir=str(tmp_path_factory.mktemp("r")),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Weights of the real architecture, drawn so that images differ in features and logits; their file and SHA-256."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.normal_(net.fc.weight, std=3.0)
    torch.save(net.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()
