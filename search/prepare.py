"""What a run needs before it starts: images that fit its configuration, an extractor, a metric to stop trials by."""

import contextlib
from collections.abc import Callable

from rich.console import Console

from evaluation import reference
from evaluation.config import Metric
from evaluation.reference import Reference
from search import samplers, watch
from search.config import SearchConfig, UserError
from trainer import data, failures, local
from trainer.config import TrainConfig
from trainer.data import Splits
from trainer.data_cache import cache_folder
from trainer.storage import Storage


def preflight(config: SearchConfig, console: Console) -> Splits:
    """Everything that can be refused before Ray starts; decodes the images where they are not. Raises UserError."""
    samplers.check(config)
    try:
        with contextlib.ExitStack() as stack:
            bars: list[Callable[[int, int], None]] = []  # made when there is something to decode

            def progress(done: int, total: int) -> None:
                if not bars:
                    bars.append(stack.enter_context(watch.progress_bar(console, "Decoding images")))
                bars[0](done, total)

            data.prepare(config.train.data, progress)
        splits = data.load(config.train.data)
        for where, training in config.variants():
            _check_fits(training, where, splits)
    except (ValueError, OSError) as error:
        message = str(error)
        raise UserError(f"train.{message}" if message.startswith("data.") else message) from error
    return splits


def _check_fits(training: TrainConfig, where: str, splits: Splits) -> None:
    try:
        training.model.check_fits(splits.train.shape)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    if training.batch_size > len(splits.train):
        raise ValueError(
            f"{where}batch_size must be at most the number of training images, {len(splits.train)}, "
            f"but is {training.batch_size}"
        )


def reference_of(config: SearchConfig, splits: Splits, console: Console, run: Storage | None) -> Reference | None:
    """The reference by the extractor that `run` keeps, and keeps from now on where it had none; without a run, by this
    machine's own.
    """
    import torch

    def prepare(device: str) -> Reference | None:
        try:
            with console.status("") as status:
                return reference.prepare(splits, config.final, cache_folder(), device, status.update, run)
        except RuntimeError as error:
            if device == "cpu" or not (failures.is_out_of_memory(error) or failures.is_fault_of_gpu(error)):
                raise
        console.print("The GPU has no room for the extractor: the CPU reads the real images, which takes longer.")
        return prepare("cpu")

    try:
        found = prepare("cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    local.release_memory()  # a GPU's, which trials need
    if found is not None:
        own = f"a classifier of the data's own labels, {found.accuracy or 0:.1%} right on held-out images"
        published = "Inception V3 of 2015, by which scores are published"
        console.print(f"Extractor:      {published if found.accuracy is None else own}")
    return found


def choose_metric(config: SearchConfig, reference: Reference | None, console: Console) -> Metric:
    """What trials are stopped by. Raises UserError where the configuration asks for one that cannot be had."""
    wanted = config.early_stopping.metric
    if reference is None:
        if wanted not in ("auto", "grid_loss"):
            raise UserError(
                f"early_stopping.metric is {wanted}, which needs labels or final.inception_weights; use grid_loss"
            )
        console.print(
            "Nothing can judge these images (no labels, no Inception weights): trials are stopped by grid_loss."
        )
        return "grid_loss"
    return "frechet" if wanted == "auto" else wanted
