"""The conditional search space: family first, then that family's own parameters → one TrainConfig."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import optuna.distributions as od

from search.config import KnownPoint, Range, SearchConfig, Searched
from trainer.config import TrainConfig

Params = dict[str, Any]  # names as Optuna knows them: family, cosine.tau, learning_rate, …


class Suggester(Protocol):
    """What is needed of an optuna.Trial (Ray hands in a wrapper of one)."""

    def suggest_categorical(self, name: str, choices: list[str]) -> Any: ...
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
        return {"family": family} | {name: value(name, searched) for name, searched in named.items()}

    return suggest


def parameters(config: SearchConfig, family: str) -> dict[str, Searched]:
    """The parameters of a family by the names that Optuna knows them by."""
    space = config.space.families[family]  # type: ignore[index]
    own: dict[str, Searched] = {"start": space.start, "end": space.end}
    if family != "linear":  # a line has no tau
        own["tau"] = space.tau
    return {f"{family}.{name}": searched for name, searched in own.items()} | {
        "learning_rate": config.space.learning_rate,
        "dropout": config.space.dropout,
    }


def distributions(config: SearchConfig, family: str) -> dict[str, od.BaseDistribution]:
    """The searched parameters of a family as Optuna's distributions: what a study is rebuilt with."""
    searched: dict[str, od.BaseDistribution] = {"family": od.CategoricalDistribution(list(config.space.families))}
    for name, value in parameters(config, family).items():
        if isinstance(value, Range):
            searched[name] = od.FloatDistribution(value.low, value.high, log=value.log)
    return searched


def known_params(config: SearchConfig, point: KnownPoint) -> Params:
    """A known point by Optuna's names; learning rate and dropout are the base training's where it has none."""
    params: Params = {"family": point.family, f"{point.family}.start": point.start, f"{point.family}.end": point.end}
    if point.family != "linear":
        params[f"{point.family}.tau"] = point.tau
    base = config.train
    params["learning_rate"] = base.learning_rate if point.learning_rate is None else point.learning_rate
    params["dropout"] = base.dropout if point.dropout is None else point.dropout
    return params


def contains(config: SearchConfig, params: Params) -> bool:
    """Whether the space holds these parameters; Optuna is told of no others."""
    if params["family"] not in config.space.families:
        return False
    for name, searched in parameters(config, params["family"]).items():
        value = params[name]
        inside = searched.low <= value <= searched.high if isinstance(searched, Range) else value == searched
        if not inside:
            return False
    return True


def flat(params: Params) -> dict[str, Any]:
    """Optuna's names → the columns of the trials table: family, start, end, tau, learning_rate, dropout."""
    family = params["family"]
    return {
        "family": family,
        "start": float(params[f"{family}.start"]),
        "end": float(params[f"{family}.end"]),
        "tau": float(params.get(f"{family}.tau", 1.0)),
        "learning_rate": float(params["learning_rate"]),
        "dropout": float(params["dropout"]),
    }


def params_of(row: Mapping[str, Any]) -> Params:
    """The trials table's columns → Optuna's names: the inverse of `flat`."""
    family = row["family"]
    names = ("start", "end") if family == "linear" else ("start", "end", "tau")
    return {"family": family, "learning_rate": row["learning_rate"], "dropout": row["dropout"]} | {
        f"{family}.{name}": row[name] for name in names
    }


def train_config(config: SearchConfig, row: Mapping[str, Any]) -> TrainConfig:
    """The training of one row of the trials table. Raises pydantic.ValidationError where its schedule breaks a law."""
    base = config.train.model_dump()
    base["schedule"] |= {name: row[name] for name in ("family", "start", "end", "tau")}
    return TrainConfig.model_validate(base | {name: row[name] for name in ("learning_rate", "dropout", "seed")})
