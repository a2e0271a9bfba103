"""`ddpm-search schedule …`: a noise schedule as numbers or as a picture."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydantic import ValidationError
from rich.table import Table

from search.config import UserError
from search.options import Json, console, home
from search.space_config import KNOWN_POINTS, explain
from trainer import schedules
from trainer.config import ScheduleConfig

app = typer.Typer(no_args_is_help=True, help="A noise schedule as numbers or as a picture.")

Family = Annotated[str, typer.Option(help="linear, polynomial, cosine or sigmoid.")]
Start = Annotated[float, typer.Option()]
End = Annotated[float, typer.Option()]
Tau = Annotated[float, typer.Option()]
Steps = Annotated[int, typer.Option(help="T, the number of diffusion steps.")]


@app.command()
def show(family: Family, start: Start, end: End, tau: Tau = 1.0, steps: Steps = 1000, as_json: Json = False) -> None:
    """A schedule as numbers."""
    schedule = _schedule(family, start, end, tau, steps)
    numbers = _numbers(schedule)
    if as_json:
        print(json.dumps(numbers))
        return
    console.print(f"{schedule.label()}, T = {schedule.steps}")
    console.print(
        f"terminal SNR {numbers['terminal_snr']:.3g}, "
        f"prior KL {numbers['prior_kl_bits_per_dim']:.3g} bits per dimension"
    )
    console.print(f"screen: {numbers['screened'] or 'passes'}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step t", "beta", "alpha_bar", "log SNR"):
        table.add_column(name, justify="right")
    log_snr = schedules.log_snr(np.array(numbers["alpha_bar"]))
    for index in np.unique(np.linspace(0, schedule.steps - 1, 11).round().astype(int)):
        table.add_row(
            str(index + 1),
            f"{numbers['beta'][index]:.4g}",
            f"{numbers['alpha_bar'][index]:.4g}",
            f"{log_snr[index]:.2f}",
        )
    console.print(table)


@app.command()
def plot(
    family: Family,
    start: Start,
    end: End,
    out: Annotated[Path, typer.Option(callback=home)],
    tau: Tau = 1.0,
    steps: Steps = 1000,
) -> None:
    """A schedule as a picture."""
    from evaluation import pictures

    schedule = _schedule(family, start, end, tau, steps)
    with _written(out):
        pictures.plot_schedules([schedule], out)


@app.command()
def compare(
    named: Annotated[
        list[str] | None, typer.Argument(metavar="FAMILY:START:END[:TAU]…", help="Default: the original study's five.")
    ] = None,
    out: Annotated[Path, typer.Option(callback=home)] = Path("schedules.png"),
    steps: Steps = 1000,
) -> None:
    """Several schedules, and what they do to one image."""
    from sklearn.datasets import load_sample_image

    from evaluation import pictures

    with _written(out):
        if named:
            chosen = [_parsed(text, steps) for text in named]
        else:
            chosen = [_schedule(p.family, p.start, p.end, p.tau, steps) for p in KNOWN_POINTS]
        photo = load_sample_image("flower.jpg")[60:380:2, 160:480:2]  # embedded in scikit-learn
        pictures.plot_compare(chosen, photo, out)


@contextlib.contextmanager
def _written(out: Path) -> Iterator[None]:
    """Around what draws a picture into `out`. Raises UserError where that is no place for one."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, which is what is written, but is {out}")
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
    console.print(f"Written: {out}")


def _schedule(family: str, start: float, end: float, tau: float, steps: int) -> ScheduleConfig:
    """Raises UserError where the values break a law."""
    try:
        return ScheduleConfig.model_validate({"family": family, "start": start, "end": end, "tau": tau, "steps": steps})
    except ValidationError as error:
        raise UserError("; ".join(explain(e) for e in error.errors()[:3])) from None


def _parsed(text: str, steps: int) -> ScheduleConfig:
    family, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if not 2 <= len(values) <= 3:
        raise UserError(
            f"a schedule is FAMILY:START:END or FAMILY:START:END:TAU, such as cosine:0:1:1, but got {text!r}"
        )
    return _schedule(family, values[0], values[1], values[2] if len(values) == 3 else 1.0, steps)


def _numbers(schedule: ScheduleConfig) -> dict[str, Any]:
    """What `show --json` prints: beta and alpha_bar (T,), terminal_snr, prior_kl_bits_per_dim, screened."""
    betas = schedule.betas()
    alpha_bar = schedules.alpha_bar(betas)
    return schedule.model_dump() | {
        "terminal_snr": schedules.terminal_snr(alpha_bar[-1]),
        "prior_kl_bits_per_dim": schedules.prior_kl_bits_per_dim(alpha_bar[-1]),
        "screened": schedules.screen(**schedule.model_dump()),
        "beta": betas.tolist(),
        "alpha_bar": alpha_bar.tolist(),
    }
