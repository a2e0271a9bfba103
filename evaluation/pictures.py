"""Pictures: grids of images, and what noise schedules do to one. NumPy arrays in, PNG files out.

Matplotlib and PIL are imported where something is drawn: importing this module costs nothing, and never torch.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from evaluation.plots import Panel, draw, look, schedule_panels, style
from trainer import schedules
from trainer.config import ScheduleConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUTTER = 225  # light grey: shows the edge of white images and of black ones
MAX_PNG = 100_000  # bytes of a picture in a page; a larger one becomes a JPEG
STRIP_IMAGES = 11
WIDTH, LABEL_WIDTH = 13.0, 2.6  # inches, of a PNG and of what a strip is called
LEGEND_COLUMNS = 4


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


def data_uri(picture: np.ndarray) -> str:
    """(H, W, C) uint8 of one channel or three, as an address that holds the picture itself.

    A PNG, or a JPEG where that would be large: noise does not compress.
    """
    from PIL import Image

    file, image = io.BytesIO(), Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    kind = "png"
    image.save(file, format="PNG", optimize=True)
    if len(file.getbuffer()) > MAX_PNG:
        kind, file = "jpeg", io.BytesIO()
        image.save(file, format="JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def plot_schedules(configs: Sequence[ScheduleConfig], path: Path | IO[bytes]) -> None:
    """alpha_bar, log-SNR and beta of one or more schedules as a PNG. Raises ValueError for none."""
    _refuse_none(configs)
    plot_panels(schedule_panels((config, number) for number, config in enumerate(configs)), path)


def plot_panels(panels: Sequence[Panel], path: Path | IO[bytes]) -> None:
    """Panels of the same curves side by side, as a PNG."""
    from matplotlib.figure import Figure

    with look():
        figure = Figure(figsize=(WIDTH, _curves_height(panels)), layout="constrained")
        _draw_panels(figure, panels)
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
    panels = schedule_panels((config, number) for number, config in enumerate(configs))
    curves_height = _curves_height(panels)
    with look():
        figure = Figure(figsize=(WIDTH, curves_height + strips_height), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(curves_height, strips_height))[:, 0]
        _draw_panels(above, panels)
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
    alpha_bar = np.concatenate([[1.0], schedules.alpha_bar(config.betas())])
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


def _draw_panels(figure: "Figure | Any", panels: Sequence[Panel]) -> None:
    """Side by side on a figure or a part of one, with one legend below."""
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axes, panel)
    lines, labels = axes.get_legend_handles_labels()
    columns = min(LEGEND_COLUMNS, len(labels))
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)


def _curves_height(panels: Sequence[Panel]) -> float:
    """Inches that `_draw_panels` needs."""
    return 4.2 + 0.26 * math.ceil(len(panels[0].curves) / LEGEND_COLUMNS)
