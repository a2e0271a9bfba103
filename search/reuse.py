"""Which trial is a configuration already but for rounding, so that one training speaks for both."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from search import space
from search.config import SearchConfig
from search.records import OPEN, Row
from trainer import schedules

SPEAKS = (*OPEN, "completed", "stopped")  # for a configuration that is nearly the same
LOG_LEARNING_RATE, DROPOUT = 0.02, 0.005  # largest differences that are but rounding


def reused(config: SearchConfig, row: Row, records: Iterable[Row]) -> dict[str, Any] | None:
    """What changes in the row of a configuration that a trial of `records` speaks for; None where none does.

    Families are no bar: sigmoid and cosine curves can be one. A failed trial says nothing of another training.
    """
    curve = _alpha_bar(config, row)
    near = [
        (schedules.largest_difference(curve, _alpha_bar(config, other)), other.trial)
        for other in records
        if abs(other.dropout - row.dropout) <= DROPOUT
        and abs(math.log(other.learning_rate / row.learning_rate)) <= LOG_LEARNING_RATE
        and other.state in SPEAKS
        and (other.seed, other.settings) == (row.seed, row.settings)
    ]
    difference, trial = min(near, default=(math.inf, ""))
    if difference >= config.same_alpha_bar:
        return None
    return {"same_as": trial, "reason": f"the same as {trial}: alpha_bar differs by {difference:.2g} at most"}


def _alpha_bar(config: SearchConfig, row: Row) -> np.ndarray:
    return schedules.alpha_bar(space.train_config(config, vars(row)).schedule.betas())
