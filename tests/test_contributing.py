"""The worked examples of CONTRIBUTING.md: each patch applies to the source as it is, and does what is printed there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.connect import PACKAGES

ROOT = Path(__file__).parents[1]
SECTIONS = [section.partition("\n") for section in (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1:]]
EXAMPLES = {
    title: re.findall(r"^```\w+\n(.*?)^```", text, re.M | re.S) for title, _, text in SECTIONS if "```diff" in text
}
SLOW = {"An extractor", "A sampler"}  # torch is imported twice


def test_four_kinds_of_addition_are_shown():
    assert list(EXAMPLES) == ["A schedule family", "A data set", "An extractor", "A sampler"]


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[pytest.mark.slow] if title in SLOW else []) for title in EXAMPLES]
)
def test_an_example_is_short_applies_and_prints_what_is_said(title, tmp_path):
    patch, command, printed = EXAMPLES[title]
    assert len(re.findall(r"^[+-](?!\+\+ |-- ).*\S", patch, re.M)) <= 20

    source, bin_ = tmp_path / "source", tmp_path / "bin"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    bin_.mkdir()
    for name, does in {"python": "", "ddpm-search": " -m search.cli"}.items():
        (bin_ / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{does} "$@"\n')
        (bin_ / name).chmod(0o755)
    # Without the ceiling git would look for a repository around tmp_path, and skip what is not in its index.
    own = {"GIT_CEILING_DIRECTORIES": str(tmp_path), "DDPM_SEARCH_CACHE": str(tmp_path / "cache")}
    env = os.environ | own | {"PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(source)}

    def run(*words: str, given: str | None = None) -> str:
        done = subprocess.run(words, cwd=source, env=env, input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with pytest.raises(AssertionError):  # without the patch there is no such thing
        run("sh", "-c", command)
    run("git", "apply", "-", given=patch)
    assert run("sh", "-c", command).startswith(printed)
