"""The reader of MMEB-eval in both of its forms: inputs, candidates, and rows that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parquet_files import PLAIN, write

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
    with pytest.raises(CocoaError, match=r"gone/a/x\.jpg: no such image file \(data set a, row 0\); 1 of 1"):
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


def test_candidates_are_not_lists(tmp_path: Path) -> None:
    write(tmp_path / "a" / "test-00000-of-00001.parquet", PLAIN, ("q", "", "a", ""))
    with pytest.raises(CocoaError, match="column tgt_text holds no lists"):
        read_eval(tmp_path)
