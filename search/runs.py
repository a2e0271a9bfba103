"""A run's folder, opened: its configuration, its trials, its ranking and what confirms it."""

import json
from typing import Any

import yaml

from search.config import SearchConfig, UserError
from search.config_file import parse
from search.records import FILE, DamagedError, Records, Row
from trainer.storage import Storage

CONFIG, RANKING, CONFIRM = "config.yaml", "ranking.json", "confirm"


def storage_at(address: str) -> Storage:
    """Raises UserError where no storage can be at such an address."""
    try:
        return Storage(address)
    except (ValueError, OSError, RuntimeError) as error:  # an unknown s3:// like scheme, no answer, ~nobody
        raise UserError(f"{address} is no place for a run: {error}; give a folder, or s3://bucket/folder") from error


def open_run(path: str) -> tuple[SearchConfig, Storage, Records]:
    """An earlier run, to go on with. Raises UserError where there is none, or this version cannot go on with it."""
    tree, run, records = read_run(path)
    return parse(tree, f"{path}/{CONFIG}"), run, records


def read_run(path: str) -> tuple[dict[str, Any], Storage, Records]:
    """An earlier run, perhaps of another version: its configuration is not checked. Raises UserError."""
    run = storage_at(path)
    if not run.exists(CONFIG):
        raise UserError(f"no run at {path}: it has no {CONFIG}; give the folder that `ddpm-search run` printed")
    try:
        tree, records = yaml.safe_load(run.read(CONFIG)), Records.load(run)
    except (yaml.YAMLError, UnicodeDecodeError, DamagedError) as error:
        raise UserError(f"the run at {path} is damaged: {error}; restore {CONFIG} and {FILE} from a copy") from error
    try:
        whole = bool(tree["name"] and tree["train"]["epochs"] and tree["early_stopping"]["metric"])
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(
            f"no run at {path}: its {CONFIG} is not a run's; give the folder that `ddpm-search run` printed"
        )
    return tree, run, records


def confirmations(run: Storage) -> list[tuple[str, Row]]:
    """(the trial that it confirms, its row) of every training from a new seed, in the order of RUN/confirm's table.

    Raises UserError where that is damaged.
    """
    place = run.at(CONFIRM)
    try:
        return [(row.trial.rpartition("-seed")[0], row) for row in Records.load(place)]
    except DamagedError as error:
        raise UserError(f"{place.uri}/{FILE} is damaged: {error}; restore it from a copy") from error


def read_ranking(run: Storage) -> dict[str, Any] | None:
    """ranking.json, or None before the final stage. Raises UserError where it is damaged."""
    if not run.exists(RANKING):
        return None
    try:
        found = run.read_json(RANKING)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        found = error
    if not isinstance(found, dict) or not {"trials", "score_name", "images", "split_size"} <= found.keys():
        what = f": {found}" if isinstance(found, Exception) else ""
        raise UserError(f"{RANKING} of {run.uri} is damaged{what}; write it anew: ddpm-search evaluate {run.uri}")
    return found
