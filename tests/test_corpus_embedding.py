"""`cocoa embed`: a corpus in parts, whole or not at all, by one model."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launching import launch
from toy import captions, pictures

import cocoa.cli
import cocoa.corpus_embedding as corpus_embedding
from cocoa.corpus import Columns, list_parts, read_part
from cocoa.corpus_embedding import EmbedSettings, embed_corpus
from cocoa.corpus_files import FOLDER, METADATA, SUMMARY_NAME
from cocoa.embedding import load_embedder
from cocoa.errors import CocoaError
from cocoa.output_folder import owned
from cocoa.pairs import Side


def content(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of ten images, two of them in a folder of their own."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number, image in enumerate(pictures(10)):
        image.save(folder / ("deep" if number > 7 else ".") / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(model: Path, source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return embed_corpus(EmbedSettings(str(model), source, **{"part_size": 4, "batch_size": 2} | options), output)


def rows(output: Path) -> dict[str, torch.Tensor]:
    table = pq.read_table(output / FOLDER)
    vectors = torch.tensor(table["embedding"].to_pylist())
    return dict(zip(table["id"].to_pylist(), vectors, strict=True))


def files(output: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (output / FOLDER).iterdir()}


def test_an_output_is_one_run_s_at_a_time(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    with owned(tmp_path / "out", True), pytest.raises(CocoaError, match=r"--output .*out: another run is writing here"):
        run(tiny_backbone_path(), images, tmp_path / "out")


def test_a_folder_of_images(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    model, output = tiny_backbone_path(), tmp_path / "out"
    summary = run(model, images, output, instruction="Find a picture like this.")
    found = rows(output)
    names = [f"{n}.png" for n in range(8)] + ["deep/8.png", "deep/9.png"]
    assert sorted(found) == sorted(names) and summary["rows"] == 10 and summary["parts"] == 3
    wanted = load_embedder(model).embed([Side("Find a picture like this.", image=str(images / name)) for name in names])
    assert torch.stack([found[name] for name in names]).sub(wanted).abs().max() < 1e-5
    for path in (output / FOLDER).iterdir():
        said = json.loads(pq.read_schema(path).metadata[METADATA])
        assert said["model_hash"] == summary["model_hash"] and len(said["model_hash"]) == 32


def test_embeddings_cut_to_fewer_numbers(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    run(tiny_backbone_path(), images, tmp_path / "whole")
    run(tiny_backbone_path(), images, tmp_path / "cut", truncate_dim=8)
    whole, cut = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    for name, row in whole.items():
        assert len(cut[name]) == 8 and (row[:8] / row[:8].norm() - cut[name]).abs().max() < 1e-6
    with pytest.raises(CocoaError, match="made with another truncate_dim"):
        run(tiny_backbone_path(), images, tmp_path / "cut")


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_parts_hold_every_row_once_whatever_the_row_groups(tmp_path: Path, size: int) -> None:
    for name, count, group in (("a", 20, 6), ("b", 1, 5), ("c", 9, 9)):
        records = [{"id": f"{name}{n}", "text": f"text {n}", "other": n} for n in range(count)]
        pq.write_table(pa.Table.from_pylist(records), tmp_path / f"{name}.parquet", row_group_size=group)
    parts = list_parts(tmp_path, size, tmp_path / "out")
    read = [row for part in parts for block in read_part(part, Columns(), 4) for row in block]
    assert [row.id for row in read] == [
        f"{name}{n}" for name, count in (("a", 20), ("b", 1), ("c", 9)) for n in range(count)
    ]
    assert [row.side.text for row in read[:20]] == [f"text {n}" for n in range(20)]
    assert len({part.name for part in parts}) == len(parts)
    assert all(part.stop - part.start <= size for part in parts)


def test_images_of_every_form_in_one_table(tiny_backbone_path: Any, tmp_path: Path) -> None:
    one, two, three = pictures(3)
    one.save(tmp_path / "one.png")
    records = [
        {"picture": {"bytes": None, "path": "one.png"}, "caption": "a cup"},
        {"picture": {"bytes": content(two), "path": "gone.png"}, "caption": None},
        {"picture": {"bytes": content(three), "path": None}, "caption": "a table"},
        {"picture": None, "caption": "text alone"},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    columns = Columns(text="caption", image="picture")
    run(tiny_backbone_path(), tmp_path / "rows.parquet", tmp_path / "out", columns=columns)
    sides = [Side(text="a cup", image=one), Side(image=two), Side(text="a table", image=three), Side(text="text alone")]
    found = rows(tmp_path / "out")
    assert list(found) == [f"rows.parquet#{n}" for n in range(1, 5)]
    assert torch.stack(list(found.values())).sub(load_embedder(tiny_backbone_path()).embed(sides)).abs().max() < 1e-5


def test_a_stopped_run_embeds_what_is_missing(
    tiny_backbone_path: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_backbone_path()
    run(model, images, tmp_path / "whole")
    plain, done = corpus_embedding.write_part, []

    def die(path: Path, *args: Any) -> None:
        if len(done) == 2:
            path.with_suffix(".tmp").write_bytes(b"torn")
            raise KeyboardInterrupt
        done.append(path)
        plain(path, *args)

    monkeypatch.setattr(corpus_embedding, "write_part", die)
    with pytest.raises(KeyboardInterrupt):
        run(model, images, tmp_path / "stopped")
    monkeypatch.setattr(corpus_embedding, "write_part", plain)
    times = {path.name: path.stat().st_mtime_ns for path in done}
    run(model, images, tmp_path / "stopped")
    whole = {name: content for name, (content, _) in files(tmp_path / "whole").items()}
    stopped = {name: each for name, each in files(tmp_path / "stopped").items() if name.endswith(".parquet")}
    assert {name: content for name, (content, _) in stopped.items()} == whole
    assert all(stopped[name][1] == time for name, time in times.items())


def test_a_corpus_that_has_changed_is_embedded_where_it_has(tiny_backbone_path: Any, tmp_path: Path) -> None:
    def write(name: str, texts: list[str]) -> None:
        pq.write_table(pa.table({"text": texts}), tmp_path / "corpus" / f"{name}.parquet")

    (tmp_path / "corpus").mkdir()
    write("a", captions(6))
    write("c", captions(3))
    run(tiny_backbone_path(), tmp_path / "corpus", tmp_path / "out")
    before = files(tmp_path / "out")
    write("b", captions(2, seed=1))
    write("c", captions(3, seed=2))
    summary = run(tiny_backbone_path(), tmp_path / "corpus", tmp_path / "out")
    after = files(tmp_path / "out")
    assert summary["rows"] == 11 and summary["parts"] == 4
    assert {name for name in before if name.startswith("a")} == {n for n in after if before.get(n) == after[n]}
    assert not any(name.startswith("c") and name in before for name in after)


def test_another_model_or_instruction_is_refused(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    run(tiny_backbone_path(), images, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(CocoaError, match="made with another model_hash"):
        run(tiny_backbone_path(tied=False), images, tmp_path / "out")
    with pytest.raises(CocoaError, match="made with another instruction"):
        run(tiny_backbone_path(), images, tmp_path / "out", instruction="Find it.")
    with pytest.raises(CocoaError, match="made with another source"):
        run(tiny_backbone_path(), images / "deep", tmp_path / "out")
    assert files(tmp_path / "out") == before
    shutil.copytree(tiny_backbone_path(), tmp_path / "moved")
    assert run(tmp_path / "moved", images, tmp_path / "out")["rows"] == 10
    assert files(tmp_path / "out") == before


def bad_rows(folder: Path) -> Path:
    """Seven rows, three of which cannot be used."""
    good = pictures(1)[0]
    good.save(folder / "good.png")
    (folder / "torn.png").write_bytes(content(good)[:60])
    secret = folder.parent / f"{folder.name}-secret.png"
    good.save(secret)
    (folder / "link.png").symlink_to(secret)
    values = ["good.png", "torn.png", "gone.png", f"../{secret.name}", str(secret), "link.png", "good.png"]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"id": str(n), "image": value}) for n, value in enumerate(values)))
    return path


def test_bad_rows_are_an_error_or_left_out_and_no_path_leaves_its_folder(
    tiny_backbone_path: Any, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    source, model = bad_rows(tmp_path / "data"), tiny_backbone_path()
    with pytest.raises(CocoaError, match=r"row 1: .*torn\.png: not a readable image"):
        run(model, source, tmp_path / "error")
    with pytest.raises(CocoaError, match=r"more than max-bad-share 0\.5 .*or allow more: --max-bad-share 0\.\d$"):
        run(model, source, tmp_path / "few", on_bad_row="skip", max_bad_share=0.5)
    summary = run(model, source, tmp_path / "skip", on_bad_row="skip", max_bad_share=1.0)
    assert sorted(rows(tmp_path / "skip")) == ["0", "6"]
    found = {bad["id"]: bad["reason"] for bad in summary["bad_rows"]}
    assert "not a readable image" in found.pop("1")
    reasons = {name: reason.rpartition(": ")[2] for name, reason in found.items()}
    outside = "outside of the data folder"
    assert reasons == {"2": "no such image file", "3": outside, "4": outside, "5": outside}


def test_a_part_larger_than_memory_allows_is_read_in_blocks(
    tiny_backbone_path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_embedding, "BLOCK", 3)
    pq.write_table(pa.table({"text": captions(8)}), tmp_path / "rows.parquet")
    run(tiny_backbone_path(), tmp_path / "rows.parquet", tmp_path / "out", part_size=100, precision="float16")
    found = torch.stack(list(rows(tmp_path / "out").values()))
    wanted = load_embedder(tiny_backbone_path()).embed([Side(text=text) for text in captions(8)])
    assert found.sub(wanted).abs().max() < 1e-3
    assert (
        pq.read_schema(next((tmp_path / "out" / FOLDER).iterdir())).field("embedding").type.value_type == pa.float16()
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"texts": "a"}', "neither 'text' nor 'image' is there, but texts"),
        ('{"text": 3}', "row 1: text is 3, not text"),
        ('{"text": "a", "image": 3}', "row 1: image is 3, not text"),
        ('{"image": "\\ud800.png"}', "row 1: image is not Unicode"),
        ('{"text": "a", "id": "\\ud800"}', "row 1: id is not Unicode"),
        ("[]", "nothing to embed"),
        ("{", "line 1: not JSON"),
    ],
)
def test_a_file_that_is_no_corpus(tiny_backbone_path: Any, tmp_path: Path, written: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(written)
    with pytest.raises(CocoaError, match=message):
        run(tiny_backbone_path(), tmp_path / "rows.jsonl", tmp_path / "out")


def test_files_of_one_name_in_two_folders_have_ids_of_their_own(tiny_backbone_path: Any, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "corpus" / folder).mkdir(parents=True)
        pq.write_table(pa.table({"text": ["x", ""], "id": ["", None]}), tmp_path / "corpus" / folder / "train.parquet")
    source = tmp_path / "corpus" / ".." / "corpus"
    with pytest.raises(CocoaError, match=r"2 rows could not be embedded, more than max-bad-share 0\.3 of 4 allows"):
        run(tiny_backbone_path(), source, tmp_path / "few", on_bad_row="skip", max_bad_share=0.3)
    summary = run(tiny_backbone_path(), source, tmp_path / "out", on_bad_row="skip", max_bad_share=0.5)
    assert list(rows(tmp_path / "out")) == ["a/train.parquet#1", "b/train.parquet#1"]
    assert [bad["id"] for bad in summary["bad_rows"]] == ["a/train.parquet#2", "b/train.parquet#2"]


def test_broken_rows_of_a_file_are_left_out_too(tiny_backbone_path: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{\n[]\n{"text": 3}\n{"text": "b"}\n{"id": "c"}')
    options = {"on_bad_row": "skip", "max_bad_share": 0.9}
    summary = run(tiny_backbone_path(), tmp_path / "rows.jsonl", tmp_path / "out", **options)
    assert sorted(rows(tmp_path / "out")) == ["rows.jsonl#1", "rows.jsonl#5"]
    assert [bad["id"][-1] for bad in summary["bad_rows"]] == ["2", "3", "4", "6"]
    assert "neither 'text' nor 'image' is there" in summary["bad_rows"][-1]["reason"]


def test_rows_that_an_earlier_run_left_out_count_too(tiny_backbone_path: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": ""}\n' * 3)
    options = {"on_bad_row": "skip", "max_bad_share": 0.4, "part_size": 2}
    for _ in range(2):  # the second finds two parts there, whose bad rows are all that are allowed
        with pytest.raises(CocoaError, match=r"3 rows could not be embedded, more than max-bad-share 0\.4 of 6"):
            run(tiny_backbone_path(), tmp_path / "rows.jsonl", tmp_path / "out", **options)
    assert len(list((tmp_path / "out" / FOLDER).iterdir())) == 2


def test_a_parquet_file_of_equal_size_and_bounds_is_another_one(tmp_path: Path) -> None:
    names = []
    for number, middle in enumerate(("bb", "bx")):
        pq.write_table(pa.table({"text": ["aa", middle, "cc"]}), tmp_path / "rows.parquet")
        os.utime(tmp_path / "rows.parquet", ns=(number, number))  # clocks may be coarse
        names += [part.name for part in list_parts(tmp_path / "rows.parquet", 10, tmp_path / "out")]
    assert len(set(names)) == 2


def test_a_long_name_of_many_bytes(tiny_backbone_path: Any, tmp_path: Path) -> None:
    source = tmp_path / f"{'照' * 80}.jsonl"
    source.write_text('{"text": "a"}')
    assert run(tiny_backbone_path(), source, tmp_path / "out")["rows"] == 1


def test_names_of_files_that_are_no_unicode_and_links_to_nothing(tiny_backbone_path: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "gone.png").symlink_to(tmp_path / "none.png")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(content(pictures(1)[0]))
    run(tiny_backbone_path(), folder, tmp_path / "out")
    assert list(rows(tmp_path / "out")) == ["\\xff.png"]


def test_a_folder_that_cannot_be_written(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CocoaError, match="out: cannot be written"):
        run(tiny_backbone_path(), images, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_backbone_path: Any, images: Path, tmp_path: Path) -> None:
    arguments = ["embed", tiny_backbone_path(), images, "--part-size", "3", "--batch-size", "2", "--output"]
    for processes in (1, 2):
        printed = launch(processes, cocoa.cli.__file__, *arguments, tmp_path / str(processes))
        assert "done: 10 embeddings" in printed.replace("\n", " ")
    one, two = ({name: each[0] for name, each in files(tmp_path / n).items()} for n in ("1", "2"))
    assert one == two and len(one) == 4
    assert json.loads((tmp_path / "2" / SUMMARY_NAME).read_text())["rows"] == 10
