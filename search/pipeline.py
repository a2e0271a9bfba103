"""The whole way of a run: search → final stage → ranking → report → export. Each part goes on from what is on disk."""

import contextlib
import dataclasses
import importlib.metadata
import platform
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster import capacity, connect, nodes
from cluster.capacity import Placement
from evaluation import events, export, pictures, reference, report, stage
from evaluation.config import FinalStageConfig
from evaluation.reference import Reference
from evaluation.rung import Metric, RungScorer
from evaluation.sampling import sample_images
from search import budget, confirm, disk, lease, plan, samplers, tuner, watch
from search.config import SearchConfig, UserError
from search.interrupt import Interrupt
from search.records import CONFIG, RANKING, Records, Row, open_run, read_ranking
from trainer import checkpoint, data
from trainer.config import TrainConfig
from trainer.data import Splits
from trainer.data_cache import cache_folder
from trainer.storage import Storage

REPORT = "report/index.html"
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
        for name in (CONFIG, tuner.JOURNAL, budget.FILE, "tune"):
            run.delete(name)


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
        for where, training in _variants(config):
            _check_fits(training, where, splits)
    except (ValueError, OSError) as error:
        message = str(error)
        raise UserError(f"train.{message}" if message.startswith("data.") else message) from error
    return splits


def _variants(config: SearchConfig) -> Iterator[tuple[str, TrainConfig]]:
    """The base training, and it with each of the choices of space.train, with the prefix of its settings' names."""
    yield "train.", config.train
    for name, values in config.space.train.items():
        for value in values:
            yield f"space.train.{name}: ", config.training({name: value})


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


def dry_run(
    config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console
) -> dict[str, Any]:
    """What a run would do and cost, measured in a few steps where a trial would run. Writes nothing into `run`."""
    with connect.connected(address):
        cluster = capacity.read()
        judge, scorer, placement = _prepare(config, splits, cluster, console)
        with console.status("timing a few steps"):
            measured = plan.measure_on_cluster(config, scorer, cluster.use_gpu)
    images, train = len(splits.train), config.train
    forecast = plan.forecast(config, measured, images, placement.at_once, sum(cluster.slots()))
    return plan.describe(config, scorer.metric) | {
        "run": run.uri,
        "trials": config.trials,
        "trials_at_once": placement.at_once,
        "epochs": train.epochs,
        "steps": data.epoch_end(train.epochs, images, train.batch_size),
        "rungs": config.rung_epochs(),
        "metric": scorer.metric,
        "measured": dataclasses.asdict(measured),
        "forecast": forecast if judge else forecast | {"final_stage_hours": 0.0},
        "free_bytes": disk.free_bytes(run),
        "warning": disk.shortage(forecast["disk_bytes"], run),
    }


def _prepare(
    config: SearchConfig, splits: Splits, cluster: capacity.Capacity, console: Console
) -> tuple[Reference | None, RungScorer, Placement]:
    """What judges the images, what scores a rung (and by what trials are stopped), and how trials are placed."""
    try:
        placement = cluster.place(config.train.workers, config.trials_per_gpu)
        judge = _reference(config, splits, console)
    except ValueError as error:
        raise UserError(str(error)) from error
    metric = choose_metric(config, judge, console)
    settings = config.early_stopping
    return judge, reference.rung_scorer(splits, judge, settings.images, settings.sampler, metric), placement


def go(config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console) -> None:
    """Does whatever of a run is not done yet. Raises KeyboardInterrupt where the user interrupts it."""
    with disk.full_disk_said(run), lease.held(run):
        _go(config, run, splits, address, console)


def _go(config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console) -> None:
    records = Records.load(run)
    allowed = budget.Budget(config.budget, run, records)
    with connect.connected(address) as ray, Interrupt().handled() as interrupt:
        if ray.dashboard:
            console.print(f"Ray dashboard:  http://{ray.dashboard}")
        console.print(f"TensorBoard:    tensorboard --logdir {shlex.quote(run.uri + '/tensorboard')}")
        if not ray.local:
            _check_shared(run)
        cluster = capacity.read()
        judge, scorer, placement = _prepare(config, splits, cluster, console)
        left = tuner.trials_left(config, records)
        if left:
            at_once = placement.at_once
            needed = disk.disk_bytes(config, disk.expected_checkpoint_bytes(config, splits.train.shape), at_once)
            if not len(records) and (warning := disk.shortage(needed, run)):
                console.print(warning)
            console.print(f"Searching: {left} trials of {config.train.epochs} epochs, {at_once} at once\n")
            ended = tuner.search(config, run, records, scorer, placement, allowed, interrupt, console)
            console.print(f"The search ended: {ended}.")
            table = watch.trials_table(records, scorer.metric, config.train.epochs)
            console.print(table, *watch.reasons(records), "", sep="\n")
        if judge is None:
            console.print("No final stage: the data has no labels, and final.inception_weights is not given.")
        else:
            evaluate(config, run, records, judge, scorer, cluster, console, interrupt)
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
    scorer: RungScorer,
    cluster: capacity.Capacity,
    console: Console,
    interrupt: Interrupt,
) -> None:
    """The final stage and ranking.json, where any trial came to a checkpoint."""
    candidates, notes = _candidates(config, records, scorer.metric), {}
    if not candidates:
        return

    def ranking() -> dict[str, Any]:
        drawn = [candidate for candidate in candidates if candidate.trial not in notes]
        what = f"Drawing {config.final.images:,} images of each of {len(drawn)} trials"
        with watch.progress_bar(console, what) as progress:
            slots = sum(cluster.slots())
            notes.update(stage.draw(run, drawn, config.final, judge, slots, cluster.use_gpu, progress))
        return stage.ranking(run, candidates, config.final, judge, notes)

    result = ranking()
    best = [row["trial"] for row in result["trials"] if row["rank"]][: config.final.confirm.top]
    if best:
        placement = cluster.place(config.train.workers, config.trials_per_gpu)
        chosen = [records[trial] for trial in best]
        repeats, failed = confirm.train_again(config, run, chosen, scorer, placement, console, interrupt)
        candidates += repeats
        notes.update(failed)
        result = ranking()
    rows = {row.trial: row for row in confirm.all_rows(run, records)}
    for entry in result["trials"]:
        entry |= rows[entry["trial"]].params() | {"checkpoint": rows[entry["best_seed"] or entry["trial"]].checkpoint}
        for seed in entry["by_seed"]:
            seed["seed"] = rows[seed["trial"]].seed
    run.write_json(RANKING, result)


def finish(
    config: SearchConfig, run: Storage, records: Records, judge: Reference | None, splits: Splits, console: Console
) -> None:
    """Report, export and samples of the winner, from what the final stage left."""
    ranked = read_ranking(run)
    if ranked:
        console.print(watch.ranking_table(ranked), watch.ranking_notes(ranked), "", sep="\n")
    write_report(config, run, records, judge, splits, ranked)
    console.print(f"Report:   {run.uri}/{REPORT}")
    winner = _winner(ranked) if ranked else None
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
    weights: str | None = None,
    torch_export: bool = False,
) -> None:
    """Exports a trial to `out` (a local folder; None: RUN/export of a run that is not local) and draws its samples.

    weights: ema or raw; None takes those that were ranked.
    """
    row = next(row for row in confirm.all_rows(run, records) if row.trial == trial)
    if row.checkpoint is None:
        raise UserError(
            f"trial {trial} has no checkpoint ({row.state}: {row.reason}); choose another: ddpm-search status {run.uri}"
        )
    found = checkpoint.load(run.at(row.checkpoint))
    entries = ranked["trials"] if ranked else []
    entry = next((e for e in entries if trial == e["trial"] or trial in (e.get("seeds") or ())), None)
    raw = (weights or (ranked or {}).get("weights", config.final.weights)) == "raw"
    data_name = config.train.data.name
    card = export.model_card(config.name, dataclasses.asdict(row), data_name, ranked, entry, raw, torch_export)
    provenance = {"run": config.name, "trial": trial, "checkpoint": row.checkpoint, "checkpoint_meta": found.meta}
    provenance["weights"] = "raw" if raw else "ema"
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "export"
        export.export_pipeline(found, folder, card, provenance, raw, torch_export)
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
        drawn = {name: ranked[name] for name in ("images", "split_size", "sampler", "weights") if name in ranked}
        final = FinalStageConfig.model_validate(config.final.model_dump() | drawn)
        for row in ranked["trials"]:
            if row["rank"] is not None and row.get("checkpoint"):
                candidate = stage.Candidate(row["best_seed"], row["checkpoint"])
                with contextlib.suppress(FileNotFoundError):  # deleted since, to save space
                    samples[row["trial"]] = stage.kept_images(run, candidate, final, judge)
    logged = {}
    for trial in run.names("tensorboard"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(run.root, "tensorboard", trial) if run.is_local else Path(scratch)
            if not run.is_local:
                for name in run.names(f"tensorboard/{trial}"):
                    (folder / name).write_bytes(run.read(f"tensorboard/{trial}/{name}"))
            logged[trial] = events.read(folder)
    commands = [f"ddpm-search run {run.uri}/{CONFIG} --name {config.name}-again", f"ddpm-search status {run.uri}"]
    page = report.render(
        run_name=config.name,
        config=config.model_dump(mode="json"),
        rows=[dataclasses.asdict(row) for row in records],
        ranking=ranked,
        samples=samples,
        real_samples=splits.held_out.pixels[:SAMPLES],
        events=logged,
        commands=commands,
        versions=versions(),
        ended=run.read_json("search.json")["ended"] if run.exists("search.json") else None,
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
        try:
            judge = reference.prepare(splits, config.final, cache_folder(), device, lambda what: status.update(what))
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
    if judge is not None and judge.accuracy is not None:
        console.print(
            f"Judge:          a classifier of the data's own labels, {judge.accuracy:.1%} right on held-out images"
        )
    return judge


def _winner(ranked: dict[str, Any]) -> str | None:
    """The best-scored seed of the configuration that ranks first."""
    return next((row.get("best_seed") or row["trial"] for row in ranked["trials"] if row["rank"] == 1), None)


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
    with lease.held(run), connect.connected(address), Interrupt().handled() as interrupt:
        records, cluster = Records.load(run), capacity.read()
        judge, scorer, _ = _prepare(config, splits, cluster, console)
        if judge is None:
            raise UserError("nothing can judge these images: the data has no labels, so give final.inception_weights")
        evaluate(config, run, records, judge, scorer, cluster, console, interrupt)
    finish(config, run, records, judge, splits, console)


def report_again(path: str, console: Console) -> None:
    """The report of a run, from what is on disk."""
    config, run, records = open_run(path)
    splits = preflight(config, console)
    ranked = read_ranking(run)
    judge = _reference(config, splits, console) if ranked else None
    write_report(config, run, records, judge, splits, ranked)
    console.print(f"Report:   {run.uri}/{REPORT}")


def export_again(
    path: str, trial: str | None, out: Path, weights: str | None, torch_export: bool, console: Console
) -> None:
    """A trial's export, the winner's where none is named."""
    config, run, records = open_run(path)
    ranked = read_ranking(run)
    known = [row.trial for row in confirm.all_rows(run, records)]
    if trial is None:
        if ranked is None:
            raise UserError(
                f"no ranking at {path}, so no winner; name a --trial, or first: ddpm-search evaluate {path}"
            )
        trial = _winner(ranked)
        if trial is None:
            raise UserError(f"no trial of {path} could be scored, so there is no winner; name a --trial")
    elif trial not in known:
        raise UserError(f"--trial {trial} is not in this run; its trials are {', '.join(known)}")
    try:
        export_trial(config, run, records, ranked, trial, out, console, weights, torch_export)
    except (OSError, checkpoint.BrokenCheckpointError) as error:
        raise UserError(f"trial {trial} cannot be exported to --out {out}: {error}") from error


def _candidates(config: SearchConfig, records: Records, metric: str) -> list[stage.Candidate]:
    """The best trials that were trained in full; stopped ones only where there are too few."""
    trained = [row for row in watch.in_order(records, metric) if row.checkpoint and row.rungs and row.state != "failed"]

    def fully(row: Row) -> bool:
        return row.state == "completed"

    chosen = [row for row in trained if fully(row)] or trained
    return [stage.Candidate(row.trial, str(row.checkpoint)) for row in chosen[: config.final.top]]
