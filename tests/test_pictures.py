"""Pictures: grids keep every pixel, schedules noise as eq. 4 says, and drawing never needs a display or torch."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import pictures, plots
from trainer.config import ScheduleConfig

SCHEDULES = [ScheduleConfig(), ScheduleConfig(family="cosine", start=0, end=1), ScheduleConfig(steps=7)]


def some_images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("columns", [None, 1, 3, 20])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_stands_in_the_grid_enlarged_by_a_whole_factor(columns: int | None, channels: int):
    images = some_images(7, 8, 8, channels)
    grid = pictures.image_grid(images, columns, min_pixels=20, gutter=2)  # 8 pixels x 3
    across = min(7, columns or 3)
    assert grid.shape == (-(-7 // across) * 26 - 2, across * 26 - 2, channels)
    for i, image in enumerate(images):
        top, left = i // across * 26, i % across * 26
        assert (grid[top : top + 24 : 3, left : left + 24 : 3] == image).all()
        assert (grid[top + 2 : top + 24 : 3, left + 1 : left + 24 : 3] == image).all()


def test_large_images_keep_their_size_and_a_grid_without_gutters_is_the_images_alone():
    images = some_images(4, 50, 60, 3)
    assert pictures.image_grid(images, 2, gutter=2).shape == (102, 122, 3)
    grid = pictures.image_grid(images, 2, gutter=0)
    assert (grid == np.block([[[images[0]], [images[1]]], [[images[2]], [images[3]]]])).all()


@pytest.mark.parametrize("images", [some_images(0, 8, 8, 1), some_images(2, 8, 8), some_images(2, 8, 8, 1) / 255])
def test_what_is_no_stack_of_uint8_images_is_refused(images: np.ndarray):
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, C\) uint8"):
        pictures.image_grid(images)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_saved_grid_reads_back_to_the_same_pixels(tmp_path: Path, channels: int, mode: str):
    images = some_images(5, 8, 8, channels)
    pictures.save_grid_png(tmp_path / "grid.png", images, columns=5)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == mode
        assert (np.asarray(picture).reshape(*picture.size[::-1], channels) == pictures.image_grid(images, 5)).all()


def test_first_curves_all_look_different_and_neighbours_differ_in_colour_and_dashes():
    styles = [plots.style(i) for i in range(28)]
    assert len(set(styles)) == 28
    for one, other in pairwise(styles):
        assert one[0] != other[0]
        assert one[1] != other[1]


def test_strip_starts_with_the_image_and_ends_with_the_same_noise_for_every_schedule():
    image = some_images(1, 8, 8, 3)[0]
    strips = [pictures.noised_strip(schedule, image) for schedule in SCHEDULES[:2]]
    for times, strip in strips:
        assert times.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
        assert (strip[0] == image).all()
    # At T linear keeps a signal of sqrt(4e-5) = 0.006, so at most about one grey level of it is left.
    assert np.abs(strips[0][1][-1].astype(int) - strips[1][1][-1].astype(int)).max() <= 2
    assert np.abs(strips[0][1][5].astype(int) - strips[1][1][5].astype(int)).max() > 20


def test_panels_hold_the_schedule_tables():
    alpha_bar, log_snr, beta = plots.schedule_panels([(SCHEDULES[2], 0)])
    assert alpha_bar.curves[0].x.tolist() == pytest.approx([i / 7 for i in range(1, 8)])
    assert alpha_bar.curves[0].y.tolist() == pytest.approx(np.cumprod(1 - beta.curves[0].y).tolist())
    signal = alpha_bar.curves[0].y
    assert log_snr.curves[0].y.tolist() == pytest.approx(np.log(signal / (1 - signal)).tolist())


@pytest.mark.slow
def test_plots_are_pictures_and_more_schedules_make_a_taller_one(tmp_path: Path):
    heights = []
    for count in (1, 3):
        pictures.plot_compare(SCHEDULES[:count], some_images(1, 8, 8, 1)[0], tmp_path / "compare.png")
        with Image.open(tmp_path / "compare.png") as picture:
            assert picture.format == "PNG"
            heights.append(picture.height)
    assert heights[0] < heights[1]
    pictures.plot_schedules(SCHEDULES, tmp_path / "new" / "plot")  # a PNG whatever the name
    with Image.open(tmp_path / "new" / "plot") as picture:
        assert picture.format == "PNG"


def test_nothing_to_draw_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one schedule"):
        pictures.plot_schedules([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="image must be"):
        pictures.plot_compare(SCHEDULES, some_images(1, 8, 8, 2)[0], tmp_path / "x.png")


def test_svg_of_one_panel_is_the_same_to_the_byte():
    panels = plots.schedule_panels([(SCHEDULES[0], 0), (SCHEDULES[1], None)])
    svg = plots.panel_svg(panels[0], "alpha_bar & co")
    assert svg == plots.panel_svg(panels[0], "alpha_bar & co")
    assert svg.startswith("<svg")
    assert "alpha_bar &amp; co" in svg
    assert plots.CONTEXT in svg


def test_importing_pictures_imports_neither_torch_nor_matplotlib():
    code = "import sys, evaluation.pictures; print([m for m in ('torch', 'matplotlib', 'PIL') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
