"""The whole way of a run: search → final stage → ranking → report → export. Each part goes on from what is on disk."""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from rich.console import Console

from cluster import capacity, connect
from cluster.capacity import Placement
from evaluation import ranking_file, stage
from evaluation.analysis import deciding_metric
from evaluation.config import FinalStageConfig
from evaluation.reference import EXTRACTOR, Reference, rung_scorer
from evaluation.report_words import count
from evaluation.rung import RungScorer
from evaluation.shards import Candidate
from search import began, budget, confirm, disk, lease, plan, tables, trial_cost, tuner, watch
from search.config import SearchConfig, UserError
from search.interrupt import Interrupt, resume_command
from search.outcome import check_ranked, finish, versions
from search.prepare import check_nodes, choose_metric, reference_of
from search.records import Records
from search.runs import CONFIG, RANKING
from trainer import data
from trainer.data import Splits
from trainer.failures import TooLittleMemoryError
from trainer.storage import Storage

ONE_WORKER = (1, 1, None)  # the room that drawing takes


def begin(config: SearchConfig, run: Storage) -> None:
    """Writes config.yaml into a new run. Raises UserError where the place cannot be written or is taken."""
    if run.exists(CONFIG):
        raise UserError(
            f"{run.uri} holds another run; go on with it ({resume_command(run.uri)}) or give this one another --name"
        )
    header = "# " + ", ".join(f"{name} {number}" for name, number in versions().items())
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    try:
        if run.names():
            raise UserError(f"{run.uri} is not empty and holds no run; give another --name or --storage")
        run.write(CONFIG, f"{header}\n{settings}".encode())
    except OSError as error:
        raise UserError(f"--storage {run.uri} cannot be written: {error}; give a folder that can") from error


@contextlib.contextmanager
def given_up_where_refused(run: Storage) -> Iterator[None]:
    """Takes back what `begin` wrote where no trial was begun: a corrected command may have the name."""
    try:
        yield
    except lease.TakenError:
        raise  # it is another's
    except Exception:
        if not len(Records.load(run)):
            for name in (CONFIG, began.FILE, tuner.JOURNAL, budget.FILE, "tune", EXTRACTOR):
                run.delete(name)
        raise


def dry_run(
    config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console
) -> dict[str, Any]:
    """What a run would do and cost, measured in a few steps where a trial would run. Writes nothing into `run`."""
    with connect.connected(address) as connection:
        cluster = _with_room(config.room, connection, console)
        config, reference, scorer, placement = _prepare(config, splits, cluster, console, None, trains=True)
        with console.status("timing a few steps"):
            measured = trial_cost.measure_on_cluster(config, scorer, cluster.use_gpu)
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
        "forecast": forecast if reference else forecast | {"final_stage_hours": 0.0, "confirm_hours": 0.0},
        "free_bytes": disk.free_bytes(run),
        "warning": disk.shortage(forecast["disk_bytes"], run),
    }


def _with_room(
    room: tuple[int, int, int | None], connection: connect.Connection, console: Console, use_gpu: bool = False
) -> capacity.Capacity:
    """The cluster, whose nodes may have come since the last look, or may still be starting. use_gpu: one has a GPU.

    Raises UserError where not one trial fits, and ConnectError where a node has other versions.
    """
    try:
        cluster = capacity.with_room(
            room, console.print, 0 if connection.local else capacity.NODES_SECONDS, use_gpu=use_gpu
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if not connection.local:
        connection.check_versions()
    return cluster


def _prepare(
    config: SearchConfig,
    splits: Splits,
    cluster: capacity.Capacity,
    console: Console,
    run: Storage | None,
    trains: bool,
) -> tuple[SearchConfig, Reference | None, RungScorer, Placement]:
    """What judges the images, what scores a rung (and by what trials are stopped), and how trials are placed.

    The configuration comes back with a number for trials_per_gpu: auto, where anything is trained.
    """
    placement = cluster.place(*(config.room if trains else ONE_WORKER))
    reference = reference_of(config, splits, console, run, gpu_elsewhere=cluster.use_gpu)
    metric = choose_metric(config, reference, console)
    settings = config.early_stopping
    scorer = rung_scorer(splits, reference, settings.images, settings.sampler, metric)
    if trains and config.trials_per_gpu == "auto" and cluster.use_gpu and config.train.workers == 1:
        with console.status("measuring a trial's memory"):
            count = trial_cost.trials_per_gpu(config, scorer, console)
        config = config.model_copy(update={"trials_per_gpu": count})
        placement = cluster.place(1, count)
    return config, reference, scorer, placement


def go(config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console) -> None:
    """Does whatever of a run is not done yet. Raises KeyboardInterrupt where the user interrupts it."""
    with disk.full_disk_said(run), lease.held(run):
        _go(config, run, splits, address, console)


def _go(config: SearchConfig, run: Storage, splits: Splits, address: str | None, console: Console) -> None:
    began.check_images(run, splits)
    records = Records.load(run)
    allowed = budget.Budget(config.budget, run, records)
    left = tuner.trials_left(config, records)
    trains = bool(left or config.confirmations)
    if trains:
        began.check_training(run, records, config)
    with connect.connected(address) as connection, Interrupt().handled() as interrupt:
        if connection.dashboard:
            console.print(f"Ray dashboard:  http://{connection.dashboard}")
        console.print(f"TensorBoard:    tensorboard --logdir {shlex.quote(run.at('tensorboard').uri)}")
        cluster = _with_room(config.room if trains else ONE_WORKER, connection, console)
        if not connection.local:
            check_nodes(run, splits, trains, console)
        config, reference, scorer, placement = _prepare(config, splits, cluster, console, run, trains)
        if left:
            began.check_judge(run, records, config, scorer.metric, reference)
            at_once = placement.at_once
            needed = disk.disk_bytes(config, disk.expected_checkpoint_bytes(config, splits.train.shape), at_once)
            if not len(records) and (warning := disk.shortage(needed, run)):
                console.print(warning)
            console.print(
                f"Searching: {count(left, 'trial')} of {count(config.train.epochs, 'epoch')}, {at_once} at once\n"
            )
            ended = tuner.search(config, run, records, scorer, placement, allowed, interrupt, console)
            console.print(f"The search ended: {ended}.")
            table = tables.trials_table(records, scorer.metric, config.train.epochs)
            console.print(table, *tables.reasons(records), "", sep="\n")
        else:
            tuner.tidy(run, records)
            tuner.mend_study(config, run, records, scorer.metric)
        if reference is None:
            console.print("No final stage: the data has no labels, and final.inception_weights is not given.")
        else:
            evaluate(config, run, records, reference, scorer, connection, console, interrupt, cluster.use_gpu)
    finish(config, run, records, splits, console)
    if reference is not None:
        check_ranked(run)


def evaluate(
    config: SearchConfig,
    run: Storage,
    records: Records,
    reference: Reference,
    scorer: RungScorer,
    connection: connect.Connection,
    console: Console,
    interrupt: Interrupt,
    use_gpu: bool,
) -> None:
    """The final stage and ranking.json, where any trial came to a checkpoint.

    use_gpu: the cluster had a GPU so far. CPUs would draw other noise, and all of it once more.
    """
    candidates, notes = _candidates(config, records), {}
    if not candidates:
        return

    def ranking() -> dict[str, Any]:
        drawn = [candidate for candidate in candidates if candidate.trial not in notes]
        what = f"Drawing {config.final.images:,} images of each of {count(len(drawn), 'trial')}"
        # Nodes may have come and gone since the search began.
        cluster = _with_room(ONE_WORKER, connection, console, use_gpu)
        with watch.progress_bar(console, what) as progress:
            slots, memory = sum(cluster.slots()), cluster.worker().get("memory", 0)
            sampler = config.final.sampler.on("cuda" if cluster.use_gpu else "cpu")
            final = config.final.model_copy(update={"sampler": sampler})
            try:
                notes.update(stage.draw(run, drawn, final, reference, slots, cluster.use_gpu, progress, memory))
            except TooLittleMemoryError as error:
                raise UserError(str(error)) from error
        return ranking_file.ranking(run, candidates, final, reference, notes)

    result = ranking()
    best = [row["trial"] for row in result["trials"] if row["rank"]][: config.final.confirm.top]
    if best:
        placement = _with_room(config.room, connection, console, use_gpu).place(*config.room)
        chosen = [records[trial] for trial in best]
        confirming, failed = confirm.train_again(config, run, records, chosen, scorer, placement, console, interrupt)
        candidates += confirming
        notes.update(failed)
        result = ranking()
    rows = {row.trial: row for row in confirm.all_rows(run, records)}
    for entry in result["trials"]:
        best_training = rows[entry["best_training"] or entry["trial"]]
        entry |= rows[entry["trial"]].params() | {"checkpoint": best_training.checkpoint}
        for training in entry["trainings"]:
            training["seed"] = rows[training["trial"]].seed
    run.write_json(RANKING, result)


def evaluate_again(
    config: SearchConfig,
    final: FinalStageConfig,
    run: Storage,
    splits: Splits,
    address: str | None,
    console: Console,
) -> None:
    """The final stage as `final` has it, ranking, report and export of a run whose search is over or interrupted.

    The run's own configuration stays what it was: `resume` ranks by that again.
    """
    with disk.full_disk_said(run), lease.held(run):
        began.check_images(run, splits)
        records = Records.load(run)
        asked = config.model_copy(update={"final": final})
        trains = asked.confirmations > 0
        if trains:
            began.check_training(run, records, config)
        with connect.connected(address) as connection, Interrupt().handled() as interrupt:
            cluster = _with_room(asked.room if trains else ONE_WORKER, connection, console)
            if not connection.local:
                check_nodes(run, splits, trains, console)
            asked, reference, scorer, _ = _prepare(asked, splits, cluster, console, run, trains)
            if reference is None:
                raise UserError(
                    "nothing can judge these images: the data has no labels, so give final.inception_weights in "
                    f"{run.at(CONFIG).uri}"
                )
            evaluate(asked, run, records, reference, scorer, connection, console, interrupt, cluster.use_gpu)
        finish(config, run, records, splits, console)
        check_ranked(run)


def _candidates(config: SearchConfig, records: Records) -> list[Candidate]:
    """The best trials that were trained in full; stopped ones only where there are none."""
    ordered = tables.in_order(records, deciding_metric(config.model_dump(), [vars(row) for row in records]))
    trained = [row for row in ordered if row.checkpoint and row.rungs and row.state != "failed"]
    chosen = [row for row in trained if row.state == "completed"] or trained
    return [Candidate(row.trial, str(row.checkpoint)) for row in chosen[: config.final.top]]
