"""SearchConfig: the whole YAML, composed of each package's own configuration."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from evaluation.config import FinalStageConfig, Metric, SamplerConfig, rung_epochs
from search.space_config import KNOWN_POINTS, VARIED, KnownPoint, SpaceConfig, explain
from trainer.config import Config, Seed, TrainConfig, said


class EarlyStoppingConfig(Config):
    """Which trials go on at a rung.

    asha: those among the best 1/reduction of all that came so far (Li 2018). median: those whose best value so far is
    no worse than the median of the others' running averages (Golovin 2017). none: all.
    """

    scheduler: Literal["asha", "median", "none"] = "asha"
    metric: Literal["auto", Metric] = "auto"
    rungs: tuple[float, ...] = Field((1 / 9, 1 / 3), description="fractions of a training's epochs, below 1")
    reduction: float = Field(3.0, gt=1)
    images: int = Field(256, ge=2, description="images scored at a rung")
    sampler: SamplerConfig = SamplerConfig(steps=25, block_size=256)

    @model_validator(mode="after")
    def _rungs_below_the_end(self) -> "EarlyStoppingConfig":
        if not all(0 < rung < 1 for rung in self.rungs) or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(
                f"early_stopping.rungs must be rising fractions between 0 and 1, but got {list(self.rungs)}"
            )
        return self


class SearcherConfig(Config):
    """Who suggests: tpe, random, or a class of optuna.samplers by its name; `options` are its own."""

    name: str = "tpe"
    options: dict[str, Any] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class BudgetConfig(Config):
    """What ends a search before its trials are all done: no trial begins then, and running ones end at their next rung.

    The search has (1 - reserve) of each, the final stage the rest.
    """

    hours: float | None = Field(None, gt=0, description="by the clock, all times that the run was resumed together")
    worker_hours: float | None = Field(None, gt=0, description="of training and rungs, over all workers: GPU-hours")
    reserve: float = Field(0.15, ge=0, lt=1, description="share that is kept for the final stage")


class SearchConfig(Config):
    """One search: what is trained, what is varied, what stops a trial, and how the best are ranked."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    seed: Seed = 0
    trials: int = Field(50, ge=1, description="trainings started; what is screened or reused does not count")
    budget: BudgetConfig = BudgetConfig()
    train: TrainConfig = TrainConfig()
    space: SpaceConfig = SpaceConfig()
    known_points: tuple[KnownPoint, ...] = KNOWN_POINTS
    searcher: SearcherConfig = SearcherConfig()
    same_alpha_bar: float = Field(
        0.01, ge=0, description="configurations whose curves differ by less, with all else equal, are one; 0: none are"
    )
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    final: FinalStageConfig = FinalStageConfig()
    runner: Literal["train", "reuse"] = Field(
        "train",
        description="train: Ray Train, any number of workers. reuse: trials of one worker in one process, no start-up",
    )
    trials_per_gpu: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"], said("a number of trials, at least 1, or auto")
    ] = Field(1, description="trials of one worker that share a GPU; auto: as its memory allows, by one that is tried")

    @model_validator(mode="after")
    def _runner_fits(self) -> "SearchConfig":
        if self.runner == "reuse" and self.train.workers > 1:
            raise ValueError(
                f"runner: reuse trains with one worker, but train.workers is {self.train.workers}; use runner: train"
            )
        return self

    @model_validator(mode="after")
    def _settings_are_a_training_s(self) -> "SearchConfig":
        if "beta" in self.choices.get("schedule.space", ()) and "linear" in self.space.families:
            where = "space.train" if "schedule.space" in self.space.train else "train"
            raise ValueError(
                f"{where}.schedule.space: linear is stated in beta already, and its trials would have no other "
                "reading; leave it out of the search (space.families.linear: null) or this setting"
            )
        asked: list[tuple[str, str, Any, dict[str, Any]]] = [
            (f"space.train.{name}", name, value, {}) for name, values in self.space.train.items() for value in values
        ]
        for index, point in enumerate(self.known_points):
            own = {"schedule": point.model_dump(include={"family", "start", "end", "tau"})}
            asked += [(f"known_points.{index}.train.{name}", name, value, own) for name, value in point.train.items()]
        for where, name, value, own in asked:
            if name not in VARIED and not name.startswith("model."):
                raise ValueError(f"{where} cannot be searched; what can: {', '.join(VARIED)} and model.…")
            try:
                self.training({**own, name: value})
            except ValidationError as error:
                raise ValueError(f"{where}: {explain(error.errors()[0])}") from None
            except (KeyError, TypeError):
                raise ValueError(f"{where} is no setting of a training that takes {value!r}") from None
        return self

    @property
    def room(self) -> tuple[int, int, int | None]:
        """What a trial asks of a cluster, as `Capacity.place` takes it; a GPU where the share is to be measured."""
        per_gpu = 1 if self.trials_per_gpu == "auto" else self.trials_per_gpu
        return self.train.workers, per_gpu, self.train.min_workers

    @property
    def confirmations(self) -> int:
        """Trainings from new seeds, at most."""
        return min(self.final.confirm.top, self.final.top, self.trials) * self.final.confirm.seeds

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """`space.train`. Where the base training reads schedules as beta, every trial's settings say so."""
        as_beta: dict[str, tuple[Any, ...]] = {"schedule.space": ("beta",)}
        return (as_beta if self.train.schedule.space == "beta" else {}) | self.space.train

    def training(self, settings: Mapping[str, Any]) -> TrainConfig:
        """The base training with settings such as {batch_size: 32, model.channels: […]}; a group is laid over its own.

        A line cannot be read as beta: that reading, without a schedule of its own, is then a cosine's.

        Raises pydantic.ValidationError.
        """
        tree = self.train.model_dump()
        as_beta = settings.get("schedule.space") == "beta" and "schedule" not in settings
        if as_beta and self.train.schedule.family == "linear":
            tree["schedule"] |= {"family": "cosine", "start": 0.0, "end": 1.0}
        for name, value in settings.items():
            *parents, last = name.split(".")
            node = tree
            for part in parents:
                node = node[part]
            node[last] = {**node[last], **value} if isinstance(value, dict) else value
        return TrainConfig.model_validate(tree)

    def variants(self) -> Iterator[tuple[str, TrainConfig]]:
        """The base training, and it with each of the choices of space.train and each known point's settings, with the
        prefix of its settings' names.
        """
        yield "train.", self.train
        for name, values in self.space.train.items():
            for value in values:
                yield f"space.train.{name}: ", self.training({name: value})
        for index, point in enumerate(self.known_points):
            settings = {name: value for name, value in point.train.items() if not name.startswith("schedule")}
            if settings:
                yield f"known_points.{index}.train: ", self.training(settings)

    def rung_epochs(self) -> list[int]:
        return rung_epochs(self.early_stopping.rungs, self.train.epochs)


class UserError(ValueError):
    """What only the user can mend: the message says what, which value and what to do. Exit status 2."""
