"""The direction of imports, and what a light command may import."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "search": {"search", "evaluation", "trainer", "cluster"},
    "evaluation": {"evaluation", "trainer"},
    "trainer": {"trainer"},
    "cluster": {"cluster"},
}
WITH_RAY = {"trainer/ray_worker.py", "evaluation/stage.py"}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The first part of every imported module's name, those imported inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its direction"
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    assert set(imported(path)) & MAY_IMPORT.keys() <= MAY_IMPORT[package]


def test_ray_is_imported_only_where_the_cluster_is_spoken_to():
    importing = {str(path.relative_to(ROOT)) for path in FILES if "ray" in set(imported(path))}
    assert {name for name in importing if name.split("/")[0] not in ("search", "cluster")} == WITH_RAY


@pytest.mark.parametrize(
    "module", ["search.cli", "search.config", "search.records", "search.watch", "trainer.config", "trainer.schedules"]
)
def test_a_light_module_imports_neither_torch_nor_ray(module):
    heavy = "{'torch', 'ray', 'optuna', 'diffusers', 'matplotlib'}"
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_files_and_names_that_a_page_speaks_of_exist(page):
    text = (ROOT / page).read_text()
    spoken_of = re.findall(r"`((?:search|evaluation|trainer|cluster|tests|benchmarks)/[\w/]+\.py)(?::(\w+))?`", text)
    assert spoken_of or page == "README.md"
    for path, name in spoken_of:
        assert re.search(rf"^ *(def|class) {name}\b" if name else "", (ROOT / path).read_text(), re.M), f"{path}:{name}"
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_the_tree_in_the_readme_names_every_module_once(package):
    house = (ROOT / "README.md").read_text().partition("## The house\n")[2]
    tree = re.search(rf"^    {package}/ .*\n((?:      .*\n)+)", house, re.M)
    assert tree
    named = sorted(re.findall(r"\w+\.py", tree[1]))
    assert named == sorted(path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py")


def test_every_file_is_short_enough_to_read():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count >= 280} == {}
