"""What a run began with and goes on with: its images, what its trainings have in common, and what judges their rungs.

Of other images, trainings or judges nothing new would compare with what the run has.
"""

import json
from typing import Any

from evaluation.config import Metric
from evaluation.reference import Reference
from search.config import SearchConfig, UserError
from search.records import Records
from search.runs import CONFIG
from trainer.data import Splits
from trainer.storage import Storage

FILE = "began.json"  # {images, training, judge, space}
OF_A_TRIAL = ("learning_rate", "dropout", "seed")  # in its row of the trials table
OF_ITS_SCHEDULE = ("family", "start", "end", "tau")


def check_images(run: Storage, splits: Splits) -> None:
    """Raises UserError where they are others by now."""
    now = {"train": len(splits.train), "held_out": len(splits.held_out), "key": splits.key()}
    began = _on_record(run, "images", now)
    if began != now:
        raise UserError(
            f"the images of {splits.config.name} are not those that {run.uri} began with (to train on and held out: "
            f"{now['train']:,} and {now['held_out']:,} by now, {began.get('train')} and {began.get('held_out')} then), "
            "so that nothing new compares with what it has; put them back, or begin another run. Where they are the "
            f"same and only read otherwise (another Pillow), delete {run.uri}/{FILE}"
        )


def check_training(run: Storage, records: Records, config: SearchConfig) -> None:
    """Raises UserError where config.yaml has other trainings by now than those that the run's trials had."""
    now = config.train.learned()
    now |= {"data": {"horizontal_flip": config.train.data.horizontal_flip}}  # check_images has seen to the rest
    now = {name: value for name, value in now.items() if name not in OF_A_TRIAL}
    now["schedule"] = {name: value for name, value in now["schedule"].items() if name not in OF_ITS_SCHEDULE}
    if found := _difference(_on_record(run, "training", now, anew=not len(records)), now):
        name, then, value = found
        raise UserError(
            f"train.{name} was {then} when {run.uri} began, and is {value} in its {CONFIG}: its trials would not "
            "compare; put it back, or begin another run with another --name"
        )


def check_judge(
    run: Storage, records: Records, config: SearchConfig, metric: Metric, reference: Reference | None
) -> None:
    """Raises UserError where rungs would be judged otherwise than those that trials were stopped by so far."""
    now: dict[str, Any] = {"metric": metric}
    if metric != "grid_loss" and reference is not None:
        sampler = config.early_stopping.sampler.model_dump(exclude={"block_size", "bf16"})
        now |= {"images": config.early_stopping.images, "sampler": sampler}
        now |= {"extractor": reference.extractor.name, "reference": reference.key}
    if found := _difference(_on_record(run, "judge", now, anew=not any(row.rungs for row in records)), now):
        name, then, value = found
        raise UserError(
            f"the rungs of {run.uri} are judged by {name}={then} so far, and would be by {value} from now on: trials "
            f"would not compare. In its {CONFIG}, put early_stopping, final.extractor and final.inception_weights back "
            "(early_stopping.metric: grid_loss, where it began without an extractor). To rank what there is by another "
            f"extractor: ddpm-search evaluate {run.uri}"
        )


def rows_of_other_spaces(run: Storage, records: Records, config: SearchConfig) -> int:
    """How many rows the table had when the space, or who suggests from it, became what it is by now."""
    space = config.model_dump(mode="json", include={"space", "searcher", "same_alpha_bar", "seed"})
    base = config.train.model_dump(mode="json", include={"schedule", *OF_A_TRIAL})  # where the space has none of it
    now = {"is": space | base, "since": len(records)}
    found = _on_record(run, "space", now)
    if _difference(found.get("is"), now["is"]):
        found = _on_record(run, "space", now, anew=True)
    return int(found.get("since", 0))


def _on_record(run: Storage, what: str, now: dict[str, Any], anew: bool = False) -> dict[str, Any]:
    """How the run began. anew, or where that is not known: as it is now, which is put on record."""
    try:
        found = run.read_json(FILE)
    except (FileNotFoundError, ValueError):  # a new run, or a damaged file
        found = None
    whole: dict[str, Any] = found if isinstance(found, dict) else {}
    if isinstance(whole.get(what), dict) and not anew:
        began: dict[str, Any] = whole[what]
        return began
    run.write_json(FILE, whole | {what: now})
    return now


def _difference(then: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(name, then, now) of the first value that is another one, of nested dicts; tuples are lists in JSON."""
    if isinstance(then, dict) and isinstance(now, dict):
        pairs = ((key, value, now.get(key)) for key, value in then.items())  # a later version's settings are not in it
        found = (_difference(a, b, f"{name}.{key}" if name else key) for key, a, b in pairs)
        return next(filter(None, found), None)
    then, now = json.loads(json.dumps([then, now]))
    return (name, then, now) if then != now else None
