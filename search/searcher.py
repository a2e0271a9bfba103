"""OptunaSearch that screens before a trial costs anything, and tells Optuna the truth about how trials ended."""

import dataclasses
from itertools import takewhile
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from evaluation.analysis import NOT_RESUMED
from search import samplers, space, study
from search.alike import FailingAlike
from search.budget import Budget
from search.config import SearchConfig, UserError
from search.driver_only import DriverOnly
from search.records import OPEN, UNTRAINED, Records, Row
from search.reuse import reused

MAX_UNTRAINED_IN_A_ROW = 200  # screened and reused ones: then there is nothing new to be found in the space


class HonestOptunaSearch(DriverOnly, OptunaSearch):
    """Optuna over the conditional space, its trials those of the trials table.

    Interrupted trials of a resumed run come first, then known points that were not tried, then suggestions.
    Differs from Ray's OptunaSearch in what Optuna is told: a trial that was stopped early is PRUNED with the value
    of each of its rungs (Ray tells COMPLETE, and TPE takes an early value for a final one); a failed one is FAIL, and
    so is a screened one: TPE would take PRUNED ones without a value for the best there are until others have one. A
    reused one is told what became of the trial that it equals, once that has ended. `ended` says why nothing more is
    trained, `exhausted` why nothing more is suggested, where that is so: what was begun is then trained all the same.
    old_rows: how many there were when the space became what it is: that those held nothing new says nothing of it.
    """

    def __init__(
        self,
        config: SearchConfig,
        metric: str,
        records: Records,
        storage: optuna.storages.BaseStorage | None,
        budget: Budget | None = None,
        old_rows: int = 0,
    ):
        self.config, self.metric_name, self.records, self.budget = config, metric, records, budget
        self._old_rows, self.copied = old_rows, True  # copied: all that has ended
        # A resumed search must not draw again what it drew before; a fresh one depends on the seed alone.
        sampler = samplers.make(config, drawn=len(records))
        super().__init__(
            space=space.define_by_run(config),
            metric=metric,
            mode="max" if metric == "score" else "min",
            sampler=sampler,
            study_name=config.name,
            # Others need all: a grid ends when every point of it was tried.
            storage=study.ShortMemory() if isinstance(sampler, TPESampler) else InMemoryStorage(),
        )
        # Ended trials are copied: a study that lived in a journal would write ten lines a trial, each with a sync.
        self._copy = optuna.create_study(
            storage=storage, study_name=config.name, directions=self._ot_study.directions, load_if_exists=True
        )
        self.ended: str | None = None
        self.exhausted: str | None = None
        self.alike = FailingAlike()
        self._ot_study.stop = self._exhausted  # what grids call, and Optuna allows in its own loop only
        self._keys: dict[str, str] = {}  # Tune's trial id → our stable key
        self._unfinished: list[Row] = []
        tried = [space.identity(config, space.params_of(vars(row))) for row in records if row.source == "known"]
        points = [(point, space.identity(config, space.known_params(config, point))) for point in config.known_points]
        self._known = [point for point, known in points if known not in tried]
        for trial in dict.fromkeys(row.same_as for row in records if row.same_as):
            if records[trial].state == "failed":  # the driver died before it could see to them
                self._settle(trial)
        for row in records:
            if row.state in OPEN:
                self._unfinished.append(row)
            elif self._outcome(row).state not in OPEN:
                self._remember(row)
        samplers.take_up(self._ot_study)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration, after writing its row; screened and reused ones are noted on the way.

        None, to be asked again, where a trial that others equal may yet fail: one of them would be trained instead.
        """
        if self.over():
            return self._nothing()
        if self._unfinished:
            row = self._unfinished.pop(0)
            self._ask(trial_id, space.params_of(vars(row)))
            return self._start(trial_id, row)
        while not self.over():
            if self._known:
                params, known = space.known_params(self.config, self._known.pop(0)), True
                self._ask(trial_id, params)
            else:
                samplers.take_up(self._ot_study)
                if self.exhausted:
                    break
                suggested, known = super().suggest(trial_id), False
                assert suggested is not None
                params = suggested
            row = self.new_row(params, known)
            self.records.add(row)
            if row.state == "running":
                return self._start(trial_id, row)
            if self._outcome(row).state not in OPEN:
                self._tell(trial_id, row)
            elif trial_id in self._ot_trials:
                self._ot_trials[row.trial] = self._ot_trials.pop(trial_id)  # told with the trial that it equals
        return self._nothing()

    def _nothing(self) -> str | None:
        may_come = any(row.same_as and self._outcome(row).state in OPEN for row in self.records)
        return None if may_come and not (self.ended or self.alike.said) else str(Searcher.FINISHED)

    def over(self) -> str | None:
        """Why no trial is begun any more, or None.

        Where trials fail alike, what an earlier driver left unfinished stays so. Where the budget is spent, it is
        stopped where it is; but what is past its last rung is finished first.
        Raises UserError where nothing in the space passes the screen.
        """
        if self.alike.said:
            return self.alike.said
        if self.ended is None and self.budget:
            self.ended = self.budget.spent()
        if self.ended is None and not self._unfinished and self._untrained_in_a_row() >= MAX_UNTRAINED_IN_A_ROW:
            if all(row.state in UNTRAINED for row in self.records):
                raise UserError(
                    f"{MAX_UNTRAINED_IN_A_ROW} configurations in a row failed the screen, the last because: "
                    f"{list(self.records)[-1].reason}; narrow space.families in the run's config.yaml to "
                    "schedules that reach pure noise, and resume it, or begin another run"
                )
            self.exhausted = f"the last {MAX_UNTRAINED_IN_A_ROW} suggestions held nothing new to train"
        if self.ended:
            last = max(self.config.rung_epochs(), default=0)
            short = [row for row in self._unfinished if not row.rungs or row.epoch < last]
            self._unfinished = [row for row in self._unfinished if row not in short]
            for row in short:
                row = self.records.update(row.trial, state="stopped", reason=f"{NOT_RESUMED}{self.ended}")
                self._remember(row)
                self._tell_reused(row)
        if self._unfinished:
            return None
        return self.ended or (None if self._known else self.exhausted)

    def left(self) -> str | None:
        """Why the search has ended, after Tune has; what that was made to leave is then stopped as in `over`."""
        self._unfinished = [row for row in self.records if row.state in OPEN]
        return self.over() or self.ended

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Rungs are told when a trial ends, from the record, the deciding one included."""
        if result.get("epoch") is not None and trial_id in self._keys:
            self.alike.reported(self._keys[trial_id], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if (key := self._keys.pop(trial_id, None)) is None:
            return  # told already
        row = self.records[key]
        if error and row.state == "running":
            row = self.records.update(row.trial, state="failed")
        if row.state == "running":
            return  # the search was interrupted, and the trial will be resumed
        self.alike.ended(row)
        self._tell(trial_id, row)
        self._tell_reused(row)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: Tune would pickle this object; the record is what a search is resumed from."""

    def _start(self, trial_id: str, row: Row) -> dict[str, Any]:
        self._keys[trial_id] = row.trial
        self.alike.begun(row)
        if row.state == "waiting":
            row = self.records.update(row.trial, state="running")
        training = space.train_config(self.config, vars(row))
        return {"trial": row.trial, "train": training.model_dump(mode="json")}

    def new_row(self, params: space.Params, known: bool) -> Row:
        """The row of a configuration: to be trained, or screened, or reused."""
        flat = space.flat(params)
        trial = f"t{len(self.records):04d}-{flat['family']}"
        row = Row(trial=trial, source="known" if known else "suggested", seed=self.config.train.seed, **flat)
        if reason := space.screen(self.config, params):
            return dataclasses.replace(row, state="screened", reason=reason)
        if found := reused(self.config, row, self.records):
            return dataclasses.replace(row, state="reused", **found)
        return row

    def _exhausted(self) -> None:
        self.exhausted = f"{self.config.searcher.name} has suggested all there is"

    def _untrained_in_a_row(self) -> int:
        new = list(self.records)[self._old_rows :]
        return sum(1 for _ in takewhile(lambda row: row.state in UNTRAINED, reversed(new)))

    def _outcome(self, row: Row) -> Row:
        """The row that says what came of this one: the trial that was trained for it, where it was reused."""
        return self.records[row.same_as] if row.same_as else row

    def _ask(self, trial_id: str, params: space.Params) -> None:
        """Makes Optuna's next trial the one with these parameters, where its space holds them."""
        if space.contains(self.config, params):
            searched = space.distributions(self.config, params["family"])
            self._ot_study.enqueue_trial({name: params[name] for name in searched})
            super().suggest(trial_id)

    def _tell(self, trial_id: str, row: Row) -> None:
        ot_trial = self._ot_trials.pop(trial_id, None)
        if ot_trial is None:  # outside the space, or suggested by an earlier driver
            self._remember(row)
            return
        state, final, values = study.told(self._outcome(row), self.metric_name)
        for step, value in values.items():
            ot_trial.report(value, step)
        self._note(self._ot_study.tell(ot_trial, final, state=state))

    def _note(self, trial: optuna.trial.FrozenTrial) -> None:
        """Copies a trial. Where the disk refuses a line, which may be half there, the rest is left to who mends it."""
        try:
            if self.copied:
                self._copy.add_trial(trial)
        except OSError:
            self.copied = False

    def _tell_reused(self, row: Row) -> None:
        """A trial has ended: so have those that equal it. Where it failed, another is found or trained for them."""
        waiting = [other for other in self.records if other.same_as == row.trial]
        if row.state == "failed":
            self._settle(row.trial)
        for other in waiting:
            now = self.records[other.trial]
            if now.state in OPEN:
                self._tell(other.trial, other)  # it is asked for once more when it begins
                self._unfinished.append(now)
            elif self._outcome(now).state not in OPEN:
                self._tell(other.trial, now)

    def _settle(self, failed: str) -> None:
        """Each row that a failed trial was to speak for: another speaks for it, or it waits to be trained itself.

        Those to be trained, as many as `trials` allows, are written last: until then all name the failed one, or one
        that does, and a driver that comes after a kill finds them.
        """
        begun = sum(row.state not in UNTRAINED for row in self.records)
        heirs: list[Row] = []
        for row in [row for row in self.records if row.same_as == failed]:
            if found := reused(self.config, row, (*self.records, *heirs)):
                self.records.update(row.trial, **found)
            elif self.ended is None and begun + len(heirs) < self.config.trials:
                heirs.append(dataclasses.replace(row, state="waiting", reason=None, same_as=None))
        for heir in heirs:
            self.records.update(heir.trial, state="waiting", reason=None, same_as=None)

    def _remember(self, row: Row) -> None:
        """Puts a finished row of an earlier run into the study, where the space holds it."""
        params = space.params_of(vars(row))
        if not space.contains(self.config, params):
            return
        searched = space.distributions(self.config, row.family)
        state, final, values = study.told(self._outcome(row), self.metric_name)
        trial = optuna.trial.create_trial(
            state=state,
            # Optuna's tell() gives a pruned trial its last rung's value, which create_trial() leaves to us.
            value=values[max(values)] if state == TrialState.PRUNED else final,
            params={name: params[name] for name in searched},
            distributions=searched,
            intermediate_values=values,
        )
        self._ot_study.add_trial(trial)
        self._note(trial)
