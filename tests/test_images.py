"""Reading images: every mode becomes upright RGB; what is broken is named."""

import contextlib
import struct
import subprocess
import sys
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from cocoa.errors import CocoaError
from cocoa.images import inspect_image, load_image
from cocoa.inputs import ImageBudget, shown_size


def save(image, path, **options):
    image.save(path, **options)
    return str(path)


def test_images_become_rgb(tmp_path):
    def colour(path, at=(0, 0)):
        loaded = load_image(path)
        assert loaded.mode == "RGB"
        return loaded.getpixel(at)

    assert colour(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "cmyk.tiff")) == (255, 0, 0)
    assert colour(save(Image.new("L", (8, 8), 128), tmp_path / "grey.png")) == (128, 128, 128)
    assert colour(save(Image.new("LA", (8, 8), (9, 0)), tmp_path / "clear.png")) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    path = save(palette, tmp_path / "palette.png", transparency=1)
    assert [colour(path, (0, 0)), colour(path, (1, 0))] == [(255, 0, 0), (255, 255, 255)]


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    path = save(Image.new("I;16", (4, 4), 32768), tmp_path / "deep.png")
    assert load_image(path).getpixel((0, 0)) == pytest.approx((128, 128, 128), abs=1)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))  # red on the left; turned clockwise, on top
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = load_image(save(image, tmp_path / "turned.png", exif=exif))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 8)) == (255, 0, 0)
    assert upright.getpixel((16, 56)) == (0, 0, 255)
    assert load_image(upright).size == (32, 64), "not turned again"


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.png").write_bytes(b"")
    whole = save(Image.effect_noise((64, 64), 50), tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes(Path(whole).read_bytes()[:1000])
    for name, reason in (
        ("missing.png", "no such image file"),
        ("text.jpg", "not a readable image"),
        ("cut.png", "not a readable image"),
        ("half.png", "not a readable image"),
    ):
        with pytest.raises(CocoaError, match=rf"{name}: {reason}"):
            load_image(str(tmp_path / name))


def test_a_picture_too_large_to_open_is_named(tmp_path, monkeypatch):
    path = save(Image.new("RGB", (64, 64)), tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CocoaError, match=r"vast\.png"):
        load_image(path)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert load_image(str(path)).getpixel((0, 0)) == (255, 0, 0)


def test_broken_exif_data_does_not_hide_an_image(tmp_path):
    """Pillow's own turning rewrites the EXIF data, and stumbles over a date that is a fraction."""
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (64, 32), "blue").save(path)
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0132, 5, 1, 38)
    tiff = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<III", 0, 1, 3)
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1" + (len(tiff) + 2).to_bytes(2, "big") + tiff + content[2:])
    assert inspect_image(str(path)).fault == ""
    assert load_image(str(path)).size == (32, 64)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0"])
def test_exif_data_that_cannot_be_read_turns_nothing(tmp_path, kind, exif):
    path = tmp_path / f"broken.{kind}"
    Image.new("RGB", (64, 32), "blue").save(path, exif=exif, dpi=(72, 72))  # else Pillow reads it when it opens a JPEG
    assert inspect_image(str(path)).fault == ""
    assert load_image(str(path)).size == (64, 32)


@pytest.mark.parametrize("resize", ["aspect", "square"])
@pytest.mark.parametrize(
    ("size", "decoded"), [((400, 300), (400, 300)), ((901, 640), (451, 320)), ((1600, 3201), (200, 401))]
)
def test_a_jpeg_is_decoded_as_small_as_it_is_shown(tmp_path, size, decoded, resize):
    """And shown in the same size, with nearly the same colours; another file is decoded whole."""
    budget = ImageBudget((4, 64), resize)
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    path, whole = save(picture, tmp_path / "photo.jpg", quality=95), save(picture, tmp_path / "photo.png")
    shown = partial(shown_size, images=budget)
    assert load_image(whole, shown).size == load_image(path).size == size
    small = load_image(path, shown)
    assert small.size == decoded if resize == "aspect" else small.size[0] <= size[0]
    assert shown(small.size) == shown(size)
    seen = [np.asarray(image.resize(shown(size)), dtype=float) for image in (small, load_image(path))]
    assert np.abs(seen[0] - seen[1]).mean() < 1


def vast(kind, folder):
    """A small file that says it is an image of 70 million pixels or more, and its size."""
    if kind == "PNG":
        content = bytearray(Path(save(Image.new("L", (1, 1)), folder / "x.png")).read_bytes())
        content[16:24] = struct.pack(">II", 10_000, 7_000)
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    elif kind == "GIF":
        content = bytearray(Path(save(Image.new("L", (1, 1)), folder / "x.gif")).read_bytes())
        content[6:10] = struct.pack("<HH", 10_000, 7_000)
    elif kind == "JPEG":
        content = bytearray(Path(save(Image.new("L", (8, 8)), folder / "x.jpg")).read_bytes())
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", 7_000, 10_000)
    elif kind == "PPM":
        content = bytearray(b"P5 10000 7000 255\n")
    else:  # a canvas of 24 bits
        moving = {"save_all": True, "append_images": [Image.new("L", (8, 8), 9)]}
        content = bytearray(Path(save(Image.new("L", (8, 8)), folder / "x.webp", **moving)).read_bytes())
        content[24:30] = (9_999).to_bytes(3, "little") + (6_999).to_bytes(3, "little")
    path = folder / "vast"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "PPM", "WEBP"])
def test_a_picture_of_more_pixels_than_are_read_is_refused_before_it_is_decoded(tmp_path, monkeypatch, kind):
    path = vast(kind, tmp_path)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    reason = f"10000 x 7000 pixels are more than {32 if kind == 'WEBP' else 64} million; scale it down"
    for shown in (None, lambda size: (28, 28)):
        with pytest.raises(CocoaError, match=rf"vast: not a readable image \({reason}\)"):
            load_image(path, shown)
    assert reason in inspect_image(path).fault


def test_memory_is_not_taken_for_what_a_chunk_says_of_itself(tmp_path):
    path = Path(save(Image.effect_noise((64, 64), 50), tmp_path / "long.png"))
    content = path.read_bytes()
    place = content.index(b"IDAT") - 4
    path.write_bytes(content[:place] + b"\x7f\xff\xff\xff" + content[place + 4 :])
    tracemalloc.start()
    with contextlib.suppress(CocoaError):  # Pillow may take the rest for the chunk
        load_image(str(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10_000_000


def test_a_progressive_jpeg_of_many_scans_is_refused(tmp_path):
    path = Path(save(Image.new("L", (64, 64)), tmp_path / "scans.jpg", progressive=True))
    content = path.read_bytes()
    last = content[content.rindex(b"\xff\xda") : -2]
    assert load_image(str(path)).size == (64, 64)
    path.write_bytes(content[:-2] + last * 50 + content[-2:])
    with pytest.raises(CocoaError, match="a progressive JPEG of more than 50 scans"):
        load_image(str(path))
    assert "more than 50 scans" in inspect_image(str(path)).fault


def test_formats_that_are_not_read_are_refused(tmp_path):
    path = save(Image.new("RGB", (8, 8)), tmp_path / "x.eps")
    with pytest.raises(CocoaError, match=r"x\.eps: not a readable image \(of no format that is read: JPEG, PNG, "):
        load_image(path)
    assert "not an image of any format that is read (JPEG, PNG, " in inspect_image(path).fault


def test_every_colour_and_opacity_is_shown_on_white():
    colour, opacity = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.dstack([colour, colour, colour, opacity]))
    white = Image.new("RGBA", image.size, "white")
    assert load_image(image).tobytes() == Image.alpha_composite(white, image).convert("RGB").tobytes()


LARGEST = """
import os, re, sys
from pathlib import Path
from PIL import Image
from cocoa import images
name, path = sys.argv[1:]
if not os.path.exists(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    mode = {"JPEG": "CMYK", "BMP": "RGB"}.get(name, "RGBA")
    options = {"JPEG": {"progressive": True, "subsampling": 0}, "WEBP": {"method": 0}, "AVIF": {"speed": 10}}
    options["TIFF"] = {"compression": "tiff_lzw"}
    picture = Image.new(mode, (8000, images.MAX_PIXELS[name] // 8000), (200, 100, 50, 100)[: len(mode)])
    picture.save(path, name, exif=exif, **options.get(name, {}))
    raise SystemExit
for read in (images.load_image, images.inspect_image):
    before = re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    found = read(path)
    highest = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())
    print(getattr(found, "fault", ""), (int(highest[1]) - int(before[1])) * 1024, sep="\\t")
    del found
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux tells it")
@pytest.mark.parametrize("name", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000"])
def test_the_largest_picture_takes_less_than_a_gigabyte(tmp_path, name):
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("a Pillow without AVIF")
    for _ in range(2):  # it is written by one process and read by another
        command = [sys.executable, "-W", "ignore", "-c", LARGEST, name, str(tmp_path / "largest")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line in said.splitlines():
        fault, most = line.split("\t")
        assert not fault and int(most) < 1_000_000_000
    assert len(said.splitlines()) == 2


def test_a_tiff_is_turned_once_however_it_comes(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.tiff", exif=exif)
    found = [load_image(str(tmp_path / "turned.tiff")), load_image((tmp_path / "turned.tiff").read_bytes())]
    with Image.open(tmp_path / "turned.tiff") as opened:
        found.append(load_image(opened))
    assert [each.size for each in found] == [(10, 20)] * 3
