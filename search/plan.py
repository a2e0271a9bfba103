"""What a run will cost, before it costs anything: `run --dry-run`."""

import math
import tempfile
from typing import Any

from rich.console import Console

from evaluation.report_words import label, searched_words
from search import space
from search.config import SearchConfig
from search.disk import disk_bytes, size
from search.records import Records
from search.searcher import HonestOptunaSearch
from search.space_config import Range
from search.trial_cost import Measured
from trainer import data
from trainer.storage import Storage

PASSED_BY_MEDIAN = 0.5


def forecast(config: SearchConfig, measured: Measured, images: int, at_once: int, slots: int) -> dict[str, Any]:
    """Hours and bytes of a run. images: of the training split; slots: workers that the cluster holds.

    `expected` takes a share of 1/reduction (median: a half) to pass each rung; `at_most` is where no trial is stopped.
    """
    stopping = config.early_stopping
    passed = {"asha": 1 / stopping.reduction, "median": PASSED_BY_MEDIAN, "none": 1.0}[stopping.scheduler]
    rungs, train = config.rung_epochs(), config.train
    steps = [data.epoch_end(epoch, images, train.batch_size) for epoch in (0, *rungs, train.epochs)]
    scored = [measured.rung_seconds] * len(rungs) + [measured.rung_seconds * len(train.ema_decays)]
    parts = [(b - a) * measured.step_seconds + s for a, b, s in zip(steps, steps[1:], scored, strict=False)]

    def hours(share: float) -> dict[str, float]:
        """Where so many of the trials at a rung pass it."""
        trial = sum(part * share**index for index, part in enumerate(parts))
        rounds = max(1.0, config.trials / at_once)
        if share == 1:
            rounds = math.ceil(rounds)
        starts = rounds if config.runner == "train" else 1
        # However many at once, one is trained in full.
        search = (max(rounds * trial, sum(parts)) + starts * measured.start_seconds) / 3600
        work = config.trials * trial * train.workers / 3600
        limits = ((config.budget.hours, search), (config.budget.worker_hours, work))
        allowed = [(1 - config.budget.reserve) * limit / needed for limit, needed in limits if limit and needed]
        cut = min([1.0, *allowed])
        return {"search": search * cut, "workers": work * cut}

    drawn = (config.final.top + config.confirmations) * config.final.images
    return {
        "trial_hours": sum(parts) / 3600,
        "expected": hours(passed),
        "at_most": hours(1.0),
        "confirm_hours": math.ceil(config.confirmations / at_once) * sum(parts) / 3600,
        "final_stage_hours": drawn * measured.image_seconds / slots / 3600,
        "disk_bytes": disk_bytes(config, measured.checkpoint_bytes, at_once) + drawn * measured.image_bytes,
    }


def describe(config: SearchConfig, metric: str) -> dict[str, Any]:
    """The space, and what becomes of each known point before it is trained. Writes nothing that stays."""
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Storage(folder))
        searcher = HonestOptunaSearch(config.model_copy(update={"name": "plan"}), metric, records, None)
        for point in config.known_points:
            records.add(searcher.new_row(space.known_params(config, point), known=True))
        known = [row.params() | {"screened" if row.state == "screened" else "reused": row.reason} for row in records]
    families = {
        family: {n: v.model_dump() if isinstance(v, Range) else v for n, v in space.parameters(config, family).items()}
        for family in config.space.families
    }
    return {
        "space": families,
        "choices": {name: list(values) for name, values in config.space.train.items()},
        "known_points": known,
    }


def show(plan: dict[str, Any], console: Console) -> None:
    """The plan as a person reads it."""
    measured, cost = plan["measured"], plan["forecast"]
    base = " (of the base training, as all hours here)" if plan["choices"] else ""
    console.print(f"Plan of {plan['run']}: nothing is written there, nothing is trained.\n")
    console.print("Space")
    for family, named in plan["space"].items():
        own = ", ".join(
            f"{n.partition('.')[2]} {searched_words(v)}" for n, v in named.items() if n.startswith(f"{family}.")
        )
        console.print(f"  {family:<16}{own}")
    shared = {n: v for n, v in next(iter(plan["space"].values())).items() if "." not in n} | plan["choices"]
    for name, value in shared.items():
        console.print(f"  {name:<16}{searched_words(value)}")
    console.print("Known points, tried first")
    for point in plan["known_points"]:
        said = next((f"{key}: {point[key]}" for key in ("screened", "reused") if point.get(key)), "passes the screen")
        console.print(f"  {label(point):<32}{said}")
    console.print(
        f"Trials           {plan['trials']}, {plan['trials_at_once']} at once, {plan['steps']:,} steps "
        f"({plan['epochs']} epochs) each\n"
        f"Rungs            after epochs {', '.join(map(str, plan['rungs'])) or '(none)'}, by {plan['metric']}\n"
        f"Measured         {measured['step_seconds'] * 1e3:.3g} ms a step, {measured['rung_seconds']:.3g} s a rung, "
        f"{measured['image_seconds'] * 1e3:.3g} ms an image of the final stage, {measured['start_seconds']:.3g} s a "
        f"process, {size(measured['checkpoint_bytes'])} a checkpoint\n"
        f"One trial        {cost['trial_hours']:.3g} hours in full{base}\n"
        f"Search           about {cost['expected']['search']:.3g} hours ({cost['expected']['workers']:.3g} of workers)"
        f", or {cost['at_most']['search']:.3g} ({cost['at_most']['workers']:.3g}) if no trial is stopped\n"
        + (f"Confirming       about {cost['confirm_hours']:.3g} hours\n" if cost["confirm_hours"] else "")
        + f"Final stage      about {cost['final_stage_hours']:.3g} hours\n"
        f"Disk             up to {size(cost['disk_bytes'])}"
        + (f", {size(plan['free_bytes'])} free" if plan["free_bytes"] is not None else "")
    )
    if plan["warning"]:
        console.print(plan["warning"])
