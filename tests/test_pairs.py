"""The record, what of it feeds which stage, the split for validation, and the files of `data.train`."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cocoa.catalogue import stage_rows
from cocoa.errors import CocoaError
from cocoa.pair_files import read_file
from cocoa.pairs import ContentPair, Pair, Side, Turn, check_images, content_pairs, hold_out
from cocoa.sources import DataConfig, load_pairs

CAT = Side("Say what it is.", "a cat?", "/cat.jpg")
DOG = Side("Show it.", "a dog", "/dog.jpg")
ASK = Side("Find it:", "a cat")
ANSWER = Side("", "yes, a cat")
BARE = Side("Show it.", "", "/dog.jpg")


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ content_pairs


@pytest.mark.parametrize(
    ("query", "target", "image", "text"),
    [
        (CAT, ANSWER, "/cat.jpg", "a cat? yes, a cat"),  # visual question answering
        (dataclasses.replace(CAT, text=""), ANSWER, "/cat.jpg", "yes, a cat"),  # captioning
        (ASK, BARE, "/dog.jpg", "a cat"),  # text to image
        (ASK, DOG, "/dog.jpg", "a dog"),  # text to image with a text of its own
    ],
)
def test_auto_joint_reconstruction_takes_the_text_that_belongs_to_the_image(
    query: Side, target: Side, image: str, text: str
) -> None:
    found = content_pairs(Pair(query, target, dataset="mine", row=3), "joint_reconstruction")
    assert found == ContentPair(Side(image=image), text, "mine/3")


@pytest.mark.parametrize(
    ("query", "target", "block_a", "block_b"),
    [
        (CAT, ANSWER, CAT, "yes, a cat"),
        (ASK, BARE, BARE, "a cat"),  # swapped
        (ASK, DOG, DOG, "a cat"),  # swapped; the target's own text stays in A
        (CAT, DOG, CAT, "a dog"),
    ],
)
def test_auto_bridge_goes_from_the_side_with_an_image_to_the_other_sides_text(
    query: Side, target: Side, block_a: Side, block_b: str
) -> None:
    found = content_pairs(Pair(query, target), "eos_bridge")
    assert isinstance(found, ContentPair)
    assert (found.side, found.text) == (block_a, block_b)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("query_image + target_text", "a dog"),
        ("query_image + query_text", "a cat?"),
        ("query_image + query_text + target_text", "a cat? a dog"),
    ],
)
def test_joint_reconstruction_rules(rule: str, text: str) -> None:
    found = content_pairs(Pair(CAT, DOG), "joint_reconstruction", rule)
    assert isinstance(found, ContentPair)
    assert (found.side, found.text) == (Side(image="/cat.jpg"), text)


def test_a_bridge_within_one_side_keeps_only_image_and_instruction_in_block_a() -> None:
    found = content_pairs(Pair(ASK, DOG), "eos_bridge", "target -> target_text")
    assert isinstance(found, ContentPair)
    assert (found.side, found.text) == (Side("Show it.", "", "/dog.jpg"), "a dog")


@pytest.mark.parametrize(
    ("pair", "stage", "rule", "reason"),
    [
        (Pair(CAT, DOG), "joint_reconstruction", "auto", "both sides have an image"),
        (Pair(ASK, ANSWER), "joint_reconstruction", "auto", "no image"),
        (Pair(ASK, ANSWER), "eos_bridge", "auto", "no image"),
        (Pair(ASK, ANSWER), "joint_reconstruction", "query_image + target_text", "no image"),
        (Pair(CAT, BARE), "eos_bridge", "auto", "no content text"),
        (Pair(Side("Find it:"), BARE), "joint_reconstruction", "auto", "no content text"),
        (Pair(CAT, ANSWER), "eos_bridge", "off", "its data set is not for this stage"),
        (
            Pair(Side(text="Seek a cat", text_is_content=False), BARE),
            "eos_bridge",
            "target -> query_text",
            "instruction not recognised",
        ),
    ],
)
def test_a_row_that_gives_nothing_says_why(pair: Pair, stage: str, rule: str, reason: str) -> None:
    assert content_pairs(pair, stage, rule) == reason


def test_a_stage_that_rebuilds_nothing_has_no_content_pairs() -> None:
    with pytest.raises(ValueError, match="contrastive"):
        content_pairs(Pair(CAT, ANSWER), "contrastive")


def test_content_id_tells_targets_of_an_unknown_instruction_apart() -> None:
    one, two = (Side(text=f"Embed this: {note}", image="/cat.jpg", text_is_content=False) for note in "ab")
    assert one.content_id() != two.content_id()
    assert one.prompt() == "Embed this: a"


# ------------------------------------------------------------------------------------------ hold_out, images


def numbered(dataset: str, count: int) -> list[Pair]:
    return [Pair(Side(text=f"q{i}"), Side(text=f"t{i}"), dataset=dataset, row=i) for i in range(count)]


def test_hold_out_takes_rows_of_each_data_set_but_at_most_a_fifth() -> None:
    pairs = numbered("large", 100) + numbered("small", 14) + numbered("tiny", 4)
    train, validation = hold_out(pairs, 10, seed=1)
    assert Counter(pair.dataset for pair in validation) == {"large": 10, "small": 2}
    assert [p for p in pairs if p in set(train)] == train
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == len(pairs)
    assert hold_out(pairs, 0, seed=1) == (pairs, [])


def test_hold_out_depends_on_the_seed_alone() -> None:
    pairs = numbered("a", 60)
    mixed = pairs + numbered("b", 30)
    random.Random(0).shuffle(mixed)
    held = set(hold_out(pairs, 8, seed=1)[1])
    assert {pair for pair in hold_out(mixed, 8, seed=1)[1] if pair.dataset == "a"} == held
    assert set(hold_out(pairs, 8, seed=2)[1]) != held


def test_hold_out_never_validates_on_the_content_of_a_training_row() -> None:
    doubled = numbered("a", 50)
    doubled += [dataclasses.replace(pair, row=pair.row + 50) for pair in doubled]
    train, validation = hold_out(doubled, 10, seed=3)
    trained = {pair.target.text for pair in train}
    assert all(pair.target.text not in trained for pair in validation)
    assert len(train) + len(validation) == 100


def test_check_images_names_the_first_missing_file_and_how_many(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "there.png")
    there, gone, nowhere = (str(tmp_path / name) for name in ("there.png", "gone.png", "no/folder.png"))
    check_images([Pair(Side(image=there), Side(image=Image.new("RGB", (2, 2))))])
    pairs = [Pair(Side(image=there), Side(text="x"), dataset="d", row=0)]
    pairs += [Pair(Side(image=there), Side(text="x"), (Side(image=gone),), dataset="d", row=7)]
    pairs += [Pair(Side(image=gone), Side(image=nowhere), dataset="d", row=8)]
    with pytest.raises(CocoaError) as error:
        check_images(pairs)
    assert gone in str(error.value)
    assert "data set d, row 7" in str(error.value)
    assert "2 files are missing" in str(error.value)


# ------------------------------------------------------------------------------------------ files


def test_own_pairs_from_jsonl(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "mine.jsonl",
        {"query": {"text": "a", "instruction": "Find:"}, "target": {"image": "x/b.jpg"}},
        {
            "query": {"image": "/abs.jpg"},
            "target": {"text": "t"},
            "negatives": [{"text": "n"}, {"image": "m.jpg"}],
        },
    )
    first, second = read_file(path).pairs
    assert first == Pair(Side("Find:", "a"), Side(image=str(tmp_path / "x/b.jpg")), (), "mine", 1)
    assert second.query.image == "/abs.jpg"
    assert second.negatives == (Side(text="n"), Side(image=str(tmp_path / "m.jpg")))
    assert read_file(path, image_root="/pictures").pairs[0].target.image == "/pictures/x/b.jpg"


@pytest.mark.parametrize("as_list", [True, False])
def test_the_two_forms_of_the_released_code(tmp_path: Path, as_list: bool) -> None:
    def write(name: str, record: dict[str, str]) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps([record], indent=1) if as_list else json.dumps(record) + "\n")
        return path

    stage1 = read_file(write("one.json", {"image_path": "a.jpg", "caption": "A cat. "})).pairs
    assert stage1 == [Pair(Side(image=str(tmp_path / "a.jpg")), Side(text="A cat."), (), "one", 1)]
    question = "<|image_1|>\nRepresent the given image with the following question: What is it?\n"
    record = {"qry": question, "qry_image_path": "a.jpg", "pos_text": "a cat"}
    (stage2,) = read_file(write("two.json", record)).pairs
    assert stage2.query == Side(question[12:-13].strip(), "What is it?", str(tmp_path / "a.jpg"))
    assert stage2.target == Side(text="a cat")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["query_text", "query_image", "target_text", "target_instruction"])
        writer.writerow(["", "a.jpg", 'a "quoted", text\nof two lines', "Read:"])
        writer.writerow(["b", "", "c", ""])
    first, second = read_file(path).pairs
    assert first.query == Side(image=str(tmp_path / "a.jpg"))
    assert first.target == Side("Read:", 'a "quoted", text\nof two lines')
    assert (second.query.text, second.target.text, second.dataset) == ("b", "c", "mine")


GOOD = {"query": {"text": "a"}, "target": {"text": "b"}}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"query": {"text": "a"', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"query": {"text": "a"}, "target": {"text": " "}}, "target: neither text nor image"),
        ({"query": {"text": "a"}}, "target: not an object"),
        ({**GOOD, "negative": []}, "unknown key 'negative'"),
        ({**GOOD, "negatives": {"text": "a"}}, "negatives: not a list"),
        ({**GOOD, "query": {"txt": "a"}}, "unknown key 'txt'"),
        ({**GOOD, "query": {"text": 3}}, "text is 3"),
        ({"image_path": "a.jpg", "captions": ["a"]}, "unknown key 'captions'"),
        ({"image_path": "a.jpg", "caption": ""}, "caption: neither text nor image"),
        ({"qry": "a", "qry_image_path": "", "pos_text": ""}, "empty target"),
        ({"prompt": "a"}, "unknown key 'prompt'"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, bad: Any, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{bad if isinstance(bad, str) else json.dumps(bad)}\n")
    with pytest.raises(CocoaError) as error:
        read_file(path)
    assert str(error.value).startswith(f"{path}, line 3")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("query_text,target\na,b\n")
    with pytest.raises(CocoaError, match="unknown column 'target'"):
        read_file(path)
    path.write_text("query_text,target_text\na,b\nc,\n")
    with pytest.raises(CocoaError, match=r"mine\.csv, line 3, target: neither text nor image"):
        read_file(path)
    path.write_text("query_text,target_text\na,b,c\n")
    with pytest.raises(CocoaError, match=r"line 2: more fields than columns"):
        read_file(path)
    path.write_bytes(b"query_text,target_text\na,\xff\n")
    with pytest.raises(CocoaError, match="not UTF-8"):
        read_file(path)


# ------------------------------------------------------------------------------------------ load_pairs


def test_a_list_of_sources_is_concatenated(tmp_path: Path, photo_data: Path) -> None:
    record = {**GOOD, "negatives": [{"text": "n1"}, {"text": "n2"}]}
    mine = jsonl(tmp_path / "mine.jsonl", *[record] * 8)
    config = DataConfig([str(mine), str(photo_data / "MMEB-train")], subsets=["mine", "VisDial", "VisualNews_t2i"])
    found = load_pairs(config, seed=0)
    assert list(Counter(pair.dataset for pair in found.pairs).items()) == [
        ("mine", 8),
        ("VisDial", 6),
        ("VisualNews_t2i", 7),
    ]
    assert found.left_out == {"VisualNews_t2i": {"empty query": 1}}
    assert not any(pair.negatives for pair in found.pairs)
    kept = load_pairs(dataclasses.replace(config, hard_negatives=1), seed=0)
    assert [len(pair.negatives) for pair in kept.pairs] == [1] * 14 + [0] * 7
    assert kept.pairs[0].negatives[0].text == "n1"


def test_a_sample_is_decided_by_the_seed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", *[GOOD] * 40)

    def rows(seed: int) -> list[int]:
        return [pair.row for pair in load_pairs(DataConfig(str(path), max_rows_per_subset=10), seed).pairs]

    assert len(rows(0)) == 10
    assert rows(0) == sorted(rows(0)) == rows(0)
    assert rows(0) != rows(1)


def test_a_dialogue_stands_beside_an_image(tmp_path: Path) -> None:
    turns = [{"question": "what is red?", "answer": "the cup."}, {"question": "how many?", "answer": "two"}]
    rows = [
        {"image_path": "a.png", "caption": None, "dialogue": turns},
        {"image_path": "b.png", "caption": "a cup", "dialogue": None},
        {"image_path": "c.png", "caption": "a cat", "dialogue": turns[:1]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "talks.parquet")
    jsonl(tmp_path / "talks.jsonl", *rows)
    read = read_file(tmp_path / "talks.parquet").pairs
    assert read == read_file(tmp_path / "talks.jsonl").pairs
    assert [pair.row for pair in read] == [1, 2, 3]
    assert read[0].dialogue == (Turn("what is red?", "the cup."), Turn("how many?", "two"))
    assert [pair.target for pair in read] == [Side(), Side(text="a cup"), Side(text="a cat")]
    found = stage_rows(read, "compression")
    assert [(row.side.image, row.turns) for row in found] == [
        (str(tmp_path / "a.png"), read[0].dialogue),
        (str(tmp_path / "c.png"), read[2].dialogue),
    ]
    assert found.left_out == {"talks": {"no dialogue": 1}}
    assert [row.text for row in stage_rows(read, "joint_reconstruction")] == ["a cup", "a cat"]


def test_a_dialogue_stands_beside_a_query_with_text(tmp_path: Path) -> None:
    turns = [{"question": "what is red?", "answer": "the cup"}]
    query = {"text": "a note", "image": "a.png"}
    path = jsonl(
        tmp_path / "talks.jsonl",
        {"query": query, "dialogue": turns},
        {"query": query | {"image": "b.png"}, "target": {"text": "a cup"}, "dialogue": turns},
    )
    first, second = read_file(path).pairs
    assert (first.query.text, first.target, first.dialogue) == ("a note", Side(), (Turn("what is red?", "the cup"),))
    assert second.target == Side(text="a cup") and second.dialogue == first.dialogue
    assert [row.side.text for row in stage_rows([first, second], "compression")] == ["a note", "a note"]


@pytest.mark.parametrize(
    ("dialogue", "said"),
    [
        ("what is red?", "line 1, dialogue: not a list"),
        (["what is red?"], "line 1, dialogue, turn 1: not an object"),
        ([{"question": "what is red?"}], "line 1, dialogue, turn 1: question or answer is empty"),
        ([{"question": "what is red?", "reply": "it"}], "unknown key 'reply'"),
        ([], "neither text nor image"),
    ],
)
def test_a_broken_dialogue_is_named(tmp_path: Path, dialogue: object, said: str) -> None:
    with pytest.raises(CocoaError, match=re.escape(said)):
        read_file(jsonl(tmp_path / "talks.jsonl", {"image_path": "a.png", "dialogue": dialogue}))


def test_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "talks.parquet").write_text("no")
    with pytest.raises(CocoaError, match=r"talks\.parquet: not parquet"):
        read_file(tmp_path / "talks.parquet")


def test_mistakes_in_the_data_block(tmp_path: Path) -> None:
    mine = jsonl(tmp_path / "mine.jsonl", GOOD)
    (tmp_path / "notes.txt").write_text("")
    jsonl(tmp_path / "empty.jsonl")
    for config, said in [
        ({"train": str(tmp_path / "gone")}, "no such file or folder"),
        ({"train": str(tmp_path / "notes.txt")}, "not a file of .jsonl, .json, .csv, .parquet"),
        ({"train": str(tmp_path)}, "no data set in it"),
        ({"train": [str(mine), str(mine)]}, "'mine' is there twice"),
        ({"train": str(mine), "subsets": ["yours"]}, "no data set 'yours' (key `subsets`); there are mine"),
        ({"train": str(tmp_path / "empty.jsonl")}, "no usable row"),
        ({"train": []}, "data.train: empty"),
        ({"train": str(mine), "max_rows_per_subset": 0}, "data.max_rows_per_subset"),
        ({"train": str(mine), "validation_rows": -1}, "data.validation_rows"),
    ]:
        with pytest.raises(CocoaError) as error:
            load_pairs(DataConfig(**config), seed=0)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_pairs_know_nothing_of_their_readers() -> None:
    code = "import sys, cocoa.pairs; print({'datasets', 'pyarrow', 'cocoa.mmeb'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
