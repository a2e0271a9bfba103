"""What may be searched: each family's ranges, the other settings, and the known points that go first."""

import itertools
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from trainer import schedules
from trainer.config import Config, TrainConfig
from trainer.schedules import Family


class Range(Config):
    """A parameter that is searched, between `low` and `high`, both included."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(
                f"low < high must hold, but got low={self.low}, high={self.high}; a single number fixes it"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, but got low={self.low}")
        return self


RANGE, NUMBER = "<range>", "<number>"  # which of the two a wrong value was taken for; no key of a YAML
Searched = Annotated[  # a number fixes the parameter
    Annotated[float, Tag(NUMBER)] | Annotated[Range, Tag(RANGE)],
    Discriminator(lambda value: RANGE if isinstance(value, dict | Range) else NUMBER),
]


class FamilySpace(Config):
    """The ranges of one schedule family."""

    start: Searched
    end: Searched
    tau: Searched = 1.0


# Ho 2020 (linear, 1e-4 to 0.02); Nichol & Dhariwal 2021 (cosine, an offset near 0); Chen 2023, Tables 1 and 3 (cosine
# start 0 to 0.2, tau 0.5 to 3; sigmoid -3 to 3, tau 0.3 to 1.1), each with room around what was published.
FAMILIES: dict[Family, FamilySpace] = {
    "linear": FamilySpace(start=Range(low=1e-5, high=1e-3, log=True), end=Range(low=5e-3, high=5e-2, log=True)),
    "polynomial": FamilySpace(start=0.0, end=1.0, tau=Range(low=0.25, high=2.0, log=True)),
    "cosine": FamilySpace(start=Range(low=0.0, high=0.3), end=1.0, tau=Range(low=0.5, high=3.0, log=True)),
    "sigmoid": FamilySpace(
        start=Range(low=-3.0, high=0.0), end=Range(low=1.0, high=4.0), tau=Range(low=0.3, high=1.5, log=True)
    ),
}


# Settings of a training that may be searched beside these: not what makes trials incomparable, nor the cluster's.
VARIED = (
    "batch_size", "model", "lr_decay", "lr_decay_epochs", "gradient_clip", "ema_decays", "micro_batch",
    "schedule.steps", "schedule.space",
)  # fmt: skip


class SpaceConfig(Config):
    """What is searched: the family first, then that family's own parameters.

    The families named are those searched; of each, what is left out keeps its default, and null drops it. `train` is
    more of the training's settings by name, with the values to choose from: {batch_size: [16, 32]}, or whole groups
    where several belong together: {model: [{channels: [64, 128], attention: [false, true]}, …]}.
    """

    families: dict[Family, FamilySpace] = Field(FAMILIES, min_length=1)
    learning_rate: Searched | None = Field(Range(low=5e-5, high=2e-3, log=True), description="null: the training's own")
    dropout: Searched | None = Field(Range(low=0.0, high=0.3), description="null: the training's own")
    train: dict[str, tuple[Any, ...]] = Field({})

    @field_validator("families", mode="before")
    @classmethod
    def _left_out_is_default(cls, families: Any) -> Any:
        if not isinstance(families, dict):
            return families
        named = {family: own for family, own in families.items() if own is not None}
        return {
            family: FAMILIES[family].model_dump() | own if isinstance(own, dict) and family in FAMILIES else own
            for family, own in named.items()
        }

    @field_validator("train", mode="before")
    @classmethod
    def _named_in_full(cls, settings: Any) -> Any:
        """{model: {channels: […]}} is {model.channels: […]}: so --set space.train.model.channels=[…] gives it."""
        if not isinstance(settings, dict):
            return settings
        named: dict[str, Any] = {}
        for name, value in settings.items():
            inner = cls._named_in_full(value)
            named |= {f"{name}.{k}": v for k, v in inner.items()} if isinstance(inner, dict) else {name: value}
        return named

    @model_validator(mode="after")
    def _keeps_the_laws(self) -> "SpaceConfig":
        for family, own in self.families.items():
            if family == "linear" and own.tau != 1:
                raise ValueError(f"space.families.linear.tau must be left out, for linear has none, but got {own.tau}")
            _some_keep_the_laws(family, own)
        for name in ("learning_rate", "dropout"):
            for value in _ends(getattr(self, name)):
                try:
                    TrainConfig.model_validate({name: value})
                except ValidationError as error:
                    raise ValueError(f"space.{explain(error.errors()[0])}") from None
        for name, choices in self.train.items():
            if not choices or any(choice in choices[:index] for index, choice in enumerate(choices)):
                raise ValueError(f"space.train.{name} must be a list of different values, but got {list(choices)}")
        return self


def _ends(searched: Searched | None) -> tuple[float, ...]:
    if searched is None:
        return ()
    return (searched.low, searched.high) if isinstance(searched, Range) else (searched,)


def _some_keep_the_laws(family: Family, own: FamilySpace) -> None:
    """Raises ValueError where no corner of a family's ranges is a schedule."""
    for corner in itertools.product(_ends(own.start), _ends(own.end), _ends(own.tau)):
        try:
            return schedules.check(family, *corner)
        except ValueError as error:
            broken = error
    raise broken


class KnownPoint(Config):
    """A configuration to try before any suggestion; what is left out is the base training's, and tau 1."""

    family: Family
    start: float
    end: float
    tau: float = 1.0
    learning_rate: float | None = Field(None, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)
    train: dict[str, Any] = Field({}, description="more settings of the training, as in space.train")

    @model_validator(mode="after")
    def _keeps_the_laws(self) -> "KnownPoint":
        schedules.check(self.family, self.start, self.end, self.tau)
        return self


# Table 2 of the original study.
KNOWN_POINTS = (
    KnownPoint(family="linear", start=1e-4, end=0.02),
    KnownPoint(family="cosine", start=0, end=1, tau=1),
    KnownPoint(family="cosine", start=0.2, end=1, tau=1),
    KnownPoint(family="sigmoid", start=-3, end=3, tau=1.1),
    KnownPoint(family="sigmoid", start=0, end=3, tau=0.9),
)


def explain(error: Any) -> str:
    """One entry of a pydantic ValidationError in plain words."""
    where = ".".join(str(part) for part in error["loc"] if part not in (RANGE, NUMBER))
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r} (value {error['input']!r}); remove it or correct its spelling"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where and not message.startswith(where) else message
    if error["type"] == "tuple_type":
        message = "must be a list"
    if NUMBER in error["loc"]:
        message = "must be a number, or a range {low: …, high: …, log: true or false}"
    if error["type"] == "string_pattern_mismatch":
        message = "must be letters, digits, dots, underscores and hyphens, the first a letter or digit"
    return f"{where}: {message}, but got {error['input']!r}"
