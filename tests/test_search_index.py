"""`cocoa index`: the store is what the corpus is, by one model, and nothing is embedded twice."""

from __future__ import annotations

import datetime
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from toy import captions, pictures

pytest.importorskip("lancedb", reason="needs the extra `search`")

import cocoa.search_index as search_index
from cocoa.corpus import Columns
from cocoa.corpus_embedding import EmbedSettings
from cocoa.embedding import load_embedder
from cocoa.errors import CocoaError
from cocoa.pairs import Side
from cocoa.search_index import THUMBNAIL, IndexReport, open_table, thumbnail, update_index


def run(model: Path, source: Path, db: Path, **options: Any) -> IndexReport:
    return update_index(EmbedSettings(str(model), source, **{"part_size": 4, "batch_size": 2} | options), db)


def rows(db: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in open_table(db).to_arrow().to_pylist()}


def counts(report: IndexReport) -> tuple[int, int, int, int]:
    return report.added, report.changed, report.removed, report.unchanged


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of six images, one of them in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number, image in enumerate(pictures(6)):
        image.save(folder / ("deep" if number == 5 else ".") / f"{number}'s.png")
    return folder


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the rows that were embedded, as they are."""
    names: list[str] = []
    plain = search_index.embed_rows

    def counted(embedder: Any, rows: Any, *args: Any) -> Any:
        names.extend(row.id for row in rows if not row.fault)
        return plain(embedder, rows, *args)

    monkeypatch.setattr(search_index, "embed_rows", counted)
    return names


def test_a_folder_and_what_is_stored_of_an_image(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    wide = Image.effect_noise((600, 300), 80).convert("RGB")
    wide.save(images / "wide.jpg")
    report = run(tiny_backbone_path(), images, tmp_path / "db", instruction="Find it.")
    found = rows(tmp_path / "db")
    names = ["0's.png", "1's.png", "2's.png", "3's.png", "4's.png", "deep/5's.png", "wide.jpg"]
    assert counts(report) == (7, 0, 0, 0) and sorted(found) == names
    sides = [Side("Find it.", image=str(images / name)) for name in names]
    wanted = load_embedder(tiny_backbone_path()).embed(sides).numpy()
    assert np.abs(np.array([found[name]["vector"] for name in names]) - wanted).max() < 1e-5
    row = found["wide.jpg"]
    assert (row["width"], row["height"], row["size"]) == (600, 300, (images / "wide.jpg").stat().st_size)
    assert row["path"] == str(images / "wide.jpg") and row["instruction"] == "Find it." and not row["text"]
    small = Image.open(io.BytesIO(row["thumbnail"]))
    assert (small.format, small.size) == ("JPEG", (256, 128))
    exact = wide.resize((256, 128), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small, int) - np.asarray(exact, int)).mean() < 12


def test_a_second_run_embeds_what_is_new_or_changed_and_drops_what_is_gone(
    tiny_backbone_path: Any, images: Path, tmp_path: Path, embedded: list[str]
) -> None:
    run(tiny_backbone_path(), images, tmp_path / "db")
    before = rows(tmp_path / "db")
    embedded.clear()
    assert counts(run(tiny_backbone_path(), images, tmp_path / "db")) == (0, 0, 0, 6) and not embedded
    (images / "0's.png").unlink()
    pictures(1, seed=9)[0].save(images / "1's.png")
    os.utime(images / "1's.png", ns=(1, 1))  # clocks may be coarse
    pictures(1, seed=8)[0].save(images / "new.png")
    assert counts(run(tiny_backbone_path(), images, tmp_path / "db")) == (1, 1, 1, 4)
    assert sorted(embedded) == ["1's.png", "new.png"]
    after = rows(tmp_path / "db")
    assert before.keys() - after.keys() == {"0's.png"} and after["1's.png"]["vector"] != before["1's.png"]["vector"]
    assert all(after[name] == before[name] for name in ("2's.png", "3's.png", "4's.png", "deep/5's.png"))
    fresh = tmp_path / "fresh"
    run(tiny_backbone_path(), images, fresh)
    assert {name: row["vector"] for name, row in rows(fresh).items()} == {
        name: row["vector"] for name, row in after.items()
    }


def test_a_stopped_run_goes_on_without_embedding_again(
    tiny_backbone_path: Any, images: Path, tmp_path: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = search_index._store

    def die(*args: Any) -> Any:
        if len(embedded) > 4:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(search_index, "_store", die)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_backbone_path(), images, tmp_path / "db")
    monkeypatch.setattr(search_index, "_store", plain)
    embedded.clear()
    assert counts(run(tiny_backbone_path(), images, tmp_path / "db")) == (2, 0, 0, 4)
    assert sorted(embedded) == ["4's.png", "deep/5's.png"]


def test_other_columns_are_kept_with_their_types(tiny_backbone_path: Any, tmp_path: Path) -> None:
    (one, two), day = pictures(2), datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.UTC)
    content = io.BytesIO()
    two.save(content, "PNG")
    one.save(tmp_path / "one.png")
    records = [
        {"picture": {"bytes": None, "path": "one.png"}, "caption": "a", "year": 1999, "width": 7.5, "when": day},
        {"picture": {"bytes": content.getvalue(), "path": "x"}, "caption": "b", "tags": ["x", "ü"], "ok": True},
        {"caption": "no image", "year": None, "mask": content.getvalue()},
    ]
    pq.write_table(pa.Table.from_pylist(records, _schema()), tmp_path / "rows.parquet")
    columns = Columns(text="caption", image="picture")
    run(tiny_backbone_path(), tmp_path / "rows.parquet", tmp_path / "db", columns=columns)
    found = list(rows(tmp_path / "db").values())
    assert [row["year"] for row in found] == [1999, None, None] and [row["ok"] for row in found] == [None, True, None]
    assert [row["width"] for row in found] == [7.5, None, None]  # the source's own
    assert [row["height"] for row in found] == [84, 84, None]
    assert [row["path"] for row in found] == [str(tmp_path / "one.png"), None, None]
    assert found[0]["when"] == day and found[1]["tags"] == '["x", "ü"]'
    assert found[2]["mask"] == f'"{len(content.getvalue())} bytes"' and found[2]["thumbnail"] is None
    assert {
        field.name: str(field.type) for field in open_table(tmp_path / "db").schema if field.name in records[0]
    } == {
        "year": "int64",
        "width": "double",
        "when": "timestamp[us, tz=UTC]",
    }


def _schema() -> pa.Schema:
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"picture": picture, "caption": pa.string(), "year": pa.int64(), "width": pa.float64()}
    kinds |= {"when": pa.timestamp("us", "UTC"), "tags": pa.list_(pa.string()), "ok": pa.bool_(), "mask": pa.binary()}
    return pa.schema(list(kinds.items()))


def test_rows_of_a_file_that_change_in_any_respect(
    tiny_backbone_path: Any, tmp_path: Path, embedded: list[str]
) -> None:
    pictures(1)[0].save(tmp_path / "a.png")
    records = [{"id": f"row {n}", "text": text, "year": n} for n, text in enumerate(captions(5))]
    records.append({"id": "picture", "image": "a.png"})
    source = write_rows(tmp_path / "rows.jsonl", records)
    run(tiny_backbone_path(), source, tmp_path / "db")
    embedded.clear()
    records[0]["year"], records[1]["text"], records[3]["place"] = 7, "another text", "Rome"
    del records[2]
    os.utime(tmp_path / "a.png", ns=(1, 1))
    write_rows(source, records)
    assert counts(run(tiny_backbone_path(), source, tmp_path / "db")) == (0, 4, 1, 1)
    assert sorted(embedded) == ["picture", "row 0", "row 1", "row 3"]
    found = rows(tmp_path / "db")
    assert found["row 0"]["year"] == 7 and found["row 3"]["place"] == "Rome" and found["row 4"]["place"] is None
    embedded.clear()
    run(tiny_backbone_path(), source, tmp_path / "db", instruction="Find it.")
    assert len(embedded) == 5  # they would be embedded otherwise
    write_rows(source, [*records, {"text": "a", "year": "long ago"}])
    with pytest.raises(CocoaError, match="db: column 'year' held int64, and now holds string; choose another --db"):
        run(tiny_backbone_path(), source, tmp_path / "db")


@pytest.mark.parametrize("name", ["vector", "a.b", "", "_distance", "a\nb"])
def test_columns_that_cannot_be_stored(tiny_backbone_path: Any, tmp_path: Path, name: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a", name: 1}])
    with pytest.raises(CocoaError, match=r"rows\.jsonl: column .*rename it"):
        run(tiny_backbone_path(), source, tmp_path / "db")


def test_another_model_or_source_is_refused(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    db = tmp_path / "db"
    run(tiny_backbone_path(), images, db)
    before = rows(db)
    one, other = tiny_backbone_path(), tiny_backbone_path(tied=False)
    with pytest.raises(CocoaError, match=rf"made with the model {one} \(hash \w{{8}}\), not with {other} \(hash"):
        run(other, images, db)
    with pytest.raises(CocoaError, match="made with another source"):
        run(one, images / "deep", db)
    with pytest.raises(CocoaError, match="made with another precision"):
        run(one, images, db, precision="float16")
    assert rows(db) == before
    shutil.copytree(one, tmp_path / "moved")
    assert counts(run(tmp_path / "moved", images, db)) == (0, 0, 0, 6)
    (db / search_index.FACTS_NAME).unlink()
    with pytest.raises(CocoaError, match="no store of `cocoa index`"):
        run(one, images, db)


def test_bad_rows_are_an_error_or_left_out_and_no_path_leaves_its_folder(
    tiny_backbone_path: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (folder / "good.png", folder / "later torn.png", tmp_path / "secret.png"):
        pictures(1)[0].save(path)
    names = ["good.png", "later torn.png", "../secret.png", str(tmp_path / "secret.png"), "gone.png"]
    records = [{"id": str(n), "image": name} for n, name in enumerate(names)]
    source = write_rows(folder / "rows.jsonl", [*records, {"id": "0", "text": "twice"}])
    with pytest.raises(CocoaError, match=r"rows\.jsonl, row 2: .*outside of the data folder"):
        run(tiny_backbone_path(), source, tmp_path / "error")
    with pytest.raises(CocoaError, match=r"more than max-bad-share 0\.2 of 6 allows"):
        run(tiny_backbone_path(), source, tmp_path / "few", on_bad_row="skip", max_bad_share=0.2)
    options = {"on_bad_row": "skip", "max_bad_share": 1.0}
    report = run(tiny_backbone_path(), source, tmp_path / "db", **options)
    assert sorted(rows(tmp_path / "db")) == ["0", "1"] and rows(tmp_path / "db")["0"]["text"] == ""
    assert [name for name, _ in report.bad] == ["2", "3", "4", "0"] and "another row's" in report.bad[-1][1]
    (folder / "later torn.png").write_bytes((folder / "good.png").read_bytes()[:60])
    report = run(tiny_backbone_path(), source, tmp_path / "db", **options)
    assert counts(report) == (0, 0, 1, 1) and list(rows(tmp_path / "db")) == ["0"]


def test_images_that_cannot_be_reached_cost_the_store_nothing(
    tiny_backbone_path: Any, images: Path, tmp_path: Path
) -> None:
    records = [{"image": f"photos/{n}'s.png"} for n in range(5)] + [{"text": "a text"}]
    source = write_rows(tmp_path / "rows.jsonl", records)
    run(tiny_backbone_path(), source, tmp_path / "db")
    before = rows(tmp_path / "db")
    images.rename(tmp_path / "unplugged")
    with pytest.raises(CocoaError, match="no such image file"):
        run(tiny_backbone_path(), source, tmp_path / "db")
    with pytest.raises(CocoaError, match=r"more than max-bad-share 0\.5 of 6 allows"):
        run(tiny_backbone_path(), source, tmp_path / "db", on_bad_row="skip", max_bad_share=0.5)
    assert len(before) == 6 and rows(tmp_path / "db") == before
    report = run(tiny_backbone_path(), source, tmp_path / "db", on_bad_row="skip", max_bad_share=0.9)
    assert counts(report) == (0, 0, 5, 1) and len(report.bad) == 5


def test_an_image_that_is_replaced_while_it_is_embedded_is_embedded_again(
    tiny_backbone_path: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = search_index.embed_rows

    def replaced(*args: Any) -> Any:
        found = plain(*args)
        pictures(1, seed=9)[0].save(images / "0's.png")
        os.utime(images / "0's.png", ns=(1, 1))
        return found

    monkeypatch.setattr(search_index, "embed_rows", replaced)
    run(tiny_backbone_path(), images, tmp_path / "db")
    monkeypatch.setattr(search_index, "embed_rows", plain)
    assert counts(run(tiny_backbone_path(), images, tmp_path / "db")) == (0, 1, 0, 5)
    assert counts(run(tiny_backbone_path(), images, tmp_path / "db")) == (0, 0, 0, 6)


def test_a_column_may_lose_all_its_values(tiny_backbone_path: Any, tmp_path: Path) -> None:
    for years in ((1999, 2001), (None, None), (7, None)):
        records = [{"text": text, "year": year} for text, year in zip(captions(2), years, strict=True)]
        run(tiny_backbone_path(), write_rows(tmp_path / "rows.jsonl", records), tmp_path / "db")
        assert [row["year"] for _, row in sorted(rows(tmp_path / "db").items())] == list(years)


def test_a_column_that_the_source_has_no_more_is_emptied(tiny_backbone_path: Any, tmp_path: Path) -> None:
    one, two = captions(2)
    records: list[dict[str, Any]] = [{"text": one, "year": 1999}, {"text": two, "year": 2001}]
    for kept in (records, [{"text": one}, {"text": two}]):
        run(tiny_backbone_path(), write_rows(tmp_path / "rows.jsonl", kept), tmp_path / "db")
    assert [row["year"] for row in rows(tmp_path / "db").values()] == [None, None]


def test_float16_and_texts_that_are_no_unicode(tiny_backbone_path: Any, tmp_path: Path) -> None:
    records = [{"text": text, "note": "\ud800"} for text in captions(3)]
    run(tiny_backbone_path(), write_rows(tmp_path / "rows.jsonl", records), tmp_path / "db", precision="float16")
    table = open_table(tmp_path / "db")
    assert table.schema.field("vector").type.value_type == pa.float16()
    wanted = load_embedder(tiny_backbone_path()).embed([Side(text=text) for text in captions(3)]).numpy()
    found = rows(tmp_path / "db")
    vectors = [found[f"rows.jsonl#{n}"]["vector"] for n in (1, 2, 3)]
    assert np.abs(np.array(vectors, float) - wanted).max() < 1e-3
    assert found["rows.jsonl#1"]["note"] == "\\ud800"


def test_a_store_is_written_by_one_at_a_time_and_lies_in_a_folder(
    tiny_backbone_path: Any, images: Path, tmp_path: Path
) -> None:
    with search_index.owned(tmp_path / "db", True), pytest.raises(CocoaError, match="another run is writing"):
        run(tiny_backbone_path(), images, tmp_path / "db")
    (tmp_path / "file").write_text("")
    with pytest.raises(CocoaError, match="file: cannot be written"):
        run(tiny_backbone_path(), images, tmp_path / "file")


def test_a_store_whose_first_block_was_not_finished_and_one_that_is_damaged(
    tiny_backbone_path: Any, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "db" / "rows.lance" / "data").mkdir(parents=True)
    (tmp_path / "db" / "rows.lance" / "data" / "half.lance").write_text("torn")
    assert counts(run(tiny_backbone_path(), images, tmp_path / "db")) == (6, 0, 0, 0)
    for manifest in (tmp_path / "db" / "rows.lance" / "_versions").glob("*.manifest"):
        manifest.write_text("junk")
    with pytest.raises(CocoaError, match=r"db: cannot be read .*; remove it, and index again"):
        run(tiny_backbone_path(), images, tmp_path / "db")


def test_a_full_disk_is_said_and_leaves_what_was_stored(
    tiny_backbone_path: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(search_index.lancedb, "connect", full)
    with pytest.raises(CocoaError, match=r"db: cannot be written \(No space left on device\); make room"):
        run(tiny_backbone_path(), images, tmp_path / "db")
    monkeypatch.undo()
    assert counts(run(tiny_backbone_path(), images, tmp_path / "db")) == (6, 0, 0, 0)


def test_a_thumbnail_is_upright_and_small(tmp_path: Path) -> None:
    image = Image.new("RGB", (1200, 800), "blue")
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=turned)
    content, size = thumbnail(str(tmp_path / "turned.jpg"))
    assert size == (800, 1200) and Image.open(io.BytesIO(content)).size == (171, THUMBNAIL)
    assert len(thumbnail(Image.effect_noise((3000, 3000), 100))[0]) < 60_000
    assert thumbnail(Image.new("RGB", (9000, 1)))[1] == (9000, 1)
    for size in ((2560, 7), (800, 1), (600, 599), (599, 600)):  # JPEGs are decoded smaller, here to 0 or to a square
        Image.new("RGB", size).save(tmp_path / "small.jpg")
        assert thumbnail(str(tmp_path / "small.jpg"))[1] == size
