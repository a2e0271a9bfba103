"""The `ddpm-search` command: every verb, no logic. Heavy imports wait until a verb needs them."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from evaluation.config import SamplerName
from search import cluster_verbs, schedule_verbs
from search.config import UserError
from search.config_file import load
from search.options import Address, Json, Name, Set, console, home
from trainer.config import SEEDS, Weights

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Finds the noise schedule, learning rate and dropout with which a DDPM draws the best images.",
)
app.add_typer(schedule_verbs.app, name="schedule")
app.add_typer(cluster_verbs.app, name="cluster")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name such as digits.")]
RunPath = Annotated[str, typer.Argument(metavar="PATH", help="The folder of a run, such as runs/digits.")]


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def run(
    config: Config,
    set_: Set = None,
    name: Name = None,
    storage: Annotated[str, typer.Option(metavar="STORAGE", help="A folder, or such as s3://bucket/folder.")] = "runs",
    address: Address = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with its cost, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Search, draw and score images of the best trials, rank, report, export."""
    if as_json and not dry_run:
        raise UserError("--json prints the plan of --dry-run; a run's results: ddpm-search rank --json")

    settings = load(config, set_, name)

    from search import pipeline, prepare
    from search.runs import storage_at

    place = storage_at(storage).at(settings.name)
    if dry_run:
        from search.plan import show

        told = Console(stderr=True, highlight=False, markup=False) if as_json else console
        plan = pipeline.dry_run(settings, place, prepare.preflight(settings, told), address, told)
        print(json.dumps(plan, indent=2)) if as_json else show(plan, console)
        return
    splits = prepare.preflight(settings, console)
    pipeline.begin(settings, place)
    console.print(f"Run:            {place.uri}")
    with pipeline.given_up_where_refused(place):
        _go(settings, place, splits, address)


@app.command()
def resume(path: RunPath, address: Address = "local") -> None:
    """Go on with a run where it was cut: a trial, the search, or the final stage."""
    from search.prepare import preflight
    from search.runs import open_run

    settings, place, records = open_run(path)
    console.print(f"Run:            {place.uri} ({len(records)} trials on record)")
    _go(settings, place, preflight(settings, console), address)


def _go(settings: Any, place: Any, splits: Any, address: str) -> None:
    from search import pipeline
    from search.interrupt import resume_command

    try:
        pipeline.go(settings, place, splits, address, console)
    except KeyboardInterrupt:
        again = resume_command(place.uri, address)
        print(f"\nInterrupted; what was finished is kept. Go on with: {again}", file=sys.stderr)
        raise SystemExit(130) from None


@app.command()
def status(path: RunPath, as_json: Json = False) -> None:
    """The trials of a run, while it works and after."""
    from evaluation.analysis import deciding_metric
    from search import budget, tables
    from search.runs import confirmations, read_ranking, read_run

    settings, place, records = read_run(path)
    rows, confirming = list(records), confirmations(place)
    if as_json:
        parents = [None] * len(rows) + [parent for parent, _ in confirming]
        found = zip(parents, [*rows, *(row for _, row in confirming)], strict=True)
        print(json.dumps([vars(row) | {"confirms": parent} for parent, row in found], indent=2))
        return
    metric = deciding_metric(settings, [vars(row) for row in rows])
    epochs = settings["train"]["epochs"]
    console.print(tables.trials_table(rows, metric, epochs))
    if ended := budget.read(place).get("ended"):
        console.print(f"The search ended: {ended}.")
    if confirming:
        again = tables.trials_table([row for _, row in confirming], metric, epochs)
        console.print("\nThe best, trained again from new seeds:", again)
    if ranking := read_ranking(place):
        console.print("", tables.ranking_table(ranking))


@app.command()
def evaluate(
    path: RunPath,
    top: Annotated[int | None, typer.Option(min=1, help="Trials that are scored.")] = None,
    images: Annotated[int | None, typer.Option(min=3, help="Images a trial.")] = None,
    weights: Annotated[Weights | None, typer.Option(help="raw: as trained, without the moving average.")] = None,
    sampler: Annotated[SamplerName | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    address: Address = "local",
) -> None:
    """The final stage alone, by default as it is configured: images that were drawn so already are kept."""
    from search import pipeline
    from search.prepare import preflight
    from search.runs import open_run

    settings, place, _ = open_run(path)
    draws = settings.final.sampler.model_copy(update=_given(name=sampler, steps=steps))
    final = settings.final.model_copy(update=_given(top=top, images=images, weights=weights, sampler=draws))
    splits = preflight(settings, console)
    try:
        pipeline.evaluate_again(settings, final, place, splits, address, console)
    except KeyboardInterrupt:
        print("\nInterrupted; images that were drawn are kept. The same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None


@app.command()
def rank(path: RunPath, as_json: Json = False) -> None:
    """The ranking, with confidence intervals and ties."""
    from search import tables
    from search.runs import read_ranking, read_run

    _, place, _ = read_run(path)
    ranking = read_ranking(place)
    if ranking is None:
        raise UserError(
            f"no ranking at {path}: draw and score the best trials' images with: ddpm-search evaluate {path}"
        )
    if as_json:
        print(json.dumps(ranking, indent=2))
    else:
        console.print(tables.ranking_table(ranking), tables.ranking_notes(ranking), sep="\n")


@app.command()
def report(path: RunPath) -> None:
    """Write the HTML report of a run anew."""
    from search import outcome

    outcome.report_again(path, console)


@app.command()
def export(
    path: RunPath,
    out: Annotated[Path, typer.Option(help="The folder to write.", callback=home)],
    trial: Annotated[str | None, typer.Option(help="The trial; default is the winner.")] = None,
    weights: Annotated[Weights | None, typer.Option(help="Default: those that were ranked.")] = None,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Write denoiser.pt2 too.")] = False,
) -> None:
    """A trial's model as a folder that diffusers loads."""
    from search import outcome

    outcome.export_again(path, trial, out, weights, torch_export, console)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An exported folder.", callback=home)],
    out: Annotated[Path, typer.Option(help="FILE.png (a grid), FILE.npz, or a folder of PNG files.", callback=home)],
    images: Annotated[int, typer.Option(min=1, help="Drawn up to 100 at a time.")] = 64,
    sampler: Annotated[SamplerName, typer.Option()] = "ddim",
    steps: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS - 1)] = 0,
) -> None:
    """Images from an export."""
    from search import verbs

    verbs.sample(folder, out, images, sampler, steps, seed, console)


@app.command()
def score(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="A folder of images, an .npz, or a Parquet file.", callback=home)
    ],
    extractor: Annotated[str, typer.Option(help="inception, or the folder of a stored classifier.")] = "inception",
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's weights; by default they are downloaded.", callback=home)
    ] = None,
    split_size: Annotated[int, typer.Option(min=2)] = 5000,
    as_json: Json = False,
) -> None:
    """Score images, or stored `logits` or `probabilities` (N, K) in an .npz, which need no extractor."""
    from search import verbs

    verbs.score(images, extractor, inception_weights, split_size, as_json, console)


@app.command()
def train(
    config: Config,
    set_: Set = None,
    out: Annotated[
        Path,
        typer.Option(help="Checkpoints and TensorBoard events; an earlier training there goes on.", callback=home),
    ] = Path("runs/train"),
) -> None:
    """One training without a search and without Ray."""
    from search import verbs

    verbs.train(load(config, set_), out, console)


def main() -> None:
    """Runs a command; a user's error is one message and exit status 2."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cache := os.environ.get("DDPM_SEARCH_CACHE"):  # workers have working directories of their own
        os.environ["DDPM_SEARCH_CACHE"] = str(Path(cache).expanduser().absolute())
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"ddpm-search: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        from cluster.connect import ConnectError

        if not isinstance(error, ConnectError | PermissionError) and "AWS Error" not in str(error):
            raise
        remedy = "" if isinstance(error, ConnectError) else "; give a place that can be read and written"
        print(f"ddpm-search: {error}{remedy}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
