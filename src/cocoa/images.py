"""Reading images as upright RGB, and seeing what is wrong with a file before a model does."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from cocoa.errors import CocoaError, ImageError
from cocoa.image_files import check_bytes, read_member, split_archive

ImageRef = str | bytes | Image.Image
"""An image in memory, the content of an image file, or the absolute path of one."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What the EXIF tag `ORIENTATION` asks for."""
ORIENTATION = 0x0112


MAX_PIXELS = dict.fromkeys(("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "PPM"), 64_000_000) | dict.fromkeys(
    ("WEBP", "AVIF", "JPEG2000"), 32_000_000
)
"""The formats that are read, and the most pixels of an image of each, which is refused before it is decoded.

Decoding a pixel takes up to 13 bytes, 29 where the decoder keeps copies of its own: less than 1 GB in all, in every
thread that decodes images.
"""
MAX_SCANS = 50
"""Of a progressive JPEG, each of which takes as long as the whole image; encoders write some ten."""
Size = tuple[int, int]
"""Width and height in pixels."""


def load_image(image: ImageRef, shown: Callable[[Size], Size] | None = None) -> Image.Image:
    """The image as upright RGB (EXIF rotation applied; CMYK, greyscale of 8 or 16 bits and palettes converted).

    Transparent pixels become white; of an animation the first frame is taken.

    Args:
        image: in memory, its file's content, or its path.
        shown: the size that an image of a given size is shown in; the file of a JPEG is then decoded at a half, a
            quarter or an eighth of its size where that is enough, and shown in the same size.

    Raises:
        CocoaError: the file is missing, no readable image, or one of more than `MAX_PIXELS`; the message names it.
    """
    if not isinstance(image, Image.Image):
        name = image if isinstance(image, str) else "image"
        try:
            with open_image(io.BytesIO(_content(image))) as opened:  # a file would be read by what it says of itself
                if shown is not None and opened.format == "JPEG":
                    _decode_smaller(opened, shown)
                return _upright(opened)
        except FileNotFoundError:
            raise ImageError(f"{name}: no such image file; check the data folder or `image_root`") from None
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise ImageError(f"{name}: not a readable image ({error}); replace it or drop its row") from None
    return _upright(image)


def _decode_smaller(opened: Image.Image, shown: Callable[[Size], Size]) -> None:
    width, height = opened.size
    wanted = shown(opened.size)
    for scale in (8, 4, 2):
        small = -(-width // scale), -(-height // scale)
        if small[0] >= wanted[0] and small[1] >= wanted[1] and shown(small) == wanted:
            opened.draft(None, (max(1, width // scale), max(1, height // scale)))
            return


def open_image(source: io.BytesIO) -> Image.Image:
    """An image file opened and not decoded, once it is seen to be none that takes all memory or time.

    Raises:
        UnidentifiedImageError: it is of none of the formats.
        ValueError: it has too many pixels or scans; whatever else Pillow stumbles over.
    """
    try:
        opened = Image.open(source, formats=_formats())
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"of no format that is read: {', '.join(_formats())}") from None
    try:
        (width, height), limit = opened.size, MAX_PIXELS[opened.format or ""]
        if width * height > limit:
            raise ValueError(f"{width} x {height} pixels are more than {limit // 1_000_000} million; scale it down")
        if opened.info.get("progressive") and _scans(source.getvalue()) > MAX_SCANS:
            raise ValueError(f"a progressive JPEG of more than {MAX_SCANS} scans; save it anew")
    except Exception:
        opened.close()
        raise
    return opened


@cache
def _formats() -> tuple[str, ...]:
    """Those of `MAX_PIXELS` that this Pillow reads; MPO is what it makes of a JPEG of several pictures."""
    Image.init()
    return tuple(name for name in MAX_PIXELS if name in Image.OPEN and name != "MPO")


def _scans(content: bytes) -> int:
    return len(re.findall(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]", content))  # marker, length, components


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF data says, in RGB and without that data."""
    image.load()  # which turns a TIFF, and takes the tag away
    turn = TURNS.get(orientation(image))  # not `exif_transpose`, which stumbles over broken EXIF data
    upright = _opaque(image) if image.has_transparency_data else _rgb(image)
    if turn is not None:  # last: fewer bytes are held at a time
        upright = upright.transpose(turn)
    upright.info = {}
    return upright


def orientation(image: Image.Image) -> int:
    """What an image's EXIF data says of how it is to be turned: 1 is not at all, 0 that it cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # what Pillow raises depends on the format and on what is broken
        return 0


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """An image on white."""
    white = Image.new("RGB", image.size, "white")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white.paste(image, mask=image)
    return white


def image_size(image: ImageRef) -> tuple[int, int]:
    """Width and height as the file's header says, before any rotation; (0, 0) if it cannot be told."""
    if isinstance(image, Image.Image):
        return image.size
    try:
        with Image.open(_source(image), formats=_formats()) as opened:
            return opened.size
    except Exception:  # as in `load_image`
        return 0, 0


class Inspected(NamedTuple):
    """What a file says without a model: why it is no image (empty where it is one), and a hash of its content."""

    fault: str
    digest: bytes


def inspect_image(path: str) -> Inspected:
    """Read a file whole and decode it, as small as its format allows (a cut JPEG shows at an eighth of its size)."""
    try:
        content = read_image_bytes(path)
    except CocoaError as error:
        return Inspected(str(error).removeprefix(f"{path}: "), b"")
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        with open_image(io.BytesIO(content)) as opened:
            opened.draft("RGB", (1, 1))
            _upright(opened)
    except UnidentifiedImageError:
        return Inspected(f"not an image of any format that is read ({', '.join(_formats())}); replace it", digest)
    except Exception as error:  # as in `load_image`
        return Inspected(f"not a readable image ({error}); replace it", digest)
    return Inspected("", digest)


def read_image_bytes(image: str) -> bytes:
    """The file's content, whatever it is.

    Raises:
        CocoaError: it cannot be read.
    """
    try:
        return _content(image)
    except Exception as error:  # a damaged archive raises as much as a damaged image does
        raise CocoaError(f"{image}: cannot be read ({error}); check the data folder or `image_root`") from None


def _content(image: str | bytes) -> bytes:
    source = _source(image)
    return source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()


def _source(path: str | bytes) -> str | io.BytesIO:
    """What Pillow opens: the path of a file, or the content of a file or of an archive's member."""
    if isinstance(path, bytes):
        return io.BytesIO(path)
    archive, member = split_archive(path)
    if not archive:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("a folder, pipe or device")  # a pipe would be waited for, a device may have no end
        check_bytes(os.path.getsize(path))
        return path
    try:
        return io.BytesIO(read_member(archive, member))
    except KeyError:
        raise FileNotFoundError(path) from None
