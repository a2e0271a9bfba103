"""A configuration's file, and --set: YAML → SearchConfig."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from search.config import SearchConfig, UserError
from search.space_config import explain

CONFIGS = Path(__file__).parent / "configs"


def load(name_or_path: str, overrides: list[str] | None = None, name: str | None = None) -> SearchConfig:
    """Reads a YAML by path or address, or a shipped one by name; `overrides` are a.b=c, or a.b+=c to append to a list,
    c read as YAML; `name` is the run's, by default the file's. Raises UserError."""
    try:
        found = _read(name_or_path)
    except (OSError, ValueError) as error:  # no text, may not be read; an unknown s3:// like scheme
        raise UserError(f"{name_or_path} is no configuration that can be read: {error}") from error
    if found is None:
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(
            f"no configuration at {name_or_path!r}; give the path of a YAML file, or a shipped name: {names}"
        )
    stem, text = found
    try:
        tree = _Loader(text).get_single_data() or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name_or_path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name_or_path} must hold a mapping of settings, but holds a {type(tree).__name__}")
    tree.setdefault("name", stem)
    for override in overrides or []:
        _set(tree, override)
    if name is not None:
        tree["name"] = name
    return parse(tree, name_or_path)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # <<: *anchor, laid under its own
        keys = [self.construct_object(key, deep=True) for key in own]
        if twice := [key for index, key in enumerate(keys) if key in keys[:index]]:
            raise yaml.YAMLError(f"{twice[0]!r} is given twice, the second time{node.start_mark}")
        return super().construct_mapping(node, deep)


def _read(name_or_path: str) -> tuple[str, str] | None:
    """The name of a file without its ending, and what is in it; None where there is no such file."""
    if "://" in name_or_path:
        from trainer.storage import Storage

        file = Storage(name_or_path)
        return (Path(file.root).stem, file.read("").decode()) if file.exists() else None
    path = _find(name_or_path)
    return (path.stem, path.read_text()) if path else None


def _find(name_or_path: str) -> Path | None:
    shipped = CONFIGS / f"{name_or_path}.yaml"
    try:
        path = shipped if "/" not in name_or_path and shipped.exists() else Path(name_or_path).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # a name too long for a file, ~nobody
        return None


def parse(tree: dict[str, Any], origin: str) -> SearchConfig:
    """Checks a mapping. Raises UserError that names the first few wrong keys."""
    try:
        return SearchConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(explain(e) for e in error.errors()[:3])) from None


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set takes a.b=value, but got {override!r}")
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents, 1):
        if isinstance(node, dict) and part not in node:  # what is not named there keeps its default
            node[part] = _default(".".join(parents[:depth])) or {}
        node = node[part] if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {part!r} holds no further settings")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}") from error
    for part in value if isinstance(value, list) else [value]:
        for key_read in part if isinstance(part, dict) else ():
            if part[key_read] is None and ":" in str(key_read):
                raise UserError(
                    f"--set {override}: YAML wants a space after a colon: {str(key_read).replace(':', ': ')}"
                )
    if last.endswith("+"):
        _append(node, last.removesuffix("+"), value, key)
    else:
        node[last] = value


def _append(node: dict[str, Any], name: str, value: Any, key: str) -> None:
    present = node.get(name, _default(key.removesuffix("+")))
    if not isinstance(present, list):
        raise UserError(f"--set {key}=…: {name!r} is no list; use {name}=… to replace it")
    node[name] = [*present, value]


def _default(key: str) -> Any:
    """The default of a.b, as YAML would give it; an empty list where there is no such key, which is refused later."""
    node: Any = SearchConfig(name="default").model_dump(mode="json")
    for part in key.split("."):
        node = node.get(part, []) if isinstance(node, dict) else []
    return node
