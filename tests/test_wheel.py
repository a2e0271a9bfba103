"""The wheel: what is in it, and that it works where the repository is not."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from cluster.connect import PACKAGES

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_every_place_that_names_the_version_names_this_one():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == (cited["version"], str(cited["date-released"])) == (VERSION, released[0][1])
    images = {
        tag for path in (ROOT / "manifests").iterdir() for tag in re.findall(r"ddpm-search:(\S+)", path.read_text())
    }
    assert images == {VERSION}


def test_the_citation_has_what_cff_1_2_0_asks_for():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()  # the schema's `required`
    assert cited["authors"] == [{"name": "The ddpm-search authors"}]
    assert cited["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy, for setuptools leaves folders in the source and takes up what it left there."""
    source = tmp_path_factory.mktemp("source") / "source"
    left = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", "built", "."], cwd=source, check=True)
    (built,) = (source / "built").iterdir()
    return built


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    files = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    own = {str(path) for path in files if "__pycache__" not in path.parts}
    assert {"search/configs/digits.yaml", "evaluation/report.css"} <= own
    about = f"ddpm_search-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
    assert {name for name in held if not name.startswith(f"{about}/")} == own
    assert f"{about}/licenses/LICENSE" in held


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_repository(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "venv"], cwd=tmp_path, check=True)
    bin_ = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    # This environment's dependencies. Its own .pth files, which lead to the repository, are not followed from here.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["DDPM_SEARCH_CACHE"] = str(tmp_path / "cache")

    def run(*words: str) -> str:
        done = subprocess.run([bin_ / words[0], *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    asked = "import importlib.metadata as m, search, trainer; print(m.version('ddpm-search'), search.__file__)"
    assert run("python", "-c", asked).split() == [VERSION, str(site / "search" / "__init__.py")]
    assert "resume" in run("ddpm-search", "--help")
    shown = run("ddpm-search", "schedule", "show", "--family", "cosine", "--start", "0", "--end", "1")
    assert "screen: passes" in shown
    tiny = ["train.epochs=1", "train.data.subset=80", "train.schedule.steps=10", "train.data.labels=false"]
    run(
        "ddpm-search", "train", "digits", "--out", "trained", *(word for setting in tiny for word in ("--set", setting))
    )
    assert any((tmp_path / "trained").glob("checkpoint_*"))
