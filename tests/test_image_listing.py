"""Which pictures a source holds: each once, by its pixels, and what cannot be read named."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from toy import pictures as toy_pictures

from cocoa.errors import CocoaError
from cocoa.image_listing import Listing, list_pictures, path_in, root_of
from cocoa.images import load_image
from cocoa.pairs import Turn

PICTURES = toy_pictures(4)
TURNS = [{"question": "what?", "answer": "a cat"}]


def encoded(image: Image.Image, form: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with pictures 0, 1, 2 at three depths, and what is no image."""
    folder = tmp_path / "source"
    (folder / "b" / "c").mkdir(parents=True)
    PICTURES[0].save(folder / "b" / "zero.PNG")
    PICTURES[1].save(folder / "a one.webp", lossless=True)
    PICTURES[2].save(folder / "b" / "c" / "two.bmp")
    (folder / "notes.txt").write_text("no image, and does not say so")
    return folder


def names(listing: Listing) -> list[str]:
    return [Path(picture.path).name for picture in listing.pictures]


def test_a_folder_at_any_depth_in_the_order_of_its_paths(source: Path, tmp_path: Path) -> None:
    found = list_pictures(source, tmp_path / "out")
    assert names(found) == ["a one.webp", "two.bmp", "zero.PNG"]
    assert (found.duplicates, found.unreadable) == (0, {})
    assert all(Path(picture.path).is_absolute() and not picture.caption for picture in found.pictures)
    assert not (tmp_path / "out").exists()


def test_the_same_picture_under_other_names_and_encodings_is_one(source: Path, tmp_path: Path) -> None:
    before = list_pictures(source, tmp_path / "out").pictures
    PICTURES[0].save(source / "z.tiff")
    PICTURES[0].save(source / "z.png", compress_level=0)
    (source / "b" / "zz.png").write_bytes((source / "b" / "zero.PNG").read_bytes())
    found = list_pictures(source, tmp_path / "out")
    assert found.pictures == before and found.duplicates == 3
    other = np.asarray(PICTURES[0]).copy()
    other[0, 0, 0] ^= 1
    Image.fromarray(other).save(source / "z.png")
    assert len(list_pictures(source, tmp_path / "out").pictures) == 4


def test_broken_images_are_named_and_no_end(source: Path, tmp_path: Path) -> None:
    whole = (source / "b" / "zero.PNG").read_bytes()
    (source / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "empty.jpg").write_bytes(b"")
    (source / "text.gif").write_text("GIF? no")
    found = list_pictures(source, tmp_path / "out")
    assert len(found.pictures) == 3
    assert set(found.unreadable) == {str(source / name) for name in ("cut.png", "empty.jpg", "text.gif")}
    assert all("not a readable image" in reason for reason in found.unreadable.values())


def test_what_lies_in_the_output_is_no_source(source: Path) -> None:
    (source / "out").mkdir()
    PICTURES[3].save(source / "out" / "three.png")
    assert len(list_pictures(source, source / "out").pictures) == 3
    assert len(list_pictures(source / "b", source).pictures) == 2  # a source inside of the output is one
    with pytest.raises(CocoaError, match="same folder; choose another --output"):
        list_pictures(source, source / "b" / "..")


@pytest.mark.parametrize("form", ["struct", "bytes", "path", "image_path", "datasets"])
def test_parquet_in_every_form(source: Path, tmp_path: Path, form: str) -> None:
    files, contents = ["b/zero.PNG", "a one.webp"], [encoded(PICTURES[0]), encoded(PICTURES[1], "jpeg", quality=50)]
    path, captions = source / "table.parquet", ["a zero", None]
    if form == "datasets":
        rows = {"image": [{"bytes": content, "path": None} for content in contents], "caption": captions}
        features = Features({"image": ImageFeature(decode=False), "caption": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(path)
    else:
        column: dict[str, list[Any]] = {
            "struct": [{"bytes": contents[0], "path": "x.png"}, {"bytes": None, "path": files[1]}],
            "bytes": contents,
            "path": files,
            "image_path": files,
        }
        name = "image_path" if form == "image_path" else "image"
        table = pa.table({"id": [1, 2], name: column[form], "caption": captions, "label": ["a", "b"]})
        pq.write_table(table, path, row_group_size=1)
    found = list_pictures(path, tmp_path / "out")
    assert [picture.caption for picture in found.pictures] == ["a zero", ""]
    wanted = {"struct": [contents[0], None], "bytes": contents, "datasets": contents}.get(form, [None, None])
    for picture, content, file in zip(found.pictures, wanted, files, strict=True):
        if content is None:
            assert picture.path == str(source / file)
        else:
            assert Path(picture.path).parent == tmp_path / "out" / "images"
            assert Path(picture.path).read_bytes() == content
            assert Path(picture.path).suffix == (".png" if content == contents[0] else ".jpg")
    assert np.array_equal(load_image(found.pictures[0].path), PICTURES[0])


def test_embedded_images_are_written_once(tmp_path: Path) -> None:
    contents = [encoded(PICTURES[i]) for i in (0, 1, 0, 0)]
    (tmp_path / "tables" / "deep").mkdir(parents=True)
    for i, name in enumerate(("one", "deep/two")):
        pq.write_table(pa.table({"image": contents[2 * i : 2 * i + 2]}), tmp_path / "tables" / f"{name}.parquet")
    found = list_pictures(tmp_path / "tables", tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert (len(found.pictures), found.duplicates, len(written)) == (2, 2, 2)
    assert list_pictures(tmp_path / "tables", tmp_path / "out") == found
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_rows_without_a_readable_image_are_named_by_file_and_row(tmp_path: Path) -> None:
    images = [encoded(PICTURES[0]), None, b"not an image", b"", encoded(PICTURES[1])]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", row_group_size=2)
    found = list_pictures(tmp_path / "t.parquet", tmp_path / "out")
    assert len(found.pictures) == 2
    assert list(found.unreadable) == [f"{tmp_path / 't.parquet'}, row {row}" for row in (2, 3, 4)]
    assert found.unreadable[f"{tmp_path / 't.parquet'}, row 2"] == "no image"
    assert "Pillow" in found.unreadable[f"{tmp_path / 't.parquet'}, row 3"]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_files_of_paths(source: Path, tmp_path: Path, suffix: str) -> None:
    rows = [{"image_path": "b/zero.PNG", "caption": "a zero"}, {"image_path": str(source / "a one.webp")}]
    path = source / f"list.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image_path", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    found = list_pictures(path, tmp_path / "out").pictures
    assert [(Path(picture.path).name, picture.caption) for picture in found] == [
        ("zero.PNG", "a zero"),
        ("a one.webp", ""),
    ]


def test_a_conversation_and_a_caption_are_kept_from_any_of_the_same_pictures(source: Path, tmp_path: Path) -> None:
    rows = [
        {"image_path": "b/zero.PNG"},
        {"image_path": "b/zero.PNG", "dialogue": TURNS},
        {"image_path": "b/zero.PNG", "caption": "first"},
        {"image_path": "b/zero.PNG", "caption": "second"},
    ]
    (source / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (picture,) = list_pictures(source / "list.jsonl", tmp_path / "out").pictures
    assert (picture.caption, picture.turns) == ("first", (Turn("what?", "a cat"),))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "l.jsonl",
            '{"image_path": "b/zero.PNG", "captoin": "x"}',
            "line 1: captoin: unknown key; did you mean caption",
        ),
        ("l.jsonl", '{"image_path": "b/zero.PNG"}\n{"caption": "x"}', "line 2: image_path is empty; fill it in"),
        ("l.jsonl", '{"image_path": "b/zero.PNG", "caption": ["x"]}', "line 1: caption is of type list, not text"),
        ("l.jsonl", '"b/zero.PNG"', "line 1: not a JSON object"),
        ("l.jsonl", "{", "line 1: not JSON"),
        ("l.csv", "image_path,caption\nb/zero.PNG,a,b\n", "line 2: more fields than columns"),
        ("l.csv", "path\nb/zero.PNG\n", "line 2: path: unknown key; there are: image_path, caption"),
        ("l.txt", "b/zero.PNG", r"l.txt: not a folder, nor a file of .parquet, .jsonl, .json, .csv"),
        ("l.parquet", "b/zero.PNG", "l.parquet: not parquet .*; write it again"),
        (
            "l.jsonl",
            '{"image_path": "none.png"}',
            "no image that can be read; .*line 1: .*none.png: no such image file",
        ),
    ],
)
def test_a_file_that_is_not_of_this_form(source: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    (source / name).write_text(content)
    with pytest.raises(CocoaError, match=message):
        list_pictures(source / name, tmp_path / "out")


def test_sources_that_are_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="none: no such file or folder; name a folder of images"):
        list_pictures(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CocoaError, match="empty: no image that can be read; name a folder"):
        list_pictures(tmp_path / "empty", tmp_path / "out")
    pq.write_table(pa.table({"picture": ["a.png"]}), tmp_path / "t.parquet")
    with pytest.raises(CocoaError, match=r"t.parquet: no column image or image_path \(there are: picture\)"):
        list_pictures(tmp_path / "t.parquet", tmp_path / "out")
    pq.write_table(pa.table({"image": [1]}), tmp_path / "t.parquet")
    with pytest.raises(CocoaError, match=r"t.parquet, row 1: image is int; write bytes, a path"):
        list_pictures(tmp_path / "t.parquet", tmp_path / "out")
    pq.write_table(pa.table({"image": ["a.png"]}), source / "t.parquet")
    with pytest.raises(CocoaError, match=r"source: both images .* and parquet files .*; name one of them"):
        list_pictures(source, tmp_path / "out")


def test_paths_are_relative_to_the_folder_that_they_lie_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, or none: one `image_root` has to do for the file."""
    monkeypatch.chdir(tmp_path)
    inside, outside = f"{tmp_path}/out/images/a.png", f"{tmp_path}/outside/a.png"
    assert root_of([inside], Path("out")) is None
    assert path_in(inside, Path("out"), None) == "images/a.png"
    assert root_of([outside], Path("out")) == f"{tmp_path}/outside"
    assert path_in(outside, Path("out"), f"{tmp_path}/outside") == outside
    assert root_of([inside, outside], Path("out")) == str(tmp_path)
