"""`ddpm-search cluster …`: heavy imports wait until a verb needs them."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cluster.doctor import Finding
    from search.config import SearchConfig

app = typer.Typer(no_args_is_help=True, help="The cluster that trials run on.")
console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)

Address = Annotated[str, typer.Option(help="local starts a Ray here; auto or HOST:PORT joins one that runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting, a.b=value; a.b+=value appends to a list.")]
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@app.command("capacity")
def capacity_(
    workers: Annotated[int, typer.Option(min=1, help="Workers a trial.")] = 1, address: Address = "local"
) -> None:
    """How many trials the cluster holds at once."""
    from cluster import capacity, connect

    with connect.connected(address):
        cluster = capacity.read()
        what = "GPU" if cluster.use_gpu else "CPU"
        for index, slots in enumerate(cluster.slots()):
            console.print(f"node {index}: {slots} workers, one {what} each")
        console.print(f"{cluster.trials_at_once(workers)} trials of {workers} workers at once")


@app.command("doctor")
def doctor_(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Its data set and weights are looked for, too.")
    ] = None,
    set_: Set = None,
    storage: Annotated[str, typer.Option(help="The STORAGE of the runs to come.")] = "runs",
    address: Address = "local",
    as_json: Json = False,
) -> None:
    """Check every node before money is spent. Exit status 1 where a check fails."""
    from search.config import load
    from search.records import storage_at

    settings = load(config, set_ or []) if config else None
    place = storage_at(storage)

    from cluster import connect, doctor

    findings: list[Finding] = []
    # What this looks into is told as a row, not refused on the way in.
    with connect.connected(address, check_versions=False):
        for finding in (*_weights(settings), *doctor.examine(place, _probes(settings))):
            findings.append(finding)
            if not as_json:
                _show(finding)
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in STYLES}
    if as_json:
        print(json.dumps({"counts": counts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["fail"]:
        raise SystemExit(1)


def _show(finding: "Finding") -> None:
    style = STYLES[finding.verdict]
    console.print(
        f"[{style}]{finding.verdict}[/{style}]  {finding.check:<17} {finding.node:<24} {finding.found}", soft_wrap=True
    )
    if finding.remedy:
        console.print(f"      → {finding.remedy}", soft_wrap=True)


def _probes(settings: "SearchConfig | None") -> dict[str, tuple[Callable[[], str], str]]:
    if settings is None:
        return {}
    wanted = settings.train.data

    def look_at_data() -> str:
        from trainer import data

        splits = data.load(wanted)
        return f"{wanted.name}: {len(splits.train):,} training images of {splits.train.shape}"

    return {"data": (look_at_data, "put the data set at the same path of every node, or on a shared disk")}


def _weights(settings: "SearchConfig | None") -> "Iterator[Finding]":
    """Workers get the judge from the process that starts the search: its weights are needed here."""
    from cluster.doctor import Finding

    if settings is None or not settings.final.inception_weights:
        return
    from evaluation.extractors import Inception

    path = Path(settings.final.inception_weights).expanduser()
    try:
        Inception(path)
    except (OSError, ValueError) as error:
        yield Finding("weights", "this machine", "fail", str(error), "give final.inception_weights the right file")
    else:
        yield Finding("weights", "this machine", "pass", f"{path} is torch-fidelity's")
