"""The whole way of a run: search → final stage → ranking → report → export. Each part goes on from what is on disk."""

import contextlib
import dataclasses
import importlib.metadata
import platform
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster import capacity, connect, nodes
from evaluation import export, pictures, reference, report, report_figures, stage
from evaluation.config import FinalStageConfig
from evaluation.reference import Reference
from evaluation.rung import Metric
from evaluation.sampling import sample_images
from search import lease, tuner, watch
from search.config import SearchConfig, UserError
from search.records import CONFIG, Records, Row, open_run
from trainer import checkpoint, data
from trainer.data import Splits
from trainer.data_cache import cache_folder
from trainer.storage import Storage

RANKING, REPORT = "ranking.json", "report/index.html"
SAMPLES = 64


def begin(config: SearchConfig, run: Storage) -> None:
    """Writes config.yaml into a new run. Raises UserError where the place cannot be written or is taken."""
    if run.exists(CONFIG):
        raise UserError(
            f"{run.uri} holds another run; go on with it (ddpm-search resume {run.uri}) or give this one another --name"
        )
    try:
        if run.names():
            raise UserError(f"{run.uri} is not empty and holds no run; give another --name or --storage")
        run.write(CONFIG, _config_yaml(config).encode())
    except OSError as error:
        raise UserError(f"--storage {run.uri} cannot be written: {error}; give a folder that can") from error


def give_up(run: Storage) -> None:
    """Takes back what `begin` wrote where no trial was begun: a corrected command may have the name."""
    if not len(Records.load(run)):
        for name in (CONFIG, tuner.JOURNAL, "tune"):
            run.delete(name)


def preflight(config: SearchConfig, console: Console) -> Splits:
    """Everything that can be refused before Ray starts; decodes the images where they are not. Raises UserError."""
    try:
        with contextlib.ExitStack() as stack:
            bars: list[Callable[[int, int], None]] = []  # made when there is something to decode

            def progress(done: int, total: int) -> None:
                if not bars:
                    bars.append(stack.enter_context(watch.progress_bar(console, "Decoding images")))
                bars[0](done, total)

            data.prepare(config.train.data, progress)
        splits = data.load(config.train.data)
        config.train.model.check_fits(splits.train.shape)
        if config.train.batch_size > len(splits.train):
            raise ValueError(
                f"train.batch_size must be at most the number of training images, {len(splits.train)}, "
                f"but is {config.train.batch_size}"
            )
    except (ValueError, OSError) as error:
        message = str(error)
        raise UserError(f"train.{message}" if message.startswith(("data.", "model.")) else message) from error
    return splits


def go(config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console) -> None:
    """Does whatever of a run is not done yet. Raises KeyboardInterrupt where the user interrupts it."""
    with lease.held(run):
        _go(config, run, splits, address, console)


def _go(config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console) -> None:
    records = Records.load(run)
    with connect.connected(address) as ray:
        if ray.dashboard:
            console.print(f"Ray dashboard:  http://{ray.dashboard}")
        console.print(f"TensorBoard:    tensorboard --logdir {shlex.quote(run.uri + '/tensorboard')}")
        if not ray.local:
            _check_shared(run)
        cluster = capacity.read()
        try:
            placement = cluster.place(config.train.workers, config.trials_per_gpu)
            judge = _reference(config, splits, console)
        except ValueError as error:
            raise UserError(str(error)) from error
        metric = choose_metric(config, judge, console)
        settings = config.early_stopping
        scorer = reference.rung_scorer(splits, judge, settings.images, settings.sampler, metric)
        left = tuner.trials_left(config, records)
        if left:
            console.print(f"Searching: {left} trials of {config.train.epochs} epochs, {placement.at_once} at once\n")
            view = watch.SearchView(console, records, metric, config.train.epochs, config.trials)
            with view.shown():
                tuner.search(config, run, records, metric, scorer, placement, view.changed)
            console.print(view.summary())
            table = watch.trials_table(records, metric, config.train.epochs)
            console.print(table, *watch.reasons(records), "", sep="\n")
        if judge is None:
            console.print("No final stage: the data has no labels, and final.inception_weights is not given.")
        else:
            evaluate(config, run, records, judge, metric, cluster, console)
    finish(config, run, records, judge, splits, console)
    if judge is not None and not run.exists(RANKING):
        raise SystemExit(f"ddpm-search: no trial came to a checkpoint: nothing to rank; see {run.uri}/{REPORT}")


def _check_shared(run: Storage) -> None:
    """Raises UserError where a node does not see the run: its trials would train, and be lost."""
    living = nodes.living()
    seen = nodes.on_each(living, run.exists, CONFIG)
    blind = [node.name for node, sees in zip(living, seen, strict=True) if sees is not True]
    if blind:
        raise UserError(
            f"--storage must be shared by all nodes, but {run.uri} is not seen on {', '.join(blind)}; give a folder of "
            "NFS or s3://bucket/folder, and look with: ddpm-search cluster doctor --storage …"
        )


def evaluate(
    config: SearchConfig,
    run: Storage,
    records: Records,
    judge: Reference,
    metric: str,
    cluster: capacity.Capacity,
    console: Console,
) -> None:
    """The final stage and ranking.json, where any trial came to a checkpoint."""
    candidates = _candidates(config, records, metric)
    if not candidates:
        return
    final = config.final
    with watch.progress_bar(
        console, f"Drawing {final.images:,} images of each of {len(candidates)} trials"
    ) as progress:
        stage.draw(run, candidates, final, judge, sum(cluster.slots()), cluster.use_gpu, progress)
    result = stage.ranking(run, candidates, final, judge, notes={})
    result["trials"] = [row | records[row["trial"]].params() for row in result["trials"]]
    run.write_json(RANKING, result)


def finish(
    config: SearchConfig, run: Storage, records: Records, judge: Reference | None, splits: Splits, console: Console
) -> None:
    """Report, export and samples of the winner, from what the final stage left."""
    ranked = run.read_json(RANKING) if run.exists(RANKING) else None
    if ranked:
        console.print(watch.ranking_table(ranked), "")
    write_report(config, run, records, judge, splits, ranked)
    console.print(f"Report:   {run.uri}/{REPORT}")
    winner = next((row["trial"] for row in ranked["trials"] if row["rank"] == 1), None) if ranked else None
    if winner is not None and ranked is not None:
        export_trial(config, run, records, ranked, winner, Path(run.root) / "export" if run.is_local else None, console)


def export_trial(
    config: SearchConfig,
    run: Storage,
    records: Records,
    ranked: dict[str, Any] | None,
    trial: str,
    out: Path | None,
    console: Console,
) -> None:
    """Exports a trial to `out` (a local folder; None: RUN/export of a run that is not local) and draws its samples."""
    row = records[trial]
    if row.checkpoint is None:
        raise UserError(
            f"trial {trial} has no checkpoint ({row.state}: {row.reason}); choose another: ddpm-search status {run.uri}"
        )
    found = checkpoint.load(run.at(row.checkpoint))
    entry = next((r for r in ranked["trials"] if r["trial"] == trial), None) if ranked else None
    card = export.model_card(config.name, dataclasses.asdict(row), config.train.data.name, ranked, entry)
    provenance = {"run": config.name, "trial": trial, "checkpoint": row.checkpoint, "checkpoint_meta": found.meta}
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "export"
        export.export_pipeline(found, folder, card, provenance)
        denoiser, betas, shape = export.load_export(folder)
        images = sample_images(denoiser, betas, shape, config.final.sampler, 0, SAMPLES, "cpu")
        picture = folder.parent / "samples.png"
        pictures.save_grid_png(picture, images)
        if out is None:
            for file in (*folder.rglob("*"), picture):
                if file.is_file():
                    run.write(str(file.relative_to(scratch)), file.read_bytes())
    where = out or f"{run.uri}/export"
    console.print(f"Winner:   {where}  (diffusers.DDPMPipeline.from_pretrained loads it)")
    console.print(f"Samples:  {where.parent if isinstance(where, Path) else run.uri}/samples.png")


def write_report(
    config: SearchConfig,
    run: Storage,
    records: Records,
    judge: Reference | None,
    splits: Splits,
    ranked: dict[str, Any] | None,
) -> None:
    """RUN/report/index.html, from whatever there is."""
    samples = {}
    if ranked and judge:
        # As it was ranked, which `evaluate` may have been told to do otherwise than config.yaml.
        drawn = {name: ranked[name] for name in ("images", "split_size", "sampler")}
        final = FinalStageConfig.model_validate(config.final.model_dump() | drawn)
        for row in ranked["trials"]:
            stored = records[row["trial"]].checkpoint
            if row["rank"] is not None and stored:
                samples[row["trial"]] = stage.kept_images(run, stage.Candidate(row["trial"], stored), final, judge)
    curves = {}
    for trial in run.names("tensorboard"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(run.root, "tensorboard", trial) if run.is_local else Path(scratch)
            if not run.is_local:
                for name in run.names(f"tensorboard/{trial}"):
                    (folder / name).write_bytes(run.read(f"tensorboard/{trial}/{name}"))
            curves[trial] = report_figures.read_curves(folder)
    commands = [f"ddpm-search run {run.uri}/{CONFIG} --name {config.name}-again", f"ddpm-search status {run.uri}"]
    page = report.render(
        run_name=config.name,
        config=config.model_dump(mode="json"),
        rows=[dataclasses.asdict(row) for row in records],
        ranking=ranked,
        samples=samples,
        real_samples=splits.held_out.pixels[:SAMPLES],
        curves=curves,
        commands=commands,
        versions=versions(),
    )
    run.write(REPORT, page.encode())


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    names = ("ddpm-search", "torch", "ray", "optuna", "diffusers", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _config_yaml(config: SearchConfig) -> str:
    header = "# " + ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"{header}\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}"


def _reference(config: SearchConfig, splits: Splits, console: Console) -> Reference | None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.status("") as status:
        judge = reference.prepare(splits, config.final, cache_folder(), device, lambda what: status.update(what))
    if judge is not None and judge.accuracy is not None:
        console.print(
            f"Judge:          a classifier of the data's own labels, {judge.accuracy:.1%} right on held-out images"
        )
    return judge


def choose_metric(config: SearchConfig, judge: Reference | None, console: Console) -> Metric:
    """What trials are stopped by. Raises UserError where the configuration asks for one that cannot be had."""
    wanted = config.early_stopping.metric
    if judge is None:
        if wanted not in ("auto", "grid_loss"):
            raise UserError(
                f"early_stopping.metric is {wanted}, which needs labels or final.inception_weights; use grid_loss"
            )
        console.print(
            "Nothing can judge these images (no labels, no Inception weights): trials are stopped by grid_loss."
        )
        return "grid_loss"
    return "frechet" if wanted == "auto" else wanted


def evaluate_again(config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console) -> None:
    """The final stage, ranking, report and export of a run whose search is over or interrupted."""
    with lease.held(run), connect.connected(address):
        records = Records.load(run)
        judge = _reference(config, splits, console)
        if judge is None:
            raise UserError("nothing can judge these images: the data has no labels, so give final.inception_weights")
        evaluate(config, run, records, judge, choose_metric(config, judge, console), capacity.read(), console)
    finish(config, run, records, judge, splits, console)


def report_again(path: str, console: Console) -> None:
    """The report of a run, from what is on disk."""
    config, run, records = open_run(path)
    splits = preflight(config, console)
    ranked = run.read_json(RANKING) if run.exists(RANKING) else None
    judge = _reference(config, splits, console) if ranked else None
    write_report(config, run, records, judge, splits, ranked)
    console.print(f"Report:   {run.uri}/{REPORT}")


def export_again(path: str, trial: str | None, out: Path, console: Console) -> None:
    """A trial's export, the winner's where none is named."""
    config, run, records = open_run(path)
    ranked = run.read_json(RANKING) if run.exists(RANKING) else None
    known = [row.trial for row in records]
    if trial is None:
        if ranked is None:
            raise UserError(
                f"no ranking at {path}, so no winner; name a --trial, or first: ddpm-search evaluate {path}"
            )
        trial = next((row["trial"] for row in ranked["trials"] if row["rank"] == 1), None)
        if trial is None:
            raise UserError(f"no trial of {path} could be scored, so there is no winner; name a --trial")
    elif trial not in known:
        raise UserError(f"--trial {trial} is not in this run; its trials are {', '.join(known)}")
    try:
        export_trial(config, run, records, ranked, trial, out, console)
    except (OSError, checkpoint.BrokenCheckpointError) as error:
        raise UserError(f"trial {trial} cannot be exported to --out {out}: {error}") from error


def _candidates(config: SearchConfig, records: Records, metric: str) -> list[stage.Candidate]:
    """The best trials that were trained in full; stopped ones only where there are too few."""
    trained = [row for row in watch.in_order(records, metric) if row.checkpoint and row.rungs and row.state != "failed"]

    def fully(row: Row) -> bool:
        return row.state == "completed"

    chosen = [row for row in trained if fully(row)] or trained
    return [stage.Candidate(row.trial, str(row.checkpoint)) for row in chosen[: config.final.top]]
