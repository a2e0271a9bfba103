"""A search on a simulated clock: the real searcher and scheduler, called as Tune calls them, over known curves.

Nothing is trained and Ray does not run. The clock shows the seconds that the trainings would have taken. Where the
driver counts, the CPU seconds that searcher and scheduler really took are added (of all threads; the rest of the
machine's load is not theirs): they deal with one event after the other, and a worker whose trial has ended waits for
its next one.
"""

import heapq
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.tune.schedulers import TrialScheduler

Steps = list[tuple[float, dict[str, Any]]]  # (seconds since the training's first step, what it reports then)


@dataclass
class Trial:
    """As much of Tune's trial as schedulers look at, and what its training will report."""

    trial_id: str
    config: dict[str, Any]
    steps: Steps
    began: float = 0.0  # its training's first step
    ended: float = 0.0  # the report after which it did not go on
    last: dict[str, Any] = field(default_factory=dict)
    local_path: None = None


@dataclass
class Replay:
    """What came of a search."""

    workers: int
    trials: list[Trial] = field(default_factory=list)  # those that were begun
    seconds: float = 0.0  # on the clock, now
    driver: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # call → seconds of each
    driver_seconds: float = 0.0
    # Until the last trial was begun: then workers run out of trials.
    busy_until_spent: float = 0.0  # share of the workers' seconds in training
    driver_share_until_spent: float = 0.0  # of the seconds on the clock


def run(
    searcher: Any,
    scheduler: Any,
    steps: Callable[[dict[str, Any]], Steps],
    workers: int,
    trials: int,
    *,
    gap_seconds: float = 0.0,
    driver_counts: bool = False,
    changed: Callable[[], None] = lambda: None,
    ended: Callable[[Replay, Trial], bool] = lambda replay, trial: False,
) -> Replay:
    """A search of so many trials; it is over sooner where ended(replay, trial), called after each trial, is true.

    steps(configuration): what the training of a suggestion reports. gap_seconds: from a trial's start to its training's
    first step. changed() is called after each event.
    """
    replay = Replay(workers)
    driver_free = 0.0

    def timed(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal driver_free
        began = time.process_time()
        answer = function(*arguments)
        took = time.process_time() - began
        replay.driver[call].append(took)
        replay.driver_seconds += took
        driver_free += took if driver_counts else 0.0
        return answer

    def begin() -> None:
        if len(replay.trials) == trials:
            return
        name = f"tune{len(replay.trials)}"
        config = timed("suggest", searcher.suggest, name)
        if not isinstance(config, dict):  # the searcher has nothing more
            return
        trial = Trial(name, config, steps(config), began=driver_free + gap_seconds)
        replay.trials.append(trial)
        replay.driver_share_until_spent = replay.driver_seconds / trial.began if trial.began else 0.0
        scheduler.on_trial_add(None, trial)
        heapq.heappush(events, (trial.began + trial.steps[0][0], next(order), trial, 0))

    order = itertools.count()
    events: list[tuple[float, int, Trial, int]] = []
    for _ in range(workers):
        begin()
    while events:
        due, _, trial, index = heapq.heappop(events)
        driver_free = replay.seconds = max(due, driver_free)
        trial.ended, trial.last = due, trial.steps[index][1]
        decision = timed("result", scheduler.on_trial_result, None, trial, trial.last)
        if decision != TrialScheduler.STOP and index < len(trial.steps) - 1:
            searcher.on_trial_result(trial.trial_id, trial.last)
            timed("view", changed)
            heapq.heappush(events, (trial.began + trial.steps[index + 1][0], next(order), trial, index + 1))
            continue
        timed("complete", searcher.on_trial_complete, trial.trial_id, trial.last)
        timed("view", changed)
        if ended(replay, trial):
            break
        begin()

    spent = replay.trials[-1].began
    busy = sum(max(0.0, min(trial.ended, spent) - trial.began) for trial in replay.trials)
    replay.busy_until_spent = busy / (spent * workers) if spent else 1.0
    return replay
