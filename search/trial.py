"""One Tune trial: Ray Train around the training loop, with the rung scorer plugged in."""

from collections.abc import Callable
from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback

from evaluation.rung import RungScorer
from trainer import ray_worker
from trainer.config import TrainConfig
from trainer.storage import Storage


class RungReportCallback(TuneReportCallback):
    """Hands Tune the rung reports, and no others: what Tune does not compare would only slow it down."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0].get("rung"):
            super().after_report(run_context, metrics, checkpoint)


def trainable(
    run: Storage, scorer: RungScorer, rungs: list[int], use_gpu: bool, report_seconds: float
) -> Callable[[dict[str, Any]], None]:
    """The function that Tune runs for each trial; its config is {trial, train}."""

    def trial(config: dict[str, Any]) -> None:
        ray_worker.fit(
            TrainConfig.model_validate(config["train"]),
            name=config["trial"],
            run=run,
            score=scorer,
            rungs=rungs,
            callbacks=[RungReportCallback()],
            use_gpu=use_gpu,
            report_seconds=report_seconds,
        )

    return trial
