"""What a run needs before it starts: images that fit its configuration, an extractor, a metric to stop trials by."""

import contextlib
from collections.abc import Callable

from rich.console import Console

from evaluation import reference
from evaluation.config import Metric
from evaluation.inception import Inception
from evaluation.reference import Reference
from evaluation.report_words import count
from search import samplers, watch
from search.config import SearchConfig, UserError
from search.runs import CONFIG
from trainer import data, failures, local
from trainer.config import TrainConfig
from trainer.data import Splits
from trainer.data_cache import cache_folder
from trainer.storage import Storage

DECODE_SECONDS = 6 * 3600  # that a node may take to decode its images


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


def check_nodes(run: Storage, splits: Splits, trains: bool, console: Console) -> None:
    """Raises UserError where a node does not see the run or, where something is to be trained, has other images."""
    _check_shared(run)
    if trains:
        _check_images(splits, console)


def _check_shared(run: Storage) -> None:
    """Where a node does not see the run, its trials would train, and be lost."""
    from cluster import nodes

    living = nodes.living()
    seen = nodes.on_each(living, run.exists, CONFIG)
    gone = nodes.NodeGoneError
    blind = [n.name for n, sees in zip(living, seen, strict=True) if sees is not True and not isinstance(sees, gone)]
    if blind:
        raise UserError(
            f"--storage must be shared by all nodes, but {run.uri} is not seen on {', '.join(blind)}; give a folder of "
            "NFS or s3://bucket/folder, and look with: ddpm-search cluster doctor --storage …"
        )


def _check_images(splits: Splits, console: Console) -> None:
    """Of every node that may train; those that have not decoded them yet do it now."""
    from cluster import nodes

    living = nodes.living()
    training = [node for node in living if node.gpus] or living
    with console.status(f"reading the images on {count(len(training), 'node')}"):
        config, key = splits.config, splits.key()
        found = nodes.on_each(training, lambda: data.load_same(config, key) and None, timeout_s=DECODE_SECONDS)
    for node, error in zip(training, found, strict=True):
        if isinstance(error, ValueError | OSError):
            raise UserError(f"on node {node.name}: train.{str(error).partition(data.ON_NODE)[0]}")


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


def reference_of(
    config: SearchConfig, splits: Splits, console: Console, run: Storage | None, gpu_elsewhere: bool = False
) -> Reference | None:
    """The reference by the extractor that `run` keeps, and keeps from now on where it had none; without a run, by this
    machine's own.

    gpu_elsewhere: the Ray that this process is connected to has a GPU. It is used where this machine has none: of a
    head without one, CIFAR-10's classifier takes hours of CPUs.
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
        here = torch.cuda.is_available()
        if gpu_elsewhere and not here:
            with console.status("a node with a GPU reads the real images"):
                found = _prepare_elsewhere(config, splits, run)
        else:
            found = prepare("cuda" if here else "cpu")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    local.release_memory()  # a GPU's, which trials need
    if found is not None:
        own = f"a classifier of the data's own labels, {found.accuracy or 0:.1%} right on held-out images"
        published = "Inception V3 of 2015, by which scores are published"
        console.print(f"Extractor:      {published if found.accuracy is None else own}")
    return found


def _prepare_elsewhere(config: SearchConfig, splits: Splits, run: Storage | None) -> Reference | None:
    """reference.prepare on a node with a GPU, which has the data as trials do; Inception's weights are of this one."""
    import ray

    inception = reference.inception_of(splits, config.final)
    task = ray.remote(num_cpus=1, num_gpus=1, max_calls=1)(_prepare_there)
    try:
        found: Reference | None = ray.get(task.remote(config, splits.key(), run, inception))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
    return found


def _prepare_there(
    config: SearchConfig, key: str, run: Storage | None, inception: Inception | None
) -> Reference | None:
    splits = data.load(config.train.data)
    if splits.key() != key:
        raise ValueError("data.name: a node has other images there than this machine; give all nodes the same")

    def prepare(device: str) -> Reference | None:
        return reference.prepare(splits, config.final, cache_folder(), device, lambda what: None, run, inception)

    try:
        return prepare(str(local.default_device()))
    except RuntimeError as error:
        if not (failures.is_out_of_memory(error) or failures.is_fault_of_gpu(error)):
            raise
    return prepare("cpu")  # others have the GPU's memory


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
