"""One Tune trial: Ray Train around the training loop, with the rung scorer plugged in."""

import os
import traceback
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster import capacity
from evaluation.rung import RungScorer
from search.disk import DISK_FULL
from trainer.config import TrainConfig
from trainer.storage import Storage


class RungReportCallback(TuneReportCallback):
    """Hands Tune the rung reports, and no others: what Tune does not compare would only slow it down."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0].get("rung"):
            super().after_report(run_context, metrics, checkpoint)


def _report_rungs(checkpoints: Storage, training: TrainConfig) -> None:
    """Those of an earlier life, which perhaps were not noted: training goes on behind them.

    The workers of a trial outlive its own process for a while, and may have passed several.
    """
    from trainer import checkpoint

    found = checkpoint.latest(checkpoints, of_a_rung=True, of=training)
    if found is not None:
        meta = found[1].meta
        for metrics in meta.get("rungs") or [meta["metrics"]]:
            tune.report({**metrics, "checkpoint_path": found[0].root})


def in_ray_train(run: Storage, rungs: list[int], worker: dict[str, float]) -> Callable[..., None]:
    """The function that Tune runs for each trial, whose config is {trial, train}: Ray Train with its worker group.

    Its scorer is handed in by tune.with_parameters: Ray refuses functions above 95 MiB, and Inception has 123.
    """

    def trial(config: dict[str, Any], scorer: RungScorer) -> None:
        from trainer import ray_worker

        training = TrainConfig.model_validate(config["train"])
        _report_rungs(run.at("train", config["trial"]), training)
        ray_worker.fit(
            training,
            name=config["trial"],
            run=run,
            score=scorer,
            rungs=rungs,
            callbacks=[RungReportCallback()],
            images=scorer.key,
            worker=worker,
            strategy=lambda: capacity.read().strategy(training.workers, worker),  # of the nodes that there are by now
        )

    return trial


def in_reused_process(run: Storage, rungs: list[int]) -> Callable[..., None]:
    """As `in_ray_train`, for one worker, in the trial's own process, which Tune hands from trial to trial.

    Starting a worker group takes far longer than the next trial in a process that is warm: docs/benchmarks.md.
    """

    def trial(config: dict[str, Any], scorer: RungScorer) -> None:
        import torch

        from trainer import data, failures, local, loop

        local.release_memory()  # not at the end of the last trial, whose frames held its model
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        training = TrainConfig.model_validate(config["train"])
        _report_rungs(run.at("train", config["trial"]), training)

        def report(metrics: loop.Metrics, checkpoint: Storage) -> None:
            if metrics["rung"]:
                tune.report({**metrics, "checkpoint_path": checkpoint.root})

        try:
            local.fit(
                training,
                data.load_same(training.data, scorer.key).train,
                run.at("train", config["trial"]),
                run.at("tensorboard", config["trial"]),
                local.default_device(),
                report,
                score=scorer,
                rungs=rungs,
            )
        except Exception as error:
            if isinstance(error, OSError) and error.errno not in DISK_FULL:
                raise  # the storage may be back when Tune tries again
            if failures.is_fault_of_gpu(error):
                raise  # it stays with the process that met it
            traceback.print_exc()
            tune.report(failures.failure_report(error))

    return trial
