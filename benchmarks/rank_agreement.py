"""How well fewer sampling steps and fewer images rank the trials of a finished run as the full setting does.

    python -m benchmarks.rank_agreement runs/digits [--full-steps 100] [--full-images 2000]

Images of every trial are drawn at each setting (kept in the run as `evaluate` keeps them) and ranked by score and by
Fréchet distance. Agreement is Kendall's tau with the ranking at the full setting; its interval is a percentile
bootstrap over trials. Use: choose `final.sampler.steps`, `final.images` and the rungs' settings by evidence.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from scipy.stats import kendalltau

from benchmarks.common import provenance, write
from evaluation import ranking_file, reference, stage
from evaluation.config import FinalStageConfig
from evaluation.reference import Reference
from evaluation.shards import Candidate
from search.prepare import preflight
from search.runs import open_run
from trainer.data_cache import cache_folder
from trainer.local import default_device
from trainer.storage import Storage

STEPS, IMAGES, RESAMPLES = (10, 20, 50), (500, 1000), 2000
MIN_TRIALS = 8


def values(
    run: Storage, candidates: list[Candidate], final: FinalStageConfig, judge: Reference, what: str
) -> dict[str, np.ndarray]:
    """The score and the Fréchet distance of every candidate, (trials,) each, drawn over all of this machine."""
    use_gpu = default_device().type == "cuda"
    workers = int(ray.cluster_resources()["GPU" if use_gpu else "CPU"])
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as shown:
        bar = shown.add_task(what)
        reasons = stage.draw(
            *(run, candidates, final, judge, workers, use_gpu),
            progress=lambda done, total: shown.update(bar, completed=done, total=total),
        )
    for trial, reason in reasons.items():
        raise SystemExit(f"{trial} cannot be ranked: {reason}")
    rows = {row["trial"]: row for row in ranking_file.ranking(run, candidates, final, judge, {})["trials"]}
    ordered = [rows[candidate.trial] for candidate in candidates]
    return {
        "score": np.array([row["score"]["mean"] for row in ordered]),
        "frechet": np.array([row["frechet"]["value"] for row in ordered]),
    }


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Kendall's tau and its 95% interval over resampled trials."""
    rng = np.random.default_rng(0)
    taus = []
    for _ in range(RESAMPLES):
        index = rng.integers(len(a), size=len(a))
        taus.append(kendalltau(a[index], b[index]).statistic)
    low, high = np.nanquantile(taus, (0.025, 0.975))
    return {"tau": round(float(kendalltau(a, b).statistic), 3), "ci": [round(float(low), 3), round(float(high), 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--full-steps", type=int, default=100)
    parser.add_argument("--full-images", type=int, default=2000)
    arguments = parser.parse_args()
    console = Console()
    config, run, records = open_run(arguments.run)
    candidates = [Candidate(row.trial, row.checkpoint) for row in records if row.checkpoint and row.state != "failed"]
    if len(candidates) < MIN_TRIALS:
        raise SystemExit(f"{arguments.run} has {len(candidates)} checkpoints; at least {MIN_TRIALS} are needed")
    splits = preflight(config, console)
    judge = reference.prepare(splits, config.final, cache_folder(), str(default_device()), console.print)
    if judge is None:
        raise SystemExit("nothing can judge these images: the data has no labels, so give final.inception_weights")

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False)

    def measured(steps: int, images: int) -> dict[str, np.ndarray]:
        sampler = config.final.sampler.model_copy(update={"steps": steps})
        final = config.final.model_copy(update={"sampler": sampler, "images": images, "split_size": images})
        return values(run, candidates, final, judge, f"{steps} steps, {images:,} images")

    full = measured(arguments.full_steps, arguments.full_images)
    rows = []
    for steps in (*STEPS, arguments.full_steps):
        for images in (*IMAGES, arguments.full_images):
            if (steps, images) != (arguments.full_steps, arguments.full_images):
                found = measured(steps, images)
                rows.append(
                    {"steps": steps, "images": images, **{name: agreement(found[name], full[name]) for name in full}}
                )
    table = Table("steps", "images", "score: tau", "95% CI", "Fréchet: tau", "95% CI")
    for row in rows:
        cells = [cell for name in ("score", "frechet") for cell in (str(row[name]["tau"]), str(row[name]["ci"]))]
        table.add_row(str(row["steps"]), f"{row['images']:,}", *cells)
    console.print(table)
    setting = {"steps": arguments.full_steps, "images": arguments.full_images}
    write(
        "rank_agreement",
        {
            **provenance(config.seed),
            **{"run": Path(arguments.run).name, "trials": len(candidates), "extractor": judge.extractor.name},
            **{"sampler": config.final.sampler.model_dump(), "full": setting, "agreement": rows},
        },
    )


if __name__ == "__main__":
    main()
