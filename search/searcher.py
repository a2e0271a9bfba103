"""OptunaSearch that screens before a trial costs anything, and tells Optuna the truth about how trials ended."""

import dataclasses
import warnings
from typing import Any

import optuna
from optuna.trial import TrialState
from pydantic import ValidationError
from ray.tune.search.optuna import OptunaSearch

from search import space
from search.config import SearchConfig, UserError
from search.records import Live, Records, Row
from search.study import ShortMemory
from trainer import schedules

MAX_SCREENED_IN_A_ROW = 1000


class HonestOptunaSearch(Live, OptunaSearch):
    """TPE over the conditional space, its trials those of the trials table.

    Interrupted trials of a resumed run come first, then known points that were not tried, then suggestions.
    Differs from Ray's OptunaSearch in what Optuna is told: a trial that was stopped early is PRUNED with the value
    of each of its rungs (Ray tells COMPLETE, and TPE takes an early value for a final one); a failed one is FAIL,
    and so is a screened one: TPE would take PRUNED ones without a value for the best there are until others have one.
    """

    def __init__(
        self, config: SearchConfig, metric: str, records: Records, storage: optuna.storages.BaseStorage | None
    ):
        self.config, self.metric_name, self.records = config, metric, records
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A resumed search must not draw again what it drew before; a fresh one depends on the seed alone.
            sampler = optuna.samplers.TPESampler(
                seed=config.seed + len(records), multivariate=True, group=True, constant_liar=True
            )
            super().__init__(
                space=space.define_by_run(config),
                metric=metric,
                mode="max" if metric == "score" else "min",
                sampler=sampler,
                study_name=config.name,
                storage=ShortMemory(),
            )
        # Ended trials are copied: a study that lived in a journal would write ten lines a trial, each with a sync.
        self._copy = optuna.create_study(
            storage=storage, study_name=config.name, directions=self._ot_study.directions, load_if_exists=True
        )
        self._keys: dict[str, str] = {}  # Tune's trial id → our stable key
        self._unfinished: list[Row] = []
        known_rows = [row for row in records if row.source == "known"]
        self._known = list(config.known_points[len(known_rows) :])
        for row in records:
            if row.state == "running":
                self._unfinished.append(row)
            else:
                self._remember(row)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's configuration, after writing its row; those that fail the screen are noted on the way."""
        if self._unfinished:
            row = self._unfinished.pop(0)
            self._ask(trial_id, space.params_of(dataclasses.asdict(row)))
            return self._start(trial_id, row)
        for _ in range(MAX_SCREENED_IN_A_ROW):
            if self._known:
                params, known = space.known_params(self.config, self._known.pop(0)), True
                self._ask(trial_id, params)
            else:
                params, known = super().suggest(trial_id), False
                assert params is not None
            row = self._new_row(params, known)
            self.records.add(row)
            if row.state == "running":
                return self._start(trial_id, row)
            self._tell(trial_id, row)
        raise UserError(
            f"{MAX_SCREENED_IN_A_ROW} configurations in a row failed the screen, the last because: {row.reason}; "
            "narrow space.families to schedules that reach pure noise"
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: rungs are told when a trial ends, from the record, the deciding one included."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        row = self.records[self._keys[trial_id]]
        if error and row.state == "running":
            row = self.records.update(row.trial, state="failed")
        if row.state != "running":  # else the search was interrupted, and the trial will be resumed
            self._tell(trial_id, row)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: Tune would pickle this object; the record is what a search is resumed from."""

    def _start(self, trial_id: str, row: Row) -> dict[str, Any]:
        self._keys[trial_id] = row.trial
        training = space.train_config(self.config, dataclasses.asdict(row))
        return {"trial": row.trial, "train": training.model_dump(mode="json")}

    def _new_row(self, params: space.Params, known: bool) -> Row:
        flat = space.flat(params)
        trial = f"t{len(self.records):04d}-{flat['family']}"
        row = Row(trial=trial, source="known" if known else "suggested", seed=self.config.train.seed, **flat)
        reason = screen(self.config, row)
        return dataclasses.replace(row, state="screened", reason=reason) if reason else row

    def _ask(self, trial_id: str, params: space.Params) -> None:
        """Makes Optuna's next trial the one with these parameters, where its space holds them."""
        if space.contains(self.config, params):
            searched = space.distributions(self.config, params["family"])
            self._ot_study.enqueue_trial({name: params[name] for name in searched})
            super().suggest(trial_id)

    def _tell(self, trial_id: str, row: Row) -> None:
        ot_trial = self._ot_trials.pop(trial_id, None)
        if ot_trial is None:  # a known point outside the space
            return
        for step, value in self._values(row).items():
            ot_trial.report(value, step)
        state = self._state(row)
        self._copy.add_trial(self._ot_study.tell(ot_trial, self._final(row), state=state))

    def _remember(self, row: Row) -> None:
        """Puts a finished row of an earlier run into the study."""
        params = space.params_of(dataclasses.asdict(row))
        if not space.contains(self.config, params):
            return
        searched = space.distributions(self.config, row.family)
        state, values = self._state(row), list(self._values(row).values())
        trial = optuna.trial.create_trial(
            state=state,
            # Optuna's tell() gives a pruned trial its last rung's value, which create_trial() leaves to us.
            value=self._final(row) if state != TrialState.PRUNED else values[-1] if values else None,
            params={name: params[name] for name in searched},
            distributions=searched,
            intermediate_values=self._values(row),
        )
        self._ot_study.add_trial(trial)
        self._copy.add_trial(trial)

    def _values(self, row: Row) -> dict[int, float]:
        """Epoch → value of the metric, for the rungs that have one."""
        rungs = {rung["epoch"]: rung[self.metric_name] for rung in row.rungs}
        return {epoch: value for epoch, value in rungs.items() if value is not None}

    def _final(self, row: Row) -> float | None:
        """The value of a completed trial; Optuna takes none of any other."""
        return self._values(row)[row.rungs[-1]["epoch"]] if self._state(row) == TrialState.COMPLETE else None

    def _state(self, row: Row) -> TrialState:
        if row.state == "completed" and row.rungs and row.rungs[-1]["epoch"] in self._values(row):
            return TrialState.COMPLETE
        # One that was completed and drew no finite images has no value to tell.
        return TrialState.FAIL if row.state in ("failed", "completed", "screened") else TrialState.PRUNED


def screen(config: SearchConfig, row: Row) -> str | None:
    """Why a row is not worth training: a law its schedule breaks, or too much signal left in x_T. None: it is."""
    try:
        training = space.train_config(config, dataclasses.asdict(row))
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return schedules.screen(**training.schedule.model_dump())
