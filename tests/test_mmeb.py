"""The table of the 36 data sets against the data as it is, and the readers of both MMEB layouts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from parquet_files import write

from cocoa.catalogue import (
    datasets,
    find_dataset,
    known_instructions,
    make_side,
    split_instruction,
    stage_rows,
)
from cocoa.errors import CocoaError
from cocoa.mmeb import read_train
from cocoa.pairs import CONTENT_STAGES, Pair, PairSet, Side

MARK = "<|image_1|>\n"
TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path")


@pytest.fixture
def train_pairs(photo_data: Path) -> PairSet:
    return read_train(photo_data / "MMEB-train")


# ------------------------------------------------------------------------------------------ the table


def test_the_table_holds_the_36_data_sets() -> None:
    table = datasets()
    assert len(table) == 36
    groups = Counter(entry.meta_task for entry in table.values())
    assert groups == {"Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4}
    assert sum(entry.ood for entry in table.values()) == 16
    assert find_dataset("ImageNet_1K") is find_dataset("ImageNet-1K") is table["ImageNet-1K"]
    assert find_dataset("mine") is None


def test_every_rule_is_one_of_the_known_ones() -> None:
    joint = {
        "off",
        "query_image + query_text",
        "query_image + target_text",
        "query_image + query_text + target_text",
        "target_image + query_text",
        "target_image + target_text",
    }
    bridge = {"off", "query -> target_text", "target -> query_text", "target -> target_text"}
    for entry in datasets().values():
        assert entry.joint_reconstruction in joint
        assert entry.eos_bridge in bridge
        if entry.ood:
            assert (entry.joint_reconstruction, entry.eos_bridge) == ("off", "off")
        for instruction in entry.query + entry.target:
            assert instruction == instruction.strip()
            assert "<|" not in instruction


# methods.md, "Which rows of MMEB-train feed which stage", written out once more
STAGES_OF = {
    "MSCOCO_i2t VisualNews_i2t": ("query_image + target_text", "query -> target_text"),
    "MSCOCO_t2i VisualNews_t2i VisDial": ("target_image + query_text", "target -> query_text"),
    "WebQA": ("target_image + target_text", "target -> target_text"),
    "N24News": ("query_image + query_text", "query -> target_text"),
    "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W": (
        "query_image + query_text + target_text",
        "query -> target_text",
    ),
    "ImageNet-1K VOC2007 SUN397 HatefulMemes": ("off", "query -> target_text"),
    "MSCOCO CIRR NIGHTS": ("off", "off"),
}


def test_the_rules_are_the_ones_we_decided() -> None:
    listed = {name: rules for names, rules in STAGES_OF.items() for name in names.split()}
    trained = {name: entry for name, entry in datasets().items() if not entry.ood}
    assert {name: (e.joint_reconstruction, e.eos_bridge) for name, e in trained.items()} == listed


# ------------------------------------------------------------------------------------------ instructions


@pytest.mark.parametrize(
    ("text", "instruction", "content"),
    [
        (f"{MARK}Ask: what?\n\n", "Ask:", "what?"),
        ("  Ask:\nQ:a\nA:b\n", "Ask:", "Q:a\nA:b"),  # inner whitespace stays
        ("Ask:what?", "Ask:", "what?"),
        ("Ask:", "Ask:", ""),
        ("Ask: politely: what?", "Ask: politely:", "what?"),  # the longest one
        ("Show it\n", "Show it", ""),
        (f"{MARK}Show it.", "Show it.", ""),
        ("Name the thing", "Name", "the thing"),
    ],
)
def test_split_instruction(text: str, instruction: str, content: str) -> None:
    known = ["Ask: {text}", "Ask: politely: {text}", "Show it.", "Name {text}"]
    assert split_instruction(text, known) == (instruction, content)


@pytest.mark.parametrize("text", ["Show it to me", "Tell: what?", "Names of things", ""])
def test_a_text_without_a_known_instruction_is_not_split(text: str) -> None:
    assert split_instruction(text, ["Ask: {text}", "Show it.", "Name {text}"]) is None


def test_an_unknown_instruction_is_never_content_in_the_36() -> None:
    carrying, alone = ("Ask: {text}",), ("Show it.",)
    whole = Side(text="Please tell: what?", text_is_content=False)
    assert make_side("Please tell: what?", None, carrying, known=True) == whole
    assert make_side("Depict it.", "/a.jpg", alone, known=True) == Side("Depict it.", "", "/a.jpg")
    assert make_side("a cat", None, (), known=True) == Side(text="a cat")  # text targets carry no instruction
    assert make_side("a cat", None, carrying, known=False) == Side(text="a cat")


# ------------------------------------------------------------------------------------------ MMEB-train


def test_photos_read_in_file_order(train_pairs: PairSet) -> None:
    counts = Counter(pair.dataset for pair in train_pairs.pairs)
    assert len(counts) == 14
    assert counts["VisualNews_i2t"] == 8  # two shards
    assert counts["MSCOCO_i2t"] == 34  # neither the other split nor the older file
    rows = [pair.row for pair in train_pairs.pairs if pair.dataset == "VisualNews_i2t"]
    assert rows == list(range(8))
    assert train_pairs.left_out == {"VisualNews_t2i": {"empty query": 1}}


@pytest.mark.parametrize(
    ("dataset", "query", "target"),
    [
        (
            "MSCOCO_i2t",
            ("Find an image caption describing the given everyday image.", ""),
            ("", "An astronaut in"),
        ),
        (
            "VisualNews_i2t",
            ("Find a caption for the news in the given photo.", ""),
            ("", "Eileen Collins sits"),
        ),
        (
            "MSCOCO_t2i",
            ("Find me an everyday image that matches the given caption:", "An astronaut"),
            "image",
        ),
        ("WebQA", ("Find a Wikipedia image that answers this question:", "How many towers"), None),
        ("VisDial", (None, "Q:is there a person\nA:yes, a woman\nQ:"), ("Represent the given image", "")),
        ("MSCOCO", (None, '"helmet"'), ("Represent the given cropped image of the object", "")),
        (
            "ImageNet_1K",
            ("Represent the given image for classification", ""),
            ("", "spacesuit, pressure suit, "),
        ),
        ("N24News", (None, "Eileen Collins sits"), ("", "Science")),
    ],
)
def test_each_form_is_split(train_pairs: PairSet, dataset: str, query: Any, target: Any) -> None:
    pair = next(pair for pair in train_pairs.pairs if pair.dataset == dataset)
    expected = ("Represent the given image.", "") if target == "image" else target
    for side, wanted in ((pair.query, query), (pair.target, expected)):
        if wanted is not None:
            instruction, start = wanted
            assert instruction is None or side.instruction == instruction
            assert side.text.startswith(start)
            assert bool(side.text) == bool(start)
        assert "<|image_1|>" not in side.prompt()
        assert side.text == side.text.strip()


def test_negatives(train_pairs: PairSet) -> None:
    by_set = {
        dataset: [p for p in train_pairs.pairs if p.dataset == dataset]
        for dataset in {p.dataset for p in train_pairs.pairs}
    }
    assert by_set["OK-VQA"][0].negatives == (Side(text="blue"),)
    assert not by_set["CIRR"][0].negatives  # the columns are missing
    assert not by_set["MSCOCO_i2t"][0].negatives  # the columns are empty
    (negative,) = by_set["VisDial"][0].negatives  # an image without text: it says what its target says
    assert negative.instruction == by_set["VisDial"][0].target.instruction == "Represent the given image"
    assert negative.image != by_set["VisDial"][0].target.image


def test_lists_of_negatives(tmp_path: Path) -> None:
    path = tmp_path / "MSCOCO_i2t" / "original-00000-of-00001.parquet"
    write(path, (*TRAIN, "neg_text", "neg_image_path"), ("q", "a.jpg", "t", "", ["n1", "n2"], ["", ""]))
    assert [side.text for side in read_train(tmp_path).pairs[0].negatives] == ["n1", "n2"]


def test_a_sample_is_a_seeded_subset_in_file_order(photo_data: Path) -> None:
    def rows(seed: int) -> list[int]:
        found = read_train(photo_data / "MMEB-train", subsets=["MSCOCO_i2t"], max_rows_per_subset=9, seed=seed)
        return [pair.row for pair in found.pairs]

    assert len(rows(0)) == 9
    assert rows(0) == sorted(rows(0)) == rows(0)
    assert rows(0) != rows(1)
    assert rows(0) != list(range(9))


def test_either_spelling_of_a_subset_is_found(photo_data: Path) -> None:
    found = read_train(photo_data / "MMEB-train", subsets="ImageNet-1K")
    assert [pair.dataset for pair in found.pairs] == ["ImageNet_1K"] * 10


def test_empty_rows_are_counted_by_reason(tmp_path: Path) -> None:
    instruction = "Find me an everyday image that matches the given caption:"
    write(
        tmp_path / "MSCOCO_t2i" / "original-00000-of-00001.parquet",
        TRAIN,
        (f"{instruction} a cat", "", f"{MARK}Represent the given image.", "a.jpg"),
        (f"{instruction}\n", "", f"{MARK}Represent the given image.", "a.jpg"),
        (f"{instruction} a dog", None, f"{MARK}Represent the given image.", ""),
        (None, None, None, None),
    )
    found = read_train(tmp_path)
    assert [pair.row for pair in found.pairs] == [0]
    assert found.left_out == {"MSCOCO_t2i": {"empty query": 2, "empty target": 1}}


def test_mistakes_name_what_is_there(tmp_path: Path, photo_data: Path) -> None:
    train = photo_data / "MMEB-train"
    with pytest.raises(CocoaError, match=r"CIRR: no split 'diverse_instruction' .* there are: original"):
        read_train(train, split="diverse_instruction", subsets=["CIRR"])
    with pytest.raises(CocoaError, match=r"no data set 'COCO' .* A-OKVQA, CIRR"):
        read_train(train, subsets=["COCO"])
    with pytest.raises(CocoaError, match="no such folder"):
        read_train(tmp_path / "gone")
    path = write(tmp_path / "a" / "original-00000-of-00001.parquet", ("qry", "qry_image_path"), ("q", ""))
    with pytest.raises(CocoaError) as error:
        read_train(tmp_path)
    assert f"{path}: no column pos_text, pos_image_path" in str(error.value)
    path.write_text("<html>")
    with pytest.raises(CocoaError, match="not a readable parquet file"):
        read_train(tmp_path)
    path.rename(tmp_path / "a" / "original-00001-of-00002.parquet")
    with pytest.raises(CocoaError, match=r"original-00000-of-00002\.parquet is missing"):
        read_train(tmp_path)


def test_a_folder_of_another_name_is_a_data_set_too(tmp_path: Path) -> None:
    row = ("Which hat is this?\n", "hats/a.jpg", f"{MARK}Represent the given image.\n", "hats/b.jpg")
    write(tmp_path / "hats" / "original-00000-of-00001.parquet", TRAIN, row)
    (pair,) = read_train(tmp_path, image_root="/pictures").pairs
    assert pair.query == Side(text="Which hat is this?", image="/pictures/hats/a.jpg")
    assert pair.target == Side("Represent the given image.", "", "/pictures/hats/b.jpg")  # known from the 36


# ---------------------------------------------------------------------------------- content alone is rebuilt


def prefixes() -> list[str]:
    return [text.removesuffix("{text}").strip(" .") for text in known_instructions()]


@pytest.mark.parametrize("stage", CONTENT_STAGES)
def test_no_instruction_is_ever_a_reconstruction_target(train_pairs: PairSet, stage: str) -> None:
    rows = stage_rows(train_pairs.pairs, stage)
    assert len(rows) > 80
    for row in rows:
        assert row.text
        assert not [prefix for prefix in prefixes() if prefix in row.text]
    if stage == "joint_reconstruction":
        assert all(row.side == Side(image=row.side.image) and row.side.image for row in rows)
    else:
        assert all(row.side.instruction and row.side.image for row in rows)
        assert all(row.text not in row.side.prompt() for row in rows if not row.dataset.endswith("VQA"))


@pytest.mark.parametrize("stage", CONTENT_STAGES)
def test_no_instruction_is_rebuilt_under_any_rule(train_pairs: PairSet, stage: str) -> None:
    """Even if every data set followed `auto`, or was named otherwise."""
    renamed = [Pair(pair.query, pair.target, (), "mine", i) for i, pair in enumerate(train_pairs.pairs)]
    rows = stage_rows(renamed, stage)
    assert len(rows) > 80
    assert not [row for row in rows for prefix in prefixes() if prefix in row.text]


@pytest.mark.parametrize("stage", CONTENT_STAGES)
def test_paraphrased_instructions_are_never_rebuilt(photo_data: Path, stage: str) -> None:
    names = ["MSCOCO_i2t", "MSCOCO_t2i", "OK-VQA", "WebQA"]
    pairs = read_train(photo_data / "MMEB-train", "diverse_instruction", names).pairs
    rows = stage_rows(pairs, stage)
    texts = {row.dataset: row.text for row in rows}
    assert texts["MSCOCO_i2t"] == "A ginger cat with green eyes looks to the side."
    assert rows.left_out["MSCOCO_t2i"] == {"instruction not recognised": 1}
    assert rows.left_out["WebQA"] == {"instruction not recognised": 2}
    if stage == "eos_bridge":  # what stands in block A may be a paraphrase
        assert texts["OK-VQA"] == "cat"
        assert rows[1].side.prompt() == "Look, then answer: What animal is this?"
    else:
        assert rows.left_out["OK-VQA"] == {"instruction not recognised": 1}
    one, two = (pair.target for pair in pairs if pair.dataset == "WebQA")
    assert one.image == two.image
    assert one.content_id() != two.content_id()


def test_rows_left_out_are_counted_by_reason(train_pairs: PairSet) -> None:
    rows = stage_rows(train_pairs.pairs, "joint_reconstruction")
    assert rows.left_out["CIRR"] == {"its data set is not for this stage": 6}
    assert rows.left_out["MSCOCO_t2i"] == {"same image and text as an earlier row": 8}
    assert len(rows) + sum(sum(reasons.values()) for reasons in rows.left_out.values()) == len(train_pairs)
    assert len({row.row_id for row in rows}) == len(rows)


def test_the_same_image_and_text_is_kept_once_under_two_instructions() -> None:
    image, caption = "/cat.jpg", "A cat."
    pairs = [
        Pair(Side("Find a caption", "", image), Side(text=caption), dataset="MSCOCO_i2t", row=1),
        Pair(Side("Find an image", caption), Side("Represent it.", "", image), dataset="MSCOCO_t2i", row=2),
        Pair(Side("Find an image", caption), Side("Represent it.", "", "/b.jpg"), dataset="MSCOCO_t2i", row=3),
    ]
    for stage in CONTENT_STAGES:
        assert [row.row_id for row in stage_rows(pairs, stage)] == ["MSCOCO_i2t/1", "MSCOCO_t2i/3"]


def test_webqa_bridges_the_image_to_its_own_text(train_pairs: PairSet) -> None:
    row = next(row for row in stage_rows(train_pairs.pairs, "eos_bridge") if row.dataset == "WebQA")
    assert row.side.prompt() == "Represent the given Wikipedia image with related text information:"
    assert row.text == "DSCOVR launch. Falcon 9 on the pad before lift-off."


@pytest.mark.parametrize("column", [*TRAIN[:4], "neg_text"])
def test_columns_of_another_type_are_named(tmp_path: Path, column: str) -> None:
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    row = [3 if name == column else "x" for name in columns]
    write(tmp_path / "a" / "original-00000-of-00001.parquet", columns, row)
    with pytest.raises(CocoaError, match=f"column {column} holds int64, not strings"):
        read_train(tmp_path)
