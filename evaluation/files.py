"""Images on disk: what `sample` writes and `score` reads."""

import io
import zipfile
from pathlib import Path

import numpy as np

from evaluation.pictures import save_grid_png
from trainer.datasets import IMAGE_SUFFIXES, files_below
from trainer.decode import decode


def check_out(out: Path) -> None:
    """Raises ValueError where `write_images` would: before images are drawn that have nowhere to go."""
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out must be FILE.png, FILE.npz or a folder without a suffix, but got {out}")
    if not out.suffix and any(out.glob("*.png")):
        raise ValueError(f"--out {out} holds PNG files already; give a new folder")


def write_images(images: np.ndarray, out: Path) -> None:
    """(N, H, W, C) uint8 → a grid where `out` is FILE.png, an array `images` in FILE.npz, else a folder of PNG files.

    Raises ValueError where a folder holds images of an earlier call, which would be mixed with these.
    """
    check_out(out)
    if out.suffix == ".png":
        save_grid_png(out, images)
    elif out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, images=images)
    else:
        from PIL import Image

        out.mkdir(parents=True, exist_ok=True)
        for index, pixels in enumerate(images):
            Image.fromarray(pixels.squeeze()).save(out / f"{index:06d}.png")


def read_images(path: Path) -> np.ndarray:
    """Images → (N, H, W, C) uint8, from a Parquet file or a folder of some, a folder of image files, or an .npz with
    `images` (N, H, W, C) uint8.

    Files come in the order of their names, or mixed, always alike, where they lie in several sub-folders.
    Parquet: the column `img` or `image`, encoded bytes as in the Hugging Face layout. Raises ValueError, saying why.
    """
    if not path.exists():
        raise ValueError(f"no images at {path}; give a folder of images, an .npz, or a Parquet file")
    if path.is_dir():
        tables = sorted(path.glob("*.parquet"))
        if tables:
            return _stack([content for table in tables for content in _encoded(table)], path)
        files = sorted(files_below(path, IMAGE_SUFFIXES))
        if len({file.parent for file in files}) > 1:  # classes as a rule, and a score's splits are contiguous
            files = [files[index] for index in np.random.default_rng(0).permutation(len(files))]
        return _stack([p.read_bytes() for p in files], path)
    if path.suffix == ".npz":
        images, names = read_array(path, "images")
        if images is None:
            raise ValueError(f"{path} must hold `images`, `logits` or `probabilities`, but holds {names}")
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images in {path} must be (N, H, W, C) uint8, but are {images.shape} {images.dtype}")
        return images
    if path.suffix == ".parquet":
        return _stack(_encoded(path), path)
    raise ValueError(f"{path} must be a folder of images, an .npz or a Parquet file")


def parquet_of(images: np.ndarray, first: int) -> bytes:
    """(N, H, W, C) uint8 → a Parquet file of PNG bytes in the Hugging Face layout; `index` counts from `first`."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for index, pixels in enumerate(images, first):
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "png")
        rows.append({"index": index, "image": {"bytes": buffer.getvalue(), "path": f"{index:07d}.png"}})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=pa.schema([("index", pa.int64()), ("image", image)]))
    pq.write_table(table, out, write_page_checksum=True)
    return out.getvalue()


def holds_images(content: bytes, first: int, count: int) -> bool:
    """Whether this is what `parquet_of` made of images first .. first + count - 1, cut and damaged nowhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content), pre_buffer=False, page_checksum_verification=True)
        index = file.read(use_threads=False)["index"].to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return False
    return index == list(range(first, first + count))


def _encoded(path: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A pool of threads aborts the process at its end once in a while: see search/records.py.
        table = pq.ParquetFile(path, pre_buffer=False)
        columns = [name for name in ("img", "image") if name in table.schema_arrow.names]
        rows = table.read(columns=columns[:1], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not columns:
        raise ValueError(f"{path} must have a column img or image, but has {table.schema_arrow.names}")
    rows = rows[columns[0]].to_pylist()
    return [row["bytes"] if isinstance(row, dict) else row for row in rows]


def read_array(path: Path, name: str) -> tuple[np.ndarray | None, list[str]]:
    """An array of an .npz, None where it has none of that name, and the names it has. Raises ValueError if no .npz."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return content[name] if name in content.files else None, content.files
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not an .npz of plain arrays: {error}") from error


def _stack(encoded: list[bytes], path: Path) -> np.ndarray:
    """As training reads them (trainer/ingest.py), grey where all are: what is scored is what a model would learn."""
    if not encoded:
        raise ValueError(f"no images at {path}; files of {', '.join(IMAGE_SUFFIXES)} are read")
    images = []
    for index, content in enumerate(encoded):
        try:
            images.append(decode(content, None, None))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many, see trainer/ingest.py
            raise ValueError(f"image {index} of {path} cannot be read: {error}") from error
    if len({image.shape[2] for image in images}) > 1:
        images = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"images at {path} must be of one shape, but are of {len(shapes)}, such as {sorted(map(str, shapes))[:3]}"
        )
    return np.stack(images)
