"""Pictures: grids of images, and noise schedules as curves. NumPy arrays in, a PNG file or an SVG element out.

Matplotlib and PIL are imported where something is drawn: importing this module costs nothing, and never torch.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from trainer import schedules
from trainer.config import ScheduleConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, distinct to every kind of colour vision; without yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.8), (1.2, 1.4), (6, 1.5, 1.2, 1.5))  # line lengths in line widths
CONTEXT = "#c4c4c4"  # curves that are only there to be compared with
GUTTER = 225  # light grey: shows the edge of white images and of black ones

MAX_POINTS = 256  # of a schedule's T that are drawn
LOG_SNR_SHOWN = 16.0  # nats; beyond it nothing is left to tell signal from noise, or noise from signal
STRIP_IMAGES = 11
WIDTH, LABEL_WIDTH = 13.0, 2.6  # inches, of a PNG and of what a strip is called
LEGEND_COLUMNS = 4


@dataclass(frozen=True)
class Curve:
    """One line of a panel: x and y (n,). `style` numbers its colour and dashes; None draws it as grey context.

    `end` marks the last point: "o" for a trial that was finished, "x" for one that was stopped there.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int | None
    end: str = ""


@dataclass(frozen=True)
class Panel:
    """Axes with their curves; `ylim` None fits them."""

    title: str
    xlabel: str
    ylabel: str
    curves: list[Curve]
    log_y: bool = False
    ylim: tuple[float, float] | None = None


def style(number: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of curve `number`: neighbours differ in both, and the first 28 are all different."""
    return COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]


def image_grid(images: np.ndarray, columns: int | None = None, min_pixels: int = 48, gutter: int = 2) -> np.ndarray:
    """Images side by side, row by row. images: (N, H, W, C) uint8, N >= 1. Returns (height, width, C) uint8.

    Small images are enlarged by a whole factor, nearest neighbour, until a side has `min_pixels`: a digit of 8 pixels
    is legible and its pixels stay its own. columns: None is as square as N allows. gutter: pixels between images.
    Raises ValueError for another shape or type, or columns < 1.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"images must be (N, H, W, C) uint8 with N >= 1, but are {images.shape} {images.dtype}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be >= 1, but got {columns=}")
    count, height, width, channels = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    scale = max(1, math.ceil(min_pixels / max(height, width)))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.full((rows * columns, height * scale + gutter, width * scale + gutter, channels), GUTTER, np.uint8)
    cells[:count, : height * scale, : width * scale] = images
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return grid.reshape(rows * cells.shape[1], columns * cells.shape[2], channels)[: -gutter or None, : -gutter or None]


def save_grid_png(path: Path | IO[bytes], images: np.ndarray, columns: int | None = None) -> None:
    """`image_grid` as a PNG file, of one channel or three. Raises as `image_grid`."""
    from PIL import Image

    grid = image_grid(images, columns)
    if grid.shape[-1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels to be a picture, but have {grid.shape[-1]}")
    Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(_ready(path), format="PNG", optimize=True)


def schedule_panels(configs: Iterable[tuple[ScheduleConfig, int | None]]) -> list[Panel]:
    """alpha_bar, log-SNR and beta over t/T, of schedules that each have a `Curve.style`."""
    curves: tuple[list[Curve], list[Curve], list[Curve]] = ([], [], [])
    for config, number in configs:
        betas = schedules.betas(**config.model_dump())
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

    with _look(base_size=11):
        figure = Figure(figsize=(4.6, 3.5), layout="constrained")
        _draw(figure.add_subplot(), panel)
        text = io.StringIO()
        # No date and a fixed salt: the same run gives the same page to the byte.
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": name})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", '<svg role="img"', 1)


def plot_schedules(configs: Sequence[ScheduleConfig], path: Path | IO[bytes]) -> None:
    """alpha_bar, log-SNR and beta of one or more schedules as a PNG. Raises ValueError for none."""
    _refuse_none(configs)
    from matplotlib.figure import Figure

    with _look():
        figure = Figure(figsize=(WIDTH, _curves_height(configs)), layout="constrained")
        _draw_schedules(figure, configs)
        figure.savefig(_ready(path), format="png", dpi=120)


def plot_compare(configs: Sequence[ScheduleConfig], image: np.ndarray, path: Path | IO[bytes]) -> None:
    """The curves of `plot_schedules`, and below them one image as each schedule noises it, as a PNG.

    image: (H, W, C) uint8, of one channel or three. All schedules add the same noise, at t/T = 0 (the image), 0.1 … 1.
    Raises ValueError for no schedule or another image.
    """
    _refuse_none(configs)
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype != np.uint8:
        raise ValueError(f"image must be (H, W, 1) or (H, W, 3) uint8, but is {image.shape} {image.dtype}")
    from matplotlib.figure import Figure

    image_width = (WIDTH - LABEL_WIDTH) / STRIP_IMAGES
    strips_height = 0.75 + len(configs) * (image_width * image.shape[0] / image.shape[1] + 0.04)
    curves_height = _curves_height(configs)
    with _look():
        figure = Figure(figsize=(WIDTH, curves_height + strips_height), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(curves_height, strips_height))[:, 0]
        _draw_schedules(above, configs)
        below.suptitle("One image, the same noise: what each schedule leaves of it at t/T", fontsize=11)
        axes = below.subplots(
            len(configs),
            STRIP_IMAGES + 1,
            squeeze=False,
            width_ratios=[LABEL_WIDTH] + [image_width] * STRIP_IMAGES,
            gridspec_kw={"wspace": 0.02, "hspace": 0.02},
        )
        for number, (config, row) in enumerate(zip(configs, axes, strict=True)):
            row[0].axis("off")
            colour, dashes = style(number)
            row[0].set(xlim=(0, 1), ylim=(0, 1))
            row[0].text(0.94, 0.46, config.label().replace("(", "\n("), ha="right", va="bottom")
            row[0].plot([0.55, 0.94], [0.36, 0.36], color=colour, dashes=dashes)
            for cell, time, noised in zip(row[1:], *noised_strip(config, image), strict=True):
                # Drawn in 0..255 as it is: matplotlib would stretch every image to its own darkest and brightest.
                cell.imshow(noised.squeeze(-1) if noised.shape[-1] == 1 else noised, cmap="gray", vmin=0, vmax=255)
                cell.set(xticks=[], yticks=[])
                if number == 0:
                    cell.set_title(f"{time:.1f}", fontsize=10)
        figure.savefig(_ready(path), format="png", dpi=120)


def noised_strip(config: ScheduleConfig, image: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps of one image, eps the same for every schedule.

    Returns t/T (11,) from 0, which is the image itself, to 1, and the images (H, W, C) uint8, cut at black and white.
    """
    alpha_bar = np.concatenate([[1.0], schedules.alpha_bar(schedules.betas(**config.model_dump()))])
    times = np.linspace(0, 1, STRIP_IMAGES)
    x_0 = image / 127.5 - 1
    eps = np.random.default_rng(0).standard_normal(image.shape)
    kept = alpha_bar[np.round(times * config.steps).astype(int)]
    noised = [np.sqrt(signal) * x_0 + np.sqrt(1 - signal) * eps for signal in kept]
    return times, [((x_t.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8) for x_t in noised]


def _ready(path: Path | IO[bytes]) -> Path | IO[bytes]:
    """The same, its folder made where it lacked."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _refuse_none(configs: Sequence[ScheduleConfig]) -> None:
    if not configs:
        raise ValueError("there must be at least one schedule to draw, but got none")


@contextmanager
def _look(base_size: int = 10) -> Iterator[None]:
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


def _draw(axes: "Axes", panel: Panel) -> None:
    # Context first, and below: it must never hide what is named.
    for curve in sorted(panel.curves, key=lambda curve: curve.style is not None):
        colour, dashes = (CONTEXT, ()) if curve.style is None else style(curve.style)
        options: dict[str, Any] = {"linewidth": 1.0} if curve.style is None else {"dashes": dashes}
        drawn = np.isfinite(curve.y) & ((curve.y > 0) | (not panel.log_y))
        (line,) = axes.plot(curve.x, np.where(drawn, curve.y, np.nan), color=colour, label=curve.label, **options)
        if curve.end and drawn.any():
            last = np.flatnonzero(drawn)[-1]
            axes.plot(curve.x[last], curve.y[last], curve.end, color=colour, markersize=6, zorder=line.get_zorder())
    if panel.log_y:
        axes.set_yscale("log")
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim)


def _draw_schedules(figure: "Figure | Any", configs: Sequence[ScheduleConfig]) -> None:
    """Three panels side by side on a figure or a part of one, with one legend below."""
    panels = schedule_panels((config, number) for number, config in enumerate(configs))
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _draw(axes, panel)
    columns = min(LEGEND_COLUMNS, len(configs))
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)


def _curves_height(configs: Sequence[ScheduleConfig]) -> float:
    """Inches that `_draw_schedules` needs."""
    return 4.2 + 0.26 * math.ceil(len(configs) / LEGEND_COLUMNS)
