"""Nothing that was stored or downloaded is run."""

import ast
from pathlib import Path

import pytest

from search.config import UserError
from search.config_file import load

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for package in ("search", "evaluation", "trainer", "cluster") for path in (ROOT / package).rglob("*.py")
)
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def calls(path: Path) -> dict[str, list[ast.Call]]:
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def test_no_file_of_ours_unpickles():
    assert any("torch.load" in calls(path) for path in FILES)
    for path in FILES:
        tree = ast.parse(path.read_text())
        imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        imported |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & UNSAFE, path
        called = calls(path)
        for call in called.get("torch.load", ()):
            assert {"weights_only": True}.items() <= {
                k.arg: getattr(k.value, "value", 0) for k in call.keywords
            }.items()
        for call in called.get("np.load", ()):
            assert all(k.arg != "allow_pickle" or getattr(k.value, "value", 1) is False for k in call.keywords)
        assert not called.keys() & {"yaml.load", "eval", "exec"}


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b", "..", "", ".hidden", "a b", "a\nb"])
def test_a_run_s_name_stays_below_storage(name):
    with pytest.raises(UserError, match="name"):
        load("digits", [f"name={name!r}"])
