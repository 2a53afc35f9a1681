"""The reader of MMEB-eval in both of its forms: inputs, candidates, and rows that cannot be used."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_files import PLAIN, write, write_eval

from cocoa.bad_rows import BadRow, BadRows
from cocoa.catalogue import datasets
from cocoa.errors import CocoaError
from cocoa.eval_inputs import check_eval_images
from cocoa.mmeb import read_train
from cocoa.mmeb_eval import read_eval
from cocoa.pairs import Side

MARK = "<|image_1|>\n"
TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def test_photos_evaluation_sets(photo_data: Path) -> None:
    found = {dataset.name: dataset for dataset in read_eval(photo_data / "MMEB-eval")}
    check_eval_images(found.values())
    groups = {datasets()[name].meta_task for name in found}
    assert groups == {"Classification", "VQA", "Retrieval", "Grounding"}
    assert any(datasets()[name].ood for name in found)
    for dataset in found.values():
        assert len(set(dataset.inputs)) == len(dataset.inputs)
        assert len(dataset.candidates) == len(dataset.queries)
        assert not [side for side in dataset.inputs if "<|image_1|>" in side.prompt()]
    labels = found["ImageNet-1K"]
    assert labels.inputs[labels.candidates[1][0]] == Side(text="tabby, tabby cat")
    assert len(labels.inputs) == 24  # 12 queries, 12 labels: each once
    edis = found["EDIS"]
    assert edis.inputs[edis.queries[0]].image is None  # text-only in spite of its marker
    answers = [edis.inputs[i] for i in edis.candidates[0]]
    assert answers[0].image == answers[-1].image  # told apart by (text, image)
    assert answers[0].text != answers[-1].text
    matching = found["RefCOCO-Matching"]
    assert all(np.sum(row == row[0]) == 2 for row in matching.candidates)  # an exact duplicate has the same index


def test_the_form_with_instructions_apart(photo_data: Path) -> None:
    vqa, cirr = read_eval(photo_data / "MMEB-eval", ["A-OKVQA", "CIRR"])
    assert vqa.inputs[vqa.queries[0]].instruction == "Represent the given image with the following question:"
    assert vqa.inputs[vqa.candidates[0][0]] == Side(text="orange")
    target = cirr.inputs[cirr.candidates[0][0]]
    assert (target.instruction, target.text) == ("Represent the given image.", "")
    assert str(target.image).endswith("MMEB-eval/eval_images/CIRR/gravel.jpg")


def test_each_row_has_its_own_instruction_and_number_of_candidates(tmp_path: Path) -> None:
    columns = ("qry_inst", "qry_text", "tgt_inst", "tgt_text")
    rows = (
        ("Ask:", "a", "Say:", ["x", "y", "x"]),
        ("Beg:", "a", "Cry:", ["y", "x"]),
        (None, "a", "Say:", ["y"]),
    )
    write(tmp_path / "mine" / "test-00000-of-00001.parquet", columns, *rows)
    (dataset,) = read_eval(tmp_path)
    assert [dataset.inputs[i].prompt() for i in dataset.queries] == ["Ask: a", "Beg: a", "a"]
    texts = [[dataset.inputs[i].prompt() for i in row] for row in dataset.candidates]
    assert texts == [["Say: x", "Say: y", "Say: x"], ["Cry: y", "Cry: x"], ["Say: y"]]
    assert len(dataset.inputs) == 3 + 4


def test_a_training_row_and_an_evaluation_row_render_the_same(tmp_path: Path) -> None:
    """In every data set, whatever the whitespace, in both forms of evaluation data."""
    queries = {name: [text.replace("{text}", "one\ntwo") for text in entry.query] for name, entry in datasets().items()}
    targets = {
        name: [text.replace("{text}", "three") for text in entry.target] or ["three"]
        for name, entry in datasets().items()
    }
    for name in datasets():
        query, target = queries[name][0], targets[name][0]
        write(
            tmp_path / "train" / name / "original-00000-of-00001.parquet",
            TRAIN,
            (f"{MARK}{query}\n", "q.jpg", f"{MARK}{target}", "t.jpg"),
        )
        row = (f"  <|image_1|> {query}\n\n", "q.jpg", [f"{target}\n"], ["t.jpg"])
        write(tmp_path / "plain" / name / "test-00000-of-00001.parquet", PLAIN, row)
        instruction = datasets()[name].query[0].removesuffix("{text}")
        content = "one\ntwo\n" if "one" in query else ""
        write(
            tmp_path / "split" / name / "test-00000-of-00001.parquet",
            ("qry_inst", *PLAIN),
            (f"{MARK}{instruction}\n", content, "q.jpg", [f"{MARK}{target}"], ["t.jpg"]),
        )
    trained = {pair.dataset: pair for pair in read_train(tmp_path / "train").pairs}
    assert len(trained) == 36
    for form in ("plain", "split"):
        for dataset in read_eval(tmp_path / form):
            pair = trained[dataset.name]
            for ours, theirs in ((pair.query, dataset.queries[0]), (pair.target, dataset.candidates[0][0])):
                assert ours.prompt() == dataset.inputs[theirs].prompt()
                assert ours.text == dataset.inputs[theirs].text
                assert "\n" not in ours.prompt()[-1:]


def test_images_are_found_in_the_folder_or_in_images_in_it(tmp_path: Path) -> None:
    write(tmp_path / "a" / "test-00000-of-00001.parquet", PLAIN, ("q", "a/x.jpg", ["t"], [""]))
    for folder in ("eval_images", "images", "."):
        (tmp_path / folder / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "a" / "x.jpg").write_bytes(b"")
        (dataset,) = read_eval(tmp_path)
        check_eval_images([dataset])
        assert dataset.inputs[dataset.queries[0]].image == str((tmp_path / folder / "a" / "x.jpg").resolve())
    (dataset,) = read_eval(tmp_path, image_root=tmp_path / "gone")
    with pytest.raises(CocoaError, match=r"gone/a/x\.jpg: no such image file \(data set a, row 0\); 1 files"):
        check_eval_images([dataset])


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        (PLAIN, ("q", "", ["a", "b"], [""]), "data set a, row 1: 2 texts in tgt_text but 1 paths"),
        (PLAIN, ("q", "", [], []), "data set a, row 1: no candidates"),
        (PLAIN, ("q", "", ["b", " "], ["", ""]), "data set a, row 1: candidate: neither image nor content"),
        (PLAIN, ("", "", ["b"], [""]), "data set a, row 1: query: neither image nor content"),
        (PLAIN[:3], ("q", "", ["b"]), "no column tgt_img_path"),
        (PLAIN[:2], ("q", ""), "no column tgt_text"),
    ],
)
def test_broken_evaluation_rows_are_named(tmp_path: Path, columns: Sequence[str], row: Any, said: str) -> None:
    good = ("q", "", ["a"], [""])[: len(columns)]
    write(tmp_path / "a" / "test-00000-of-00001.parquet", columns, good, row)
    with pytest.raises(CocoaError) as error:
        read_eval(tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        (PLAIN, ("q", "", "a", ""), "column tgt_text holds string, not lists of one string a candidate"),
        (PLAIN, ("q", "", ["a"], ""), "column tgt_img_path holds string, not lists"),
        (PLAIN, ("q", "", [1], [""]), "column tgt_text holds int64, not strings"),
        (PLAIN, (7, "", ["a"], [""]), "column qry_text holds int64, not strings"),
        (PLAIN, ("q", b"bytes", ["a"], [""]), "column qry_img_path holds binary, not strings"),
        (PLAIN, ("q", {"path": "x"}, ["a"], [""]), "column qry_img_path holds struct<path: string>, not strings"),
        (("qry_inst", *PLAIN), (3.5, "q", "", ["a"], [""]), "column qry_inst holds double, not strings"),
    ],
)
def test_columns_of_another_type_are_named_whatever_the_policy(tmp_path, columns, row, said):
    write_eval(tmp_path, "a", row, columns=columns)
    for policy in ("error", "skip"):
        with pytest.raises(CocoaError, match=re.escape(said)):
            read_eval(tmp_path, bad=BadRows(policy))


def test_files_of_one_split_that_differ_are_named(tmp_path):
    write(tmp_path / "a" / "test-00000-of-00002.parquet", PLAIN, ("q", "", ["a"], [""]))
    write(tmp_path / "a" / "test-00001-of-00002.parquet", PLAIN, (7, "", ["a"], [""]))
    with pytest.raises(CocoaError, match=r"test-00001-of-00002.parquet: column qry_text holds int64"):
        read_eval(tmp_path)


def test_a_data_set_is_called_as_in_mmeb_eval_whatever_its_folder(tmp_path):
    row = ("q", "", ["a"], [""])
    write_eval(tmp_path, "ImageNet_1K", row)
    assert [dataset.name for dataset in read_eval(tmp_path)] == ["ImageNet-1K"]
    write_eval(tmp_path, "ImageNet_1K", row, ("two", "", ["a", "b"], [""]), ("three", "", [], []))
    bad = BadRows("skip")
    assert len(read_eval(tmp_path, bad=bad)[0].queries) == 1
    assert bad.left_out() == {"ImageNet-1K": 2}
    write_eval(tmp_path, "ImageNet_1K", row)
    write_eval(tmp_path, "ImageNet-1K", row)
    with pytest.raises(CocoaError, match="data set ImageNet-1K is there twice"):
        read_eval(tmp_path)


def test_null_columns_and_every_kind_of_string_and_list_are_read(tmp_path):
    strings = pa.array(["q", "q2"]).dictionary_encode()
    lists = pa.array([["a", "b"], ["b", None]], pa.large_list(pa.large_string()))
    table = {"qry_text": strings, "qry_img_path": pa.nulls(2), "tgt_text": lists}
    table["tgt_img_path"] = pa.array([["", ""], ["", "x.jpg"]], pa.list_(pa.string(), 2))
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table(table), tmp_path / "a" / "test-00000-of-00001.parquet")
    (found,) = read_eval(tmp_path)
    assert [found.inputs[i].text for i in found.queries] == ["q", "q2"]
    assert [[found.inputs[i].text for i in ids] for ids in found.candidates] == [["a", "b"], ["b", ""]]


def test_rows_that_cannot_be_used_are_skipped_counted_and_listed(tmp_path):
    bad = BadRows("skip")
    rows = [
        ("one", "", ["a", "b", ""], ["", "", ""]),  # a wrong candidate is empty: it leaves the list
        ("two", "", ["a", "b"], [""]),
        ("three", "", [], []),
        ("four", "", ["", "a"], ["", ""]),  # the right one is empty
        ("", "", ["a"], [""]),
        ("six", "", ["b", "", "a", ""], ["", "", "", ""]),
    ]
    write_eval(tmp_path, "mine", *rows)
    (found,) = read_eval(tmp_path, bad=bad)
    assert [found.inputs[i].text for i in found.queries] == ["one", "six"]
    assert [[found.inputs[i].text for i in ids] for ids in found.candidates] == [["a", "b"], ["b", "a"]]
    assert [found.number(row) for row in range(2)] == [0, 5]
    assert {side.text: row for side, row in zip(found.inputs, found.first_rows(), strict=True)} == {
        "one": 0,
        "a": 0,
        "b": 0,
        "six": 5,
    }
    assert bad.left_out() == {"mine": 4}
    assert bad.found[-1] == BadRow("mine", 0, "candidate: neither image nor content (it stands in 2 lists)", False)
    assert [row.row for row in bad.found if row.left_out] == [1, 2, 3, 4]


def test_a_row_without_a_wrong_candidate_left_is_left_out(tmp_path):
    """It would count as a hit."""
    bad = BadRows("skip")
    write_eval(tmp_path, "mine", ("one", "", ["a", ""], ["", ""]), ("two", "", ["a", "b"], ["", ""]))
    (found,) = read_eval(tmp_path, bad=bad)
    assert [found.inputs[i].text for i in found.queries] == ["two"]
    assert bad.found == [BadRow("mine", 0, "candidate: neither image nor content (no wrong one is left)")]


def test_two_uploads_of_a_split_are_not_mixed(tmp_path):
    write_eval(tmp_path, "mine", ("one", "", ["a", "b"], ["", ""]))
    (new,) = (tmp_path / "mine").iterdir()
    shutil.copy(new, new.with_name("test-00000-of-00002.parquet"))
    shutil.copy(new, new.with_name("test-00001-of-00002.parquet"))
    with pytest.raises(CocoaError, match=r"'test' is there more than once \(test-\*-of-00001.*remove the older files"):
        read_eval(tmp_path)


def test_a_data_set_of_bad_rows_alone_is_an_error_even_where_they_are_skipped(tmp_path):
    write_eval(tmp_path, "mine", ("q", "", [], []), ("", "", ["a"], [""]))
    with pytest.raises(CocoaError, match="data set mine: no usable row"):
        read_eval(tmp_path, bad=BadRows("skip"))
    with pytest.raises(CocoaError, match="on-bad-row 'drop': choose error or skip"):
        BadRows("drop")


# ------------------------------------------------------------------------------ VLM2Vec's plain form


def test_the_reference_style_keeps_texts_as_they_stand(photo_data):
    (found,) = read_eval(photo_data / "MMEB-eval", ["ImageNet-1K"], prompt_style="reference")
    assert found.inputs[found.queries[0]].text == "<|image_1|>\nRepresent the given image for classification\n"
    assert found.inputs[found.queries[0]].instruction == ""
    (edis,) = read_eval(photo_data / "MMEB-eval", ["EDIS"], prompt_style="reference")
    query = edis.inputs[edis.queries[0]]
    assert query.image is None and query.text.startswith("<|image_1|>\nFind a news image")  # its stray marker stays


@pytest.mark.parametrize(
    ("name", "split_form", "plain"),
    [
        # query: instruction, text, image; target: instruction, text, image; then both as the plain form has them
        (
            "ImageNet-1K",
            ("<|image_1|>\nRepresent it", "", "q.jpg", "", "cat\n", ""),
            ("<|image_1|>\nRepresent it\n", "cat\n"),
        ),
        (
            "OK-VQA",
            ("<|image_1|>\nAnswer:", "What? ", "q.jpg", "", "cat", ""),
            ("<|image_1|>\nAnswer: What?\n", "cat"),
        ),
        (
            "VisDial",
            ("Dialogue:", "Q:a\nA:b", "", "<|image_1|>\nShow it", "", "t.jpg"),
            ("Dialogue: Q:a\nA:b\n\n", "<|image_1|>\nShow it\n"),
        ),
        (
            "EDIS",
            ("<|image_1|>\nFind:", "news", "", "<|image_1|>\nShow:", "headline", "t.jpg"),
            ("<|image_1|>\nFind: news\n", "<|image_1|>\nShow: headline\n"),
        ),
        (
            "MSCOCO",
            ("<|image_1|>\nCrop:", '"dog"', "q.jpg", "<|image_1|>\nShow the crop", "", "t.jpg"),
            ('<|image_1|>\nCrop: "dog"\n', "<|image_1|>\nShow the crop"),
        ),
    ],
)
def test_the_split_form_is_joined_as_the_reference_does(tmp_path, name, split_form, plain):
    """By VLM2Vec's evaluation code: what its plain form says, whatever the form on disk."""
    query_said, query, query_image, target_said, target, target_image = split_form
    columns = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")
    row = (query_said, query, query_image, target_said, [target], [target_image])
    write_eval(tmp_path / "split", name, row, columns=columns)
    write_eval(tmp_path / "plain", name, (plain[0], query_image, [plain[1]], [target_image]))
    for form in ("split", "plain"):
        (found,) = read_eval(tmp_path / form, prompt_style="reference")
        sides = found.inputs[found.queries[0]], found.inputs[found.candidates[0][0]]
        assert tuple(side.text for side in sides) == plain
