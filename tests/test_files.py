"""What `sample` writes is what `score` reads."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evaluation.files import check_out, parquet_of, read_array, read_images, write_images
from evaluation.scores import inception_score
from trainer.datasets import IMAGE_SUFFIXES
from trainer.decode import decode


def noise(n: int = 5, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("out", ["images.npz", "folder", "new/place/images.npz", "new/place/folder"])
def test_images_are_read_back_bit_for_bit_and_in_order(tmp_path, channels, out):
    images = noise(12, channels=channels)
    write_images(images, tmp_path / out)
    again = read_images(tmp_path / out)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, images)


def test_a_folder_s_files_are_those_that_training_reads(tmp_path):
    (pixels,) = noise(1)
    for suffix in IMAGE_SUFFIXES:
        Image.fromarray(pixels).save(tmp_path / f"image{suffix}")
    assert len(read_images(tmp_path)) == len(IMAGE_SUFFIXES)
    hidden, linked = tmp_path / ".ipynb_checkpoints", tmp_path.with_name("linked")
    for folder in (hidden, linked):
        folder.mkdir()
        Image.fromarray(pixels).save(folder / "image.png")
    (tmp_path / "._0.png").write_bytes(b"of macOS")
    (tmp_path / "link").symlink_to(linked)
    assert len(read_images(tmp_path)) == len(IMAGE_SUFFIXES) + 1


@pytest.mark.parametrize("layout", ["hugging face", "bytes"])
def test_a_parquet_file_s_images_are_read(tmp_path, layout):
    images = noise()
    encoded = []
    for pixels in images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    column = encoded if layout == "bytes" else [{"bytes": content, "path": "x.png"} for content in encoded]
    pq.write_table(pa.table({"label": list(range(5)), "img": column}), tmp_path / "x.parquet")
    np.testing.assert_array_equal(read_images(tmp_path / "x.parquet"), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_shards_are_read_back_bit_for_bit_and_in_order(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 5, channels), dtype=np.uint8)
    for first in (4, 0):
        (tmp_path / f"{first:07d}.parquet").write_bytes(parquet_of(images[first : first + 4], first))
    np.testing.assert_array_equal(read_images(tmp_path), images)
    np.testing.assert_array_equal(read_images(tmp_path / "0000004.parquet"), images[4:])
    table = pq.read_table(tmp_path / "0000004.parquet", use_threads=False).to_pylist()
    assert [row["index"] for row in table] == [4, 5, 6]
    assert table[0]["image"]["path"] == "0000004.png"


def test_a_grid_is_one_picture(tmp_path):
    write_images(noise(), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB"
        assert min(picture.size) >= 8


def test_images_of_two_shapes_are_refused(tmp_path):
    write_images(noise(2, size=8), tmp_path / "a")
    write_images(noise(2, size=16), tmp_path / "a" / "b")
    with pytest.raises(ValueError, match=r"one shape, but are of 2.*\(16, 16, 3\)"):
        read_images(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nothing", None, "no images at"),
        ("x.txt", b"hello", "must be a folder of images"),
        ("x.npz", b"", "is not an .npz"),
        ("x.npz", b"hello", "is not an .npz"),
        ("x.npz", b"PK\x03\x04cut", "is not an .npz"),
        ("x.parquet", b"hello", "(?i)parquet"),
    ],
)
def test_what_holds_no_images_is_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_images(tmp_path / name)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.full((8, 8), 0x8000, np.uint16))


def transparent() -> Image.Image:
    return Image.new("RGBA", (8, 8), (255, 0, 0, 0))


def turned() -> Image.Image:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image.getexif()[0x0112] = 6  # a quarter turn
    return image


@pytest.mark.parametrize(
    ("image", "first"),
    [
        (sixteen_bits(), 128),
        (transparent(), 255),
        (turned(), 56),
        (Image.new("RGB", (8, 8), (10, 20, 30)).quantize(2), 10),
        (Image.new("LA", (8, 8), (0, 0)), 255),
    ],
    ids=["16 bits", "transparent", "turned", "palette", "grey and transparent"],
)
def test_images_are_read_as_training_reads_them(tmp_path, image, first):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    read = read_images(tmp_path)
    np.testing.assert_array_equal(read[0], decode(buffer.getvalue(), None, None))
    assert read[0, 0, 0, 0] == first


def test_images_in_sub_folders_are_mixed_for_splits_are_contiguous(tmp_path):
    """Sub-folders are classes as a rule: in their order a split would hold few of them, and score far too low."""
    for label in range(4):
        (tmp_path / str(label)).mkdir()
        for number in range(50):
            Image.new("L", (4, 4), color=60 * label).save(tmp_path / str(label) / f"{number}.png")
    labels = read_images(tmp_path)[:, 0, 0, 0] // 60
    certain = np.eye(4)[labels]
    assert sorted(labels) == sorted([*range(4)] * 50)
    assert inception_score(certain, 50).mean > 3.6  # 4 of the whole, 1 of a class alone
    np.testing.assert_array_equal(read_images(tmp_path)[:, 0, 0, 0] // 60, labels)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=r"image 0 of .* floating-point"):
        read_images(tmp_path)


def test_grey_images_among_colour_ones_are_repeated_to_three_channels(tmp_path):
    grey, colour = noise(1, channels=1)[0], noise(1)[0]
    Image.fromarray(grey[..., 0]).save(tmp_path / "a.png")
    Image.fromarray(colour).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_images(tmp_path), [np.repeat(grey, 3, axis=2), colour])


def test_a_folder_without_images_or_with_a_broken_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images at"):
        read_images(tmp_path)
    (tmp_path / "x.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"image 0 of .* cannot be read"):
        read_images(tmp_path)


@pytest.mark.parametrize("array", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)])
def test_an_array_that_is_no_uint8_images_is_refused(tmp_path, array):
    np.savez(tmp_path / "x.npz", images=array)
    with pytest.raises(ValueError, match=r"must be \(N, H, W, C\) uint8, but are \(2, 8, 8"):
        read_images(tmp_path / "x.npz")


def test_an_npz_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "x.npz", foo=np.ones(3), bar=np.ones(1))
    with pytest.raises(ValueError, match=r"`images`, `logits` or `probabilities`, but holds \['foo', 'bar'\]"):
        read_images(tmp_path / "x.npz")
    assert read_array(tmp_path / "x.npz", "nothing") == (None, ["foo", "bar"])


@pytest.mark.parametrize("damage", ["cut", "page"])
def test_of_several_parquet_files_the_damaged_one_is_named(tmp_path, damage):
    content = parquet_of(noise(), 0)
    (tmp_path / "a.parquet").write_bytes(content)
    harmed = content[:-20] if damage == "cut" else content[:100] + bytes(200) + content[300:]
    (tmp_path / "b.parquet").write_bytes(harmed)
    with pytest.raises(ValueError, match=r"b\.parquet"):
        read_images(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.array([None], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        read_images(tmp_path / "x.npz")


def test_images_are_not_mixed_with_those_of_an_earlier_call(tmp_path):
    write_images(noise(2), tmp_path / "a")
    for refuse in (check_out, lambda out: write_images(noise(2), out)):
        with pytest.raises(ValueError, match="holds PNG files already; give a new folder"):
            refuse(tmp_path / "a")
        with pytest.raises(ValueError, match=r"FILE\.png, FILE\.npz or a folder"):
            refuse(tmp_path / "x.jpg")
    assert len(list((tmp_path / "a").iterdir())) == 2
