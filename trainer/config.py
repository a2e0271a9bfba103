"""What one training is: every setting of it, checked where it is built."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from trainer import schedules

SEEDS = 2**32  # how many there are: 0 and up, as NumPy and Optuna take them
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


Weights = Literal["ema", "raw"]  # of a checkpoint: the moving average's, or those that were trained


class Config(BaseModel):
    """Frozen, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _a_truth_is_no_number(cls, tree: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(tree, dict) else ():
            types = _types(field.annotation)
            if isinstance(tree.get(name), bool) and bool not in types and types & {int, float}:
                raise ValueError(f"{name} must be a number, but got {tree[name]}")
        return tree


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation names, however deep in unions."""
    return {annotation}.union(*(_types(inner) for inner in get_args(annotation)))


class ScheduleConfig(Config):
    """A noise schedule: see trainer/schedules.py for the families and their laws. Default: Ho 2020."""

    family: schedules.Family = "linear"
    start: float = 1e-4
    end: float = 0.02
    tau: float = 1.0
    steps: int = Field(1000, ge=1, le=1_000_000, description="T, the number of diffusion steps")
    space: Literal["alpha_bar", "beta"] = "alpha_bar"

    @model_validator(mode="after")
    def _keeps_the_laws(self) -> "ScheduleConfig":
        schedules.check(**self.model_dump())
        return self

    def betas(self) -> np.ndarray:
        """(T,) float64, what everything else is made of: see `schedules.betas`."""
        return schedules.betas(**self.model_dump())

    def label(self) -> str:
        """Short name for tables, such as cosine(0, 1, tau 1)."""
        tau = "" if self.family == "linear" else f", tau {self.tau:.3g}"
        space = " as beta" if self.space == "beta" else ""
        return f"{self.family}({self.start:.3g}, {self.end:.3g}{tau}){space}"


class DataConfig(Config):
    """Which images. `name` is one of

    digits          8x8 grey, embedded in scikit-learn
    mnist, cifar10, fgvc-aircraft, flowers102, celeba
                    as torchvision reads them, from `root`; the images of the published test split are never used
    parquet:PATH    image bytes, and labels where there are any: one file, a folder's files, or a pattern such as
                    data/train-*.parquet
    folder:PATH     image files, sub-folders and all; labels are the first sub-folders' names
    """

    name: str = "digits"
    root: str | None = Field(None, description="where torchvision's files are; None is data in the cache folder")
    download: bool = Field(False, description="fetch a published data set that is not in root")
    subset: int | None = Field(None, ge=2, description="images used, drawn by seed; None is all of them")
    train_fraction: float = Field(0.8, gt=0, lt=1, description="the rest is held out")
    image_size: int | None = Field(
        None,
        ge=1,
        description="pixels a side; None keeps the files' own, but mnist is padded to 32, and fgvc-aircraft and "
        "celeba are scaled to 64, flowers102 to 128",
    )
    channels: Literal[1, 3] | None = Field(None, description="1 is grey; None is grey where the images are, else RGB")
    horizontal_flip: bool = Field(False, description="mirror half of the images of a batch, at random")
    labels: bool = Field(True, description="false: without the data set's labels")
    image_column: str | None = Field(None, description="of Parquet files; None is img or image")
    label_column: str = "label"
    skip_broken: bool = Field(False, description="leave out images that cannot be read; false stops at them")
    seed: Seed = 0

    @field_validator("name")
    @classmethod
    def _absolute_name(cls, name: str) -> str:
        kind, _, path = name.partition(":")
        return f"{kind}:{absolute(path)}" if path else name

    @field_validator("root")
    @classmethod
    def _absolute_root(cls, root: str | None) -> str | None:
        return absolute(root) if root else root


def absolute(path: str) -> str:
    """Workers, and a run that is resumed, are in other folders than the one that a path was meant from."""
    return path if path.startswith("~") else str(Path(path).absolute())  # ~ is each node's own


class ModelConfig(Config):
    """diffusers' UNet2DModel, one entry of `channels` and `attention` a resolution level."""

    channels: tuple[int, ...] = (128, 256, 256, 256)
    attention: tuple[bool, ...] = (False, True, True, True)
    layers_per_block: int = Field(2, ge=1)
    attention_head_dim: int = Field(64, ge=1, description="channels a head; fewer heads are faster on CPU")
    norm_groups: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if len(self.channels) != len(self.attention):
            raise ValueError(
                "model.channels and model.attention must have one entry a level each, "
                f"but have {len(self.channels)} and {len(self.attention)}"
            )
        for count, attends in zip(
            self.channels, (*self.attention[:-1], True), strict=True
        ):  # the middle always attends
            if attends and count % self.attention_head_dim:
                raise ValueError(
                    "model.channels of a level with attention, and of the last, must be a multiple of "
                    f"attention_head_dim={self.attention_head_dim}, but got {count}"
                )
            if count % self.norm_groups:
                raise ValueError(
                    f"every model.channels must be a multiple of norm_groups={self.norm_groups}, but got {count}"
                )
        return self

    def check_fits(self, shape: tuple[int, int, int]) -> None:
        """Raises ValueError where an image of shape (C, H, W) does not halve once a level."""
        _, height, width = shape
        levels = len(self.channels)
        halving = 2 ** (levels - 1)
        if height % halving or width % halving or min(height, width) < 2 * halving:
            raise ValueError(
                f"model.channels has {levels} levels, which need images that halve {levels - 1} times, "
                f"to at least 2 pixels, but they are {height}x{width}; give fewer levels or another data.image_size"
            )


def said(what: str) -> WrapValidator:
    """Of a field of several types: one message in place of one a type."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {what}, but got {value!r}") from None

    return WrapValidator(check)


Switch = Annotated[Literal["auto"] | bool, said("auto, true or false")]


class SpeedConfig(Config):
    """How fast a step is; none of it changes what is learned beyond rounding. `auto`: see trainer/speed.py."""

    bf16: Switch = Field("auto", description="autocast; auto: on GPUs")
    channels_last: Switch = Field("auto", description="auto: everywhere")
    fused_adam: Switch = Field("auto", description="auto: everywhere")
    cuda_graphs: Switch = Field("auto", description="auto: where one GPU trains alone, and is not compiled for")
    compile: Switch = Field("auto", description="torch.compile, minutes a node; auto: on GPUs, for long trainings")


class TrainConfig(Config):
    """One training. Defaults are the original study's (T 1000, batch 16, Adam 2e-4, StepLR 0.85 every 5 epochs)."""

    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    model: ModelConfig = ModelConfig()
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(16, ge=1, description="images a step over all workers together")
    learning_rate: float = Field(2e-4, gt=0)
    lr_decay: float = Field(0.85, gt=0, le=1, description="learning rate is multiplied by this …")
    lr_decay_epochs: int = Field(5, ge=1, description="… after every so many epochs")
    dropout: float = Field(0.1, ge=0, lt=1)
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema_decays: tuple[float, ...] = Field(
        (0.9999,), min_length=1, description="each reached by warm-up (1+n)/(10+n); rungs score the first, the end all"
    )
    micro_batch: int | None = Field(None, ge=1, description="images a worker takes at once; gradients are accumulated")
    checkpoint_seconds: float | None = Field(
        60.0, ge=0, description="a checkpoint is written after so long, between two steps"
    )
    checkpoint_epochs: int | None = Field(None, ge=1, description="a checkpoint is written after so many epochs")
    hang_seconds: int = Field(1800, ge=1, description="a worker that the others wait for longer has hung")
    speed: SpeedConfig = SpeedConfig()
    seed: Seed = 0
    workers: int = Field(1, ge=1, description="DDP workers of one training")
    min_workers: int | None = Field(
        None, ge=1, description="with how few it goes on where nodes are lost; None waits until all have a place"
    )

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        if not all(0 <= decay < 1 for decay in self.ema_decays) or len(set(self.ema_decays)) != len(self.ema_decays):
            raise ValueError(f"ema_decays must be different numbers in [0, 1), but got {list(self.ema_decays)}")
        if self.batch_size < self.workers:
            raise ValueError(
                f"batch_size >= workers must hold, but got batch_size={self.batch_size}, workers={self.workers}"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers <= workers must hold, but got min_workers={self.min_workers}, workers={self.workers}"
            )
        return self

    def learned(self) -> dict[str, Any]:
        """All but what may be another when a training is resumed, since it changes nothing that is learned.

        Where the images lie says nothing of which they are: a search compares their key, `train` asks for one place.
        """
        free = ("micro_batch", "checkpoint_seconds", "checkpoint_epochs", "hang_seconds", "speed")
        exclude = dict.fromkeys((*free, "workers", "min_workers"), True) | {"data": {"name", "root", "download"}}
        return self.model_dump(exclude=exclude)
