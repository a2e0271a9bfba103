"""Learning curves that were really recorded: what search_efficiency.py replays.

    python -m benchmarks.search_efficiency record --out benchmarks/curves/digits.parquet

A pool of configurations of the digits search (its known points, draws from its space at random whether they pass the
screen or not, and more that fail it), each trained to the end, with everything noted that any search might look at.
"""

import dataclasses
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from evaluation import reference
from evaluation.config import SamplerConfig
from evaluation.rung import RungScorer
from evaluation.sampling import Sampler
from evaluation.scores import frechet_distance
from search import config_file, space
from search.config import SearchConfig
from trainer import data, loop, schedules
from trainer.config import TrainConfig
from trainer.data_cache import cache_folder
from trainer.diffusion import Diffusion, epsilon_mse
from trainer.storage import Storage

FILE = Path(__file__).parent / "curves" / "digits.parquet"
EPOCHS = 9
RUNGS = (1, 3, EPOCHS)  # epochs at which images are drawn and scored
KNOWN_AND_RANDOM, FAILING = 156, 14
POOL_SEED, FRESH_SEED = 0, 1
FRESH_IMAGES = 400

# The digits demo made small enough for a hundred and more trainings: two levels of convolutions, 270 steps of 32.
# Half as many images and 20 steps at a rung, so that scoring costs about the share of a training that it has there.
MODEL = "{channels: [8, 16], attention: [false, false], layers_per_block: 1, attention_head_dim: 16, norm_groups: 8}"
OVERRIDES = [
    f"train.model={MODEL}",
    f"train.epochs={EPOCHS}",
    "train.data={name: digits, subset: 1200}",
    "train.batch_size=32",
    "train.lr_decay_epochs=2",
    "early_stopping.images=128",
    "early_stopping.sampler={steps: 20, eta: 1.0, block_size: 128}",
]


@dataclass(frozen=True)
class Curve:
    """One training. Seconds are of this process's CPU time: others worked on the machine meanwhile."""

    index: int  # of the pool
    source: str  # known, random or failing
    family: str
    start: float
    end: float
    tau: float
    learning_rate: float
    dropout: float
    seed: int
    screened: str | None  # why the screen would have refused it
    failure: str | None  # why it did not come to its end
    epochs: list[dict[str, Any]]  # each: epoch, train_seconds, loss_seconds, score_seconds, val_loss, and at RUNGS
    # frechet, score, grid_loss
    fresh_frechet: float | None  # of FRESH_IMAGES images of the last epoch, from noise that no rung has seen

    def params(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("family", "start", "end", "tau", "learning_rate", "dropout")}


def settings(overrides: tuple[str, ...] = ()) -> SearchConfig:
    """The search that the pool belongs to."""
    return config_file.load("digits", [*OVERRIDES, *overrides])


def load(path: Path) -> list[Curve]:
    """The curves recorded so far."""
    if not path.exists():
        return []
    return [Curve(**row) for row in pq.read_table(path, use_threads=False).to_pylist()]


def save(path: Path, curves: list[Curve]) -> None:
    """Whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dataclasses.asdict(c) for c in curves]), buffer, compression="zstd")
    Storage(path.parent).write(path.name, buffer.getvalue())


class Nearest:
    """The recorded curve whose configuration is nearest to a suggested one.

    Distance: the largest difference of the two alpha_bar, the difference of the logarithms of the learning rates and
    that of the dropouts, each in units of its mean over all pairs of the pool, as sides of a right angle. So a schedule
    is what it does to images, not its family's numbers.
    """

    def __init__(self, curves: list[Curve]):
        self.curves = curves
        self._table = [np.array(column) for column in zip(*(_traits(c.params()) for c in curves), strict=True)]
        self._units = [_apart(column[:, None], column).mean() or 1.0 for column in self._table]

    def __call__(self, params: dict[str, Any], taken: set[int] = frozenset()) -> int | None:  # type: ignore[assignment]
        """Place of the nearest among those that are not taken; None where all are."""
        traits = [np.asarray(trait) for trait in _traits(params)]
        sides = [_apart(*both) / unit for *both, unit in zip(self._table, traits, self._units, strict=True)]
        distance = np.sqrt(sum(side**2 for side in sides))
        distance[list(taken)] = np.inf
        place = int(np.argmin(distance))
        return place if np.isfinite(distance[place]) else None


def _traits(params: dict[str, Any]) -> tuple[np.ndarray, float, float]:
    schedule = {name: params[name] for name in ("family", "start", "end", "tau")}
    curve = schedules.alpha_bar(schedules.betas(**schedule, steps=1000, space="alpha_bar"))
    return curve[4::10], float(np.log(params["learning_rate"])), params["dropout"]


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|, of curves the largest."""
    gap = np.abs(a - b)
    return gap.max(-1) if gap.shape[-1] == 100 else gap


def pool(search: SearchConfig) -> list[dict[str, Any]]:
    """Known points, random draws from the space, then configurations that fail the screen, these spread evenly."""
    known = [space.flat(space.known_params(search, point)) | {"source": "known"} for point in search.known_points]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(POOL_SEED))
    draw = space.define_by_run(search)
    wanted = {"random": KNOWN_AND_RANDOM - len(known), "failing": FAILING}
    drawn: dict[str, list[dict[str, Any]]] = {source: [] for source in wanted}
    while any(len(drawn[source]) < count for source, count in wanted.items()):
        drawn_params = draw(study.ask())
        params, fails = space.flat(drawn_params), space.screen(search, drawn_params) is not None
        # The first draws are the random ones, whatever they are; later ones are looked through for those that fail.
        source = "random" if len(drawn["random"]) < wanted["random"] else "failing" if fails else None
        if source and len(drawn[source]) < wanted[source]:
            drawn[source].append(params | {"source": source})
    every = len(drawn["random"]) // FAILING
    mixed = known
    for index, params in enumerate(drawn["random"]):
        mixed = [*mixed, params] + (
            [drawn["failing"][index // every]] if index % every == 0 and index // every < FAILING else []
        )
    return mixed


def record(path: Path, fresh: bool, seconds: float) -> None:
    """Trains what of the pool is not recorded yet; every curve is on disk before the next begins.

    fresh: the better third of the pool once more, from a new seed, which tells a good configuration from a lucky one.
    """
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.monotonic()
    search = settings()
    splits = data.load(search.train.data)
    judge = reference.prepare(splits, search.final, cache_folder(), "cpu", print)
    stopping = search.early_stopping
    scorer = reference.rung_scorer(splits, judge, stopping.images, stopping.sampler, "frechet")
    curves = load(path)
    configurations = pool(search)
    seed = FRESH_SEED if fresh else POOL_SEED
    todo: list[int] = list(range(len(configurations)))
    if fresh:
        ended = [c for c in curves if c.seed == POOL_SEED and final_frechet(c) is not None]
        todo = [c.index for c in sorted(ended, key=final_frechet)[: len(configurations) // 3]]  # type: ignore[arg-type]
    done = {c.index for c in curves if c.seed == seed}
    for index in todo:
        if index in done:
            continue
        if time.monotonic() - began > seconds:
            break
        curve = _train(search, splits, scorer, configurations[index], index, seed)
        curves = [*load(path), curve]
        save(path, curves)
        print(
            f"{len(curves)}: {index} {curve.family} {time.monotonic() - began:.0f} s, {final_frechet(curve)}",
            flush=True,
        )


def final_frechet(curve: Curve) -> float | None:
    """At the end of the training, of the rung's images; None where it did not come there."""
    return curve.epochs[-1]["frechet"] if curve.failure is None else None


def _train(
    search: SearchConfig, splits: data.Splits, scorer: RungScorer, params: dict[str, Any], index: int, seed: int
) -> Curve:
    row = {name: value for name, value in params.items() if name != "source"} | {"seed": seed}
    training = space.train_config(search, row)
    watch = _Watch(scorer, splits.held_out.pixels)
    failure = None
    try:
        loop.train(
            training,
            splits.train,
            loop.Worker(torch.device("cpu")),
            report=lambda metrics, save: None,
            score=watch,
            rungs=range(1, EPOCHS + 1),
        )
    except loop.TrainingFailedError as error:
        failure = str(error)
    return Curve(
        index=index,
        source=params["source"],
        screened=space.screen(search, space.params_of(row)),
        failure=failure,
        epochs=watch.epochs,
        fresh_frechet=watch.fresh,
        **row,
    )


class _Watch:
    """Is called with the EMA model at the end of every epoch, and notes what a search might look at and its cost."""

    def __init__(self, scorer: RungScorer, held_out: np.ndarray):
        self.scorer, self.held_out = scorer, data.to_model_range(torch.from_numpy(held_out))
        self.epochs: list[dict[str, Any]] = []
        self.fresh: float | None = None
        self._since = time.process_time()

    def __call__(self, denoiser: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, Any]:
        laps = list(self._laps(denoiser, config, device))
        self.epochs.append({"epoch": len(self.epochs) + 1} | {k: v for lap in laps for k, v in lap.items()})
        self._since = time.process_time()
        return {"objective": 0.0}

    def _laps(self, denoiser: nn.Module, config: TrainConfig, device: torch.device) -> Iterator[dict[str, Any]]:
        epoch, began = len(self.epochs) + 1, time.process_time()
        yield {"train_seconds": began - self._since}
        loss = held_out_loss(denoiser, config, self.held_out)
        yield {"val_loss": loss, "loss_seconds": time.process_time() - began}
        began = time.process_time()
        scores = self.scorer(denoiser, config, device) if epoch in RUNGS else {}
        yield {name: _finite(scores.get(name)) for name in ("frechet", "score", "grid_loss")}
        yield {"score_seconds": time.process_time() - began}
        if epoch == EPOCHS and _finite(scores.get("frechet")) is not None:
            sampler = SamplerConfig(steps=20, eta=1.0, block_size=200, seed=1)
            betas = config.schedule.betas()
            images = Sampler(denoiser, betas, (1, 8, 8), sampler, device).images(0, FRESH_IMAGES)
            assert self.scorer.extractor is not None
            assert self.scorer.reference is not None
            self.fresh = frechet_distance(self.scorer.extractor.extract(images).features, self.scorer.reference)


@torch.no_grad()
def held_out_loss(denoiser: nn.Module, config: TrainConfig, x_0: torch.Tensor) -> float:
    """What tutorials stop on: the epsilon-MSE of held-out images at times that the schedule itself draws.

    The same times and noise at every call, which is kinder than the tutorials' fresh ones.
    """
    generator = torch.Generator().manual_seed(0)
    diffusion = Diffusion(config.schedule.betas())
    t = torch.randint(diffusion.steps, (len(x_0),), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    return float(epsilon_mse(denoiser(diffusion.q_sample(x_0, t, noise), t).sample, noise).mean())


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
