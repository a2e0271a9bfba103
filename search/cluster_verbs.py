"""`ddpm-search cluster …`: heavy imports wait until a verb needs them."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.text import Text

from evaluation.report_words import count
from search.config import SearchConfig, UserError
from search.config_file import load
from search.options import Address, Json, Name, Set, console

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from cluster.capacity import Capacity
    from cluster.doctor import Finding

app = typer.Typer(no_args_is_help=True, help="The cluster that trials run on.")
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@app.command("capacity")
def capacity_(
    workers: Annotated[int, typer.Option(min=1, help="Workers a trial.")] = 1, address: Address = "local"
) -> None:
    """How many trials the cluster holds at once."""
    from cluster import capacity, connect

    with connect.connected(address):
        console.print(*placement_lines(capacity.read(), workers), sep="\n")


def placement_lines(cluster: "Capacity", workers: int) -> list[str]:
    """Of each node and of all. Raises UserError where not one trial fits."""
    try:
        at_once = cluster.place(workers).at_once
    except ValueError as error:
        raise UserError(str(error)) from error
    nodes = [
        f"node {index}: {count(slots, 'worker')}, one {cluster.what} each"
        for index, slots in enumerate(cluster.slots())
    ]
    return [*nodes, f"{count(at_once, 'trial')} of {count(workers, 'worker')} at once"]


@app.command("doctor")
def doctor_(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="Its data set and weights are looked for, too.")
    ] = None,
    set_: Set = None,
    storage: Annotated[str, typer.Option(metavar="STORAGE", help="Where the runs to come will lie.")] = "runs",
    address: Address = "local",
    as_json: Json = False,
) -> None:
    """Check every node before money is spent. Exit status 1 where a check fails."""
    from search.runs import storage_at

    settings = load(config, set_) if config else None
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
    verdict = Text(finding.verdict, style=STYLES[finding.verdict])
    console.print(verdict, f" {finding.check:<17} {finding.node:<24} {finding.found}", soft_wrap=True)
    if finding.remedy:
        console.print(f"      → {finding.remedy}", soft_wrap=True)


def _probes(settings: SearchConfig | None) -> dict[str, tuple[Callable[[], str], str]]:
    if settings is None:
        return {}
    wanted = settings.train.data

    def look_at_data() -> str:
        from trainer import data

        splits = data.load(wanted)
        return f"{wanted.name}: {len(splits.train):,} training images of {splits.train.shape}"

    return {"data": (look_at_data, "put the data set at the same path of every node, or on a shared disk")}


def _weights(settings: SearchConfig | None) -> "Iterator[Finding]":
    """Workers get the extractor from the process that starts the search: its weights are needed here."""
    from cluster.doctor import Finding

    if settings is None or not settings.final.inception_weights:
        return
    from evaluation.inception import Inception

    path = Path(settings.final.inception_weights).expanduser()
    try:
        Inception(path)
    except (OSError, ValueError) as error:
        yield Finding("weights", "this machine", "fail", str(error), "give final.inception_weights the right file")
    else:
        yield Finding("weights", "this machine", "pass", f"{path} is torch-fidelity's")


Dashboard = Annotated[str, typer.Option(help="The head's dashboard, perhaps through an ssh tunnel.")]
HERE = "http://127.0.0.1:8265"


@app.command("submit")
def submit_(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name.")] = None,
    set_: Set = None,
    name: Name = None,
    storage: Annotated[
        str, typer.Option(metavar="STORAGE", help="A folder of every node, or s3://bucket/folder.")
    ] = "",
    resume: Annotated[str | None, typer.Option(metavar="PATH", help="Go on with the run there instead.")] = None,
    dashboard: Dashboard = HERE,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
) -> None:
    """Run a search as a Ray job, which goes on where this machine goes away. Prints its log to its end."""
    if (config is None) == (resume is None):
        raise UserError("cluster submit takes either CONFIG, or --resume PATH")
    if resume is not None and (set_ or name or storage):
        raise UserError("--resume goes on with a run as it is: leave --set, --name and --storage out")
    place = resume or storage
    if "://" not in place and not Path(place).is_absolute():
        raise UserError(
            f"a job runs on the cluster: {'--resume' if resume else '--storage'} must be an absolute folder there that "
            f"all nodes share, or an address such as s3://bucket/folder, but is {place!r}"
        )

    from cluster import submit

    jobs = submit.client(dashboard)
    with tempfile.TemporaryDirectory() as scratch:
        command = ["resume", place, "--address", "auto"]
        called = Path(place.partition("?")[0]).name
        if config is not None:
            settings = load(config, set_, name)
            called = settings.name
            Path(scratch, "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
            command = ["run", "config.yaml", "--name", called, "--storage", place, "--address", "auto"]
        job = submit.submit(jobs, command, Path(scratch), called)
    console.print(f"Job:    {job}")
    console.print(f"Status: {_again('status', job, dashboard)}")
    console.print(f"Log:    {_again('logs', job, dashboard)}")
    if not detach:
        _follow(jobs, job, dashboard)


@app.command("status")
def status_(
    job: Annotated[str, typer.Argument(metavar="JOB")], dashboard: Dashboard = HERE, as_json: Json = False
) -> None:
    """What became of a job. Exit status 1 where it failed."""
    from cluster import submit

    state = submit.state(submit.client(dashboard), job)
    print(json.dumps(state, indent=2) if as_json else f"{state['status']}: {state['message']}")
    if state["status"] == "FAILED":
        raise SystemExit(1)


@app.command("logs")
def logs_(job: Annotated[str, typer.Argument(metavar="JOB")], dashboard: Dashboard = HERE) -> None:
    """A job's log, followed to its end."""
    from cluster import submit

    jobs = submit.client(dashboard)
    submit.state(jobs, job)
    _follow(jobs, job, dashboard)


def _again(verb: str, job: str, dashboard: str) -> str:
    return shlex.join(("ddpm-search", "cluster", verb, job, "--dashboard", dashboard))


def _follow(jobs: "JobSubmissionClient", job: str, dashboard: str) -> None:
    from cluster import connect, submit

    def write(text: str) -> None:
        print(text, end="", flush=True)

    goes_on = f"the job goes on; see it again with: {_again('logs', job, dashboard)}"
    try:
        succeeded = submit.follow(jobs, job, write)
    except KeyboardInterrupt:
        print(f"\n{goes_on[0].upper()}{goes_on[1:]}", file=sys.stderr)
        raise
    except ConnectionError as error:
        raise connect.ConnectError(f"{error}; {goes_on}") from error
    if not succeeded:
        raise SystemExit(1)
