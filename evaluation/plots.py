"""Plots: curves and points on axes with units, as an SVG element or on a matplotlib figure.

Matplotlib is imported where something is drawn: importing this module costs nothing, and never torch.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainer import schedules
from trainer.config import ScheduleConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008, distinct to every kind of colour vision; without yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.8), (1.2, 1.4), (6, 1.5, 1.2, 1.5))  # line lengths in line widths
CONTEXT = "#b0b0b0"  # what is only there to be compared with

MAX_POINTS = 200  # of a schedule's T that are drawn
LOG_SNR_SHOWN = 16.0  # nats; beyond it nothing is left to tell signal from noise, or noise from signal


@dataclass(frozen=True)
class Curve:
    """One line of a panel, or points without a line: x and y (n,).

    `style` numbers its colour and dashes; None draws it as grey context. `marker` is drawn at every point, `end` at
    the last: "o" for a trial that was finished, "x" for one that was stopped there. With `steps`, y holds from the x
    before (pre) or to the x after (post). A label that begins with _ stands in no legend.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int | None
    end: str = ""
    marker: str = ""
    line: bool = True
    steps: Literal["", "pre", "post"] = ""
    filled: bool = True


@dataclass(frozen=True)
class Panel:
    """Axes with their curves; `ylim` None fits them. `rungs` are x marked by a thin line, `names` of x = 0, 1, …"""

    title: str
    xlabel: str
    ylabel: str
    curves: list[Curve]
    log_x: bool = False
    log_y: bool = False
    ylim: tuple[float, float] | None = None
    rungs: Sequence[float] = ()
    names: Sequence[str] = ()
    legend: bool = False
    whole_x: bool = False


def style(number: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of curve `number`: neighbours differ in both, and the first 28 are all different."""
    return COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]


def schedule_panels(configs: Iterable[tuple[ScheduleConfig, int | None]]) -> list[Panel]:
    """alpha_bar, log-SNR and beta over t/T, of schedules that each have a `Curve.style`."""
    curves: tuple[list[Curve], list[Curve], list[Curve]] = ([], [], [])
    for config, number in configs:
        betas = config.betas()
        alpha_bar = schedules.alpha_bar(betas)
        shown = np.unique(np.linspace(0, config.steps - 1, MAX_POINTS).round().astype(int))
        x = (shown + 1) / config.steps
        for into, y in zip(curves, (alpha_bar, schedules.log_snr(alpha_bar), betas), strict=True):
            into.append(Curve(config.label(), x, y[shown], number))
    time = "diffusion time t/T"
    limit = (-LOG_SNR_SHOWN, LOG_SNR_SHOWN)
    return [
        Panel("Signal that is left", time, "signal variance alpha_bar", curves[0], ylim=(-0.02, 1.02)),
        Panel("Signal against noise", time, "log-SNR (nats)", curves[1], ylim=limit),
        Panel("Noise added by each step", time, "beta (log scale)", curves[2], log_y=True),
    ]


def panel_svg(panel: Panel, name: str) -> str:
    """One panel as an <svg> element that scales with the page; `name` is what a screen reader says it is."""
    from matplotlib.figure import Figure

    with look(base_size=11):
        figure = Figure(figsize=(4.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, panel)
        if panel.legend:
            lines, labels = axes.get_legend_handles_labels()
            figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
        text = io.StringIO()
        # No date and a fixed salt: the same run gives the same page to the byte.
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": name})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", '<svg role="img"', 1)


@contextmanager
def look(base_size: int = 10) -> Iterator[None]:
    """How all figures look, for the length of a with block."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": base_size,
        "axes.titlesize": base_size + 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#ebebeb",
        "axes.axisbelow": True,
        "lines.linewidth": 1.8,
        "lines.scale_dashes": True,
        "figure.constrained_layout.h_pad": 0.1,  # inches
        "figure.constrained_layout.w_pad": 0.1,
        "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and copied
        "svg.hashsalt": "ddpm-search",
    }
    with matplotlib.rc_context(settings):
        yield


def draw(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for epoch in panel.rungs:
        axes.axvline(epoch, color=CONTEXT, linewidth=0.8, dashes=(2, 2), zorder=0)
    # Context first, and below: it must never hide what is named.
    for curve in sorted(panel.curves, key=lambda curve: curve.style is not None):
        colour, dashes = (CONTEXT, ()) if curve.style is None else style(curve.style)
        options: dict[str, Any] = {"linewidth": 1.0} if curve.style is None else {"dashes": dashes}
        if not curve.line:
            options = {"linestyle": "none"}
        if not curve.filled:
            options["markerfacecolor"] = "white"
        if curve.steps:
            options["drawstyle"] = f"steps-{curve.steps}"
        drawn = np.isfinite(curve.y) & ((curve.y > 0) | (not panel.log_y))
        y = np.where(drawn, curve.y, np.nan)
        (line,) = axes.plot(
            curve.x, y, color=colour, label=curve.label, marker=curve.marker, markersize=6 - 2 * curve.line, **options
        )
        if curve.end and drawn.any():
            last = np.flatnonzero(drawn)[-1]
            axes.plot(curve.x[last], curve.y[last], curve.end, color=colour, markersize=6, zorder=line.get_zorder())
    if panel.log_x:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis, *axes.get_xlim())
    if panel.log_y:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, *axes.get_ylim())
    if panel.whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if panel.names:
        axes.set_xticks(range(len(panel.names)), panel.names)
        axes.set_xlim(-0.5, len(panel.names) - 0.5)
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim)


def _plain_numbers(axis: Any, low: float, high: float) -> None:
    """A log axis over less than two decades has few powers of ten to name: then plain numbers, as many as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if high / low < 100:
        fine = MaxNLocator(5, steps=[1, 2, 5, 10]) if high / low < 4 else LogLocator(subs=(1, 2, 3, 5))
        axis.set_major_locator(fine)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
