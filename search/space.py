"""The conditional search space: family first, then that family's own parameters → one TrainConfig."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import optuna.distributions as od
from pydantic import ValidationError

from search.config import SearchConfig
from search.space_config import KnownPoint, Range, Searched
from trainer import schedules
from trainer.config import TrainConfig

Params = dict[str, Any]  # names as Optuna knows them: family, cosine.tau, learning_rate, train.batch_size, …


class Suggester(Protocol):
    """What is needed of an optuna.Trial (Ray hands in a wrapper of one)."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> Any: ...


def define_by_run(config: SearchConfig) -> Callable[[Suggester], Params]:
    """The space as Optuna's define-by-run function: returns every parameter, the fixed ones too."""

    def suggest(trial: Suggester) -> Params:
        def value(name: str, searched: Searched) -> float:
            if isinstance(searched, Range):
                return float(trial.suggest_float(name, searched.low, searched.high, log=searched.log))
            return searched

        family = trial.suggest_categorical("family", list(config.space.families))
        named = parameters(config, family)
        return (
            {"family": family}
            | {name: value(name, searched) for name, searched in named.items()}
            | {name: trial.suggest_categorical(name, choices) for name, choices in choices_of(config).items()}
        )

    return suggest


def parameters(config: SearchConfig, family: str) -> dict[str, Searched]:
    """The parameters of a family by the names that Optuna knows them by."""
    space = config.space.families[family]  # type: ignore[index]
    own: dict[str, Searched] = {"start": space.start, "end": space.end}
    if family != "linear":  # a line has no tau
        own["tau"] = space.tau
    rates = {
        "learning_rate": (config.space.learning_rate, config.train.learning_rate),
        "dropout": (config.space.dropout, config.train.dropout),
    }
    return {f"{family}.{name}": searched for name, searched in own.items()} | {
        name: base if searched is None else searched for name, (searched, base) in rates.items()
    }


def choices_of(config: SearchConfig) -> dict[str, list[Any]]:
    """The further settings of a training by Optuna's names, with their choices as Optuna takes them."""
    return {f"train.{name}": [_as_choice(value) for value in values] for name, values in config.choices.items()}


def _as_choice(value: Any) -> Any:
    """Optuna's choices are plain values: all but a number or a truth is its JSON."""
    return json.dumps(value) if isinstance(value, list | tuple | dict | str) else value


def distributions(config: SearchConfig, family: str) -> dict[str, od.BaseDistribution]:
    """The searched parameters of a family as Optuna's distributions: what a study is rebuilt with."""
    searched: dict[str, od.BaseDistribution] = {"family": od.CategoricalDistribution(list(config.space.families))}
    for name, value in parameters(config, family).items():
        if isinstance(value, Range):
            searched[name] = od.FloatDistribution(value.low, value.high, log=value.log)
    return searched | {name: od.CategoricalDistribution(choices) for name, choices in choices_of(config).items()}


def known_params(config: SearchConfig, point: KnownPoint) -> Params:
    """A known point by Optuna's names; what it leaves out is the base training's."""
    params: Params = {"family": point.family, f"{point.family}.start": point.start, f"{point.family}.end": point.end}
    if point.family != "linear":
        params[f"{point.family}.tau"] = point.tau
    base = config.train
    params["learning_rate"] = base.learning_rate if point.learning_rate is None else point.learning_rate
    params["dropout"] = base.dropout if point.dropout is None else point.dropout
    settings = dict(point.train)
    for name, values in config.choices.items():
        # the choice that the base training has made, where it is one
        made = [value for value in values if config.training({name: value}) == base]
        if name not in settings and made:
            settings[name] = made[0]
    return params | {f"train.{name}": _as_choice(value) for name, value in settings.items()}


def contains(config: SearchConfig, params: Params) -> bool:
    """Whether the space holds these parameters; Optuna is told of no others."""
    if params["family"] not in config.space.families:
        return False
    for name, searched in parameters(config, params["family"]).items():
        value = params[name]
        inside = searched.low <= value <= searched.high if isinstance(searched, Range) else value == searched
        if not inside:
            return False
    settings = {name: value for name, value in params.items() if name.startswith("train.")}
    choices = choices_of(config)
    return settings.keys() == choices.keys() and all(value in choices[name] for name, value in settings.items())


def flat(params: Params) -> dict[str, Any]:
    """Optuna's names → columns of the trials table: family, start, end, tau, learning_rate, dropout, settings."""
    family = params["family"]
    settings = {name.removeprefix("train."): value for name, value in params.items() if name.startswith("train.")}
    return {
        "family": family,
        "start": float(params[f"{family}.start"]),
        "end": float(params[f"{family}.end"]),
        "tau": float(params.get(f"{family}.tau", 1.0)),
        "learning_rate": float(params["learning_rate"]),
        "dropout": float(params["dropout"]),
        "settings": {name: _from_choice(value) for name, value in settings.items()},
    }


def _from_choice(choice: Any) -> Any:
    return json.loads(choice) if isinstance(choice, str) else choice


def params_of(row: Mapping[str, Any]) -> Params:
    """The trials table's columns → Optuna's names: the inverse of `flat`."""
    family = row["family"]
    names = ("start", "end") if family == "linear" else ("start", "end", "tau")
    return (
        {"family": family, "learning_rate": row["learning_rate"], "dropout": row["dropout"]}
        | {f"{family}.{name}": row[name] for name in names}
        | {f"train.{name}": _as_choice(value) for name, value in row["settings"].items()}
    )


def identity(config: SearchConfig, params: Params) -> TrainConfig | Params:
    """The same for all ways to write a configuration: settings may be named that the base training has."""
    try:
        return train_config(config, {"seed": config.train.seed} | flat(params))
    except ValidationError:
        return params


def train_config(config: SearchConfig, row: Mapping[str, Any]) -> TrainConfig:
    """The training of one row of the trials table. Raises pydantic.ValidationError where its schedule breaks a law."""
    own = {name: row[name] for name in ("learning_rate", "dropout", "seed")}
    schedule = {name: row[name] for name in ("family", "start", "end", "tau")}
    return config.training({**own, "schedule": schedule, **row["settings"]})


def screen(config: SearchConfig, params: Params) -> str | None:
    """Why this is not worth training: a law that its schedule breaks, or too much signal left in x_T. None: it is."""
    try:
        training = train_config(config, {"seed": config.train.seed} | flat(params))
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return schedules.screen(**training.schedule.model_dump())
