"""Reading images: every mode becomes upright RGB; what is broken is named."""

import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
