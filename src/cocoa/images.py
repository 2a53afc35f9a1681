"""Reading images as upright RGB, and seeing what is wrong with a file before a model does."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cocoa.errors import CocoaError
from cocoa.image_files import read_member, split_archive

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
        CocoaError: the file is missing or no readable image; the message names it.
    """
    if not isinstance(image, Image.Image):
        name = image if isinstance(image, str) else "image"
        try:
            with Image.open(_source(image)) as opened:
                if shown is not None and opened.format == "JPEG":
                    _decode_smaller(opened, shown)
                opened.load()
                return _upright(opened)
        except FileNotFoundError:
            raise CocoaError(f"{name}: no such image file; check the data folder or `image_root`") from None
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise CocoaError(f"{name}: not a readable image ({error}); replace it or drop its row") from None
    return _upright(image)


def _decode_smaller(opened: Image.Image, shown: Callable[[Size], Size]) -> None:
    width, height = opened.size
    wanted = shown(opened.size)
    for scale in (8, 4, 2):
        small = -(-width // scale), -(-height // scale)
        if small[0] >= wanted[0] and small[1] >= wanted[1] and shown(small) == wanted:
            opened.draft(None, (width // scale, height // scale))
            return


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF data says, in RGB and without that data."""
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))  # not `exif_transpose`, which stumbles over broken EXIF data
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB")
    image.info = {}
    return image


def image_size(image: ImageRef) -> tuple[int, int]:
    """Width and height as the file's header says, before any rotation; (0, 0) if it cannot be told."""
    if isinstance(image, Image.Image):
        return image.size
    try:
        with Image.open(_source(image)) as opened:
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
        with Image.open(io.BytesIO(content)) as opened:
            opened.draft("RGB", (1, 1))
            _upright(opened)
    except Image.UnidentifiedImageError:
        return Inspected("not an image of any format that Pillow reads; replace it", digest)
    except Exception as error:  # as in `load_image`
        return Inspected(f"not a readable image ({error}); replace it", digest)
    return Inspected("", digest)


def read_image_bytes(image: str) -> bytes:
    """The file's content, whatever it is.

    Raises:
        CocoaError: it cannot be read.
    """
    try:
        source = _source(image)
        return source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
    except Exception as error:  # a damaged archive raises as much as a damaged image does
        raise CocoaError(f"{image}: cannot be read ({error}); check the data folder or `image_root`") from None


def _source(path: str | bytes) -> str | io.BytesIO:
    """What Pillow opens: the path of a file, or the content of a file or of an archive's member."""
    if isinstance(path, bytes):
        return io.BytesIO(path)
    archive, member = split_archive(path)
    if not archive:
        return path
    try:
        return io.BytesIO(read_member(archive, member))
    except KeyError:
        raise FileNotFoundError(path) from None
