"""Who suggests the next trial: TPE, random search, or any other of Optuna's samplers."""

import inspect
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search import space
from search.config import SearchConfig, UserError
from trainer.config import SEEDS

# Multivariate: parameters together. Group: a family's own apart from the others'. Constant liar: a running trial counts
# as a bad one, so that many at once do not try one place.
DEFAULTS: dict[str, dict[str, Any]] = {"TPESampler": {"multivariate": True, "group": True, "constant_liar": True}}
STARTUP = 10  # TPE's and GP's first trials, which are random, where searcher.options say nothing else
HOPELESS = 10  # suggestions of one family in a row that fail the screen
SHORT = {"tpe": "TPESampler", "random": "RandomSampler"}


class FamilyTPE(TPESampler):
    """TPE that draws the family first, and then the parameters of that family alone: the best that pass the screen.

    Optuna's own draws those of every family for each trial, and three quarters of its work are thrown away; of what is
    left a third failed the screen (benchmarks/simulate_scale.py). Where every candidate passes it, what is drawn for
    the chosen family has the same distribution; with one family, the same values.
    """

    def __init__(self, config: SearchConfig, **settings: Any):
        super().__init__(**settings)
        self._config, self._families = config, list(config.space.families)
        self._screened = dict.fromkeys(self._families, 0)  # suggestions of each in a row that failed the screen
        self._drawn: space.Params = {}  # for the next trial: its family, and what all families share

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if len(self._families) == 1:
            self._drawn = {"family": self._families[0]}
            together: dict[str, Any] = super().sample_relative(study, trial, search_space)
            return together
        own = {name: of for name in search_space if (of := name.split(".")[0]) in self._families}
        self._drawn = {}
        shared = super().sample_relative(study, trial, {n: d for n, d in search_space.items() if n not in own})
        if not shared:
            return {}  # too few trials have ended for any but random ones
        self._drawn = shared
        chosen = {name: search_space[name] for name, of in own.items() if of == shared["family"]}
        return shared | super().sample_relative(study, trial, chosen)

    def _compute_acquisition_func(self, samples: dict[str, np.ndarray], *estimators: Any) -> np.ndarray:
        """Of TPE's candidates, those that are better than the best one to pass the screen have no value.

        Nor has a family of which nothing passes: to TPE, which hears of no trial of it, it is the most promising.
        """
        values: np.ndarray = super()._compute_acquisition_func(samples, *estimators)
        if "family" in samples:
            hopeless = [self._screened[self._families[int(index)]] >= HOPELESS for index in samples["family"]]
            values[hopeless] = -np.inf
        elif self._drawn:
            searched = space.distributions(self._config, self._drawn["family"])
            known = space.parameters(self._config, self._drawn["family"]) | self._drawn
            if searched.keys() <= self._drawn.keys() | samples.keys():
                for candidate in np.argsort(-values, kind="stable"):
                    own = {n: searched[n].to_external_repr(drawn[candidate].item()) for n, drawn in samples.items()}
                    if space.screen(self._config, known | own) is None:
                        break
                    values[candidate] = -np.inf
        return values

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        super().after_trial(study, trial, state, values)
        family = trial.params.get("family")
        if family in self._screened:
            known = space.parameters(self._config, family) | trial.params
            failed = state == TrialState.FAIL and space.screen(self._config, known) is not None
            self._screened[family] = self._screened[family] + 1 if failed else 0


def make(config: SearchConfig, drawn: int) -> BaseSampler:
    """The sampler that `searcher` names, with its options, for a study that was told of `drawn` trials before.

    Raises UserError where there is none, or it refuses them.
    """
    name, options = SHORT.get(config.searcher.name, config.searcher.name), config.searcher.options
    named = {n: c for n, c in vars(optuna.samplers).items() if inspect.isclass(c) and issubclass(c, BaseSampler)}
    if name == "GridSampler":
        raise UserError(
            "searcher GridSampler numbers its points, and would try again those that run, were known points, or came "
            "before a resume; for a space of choices there is BruteForceSampler"
        )
    known = sorted(name for name, sampler in named.items() if not inspect.isabstract(sampler) and name != "GridSampler")
    if name not in known:
        raise UserError(f"searcher must be tpe, random, or one of {', '.join(known)}, but is {config.searcher.name!r}")
    takes = inspect.signature(named[name]).parameters
    if unknown := options.keys() - takes.keys():
        raise UserError(
            f"searcher.options.{min(unknown)}: {name} has no such option; its options are {', '.join(takes)}"
        )
    sampler = partial(FamilyTPE, config) if name == "TPESampler" else named[name]
    settings = DEFAULTS.get(name, {}) | ({"seed": config.seed} if "seed" in takes else {}) | options
    try:
        if drawn and settings.get("seed") is not None:
            settings["seed"] = (settings["seed"] + drawn) % SEEDS
        if drawn and name == "QMCSampler":  # begins at its first point: another scrambling has other points
            settings["scramble"] = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made: BaseSampler = sampler(**settings)
            return made
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"searcher.options of {name}: {error}") from error


def take_up(study: optuna.Study) -> None:
    """Lets a sampler that ends a study when all was tried see that all was, or is being tried."""
    if isinstance(study.sampler, optuna.samplers.BruteForceSampler):
        for last in study.get_trials(deepcopy=False)[-1:]:
            study.sampler.after_trial(study, last, last.state, last.values)


def check(config: SearchConfig) -> None:
    """Raises UserError where the searcher cannot search this space, by suggestions in a study of its own.

    Two at the start, and two after as many random ones as it begins with, a hundred at most. A genetic sampler counts
    none but its own: its second generation is not tried.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=make(config, 0))
        study.stop = lambda: None  # type: ignore[method-assign]  # it has tried everything, see HonestOptunaSearch
        suggest = space.define_by_run(config)
        try:
            own = study.sampler
            startup = int(min(config.searcher.options.get("n_startup_trials", STARTUP), 10 * STARTUP))
            for sampler in (*2 * [own], *startup * [optuna.samplers.RandomSampler(seed=0)], *2 * [own]):
                study.sampler = sampler
                trial = study.ask()
                suggest(trial)
                study.tell(trial, float(trial.number % 7))
        except Exception as error:  # whatever a sampler says of a space that it was not made for
            raise UserError(f"searcher {config.searcher.name} cannot search this space: {error}") from error
