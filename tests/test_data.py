import hashlib
import io
import logging
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from trainer import data, data_cache, ingest
from trainer.config import DataConfig

CIFAR10_PARQUET = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    data.load.cache_clear()
    return tmp_path / "cache"


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def folder_of(path: Path, images: int = 20, classes: int = 2, size: int = 8) -> Path:
    """Noise images in sub-folders a, b, …: all different."""
    for i in range(images):
        save(path / "abcdefgh"[i % classes] / f"{i:04d}.png", noise(i, size, size, 3))
    return path


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def parquet_of(path: Path, images: list[bytes | None], labels: list | None, image: str = "img", rows: int = 7) -> Path:
    """The Hugging Face layout, in row groups of 7."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(
        [{"bytes": content, "path": None} for content in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({image: column} | ({} if labels is None else {"label": labels}))
    pq.write_table(table, path, row_group_size=rows)
    return path


def everything(splits: data.Splits) -> np.ndarray:
    return np.concatenate([splits.train.pixels, splits.held_out.pixels, splits.rest.pixels])


def fingerprints(images: data.Images) -> list[bytes]:
    return [row.tobytes() for row in images.pixels]


def refusal(**settings) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        data.load(DataConfig(**settings))
    return str(caught.value)


# Splitting


@pytest.mark.parametrize("seed", range(8))
def test_stratified_split_keeps_each_class_share_within_one_image(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 120))
    labels = rng.choice(classes, size=1000, p=rng.dirichlet(np.full(classes, 0.3)))
    for count in (1, 37, 500, 803, 999):
        chosen, others = data.split(labels, 1000, count, seed)
        assert len(chosen) == count
        np.testing.assert_array_equal(np.sort(np.concatenate([chosen, others])), np.arange(1000))
        share = np.bincount(labels, minlength=classes) * count / 1000
        more = np.bincount(labels[chosen], minlength=classes) - share
        assert more.max() < 1
        scarce = (share > 0) & (share < 1)  # large classes may give up one for each of these: see the next test
        assert more.min() > -1 - (scarce.sum() if (share > 0).sum() <= count else 0)


def test_every_class_is_among_the_chosen_where_there_are_enough():
    labels = np.repeat(np.arange(12), [20, 20, *[1] * 10])
    for seed in range(8):
        for count in (12, 30, 40, 49):
            of_each = np.bincount(labels[data.split(labels, 50, count, seed)[0]], minlength=12)
            assert of_each.min() == 1
            assert abs(of_each[0] - of_each[1]) <= 1
    assert np.bincount(labels[data.split(labels, 50, 11, 0)[0]], minlength=12).sum() == 11


def test_a_class_of_one_image_is_trained_on(tmp_path):
    for i in range(30):
        save(tmp_path / ("many" if i < 20 else f"one-{i}") / f"{i}.png", noise(i, 8, 8))
    splits = data.load(DataConfig(name=f"folder:{tmp_path}", subset=25))
    assert len(splits.train) == 20
    assert set(splits.train.labels) == set(range(11))


def test_split_without_labels_has_the_asked_for_size_and_depends_on_the_seed():
    chosen, others = data.split(None, 100, 80, seed=0)
    assert len(chosen) == 80
    np.testing.assert_array_equal(np.sort(np.concatenate([chosen, others])), np.arange(100))
    assert chosen.tolist() != data.split(None, 100, 80, seed=1)[0].tolist()


def test_equal_remainders_are_drawn_by_seed_not_by_class_order():
    labels = np.repeat(np.arange(10), 2)
    extra = {tuple(np.bincount(labels[data.split(labels, 20, 15, seed)[0]])) for seed in range(20)}
    assert len(extra) > 5


def test_held_out_images_are_in_neither_train_nor_rest():
    splits = data.load(DataConfig(subset=300))
    total = len(splits.train) + len(splits.held_out) + len(splits.rest)
    assert (len(splits.train), len(splits.held_out), total) == (240, 60, 1797)
    from sklearn.datasets import load_digits

    whole = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    # Together they are the data set, image by image: so no image is in two of them.
    assert sorted(row.tobytes() for row in everything(splits)) == sorted(row.tobytes() for row in whole)


def test_one_seed_gives_one_split_and_another_seed_another():
    first, again = data.load(DataConfig(seed=3)), data.load.__wrapped__(DataConfig(seed=3))
    np.testing.assert_array_equal(first.train.pixels, again.train.pixels)
    np.testing.assert_array_equal(first.held_out.labels, again.held_out.labels)
    assert fingerprints(first.train) != fingerprints(data.load(DataConfig(seed=4)).train)


def test_without_a_subset_rest_is_empty_and_has_the_shape_of_the_others():
    splits = data.load(DataConfig())
    assert splits.rest.pixels.shape == (0, 8, 8, 1)
    assert splits.rest.labels is not None
    assert splits.rest.labels.shape == (0,)


def test_labels_can_be_left_unused():
    splits = data.load(DataConfig(labels=False, subset=100))
    assert splits.train.labels is splits.held_out.labels is splits.rest.labels is None


# Batches


def test_every_epoch_takes_every_image_once_in_an_order_of_its_own():
    index = torch.cat([data.batch_indices(5, step, 30, 4) for step in range(15)]).numpy()
    first, second = index[:30], index[30:]
    np.testing.assert_array_equal(np.sort(first), np.arange(30))
    np.testing.assert_array_equal(np.sort(second), np.arange(30))
    assert first.tolist() != second.tolist()


def test_batch_reaches_into_the_next_epochs_permutation():
    first, second = (np.random.default_rng([3, epoch]).permutation(10).tolist() for epoch in (0, 1))
    assert data.batch_indices(3, 2, 10, 4).tolist() == first[8:] + second[:2]


# The cache


def test_images_are_mapped_from_the_cache_read_only(cache):
    pixels = data.load(DataConfig()).train.pixels
    assert isinstance(pixels, np.ndarray)
    assert not pixels.flags.writeable
    mapped = Path("/proc/self/maps").read_text()
    assert any(str(cache) in line and line.rstrip().endswith("/train.npy") for line in mapped.splitlines())


def test_mapped_images_become_tensors_without_a_copy_or_a_warning(recwarn):
    pixels = data.load(DataConfig()).train.pixels
    assert torch.from_numpy(pixels).data_ptr() == pixels.ctypes.data
    assert [str(warning.message) for warning in recwarn] == []


def test_cached_digits_need_neither_sklearn_nor_torch():
    data.prepare(DataConfig())
    code = (
        "import sys; from trainer import data, config; print(len(data.load(config.DataConfig()).train)); "
        "print({'torch', 'sklearn', 'torchvision', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["1438", "set()"]


def test_key_says_which_images_wherever_they_lie(tmp_path):
    key = {}
    for place, images in (("one", 20), ("two", 20), ("other", 21)):
        folder = folder_of(tmp_path / place, images)
        key[place] = data.load(DataConfig(name=f"folder:{folder}", subset=10)).key()
    assert key["one"] == key["two"] != key["other"]


def test_key_depends_on_split_and_scale_but_not_on_flips_or_the_place():
    def key(**settings):
        return data.load(DataConfig(**settings)).key()

    assert key() == key(horizontal_flip=True) == key(root="/nowhere")
    assert (
        len({key(), key(seed=1), key(train_fraction=0.7), key(image_size=16), key(subset=400), key(labels=False)}) == 6
    )


def test_changed_file_is_decoded_again(tmp_path):
    config = DataConfig(name=f"folder:{folder_of(tmp_path / 'images')}")
    before = data.load(config)
    save(tmp_path / "images" / "a" / "0000.png", noise(99, 8, 8, 3))
    after = data.load.__wrapped__(config)
    assert after.key() != before.key()
    assert noise(99, 8, 8, 3).tobytes() in fingerprints(after.train) + fingerprints(after.held_out)


def test_rest_is_refused_where_files_changed_since_the_split_was_made(tmp_path):
    splits = data.load(DataConfig(name=f"folder:{folder_of(tmp_path)}", subset=10))
    save(tmp_path / "a" / "new.png", noise(99, 8, 8, 3))
    with pytest.raises(ValueError, match="changed while they were in use"):
        _ = splits.rest


def test_unchanged_files_are_decoded_once(tmp_path, monkeypatch):
    config = DataConfig(name=f"folder:{folder_of(tmp_path / 'images')}", subset=10)
    splits = data.load(config)
    assert len(splits.rest) == 10
    monkeypatch.setattr(ingest, "decode", None)
    again = data.load.__wrapped__(config)
    np.testing.assert_array_equal(everything(again), everything(splits))


def test_subset_decodes_only_its_own_images_and_rest_when_asked(tmp_path, monkeypatch):
    decoded = count_decodes(monkeypatch)
    splits = data.load(DataConfig(name=f"folder:{folder_of(tmp_path, 30)}", subset=10))
    splits.key()
    assert len(decoded) == 10
    assert len(splits.rest) == len(splits.rest) == 20
    assert len(decoded) == 30
    assert len(set(decoded)) == 30


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list:
    decoded, decode = [], ingest.decode

    def counted(item, *rest):
        decoded.append(item)
        return decode(item, *rest)

    monkeypatch.setattr(ingest, "decode", counted)
    return decoded


def test_progress_counts_every_image_of_train_and_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "DECODED_AT_ONCE", 8)
    seen: list[tuple[int, int]] = []
    data.prepare(DataConfig(name=f"folder:{folder_of(tmp_path, 20)}"), lambda done, total: seen.append((done, total)))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def child(code: str, **options) -> subprocess.Popen[str]:
    lines = "import logging, os, sys; logging.basicConfig(level='INFO'); from trainer import data, config\n" + code
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", lines], **pipes, **options)


def test_processes_that_start_at_once_decode_once_and_agree(tmp_path, cache):
    config = DataConfig(name=f"folder:{folder_of(tmp_path / 'images')}")
    name = data._entry_name(config, data._find(config))
    code = f"print('ready', flush=True)\nprint(data.load(config.DataConfig(name={config.name!r})).key())"
    with data_cache.locked(cache / "images" / f".{name}.lock") as alone:
        assert alone
        workers = [child(code) for _ in range(3)]
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
        # All three wait for the lock, or will.
    ends = [worker.communicate(timeout=60) for worker in workers]
    assert len({out for out, _ in ends}) == 1
    assert sum(err.count("decoding") for _, err in ends) == 1, ends


def test_without_locks_the_first_to_finish_is_what_all_get(monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(data_cache.fcntl, "flock", refuse)

    def make(value: int) -> Callable:
        def write(folder: Path) -> dict:
            if value == 1:
                data_cache.entry("e", make(2))  # another process is first
            np.save(folder / "a.npy", np.full(3, value))
            return {"arrays": ["a"], "by": value}

        return write

    meta, arrays = data_cache.entry("e", make(1))
    assert (meta["by"], arrays["a"].tolist()) == (2, [2, 2, 2])


def test_decoding_that_was_killed_is_done_again(tmp_path, cache):
    folder = folder_of(tmp_path / "images")
    killed = child(
        f"data.prepare(config.DataConfig(name='folder:{folder}'), lambda done, total: os.kill(os.getpid(), 9))"
    )
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list(cache.glob("images/.making-*"))
    assert len(data.load(DataConfig(name=f"folder:{folder}")).train) == 16
    assert not list(cache.glob("images/.making-*"))


@pytest.mark.parametrize("damage", ["cut", "empty", "no meta", "cut meta", "meta of nothing", "no labels"])
def test_damaged_entry_is_made_again(damage, cache, caplog):
    whole = data.load(DataConfig())
    kept, key = whole.train.pixels.copy(), whole.key()
    (entry,) = cache.glob("images/[!.]*")
    if damage == "cut":
        os.truncate(entry / "train.npy", 1000)
    elif damage == "empty":
        os.truncate(entry / "train-labels.npy", 0)
    elif damage == "meta of nothing":
        (entry / "meta.json").write_text("{}")
    elif damage == "no labels":
        (entry / "train-labels.npy").unlink()
    elif damage == "no meta":
        (entry / "meta.json").unlink()
    else:
        os.truncate(entry / "meta.json", 10)
    again = data.load.__wrapped__(DataConfig())
    np.testing.assert_array_equal(again.train.pixels, kept)
    assert again.key() == key
    assert "damaged" in caplog.text


def test_failed_decoding_leaves_nothing_behind(tmp_path, cache):
    (folder_of(tmp_path / "images") / "a" / "bad.png").write_bytes(b"not an image")
    refusal(name=f"folder:{tmp_path / 'images'}")
    assert [path.name for path in cache.glob("images/*") if not path.name.endswith(".lock")] == []


def test_cache_that_cannot_be_written_is_refused_with_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "file"))
    assert "DDPM_SEARCH_CACHE" in refusal()


def test_full_disk_is_refused_before_it_is_full(monkeypatch):
    monkeypatch.setattr(ingest.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "DDPM_SEARCH_CACHE" in refusal()


def memory_grown_by_decoding_mb(folder: Path, images: int) -> float:
    """Of a process of its own, over `images` images in one row group, each 50 kB encoded and 49 kB decoded."""
    junk = np.random.default_rng(0)  # after a PNG's end; Parquet could otherwise store equal images as one
    flat = [encoded(np.full((128, 128, 3), i, np.uint8)) for i in range(256)]
    contents = [flat[i % 256] + junk.bytes(50_000) for i in range(images)]
    parquet = parquet_of(folder / f"{images}.parquet", contents, None, rows=images)
    code = (
        # VmHWM: unlike ru_maxrss it does not begin with the parent's
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "import PIL.Image, pyarrow.parquet; before = peak()\n"
        f"data.load(config.DataConfig(name='parquet:{parquet}')); print((peak() - before) / 1024)"
    )
    out, err = child(code).communicate(timeout=120)
    assert out, err
    return float(out)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    # 3,000 more are 150 MB encoded and 147 MB decoded.
    assert memory_grown_by_decoding_mb(tmp_path, 6000) < memory_grown_by_decoding_mb(tmp_path, 3000) + 50


# Images of every kind, in folders


def only(tmp_path: Path, **settings) -> np.ndarray:
    """The one image in tmp_path, twice there so that it can be split."""
    return data.load(DataConfig(name=f"folder:{tmp_path}", train_fraction=0.5, **settings)).train.pixels[0]


def twice(tmp_path: Path, image: np.ndarray | Image.Image, suffix: str = ".png", **options) -> Path:
    for name in "ab":
        save(tmp_path / f"{name}{suffix}", image, **options)
    return tmp_path


def test_grey_images_have_one_channel_and_rgb_three(tmp_path):
    grey, colour = noise(0, 8, 8), noise(1, 8, 8, 3)
    np.testing.assert_array_equal(only(twice(tmp_path / "g", grey)), grey[..., None])
    np.testing.assert_array_equal(only(twice(tmp_path / "c", colour)), colour)


def test_grey_among_rgb_becomes_rgb(tmp_path):
    save(tmp_path / "a.png", noise(0, 8, 8))
    save(tmp_path / "b.png", noise(1, 8, 8, 3))
    splits = data.load(DataConfig(name=f"folder:{tmp_path}", train_fraction=0.5))
    grey = np.repeat(noise(0, 8, 8)[..., None], 3, axis=2)
    assert sorted(row.tobytes() for row in everything(splits)) == sorted([grey.tobytes(), noise(1, 8, 8, 3).tobytes()])


def test_rgb_long_after_grey_is_refused_instead_of_losing_its_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "DECODED_AT_ONCE", 2)
    twice(tmp_path, noise(0, 8, 8))
    save(tmp_path / "z.png", noise(1, 8, 8, 3))
    message = refusal(name=f"folder:{tmp_path}")
    assert "data.channels must be given" in message
    assert "z.png" in message
    for channels in (1, 3):
        assert data.load(DataConfig(name=f"folder:{tmp_path}", channels=channels)).train.shape == (channels, 8, 8)


def test_palette_image_gets_its_colours(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert only(twice(tmp_path, palette))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize("step", [1000, 65])  # a camera's 12 bits reach to 4,095: dark, and nothing is clipped
def test_sixteen_bits_keep_their_upper_eight(tmp_path, step):
    deep = (np.arange(64, dtype=np.uint16) * step).reshape(8, 8)
    np.testing.assert_array_equal(only(twice(tmp_path, deep))[..., 0], (deep >> 8).astype(np.uint8))


def test_eight_bits_stored_in_thirty_two_are_refused_instead_of_becoming_black(tmp_path):
    shallow = Image.fromarray((np.arange(64, dtype=np.int32) * 4).reshape(8, 8))
    assert shallow.mode == "I"
    message = refusal(name=f"folder:{twice(tmp_path / 'shallow', shallow, '.tif')}", train_fraction=0.5)
    assert "a.tif (its pixels reach from 0 to 252; store it with 8 or 16 bits)" in message
    sixteen = (np.arange(64, dtype=np.uint16) * 4).reshape(8, 8)
    message = refusal(name=f"folder:{twice(tmp_path / 'sixteen', sixteen)}", train_fraction=0.5)
    assert "a.png (its pixels reach from 0 to 252; store it with 8 or 16 bits)" in message
    black = Image.fromarray(np.zeros((8, 8), np.int32))
    assert only(twice(tmp_path / "black", black, ".tif")).max() == 0


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.dstack([noise(0, 8, 8, 3), np.full((8, 8), 255, np.uint8)])
    rgba[:4, :, 3] = 0
    pixels = only(twice(tmp_path / "rgba", Image.fromarray(rgba)))
    assert (pixels[:4] == 255).all()
    np.testing.assert_array_equal(pixels[4:], rgba[4:, :, :3])
    grey_alpha = Image.fromarray(np.stack([rgba[..., 0], rgba[..., 3]], axis=-1), "LA")
    pixels = only(twice(tmp_path / "la", grey_alpha))
    assert pixels.shape == (8, 8, 1)
    assert (pixels[:4] == 255).all()


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are none
def test_image_is_turned_as_its_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(0, 6, 8, 3)
    folder = twice(tmp_path, pixels, exif=exif)
    with Image.open(folder / "a.png") as file:
        np.testing.assert_array_equal(only(folder), np.asarray(ImageOps.exif_transpose(file)))


def test_a_turned_photograph_may_have_tags_that_pillow_cannot_write(tmp_path):
    turned = struct.pack(">HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)
    software = struct.pack(">HHIf", ExifTags.Base.Software, 11, 1, 1.5)  # a number, where a text belongs
    exif = b"Exif\x00\x00MM\x00*" + struct.pack(">IH", 8, 2) + turned + software + bytes(4)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    folder = twice(tmp_path, pixels, ".jpg", exif=exif)
    with Image.open(folder / "a.jpg") as file, pytest.raises(AttributeError):
        ImageOps.exif_transpose(file)
    assert np.abs(only(folder).astype(int) - np.rot90(pixels, -1)).max() < 8


def test_non_square_images_keep_their_shape_or_are_cut_at_the_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    folder = twice(tmp_path, wide)
    np.testing.assert_array_equal(only(folder), wide)
    assert (only(folder, image_size=8) == 200).all()
    assert only(folder, image_size=4).min() > 180  # Lanczos looks a little beyond the cut


def test_image_size_scales_down_and_up(tmp_path):
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[16:] = 240
    folder = twice(tmp_path, halves, ".jpg", quality=95)
    for size in (8, 64):
        pixels = only(folder, image_size=size)
        assert pixels.shape == (size, size, 3)
        assert pixels[: size // 4].mean() < 5
        assert abs(pixels[-size // 4 :].mean() - 240) < 5
    assert data.load(DataConfig(image_size=16)).train.shape == (1, 16, 16)


def test_images_of_several_sizes_are_refused_without_image_size(tmp_path):
    save(tmp_path / "a.png", noise(0, 8, 8, 3))
    save(tmp_path / "b.png", noise(0, 6, 10, 3))
    message = refusal(name=f"folder:{tmp_path}", train_fraction=0.5)
    assert "data.image_size must be given" in message
    assert "b.png is 10x6" in message
    assert data.load(DataConfig(name=f"folder:{tmp_path}", image_size=4, train_fraction=0.5)).train.shape == (3, 4, 4)


def test_labels_are_the_first_sub_folders_in_order_of_name(tmp_path):
    for i, place in enumerate(("cat", "cat/indoors", "ant", "bee/1/2")):
        for j in range(5):
            save(tmp_path / place / f"{j}.JPG", np.full((8, 8, 3), 10 * i, np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.jpg").write_text("what macOS leaves")
    splits = data.load(DataConfig(name=f"folder:{tmp_path}", train_fraction=0.5))
    for images in (splits.train, splits.held_out):
        assert images.labels.tolist() == [{0: 2, 10: 2, 20: 0, 30: 1}[round(row.mean(), -1)] for row in images.pixels]


def test_images_that_links_lead_to_are_read_once(tmp_path):
    folder, outside = folder_of(tmp_path / "images"), folder_of(tmp_path / "outside", 10)
    (folder / "a" / "again").symlink_to(folder / "a")
    (folder / "a" / "above").symlink_to(folder)
    (folder / "a" / "beside").symlink_to(folder / "b")
    (folder / "c").symlink_to(outside)
    (folder / "d").symlink_to(outside)
    splits = data.load(DataConfig(name=f"folder:{folder}"))
    assert len(everything(splits)) == 30
    assert np.bincount(np.concatenate([splits.train.labels, splits.held_out.labels])).tolist() == [10, 10, 10]


def test_a_sub_folder_that_cannot_be_listed_is_named_instead_of_left_out(tmp_path):
    # Any path is too long somewhere: a permission that is not there would stop everyone but root.
    folder = folder_of(tmp_path)
    opened = os.open(folder / "a", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("z" * 250, dir_fd=opened)
        below = os.open("z" * 250, os.O_RDONLY, dir_fd=opened)
        os.close(opened)
        opened = below
    os.close(opened)
    message = refusal(name=f"folder:{folder}")
    assert f"data.name: {folder}/a/zzz" in message
    assert "cannot be listed (File name too long)" in message


@pytest.mark.parametrize("places", [("",), ("only",), ("", "a", "b")])
def test_images_that_are_not_all_in_several_sub_folders_have_no_labels(tmp_path, places):
    for place in places:
        twice(tmp_path / place, noise(0, 8, 8))
    assert data.load(DataConfig(name=f"folder:{tmp_path}", train_fraction=0.5)).train.labels is None


# Broken images


def broken_folder(tmp_path: Path) -> Path:
    folder = folder_of(tmp_path / "images", 20)
    whole = (folder / "a" / "0000.png").read_bytes()
    (folder / "a" / "0000.png").write_bytes(whole[: len(whole) // 2])
    for name in ("x", "y"):
        (folder / "b" / f"{name}.png").write_bytes(b"")
    (folder / "b" / "z.jpg").write_bytes(b"<html>not found</html>")
    return folder


def test_broken_images_are_named_and_counted(tmp_path):
    message = refusal(name=f"folder:{broken_folder(tmp_path)}")
    assert message.startswith("4 of 23 images cannot be read")
    assert "a/0000.png" in message
    assert "b/x.png" in message
    assert "data.skip_broken" in message
    assert "z.jpg" not in message  # the first few


def test_skip_broken_leaves_them_out_and_says_so_once(tmp_path, caplog):
    config = DataConfig(name=f"folder:{broken_folder(tmp_path)}", skip_broken=True)
    with caplog.at_level(logging.WARNING):
        splits = data.load(config)
        data.load.__wrapped__(config)
    assert len(splits.train) + len(splits.held_out) == 19
    assert len(splits.train.labels) == len(splits.train)
    assert caplog.text.count("4 of 23 images cannot be read and are left out") == 1
    expected = {noise(i, 8, 8, 3).tobytes(): i % 2 for i in range(1, 20)}
    for images in (splits.train, splits.held_out):
        assert [expected[row] for row in fingerprints(images)] == images.labels.tolist()


def test_broken_parquet_row_is_named_by_file_and_row(tmp_path):
    images = [encoded(noise(i, 8, 8, 3)) for i in range(20)]
    parquet_of(tmp_path / "p" / "0.parquet", images[:10], None)
    parquet_of(tmp_path / "p" / "1.parquet", [*images[10:13], b"?", None, *images[15:]], None)
    message = refusal(name=f"parquet:{tmp_path / 'p'}")
    assert "2 of 20" in message
    assert "row 3 of" in message
    assert "row 4 of" in message
    assert "1.parquet" in message


def test_a_link_to_nothing_is_a_broken_file(tmp_path):
    folder = folder_of(tmp_path / "images")
    (folder / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = refusal(name=f"folder:{folder}")
    assert "1 of 21 images cannot be read" in message
    assert "gone.png" in message
    splits = data.load(DataConfig(name=f"folder:{folder}", skip_broken=True))
    assert len(splits.train) + len(splits.held_out) == 20


# Parquet


def test_a_damaged_page_is_named_by_its_file_and_row_group(tmp_path):
    path = parquet_of(tmp_path / "b.parquet", [encoded(noise(i, 8, 8, 3)) for i in range(21)], None)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(group.data_page_offset)
        file.write(b"\xff" * 100)
    parquet_of(tmp_path / "a.parquet", [encoded(noise(i, 8, 8, 3)) for i in range(21)], None)
    for skip_broken in (False, True):
        message = refusal(name=f"parquet:{tmp_path}", skip_broken=skip_broken)
        assert f"data.name: row group 1 of {path} cannot be read" in message
        assert "make the file again" in message


def test_a_damaged_page_of_labels_is_named_by_its_file(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", [encoded(noise(i, 8, 8, 3)) for i in range(21)], list(range(21)))
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    with path.open("r+b") as file:
        file.seek(column.dictionary_page_offset)
        file.write(b"\xff" * 40)
    assert f"data.name: {path} is no Parquet file" in refusal(name=f"parquet:{tmp_path}")


def test_labels_that_are_numbers_in_one_file_and_names_in_another_are_refused(tmp_path):
    images = [encoded(noise(i, 8, 8)) for i in range(4)]
    parquet_of(tmp_path / "a.parquet", images, [0, 1, 0, 1])
    parquet_of(tmp_path / "b.parquet", images, ["ant", "bee"] * 2)
    message = refusal(name=f"parquet:{tmp_path}")
    assert "data.label_column='label'" in message
    assert "int64" in message
    assert "string" in message
    assert "data.labels to false" in message
    assert len(data.load(DataConfig(name=f"parquet:{tmp_path}", labels=False)).train) == 6


def test_hidden_parquet_files_are_no_data(tmp_path):
    path = parquet_of(tmp_path / "0.parquet", [encoded(noise(i, 8, 8)) for i in range(5)], None)
    (tmp_path / "._0.parquet").write_bytes(b"what macOS leaves")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "0.parquet").write_bytes(path.read_bytes())
    assert len(data.load(DataConfig(name=f"parquet:{tmp_path}")).train) == 4


def test_parquet_files_that_links_lead_to_are_read_once(tmp_path):
    for number, place in enumerate(("data", "elsewhere")):
        images = [encoded(noise(10 * number + i, 8, 8)) for i in range(5)]
        parquet_of(tmp_path / place / f"{number}.parquet", images, None)
    for name in ("linked", "again"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    splits = data.load(DataConfig(name=f"parquet:{tmp_path}/data"))
    assert len(splits.train) + len(splits.held_out) == 10


@pytest.mark.parametrize("image", ["img", "image"])
def test_parquet_files_of_a_folder_are_one_data_set(tmp_path, image):
    for number in range(3):
        images = [encoded(noise(100 * number + i, 8, 8, 3)) for i in range(10)]
        parquet_of(tmp_path / "data" / f"train-{number}.parquet", images, [i % 2 for i in range(10)], image)
    expected = {noise(100 * n + i, 8, 8, 3).tobytes(): i % 2 for n in range(3) for i in range(10)}
    splits = data.load(DataConfig(name=f"parquet:{tmp_path}", subset=20))
    for images, count in ((splits.train, 16), (splits.held_out, 4), (splits.rest, 10)):
        assert len(images) == count
        assert [expected.pop(row) for row in fingerprints(images)] == images.labels.tolist()
    assert not expected


def test_parquet_pattern_chooses_files(tmp_path):
    for name, count in (("train-0", 10), ("train-1", 10), ("test-0", 5)):
        parquet_of(tmp_path / f"{name}.parquet", [encoded(noise(i, 8, 8)) for i in range(count)], None)
    splits = data.load(DataConfig(name=f"parquet:{tmp_path}/train-*.parquet"))
    assert len(splits.train) + len(splits.held_out) == 20


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (("test-0.parquet", "train-0.parquet", "extra.parquet"), "train-*.parquet"),
        (("data/train-0.parquet", "data/validation-0.parquet"), "data/train-*.parquet"),
        (("Test.parquet", "Val.parquet"), "Test*.parquet"),
        (("default/test/0.parquet", "default/train/0.parquet"), "default/train/*.parquet"),
    ],
)
def test_parquet_files_of_differing_splits_are_refused_with_a_pattern_for_one(tmp_path, files, pattern):
    """The published test split must not be trained on unseen."""
    for name in files:
        parquet_of(tmp_path / name, [encoded(noise(i, 8, 8)) for i in range(5)], None)
    for name in (f"parquet:{tmp_path}", f"parquet:{tmp_path}/**/*.parquet"):
        message = refusal(name=name)
        assert "data.name" in message
        assert "splits" in message
        assert f"parquet:{tmp_path}/{pattern}," in message
    assert len(data.load(DataConfig(name=f"parquet:{tmp_path}/{pattern}")).train) == 4


def test_parquet_of_plain_bytes_with_names_as_labels_and_columns_of_other_names(tmp_path):
    table = pa.table({"picture": [encoded(noise(i, 8, 8)) for i in range(6)], "kind": ["cat", "ant"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    settings = {"name": f"parquet:{tmp_path / 'a.parquet'}", "label_column": "kind", "image_column": "picture"}
    splits = data.load(DataConfig(**settings))
    expected = {noise(i, 8, 8).tobytes(): (i + 1) % 2 for i in range(6)}
    assert [expected[row] for row in fingerprints(splits.train)] == splits.train.labels.tolist()
    assert "picture" in refusal(**settings | {"image_column": "img"})


@pytest.mark.skipif(not CIFAR10_PARQUET.exists(), reason=f"needs CIFAR-10 as Parquet at {CIFAR10_PARQUET}")
def test_subset_of_cifar10_is_stratified_and_decodes_no_more(monkeypatch):
    decoded = count_decodes(monkeypatch)
    splits = data.load(DataConfig(name=f"parquet:{CIFAR10_PARQUET}/test-*.parquet", subset=500))
    assert len(decoded) == 500
    assert splits.train.shape == (3, 32, 32)
    assert np.bincount(splits.train.labels).tolist() == [40] * 10
    assert np.bincount(splits.held_out.labels).tolist() == [10] * 10
    table = pq.read_table(CIFAR10_PARQUET / "test-00000-of-00001.parquet")
    wanted = {
        image["bytes"]: label
        for image, label in zip(*(column.to_pylist() for column in table.columns[:2]), strict=True)
    }
    with Image.open(io.BytesIO(min(decoded))) as image:
        pixels = np.asarray(image)
    images = splits.train if pixels.tobytes() in fingerprints(splits.train) else splits.held_out
    assert images.labels[fingerprints(images).index(pixels.tobytes())] == wanted[min(decoded)]


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_PARQUET.exists(), reason=f"needs CIFAR-10 as Parquet at {CIFAR10_PARQUET}")
def test_all_of_cifar10_loads():
    splits = data.load(DataConfig(name=f"parquet:{CIFAR10_PARQUET}/train-*.parquet", subset=6250))
    assert (len(splits.train), len(splits.held_out), len(splits.rest)) == (5000, 1250, 43750)
    assert set(np.bincount(splits.train.labels)) == {500}


# The published data sets, as they lie on disk


def cifar10_on_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """100 images in the pickled batches; the check sums, of these files here and not of the published ones."""
    from torchvision.datasets import CIFAR10

    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    pixels = noise(0, 100, 32, 32, 3)
    for number in range(6):
        part = pixels[20 * number : 20 * number + 20] if number < 5 else noise(1, 5, 32, 32, 3)
        rows = part.transpose(0, 3, 1, 2).reshape(len(part), -1)
        batch = {"batch_label": "b", "labels": [i % 10 for i in range(len(part))], "data": rows, "filenames": []}
        (base / (f"data_batch_{number + 1}" if number < 5 else "test_batch")).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij"), "num_vis": 3072}))
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in base.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    return pixels


def test_cifar10_is_its_train_split(tmp_path, monkeypatch):
    pixels = cifar10_on_disk(tmp_path, monkeypatch)
    splits = data.load(DataConfig(name="cifar10", root=str(tmp_path), subset=50))
    expected = {row.tobytes(): i % 20 % 10 for i, row in enumerate(pixels)}
    assert splits.train.shape == (3, 32, 32)
    for images in (splits.train, splits.held_out, splits.rest):
        assert [expected.pop(row) for row in fingerprints(images)] == images.labels.tolist()
    assert not expected


def test_cut_cifar10_file_is_refused(tmp_path, monkeypatch):
    cifar10_on_disk(tmp_path, monkeypatch)
    os.truncate(tmp_path / "cifar-10-batches-py" / "data_batch_3", 100)
    message = refusal(name="cifar10", root=str(tmp_path))
    assert "not as published" in message
    assert "data.download" in message


def idx(array: np.ndarray) -> bytes:
    """The IDX format of MNIST: magic number, big-endian sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def test_mnist_is_padded_to_32_unless_another_size_is_asked_for(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = noise(0, 40, 28, 28), np.arange(40, dtype=np.uint8) % 10
    for name, count in (("train", 40), ("t10k", 10)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(pixels[:count]))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels[:count]))
    splits = data.load(DataConfig(name="mnist", root=str(tmp_path)))
    assert splits.train.shape == (1, 32, 32)
    expected = {np.pad(row, 2).tobytes(): label for row, label in zip(pixels, labels.tolist(), strict=True)}
    for images in (splits.train, splits.held_out):
        assert [expected.pop(row) for row in fingerprints(images)] == images.labels.tolist()
    assert not expected
    own = data.load(DataConfig(name="mnist", root=str(tmp_path), image_size=28))
    assert set(fingerprints(own.train)) <= {row.tobytes() for row in pixels}
    assert data.load(DataConfig(name="mnist", root=str(tmp_path), image_size=16)).train.shape == (1, 16, 16)


def test_aircraft_is_train_and_val_without_the_banner(tmp_path):
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "A300B4", "Cessna 172"]
    lines = {"trainval": [], "test": []}
    for i in range(18):
        name, split = f"{1000000 + i}", "trainval" if i < 15 else "test"
        picture = np.full((140, 200, 3), 10 * (i % 3) if split == "trainval" else 250, np.uint8)
        picture[-20:] = 255  # "(c) photographer"
        save(base / "images" / f"{name}.jpg", picture, quality=95)
        lines[split].append(f"{name} {variants[i % 3]}\n")
    (base / "variants.txt").write_text("".join(f"{name}\n" for name in variants))
    for split, entries in lines.items():
        (base / f"images_variant_{split}.txt").write_text("".join(entries))
    splits = data.load(DataConfig(name="fgvc-aircraft", root=str(tmp_path)))
    assert splits.train.shape == (3, 64, 64)
    assert len(splits.train) + len(splits.held_out) == 15
    for images in (splits.train, splits.held_out):
        assert images.pixels.max() < 60
        assert [round(row.mean() / 10) for row in images.pixels] == images.labels.tolist()


def test_flowers_are_train_and_val(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    base = tmp_path / "flowers-102"
    for i in range(1, 31):
        save(base / "jpg" / f"image_{i:05d}.jpg", np.full((150, 200, 3), 8 * i, np.uint8), quality=95)
    savemat(base / "imagelabels.mat", {"labels": (np.arange(30) % 2 + 1).astype(np.uint8)[None]})
    split = {"trnid": np.arange(1, 11), "valid": np.arange(11, 21), "tstid": np.arange(21, 31)}
    savemat(base / "setid.mat", {name: ids[None].astype(np.uint16) for name, ids in split.items()})
    files = {
        name: (f, hashlib.md5((base / f).read_bytes()).hexdigest())
        for name, f in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(Flowers102, "_file_dict", Flowers102._file_dict | files)
    splits = data.load(DataConfig(name="flowers102", root=str(tmp_path)))
    assert splits.train.shape == (3, 128, 128)
    seen = {}
    for images in (splits.train, splits.held_out):
        seen |= dict(zip([round(row.mean() / 8) for row in images.pixels], images.labels.tolist(), strict=True))
    assert seen == {i: (i - 1) % 2 for i in range(1, 21)}


def test_celeba_is_train_and_valid_without_labels(tmp_path, monkeypatch):
    from torchvision.datasets import CelebA

    base = tmp_path / "celeba"
    names = [f"{i:06d}.jpg" for i in range(1, 13)]
    for i, name in enumerate(names):
        save(base / "img_align_celeba" / name, np.full((218, 178, 3), 20 * i, np.uint8), quality=95)
    table = {
        "list_attr_celeba.txt": ["12", "Bald Young", *(f"{name}  1 -1" for name in names)],
        "identity_CelebA.txt": [f"{name} {i}" for i, name in enumerate(names)],
        "list_bbox_celeba.txt": ["12", "image_id x_1 y_1 width height", *(f"{name} 1 2 3 4" for name in names)],
        "list_landmarks_align_celeba.txt": ["12", "lefteye_x lefteye_y", *(f"{name} 1 2" for name in names)],
        "list_eval_partition.txt": [f"{name} {0 if i < 8 else 1 if i < 10 else 2}" for i, name in enumerate(names)],
    }
    for name, lines in table.items():
        (base / name).write_text("\n".join(lines) + "\n")
    md5 = [("id", hashlib.md5((base / name).read_bytes()).hexdigest(), name) for name in table]
    monkeypatch.setattr(CelebA, "file_list", [CelebA.file_list[0], *md5])
    splits = data.load(DataConfig(name="celeba", root=str(tmp_path)))
    assert splits.train.shape == (3, 64, 64)
    assert splits.train.labels is None
    shown = [round(row.mean() / 20) for row in everything(splits)]
    assert sorted(shown) == list(range(10))


def test_cached_published_data_need_no_torchvision(tmp_path, monkeypatch):
    cifar10_on_disk(tmp_path, monkeypatch)
    config = DataConfig(name="cifar10", root=str(tmp_path))
    before = data.load(config).key()
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert data.load.__wrapped__(config).key() == before


def test_download_fetches_what_is_not_there_and_only_that(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    fetched = []

    def download(self):
        fetched.append(self.root)
        cifar10_on_disk(Path(self.root), monkeypatch)

    monkeypatch.setattr(CIFAR10, "download", download)
    for seed in (0, 1):
        assert len(data.load(DataConfig(name="cifar10", root=str(tmp_path), download=True, seed=seed)).train) == 80
    assert fetched == [str(tmp_path)]


# Refusals


@pytest.mark.parametrize("name", ["mnist", "cifar10", "fgvc-aircraft", "flowers102", "celeba"])
def test_absent_data_set_is_refused_with_where_it_belongs(name, cache):
    message = refusal(name=name)
    assert f"data.root={cache / 'data'}" in message
    assert "data.download" in message
    assert "http" in message


def test_failed_download_says_where_to_get_the_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def download(self):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(CIFAR10, "download", download)
    message = refusal(name="cifar10", root=str(tmp_path), download=True)
    assert "unreachable" in message
    assert f"{tmp_path}/cifar-10-batches-py" in message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "imagenet"}, ["imagenet", "cifar10", "parquet:PATH", "folder:PATH"]),
        ({"name": "folder:"}, ["folder:PATH"]),
        ({"name": "parquet:/nowhere/x"}, ["/nowhere/x", "parquet:PATH"]),
        ({"name": "folder:/nowhere/x"}, ["/nowhere/x", "folder:PATH"]),
        ({"subset": 5000}, ["data.subset", "1797", "5000"]),
        ({"subset": 2, "train_fraction": 0.99}, ["data.train_fraction", "0.99"]),
    ],
)
def test_refusal_says_which_setting_and_what_to_give(settings, says):
    message = refusal(**settings)
    for part in says:
        assert part in message


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert ".png" in refusal(name=f"folder:{tmp_path}")


def test_folder_of_splits_is_refused_instead_of_taking_them_for_classes(tmp_path):
    for split in ("train", "test"):
        twice(tmp_path / split / "cat", noise(0, 8, 8))
    assert f"folder:{tmp_path}/test" in refusal(name=f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("labels", "says"),
    [([0.5, 1.0], "double"), ([0, None], "empty in 1 row"), ([-1, 0], "at least 0, but got -1")],
)
def test_parquet_labels_that_are_no_classes_are_refused(tmp_path, labels, says):
    path = parquet_of(tmp_path / "a.parquet", [encoded(noise(i, 8, 8)) for i in range(2)], labels)
    message = refusal(name=f"parquet:{path}")
    assert says in message
    assert "data.labels" in message
    assert data.load(DataConfig(name=f"parquet:{path}", labels=False, train_fraction=0.5)).train.labels is None


def test_parquet_without_the_image_column_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "a.parquet")
    message = refusal(name=f"parquet:{tmp_path}")
    assert "data.image_column" in message
    assert "['x', 'y']" in message
    assert "int64" in refusal(name=f"parquet:{tmp_path}", image_column="x")


def test_what_was_cached_when_a_mistyped_label_column_still_passed_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_SEARCH_CACHE", str(tmp_path / "cache"))
    path = parquet_of(tmp_path / "a.parquet", [encoded(noise(i, 8, 8)) for i in range(5)], [0, 1, 0, 1, 0])
    mistyped = DataConfig(name=f"parquet:{path}", label_column="labels")
    entry = data.load(DataConfig(name=f"parquet:{path}", labels=False)).entry
    with monkeypatch.context() as earlier:
        earlier.setattr(data, "CACHE_VERSION", 2)
        left = data._entry_name(mistyped, data._find(mistyped))
    images = tmp_path / "cache" / "images"
    (images / entry).rename(images / left)
    assert "data.label_column='labels'" in refusal(name=f"parquet:{path}", label_column="labels")


def test_a_label_column_that_was_asked_for_and_is_not_there_is_refused(tmp_path):
    """Mistyped, it would leave the data without labels, and the search without its extractor."""
    path = parquet_of(tmp_path / "a.parquet", [encoded(noise(i, 8, 8)) for i in range(5)], [0, 1, 0, 1, 0])
    message = refusal(name=f"parquet:{path}", label_column="labels")
    assert "data.label_column='labels'" in message
    assert "['img', 'label']" in message
    assert "data.labels to false" in message
    assert data.load(DataConfig(name=f"parquet:{path}", label_column="labels", labels=False)).train.labels is None
    parquet_of(path, [encoded(noise(i, 8, 8)) for i in range(5)], None)
    assert data.load(DataConfig(name=f"parquet:{path}")).train.labels is None


def test_cut_parquet_file_is_named(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", [encoded(noise(0, 8, 8))], None)
    os.truncate(path, 50)
    assert "a.parquet" in refusal(name=f"parquet:{tmp_path}")


def test_relative_paths_mean_the_folder_they_were_written_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DataConfig(name="folder:x").name == f"folder:{tmp_path}/x"
    assert DataConfig(root="x").root == f"{tmp_path}/x"
    assert DataConfig(name="parquet:~/x", root="~/y").model_dump()["name"] == "parquet:~/x"
    assert DataConfig.model_validate(DataConfig(name="folder:x").model_dump()) == DataConfig(name="folder:x")
