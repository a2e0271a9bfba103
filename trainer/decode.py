"""One stored image → uint8 pixels: any format, mode and orientation that Pillow reads."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

Item = bytes | Path | np.ndarray | None
"""An encoded image, where it lies, or (H, W) or (H, W, C) uint8; None where a Parquet row holds nothing."""

TURNS = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


def decode(item: Item, size: int | None, channels: int | None, crop_bottom: int = 0) -> np.ndarray:
    """(H, W, C) uint8, C being `channels`, or what the image has where that is None.

    Scaled until the short side is `size` pixels, then cut to a square at the centre. Turned as its EXIF says; what is
    transparent becomes white; 16 bits become the upper 8. `crop_bottom` rows of the file are cut off first. Raises
    whatever Pillow raises where the image cannot be read.
    """
    if item is None:
        raise ValueError("it holds no bytes")
    if isinstance(item, np.ndarray):
        pixels = item if item.ndim == 3 else item[..., None]
        if pixels.shape[2] == (channels or pixels.shape[2]) and pixels.shape[:2] == (size or pixels.shape[0],) * 2:
            return pixels
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    else:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as file:
            rows = file.height
            if size is not None:
                file.draft(file.mode, (2 * size, 2 * size))  # a large JPEG need not be decoded in full
            banner = math.ceil(crop_bottom * file.height / rows)
            image = _turned(file)
            if banner:
                image = image.crop((0, 0, image.width, image.height - banner))
    image = _eight_bits(image)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    decoded = np.asarray(image, dtype=np.uint8)
    return decoded if decoded.ndim == 3 else decoded[..., None]


def _turned(file: Image.Image) -> Image.Image:
    """As its EXIF says. ImageOps.exif_transpose writes the tags anew, and fails on some that cameras write."""
    file.load()
    way = TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    return file.copy() if way is None else file.transpose(way)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Mode L or RGB."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known; store it with 8 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(image)
        shallow = 0 < values.max() <= 0xFF  # the upper eight of their sixteen bits are all black
        if values.min() < 0 or values.max() > 0xFFFF or shallow:
            raise ValueError(f"its pixels reach from {values.min()} to {values.max()}; store it with 8 or 16 bits")
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    grey = image.mode in GREY_MODES
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if grey else "RGB")
