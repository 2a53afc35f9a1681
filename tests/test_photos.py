"""The photographs that ship with the package, and the MMEB folders made of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from cocoa.eval_inputs import check_eval_images
from cocoa.images import load_image
from cocoa.mmeb import list_subsets, read_train
from cocoa.mmeb_eval import read_eval
from cocoa.pairs import check_images
from cocoa.photos import write_photos

PHOTOS = Path(str(resources.files("cocoa").joinpath("data/photos")))


def test_the_photographs_are_small_and_of_every_odd_kind() -> None:
    files = sorted(PHOTOS.glob("*.jpg"))
    assert 8 <= len(files) <= 12
    assert sum(file.stat().st_size for file in files) < 300_000
    images = {file.stem: Image.open(file) for file in files}
    assert max(max(image.size) for image in images.values()) <= 224
    assert {image.mode for image in images.values()} == {"RGB", "L", "CMYK"}
    assert images["rocket"].getexif()[0x0112] == 6
    assert min(images["coin"].size) < 28
    licenses = (PHOTOS / "LICENSES.md").read_text()
    assert not [file.name for file in files if f"`{file.name}`" not in licenses]


def test_photographs_load_upright_and_in_colour() -> None:
    rocket = load_image(str(PHOTOS / "rocket.jpg"))
    assert rocket.size == (224, 149)
    sky, lamps = rocket.getpixel((60, 10)), rocket.getpixel((112, 100))
    assert sum(sky) < sum(lamps)  # a dark sky above, a bright rocket in the middle
    red, green, blue = load_image(str(PHOTOS / "coffee.jpg")).getpixel((60, 110))  # the saucer; CMYK not inverted
    assert red > 1.5 * green and red > 1.5 * blue


def test_the_same_bytes_each_time(photo_data: Path, tmp_path: Path) -> None:
    write_photos(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(photo_data) for path in photo_data.rglob("*") if path.is_file())
    assert all((tmp_path / file).read_bytes() == (photo_data / file).read_bytes() for file in files)


def test_the_layouts_are_those_of_mmeb(photo_data: Path) -> None:
    train = photo_data / "MMEB-train"
    assert 100 <= len(read_train(train)) <= 150
    coco = sorted(path.name for path in (train / "MSCOCO_i2t").iterdir())
    assert coco == [f"{split}-00000-of-00001.parquet" for split in ("diverse_instruction", "original", "train")]
    for name in list_subsets(train):
        path = next((train / name).glob("original-*.parquet"))
        columns = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
        assert pq.read_schema(path).names == (columns[:4] if name == "CIRR" else columns)
    news = pq.read_table(train / "VisualNews_i2t" / "original-00000-of-00002.parquet").to_pylist()
    assert news[0]["qry"].startswith("<|image_1|>\n")
    assert news[0]["pos_text"].endswith("\n\n")
    web = pq.read_table(train / "WebQA" / "original-00000-of-00001.parquet").to_pylist()
    assert web[0]["qry"].startswith("<|image_1|>\n") and not web[0]["qry_image_path"]


def test_every_image_is_there_and_can_be_read(photo_data: Path) -> None:
    pairs = read_train(photo_data / "MMEB-train").pairs
    check_images(pairs)
    check_eval_images(read_eval(photo_data / "MMEB-eval"))
    sizes = [load_image(str(path)).size for path in photo_data.rglob("*.jpg")]
    assert min(min(size) for size in sizes) < 28
    captioned = {pair.query.image for pair in pairs if pair.dataset == "MSCOCO_i2t"}
    captions = {pair.target.text for pair in pairs if pair.dataset == "MSCOCO_i2t"}
    assert len(captioned) == len(captions) == 34  # one caption an image, one image a caption
