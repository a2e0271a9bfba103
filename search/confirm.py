"""The best configurations trained again from new seeds, as trials are: on the cluster, interrupted and resumed alike.

They are a search of their own that suggests nothing, in RUN/confirm with its own table: the first search's trials,
study and budget stay what they were. Every configuration has seeds of its own: the ranking takes what a seed does to
one for independent of what it does to another, and one seed gives two of them the same images in the same order.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console

from cluster.capacity import Placement
from evaluation.rung import RungScorer
from evaluation.shards import Candidate
from search import budget, tuner
from search.config import SearchConfig
from search.interrupt import Interrupt
from search.records import NOT_CHOSEN, Records, Row
from search.runs import CONFIRM, confirmations
from trainer.storage import Storage


def train_again(
    config: SearchConfig,
    run: Storage,
    found: Records,
    chosen: Sequence[Row],
    scorer: RungScorer,
    placement: Placement,
    console: Console,
    interrupt: Interrupt,
) -> tuple[list[Candidate], dict[str, str]]:
    """Trains every chosen configuration from `final.confirm.seeds` new seeds, where that is not done yet.

    It may spend what the search has left of the budget, the reserve included.
    Returns the new candidates of the final stage, and trial → reason of the trainings that failed among them.
    Raises KeyboardInterrupt where the user interrupted it.
    """
    confirmations(run)  # says where their table is damaged
    rest = budget.left(config.budget, run, found)
    spent = rest is None or budget.Budget(rest, run.at(CONFIRM), Records.load(run.at(CONFIRM))).spent()
    records, parents, settings = plan(config, run, chosen, goes_on=not spent)
    tuner.tidy(run.at(CONFIRM), records)
    left = tuner.trials_left(settings, records)
    if left and rest is None:
        console.print("Nothing is confirmed: the budget is spent.")
    elif left and rest is not None:
        allowed = budget.Budget(rest, run.at(CONFIRM), records)
        console.print(f"Confirming {', '.join(row.trial for row in chosen)}: {left} trainings from new seeds\n")
        ended = tuner.search(settings, run.at(CONFIRM), records, scorer, placement, allowed, interrupt, console)
        console.print(f"Confirming ended: {ended}.")
    done = {row.trial: row for row in all_rows(run, ()) if row.trial in parents}
    candidates = [Candidate(row.trial, row.checkpoint or "", parents[row.trial]) for row in done.values()]
    unfinished = [row for row in done.values() if row.state != "completed" or not row.checkpoint]
    return candidates, {row.trial: row.reason or "not trained to the end" for row in unfinished}


def plan(
    config: SearchConfig, run: Storage, chosen: Sequence[Row], goes_on: bool = True
) -> tuple[Records, dict[str, str], SearchConfig]:
    """The table with a row for each new training, trial → trial it confirms, and the search that trains just these.

    goes_on: what the budget ended is trained on, since it was raised.
    """
    earlier, records = confirmations(run), Records.load(run.at(CONFIRM))
    parents: dict[str, str] = {}
    wanted = config.final.confirm.seeds
    for row in chosen:
        trained = [again for confirmed, again in earlier if confirmed == row.trial]
        own = {again.trial: again.seed for n, again in enumerate(trained) if n < wanted or _done(again)}
        number = 0
        while len(own) < wanted:
            number += 1
            name = f"{row.trial}-seed{number}"  # its number: only earlier versions had the seed itself there
            seed = new_seed(row.seed, name)
            if name not in own and seed not in (row.seed, *own.values()):
                own[name] = seed
                records.add(Row(trial=name, source="suggested", seed=seed, state="waiting", **row.params()))
        parents |= dict.fromkeys(own, row.trial)
    for again in records:
        if again.trial in parents and again.state == "stopped" and (goes_on or again.reason == NOT_CHOSEN):
            records.update(again.trial, state="waiting", reason=None)
        elif again.trial not in parents and not _done(again) and again.reason != NOT_CHOSEN:
            records.update(again.trial, state="stopped", reason=NOT_CHOSEN)
    to_the_end = config.early_stopping.model_copy(update={"scheduler": "none"})
    # The name is what Optuna's study, Ray's dashboard and Prometheus tell the two searches apart by.
    changed = {
        "name": f"{config.name}-confirm",
        "trials": len(records),
        "known_points": (),
        "early_stopping": to_the_end,
    }
    return records, parents, config.model_copy(update=changed)


def _done(again: Row) -> bool:
    return again.state in ("completed", "failed")


def new_seed(first: int, trial: str) -> int:
    """The seed of a training, below 2**31: of its name and the search's own seed alone."""
    return int(np.random.SeedSequence([first, *trial.encode()]).generate_state(1)[0] >> 1)


def all_rows(run: Storage, records: Iterable[Row]) -> list[Row]:
    """The rows of a search and those that confirmed it, whose checkpoints' paths are made ones below the run."""
    confirming = (row for _, row in confirmations(run))
    return [
        *records,
        *(dataclasses.replace(r, checkpoint=r.checkpoint and f"{CONFIRM}/{r.checkpoint}") for r in confirming),
    ]
