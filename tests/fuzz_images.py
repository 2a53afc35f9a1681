"""Image files and archives of them, mutated."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Field, Kind, check_message, mutated
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from cocoa.image_files import check_image_files, image_locator
from cocoa.images import image_size, inspect_image, load_image, read_image_bytes
from cocoa.inputs import ImageBudget, shown_size

SHOWN = partial(shown_size, images=ImageBudget((4, 64)))


def picture(mode: str, size: tuple[int, int] = (60, 44)) -> Image.Image:
    shades = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(shades[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    image = Image.fromarray(shades)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "described"
    exif.get_ifd(0x8769)[0x9286] = b"a comment"
    return exif


def _notes() -> PngImagePlugin.PngInfo:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("said", "something " * 20, zip=True)
    notes.add_itxt("also", "said " * 20, "de", "auch", zip=True)
    return notes


def _variants() -> list[tuple[str, str, dict[str, Any]]]:
    """(format, mode, options) of a file each."""
    tiff = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma", "tiff_ccitt", "group4")
    modes = {"tiff_ccitt": ("1",), "group4": ("1",), "jpeg": ("RGB", "L")}
    return [
        *(("JPEG", mode, {"exif": _exif()}) for mode in ("RGB", "L", "CMYK")),
        *(("JPEG", mode, {"progressive": True, "subsampling": 0}) for mode in ("RGB", "CMYK")),
        ("JPEG", "RGB", {"restart_marker_blocks": 2, "comment": b"c" * 99, "optimize": True}),
        *(("PNG", mode, {"pnginfo": _notes(), "exif": _exif()}) for mode in ("RGB", "RGBA", "LA", "I;16", "1")),
        *(("PNG", mode, {"transparency": 3}) for mode in ("P", "L")),
        ("PNG", "RGB", {"icc_profile": bytes(200), "dpi": (72, 72)}),
        ("PNG", "RGB", {"save_all": True, "append_images": [picture("L")]}),
        ("WEBP", "RGB", {"exif": _exif()}),
        *(("WEBP", "RGBA", options) for options in ({"lossless": True}, {"quality": 40})),
        ("WEBP", "RGB", {"save_all": True, "append_images": [picture("L")]}),
        *(("GIF", "P", options) for options in ({"transparency": 1}, {"interlace": 0}, {"comment": b"hello"})),
        ("GIF", "P", {"save_all": True, "append_images": [picture("P")], "disposal": 2}),
        *(
            (name, mode, {})
            for name in ("BMP", "DIB", "TGA", "PCX", "IM", "SGI", "ICO", "DDS", "QOI")
            for mode in ("RGB",)
        ),
        *(("BMP", mode, {}) for mode in ("P", "1", "RGBA", "L")),
        *(("PPM", mode, {}) for mode in ("RGB", "L", "1", "I", "F")),
        *(
            ("TIFF", m, {"compression": how})
            for how in tiff
            for m in modes.get(how, ("RGB", "RGBA", "P", "I;16", "CMYK"))
        ),
        *(("TIFF", mode, {"exif": _exif()}) for mode in ("F", "I", "LA", "LAB")),
        ("TIFF", "RGB", {"big_tiff": True, "save_all": True, "append_images": [picture("L")]}),
        *(("JPEG2000", mode, {}) for mode in ("RGB", "RGBA", "L")),
        ("JPEG2000", "RGB", {"tile_size": (16, 16), "no_jp2": True}),
        *(("AVIF", mode, {"exif": _exif()}) for mode in ("RGB", "RGBA")),
        *(
            (name, mode, {})
            for name, mode in (("EPS", "RGB"), ("ICNS", "RGBA"), ("XBM", "1"), ("MSP", "1"), ("SPIDER", "F"))
        ),
        ("MPO", "RGB", {"save_all": True, "append_images": [picture("RGB")]}),
    ]


@cache
def images() -> dict[str, bytes]:
    """Valid files by name, of every format and compression that Pillow writes here."""
    found = {}
    Image.init()
    for number, (name, mode, options) in enumerate(_variants()):
        content = io.BytesIO()
        with suppress(KeyError, OSError):  # a format, or one of TIFF's compressions, that this Pillow is built without
            picture(mode).save(content, name, **options)
            found[f"{name}-{mode.replace(';', '')}-{number:02}"] = content.getvalue()
    return found


def _png_chunks(content: bytes) -> list[tuple[int, int]]:
    """(where its length stands, its length) of each chunk."""
    found, place = [], 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        found.append((place, length))
        place += 12 + length
    return found


def right_checksums(content: bytes) -> bytes:
    """A PNG file whose chunks have the checksums that they should have."""
    if not content.startswith(b"\x89PNG"):
        return content
    mended = bytearray(content)
    for place, length in _png_chunks(content):
        end = place + 8 + length
        if end + 4 <= len(content):
            mended[end : end + 4] = zlib.crc32(content[place + 4 : end]).to_bytes(4, "big")
    return bytes(mended)


def _jpeg_fields(content: bytes) -> list[Field]:
    found, place = [], 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        found.append(Field(place + 2, 2))
        if 0xC0 <= marker <= 0xC2:  # precision, height, width, components and their sampling
            found += [Field(place + 4, 1), Field(place + 5, 2), Field(place + 7, 2)]
            found += [Field(place + offset, 1) for offset in range(9, 20)]
        elif marker in (0xC4, 0xDA, 0xDB, 0xE1):  # tables, the scan's head, EXIF data
            found += [Field(place + offset, 1) for offset in range(4, min(length + 2, 60))]
        place += 2 + length
    return found


def _tiff_fields(content: bytes, start: int = 0) -> list[Field]:
    order = "little" if content[start : start + 2] == b"II" else "big"

    def number(place: int, width: int) -> int:
        return int.from_bytes(content[place : place + width], order)

    directory = start + number(start + 4, 4)
    found = [Field(start + 4, 4, order), Field(directory, 2, order)]
    for place in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(content)), 12):
        found += [Field(place + offset, width, order) for offset, width in ((0, 2), (2, 2), (4, 4), (8, 4), (8, 2))]
    return found


def image_fields(content: bytes) -> list[Field]:
    """Lengths, sizes and tags of the formats that matter; of the others the numbers at the start."""
    if content.startswith(b"\x89PNG"):
        found = [Field(place, 4) for place, _ in _png_chunks(content)]
        return [*found, Field(16, 4), Field(20, 4), *(Field(place, 1) for place in range(24, 29))] * 2
    if content.startswith(b"\xff\xd8"):
        return _jpeg_fields(content)
    if content[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_fields(content)
    if content.startswith(b"GIF8"):
        frame = content.find(b",", 13 + 3 * (2 << (content[10:11] or b"\0")[0] % 8))
        sizes = [6, 8, *(frame + offset for offset in (1, 3, 5, 7) if frame >= 0)]
        return [
            *(Field(place, 2, "little") for place in sizes),
            Field(10, 1),
            Field(frame + 9, 1),
            Field(frame + 10, 1),
        ]
    if content.startswith(b"RIFF"):
        return [
            Field(place, width, "little")
            for place, width in ((4, 4), (16, 4), (20, 4), (24, 3), (27, 3), (26, 2), (28, 2))
        ]
    if content.startswith(b"BM"):
        places = ((10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (34, 4), (46, 4))
        return [Field(place, width, "little") for place, width in places]
    return [Field(place, width, order) for place in range(0, 100, 2) for width in (2, 4) for order in ("big", "little")]


def read_image(case: tuple[str, bytes], folder: Path) -> None:
    """All ways in which a file is read; each of them survives alone."""
    path = folder / "x.img"
    path.write_bytes(case[1])
    read_path(str(path))


def read_path(path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, height = image_size(path)
        assert width >= 0 and height >= 0
        fault = inspect_image(path).fault
        if fault:
            check_message(fault)
        load_image(path, SHOWN)
        loaded = load_image(path)
    assert loaded.mode == "RGB" and min(loaded.size) >= 1 and not loaded.info


@cache
def archives() -> dict[str, bytes]:
    """Valid archives by name: a picture in each way to pack it, and names that lead elsewhere."""
    found, shown = {}, next(content for name, content in images().items() if name.startswith("PNG-RGB-"))
    ways = {
        "stored": zipfile.ZIP_STORED,
        "deflated": zipfile.ZIP_DEFLATED,
        "bzip2": zipfile.ZIP_BZIP2,
        "lzma": zipfile.ZIP_LZMA,
    }
    for name, way in ways.items():
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", way) as file:
            for member in ("A/0.png", "images/A/1.png", "../A/2.png", "/A/3.png", "A/", "A/é.png"):
                file.writestr(member, shown)
            file.comment = b"a comment"
        found[name] = content.getvalue()
    return found


def archive_fields(content: bytes) -> list[Field]:
    """The numbers of every local header, of the directory and of its end."""
    layouts = {
        b"PK\3\4": "4:2 6:2 8:2 14:4 18:4 22:4 26:2 28:2",
        b"PK\1\2": "6:2 8:2 10:2 16:4 20:4 24:4 28:2 30:2 32:2 38:4 42:4",
        b"PK\5\6": "4:2 6:2 8:2 10:2 12:4 16:4 20:2",
    }
    found = []
    for mark, layout in layouts.items():
        place = content.find(mark)
        while place >= 0:
            pairs = (item.split(":") for item in layout.split())
            found += [Field(place + int(offset), int(width), "little") for offset, width in pairs]
            place = content.find(mark, place + 1)
    return found


@cache
def bombs() -> dict[str, bytes]:
    """Archives whose members are far larger than they are, or say that they are."""
    content = io.BytesIO()
    with (
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("A/0.png", "w") as member,
    ):
        for _ in range(210):
            member.write(bytes(1 << 20))
    large = content.getvalue()
    size = struct.pack("<I", 210 << 20)
    return {"large": large, "lying": large.replace(size, struct.pack("<I", 50_000_000))}


def read_archive(case: tuple[str, bytes], folder: Path) -> None:
    (folder / "images.zip").write_bytes(case[1])
    wanted = ("A/0.png", "A/1.png", "images/A/1.png", "../A/2.png", "/A/3.png", "A/é.png", "A/none.png", "B/\0.png")
    try:
        located = [image_locator(folder)(name) for name in wanted]
        check_image_files([(path, "mine", 3) for path in located[:1]], {"mine": str(folder)})
        for path in located:
            survived(path)
    finally:
        for member in wanted[:4]:
            survived(f"{folder}/images.zip/{member}")
    assert not (folder.parent / "A").exists() and not os.path.exists("/A")
    read_path(located[0])


def survived(path: str) -> None:
    """A path of an archive read in every way, whatever it holds."""
    from cocoa.errors import CocoaError

    for read in (read_path, read_image_bytes):
        try:
            read(path)
        except CocoaError as error:
            check_message(str(error))


KINDS = {
    "images": Kind(mutated(images, image_fields, right_checksums), read_image),
    "archives": Kind(
        mutated(archives, archive_fields) | st.sampled_from(("large", "lying")).map(lambda n: (n, bombs()[n])),
        read_archive,
    ),
}
