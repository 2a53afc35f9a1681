"""What an evaluation leaves behind: flat score files, the leaderboard's JSON, and a table beside published numbers."""

import json

import pytest

from cocoa.catalogue import datasets
from cocoa.metrics import GROUPS
from cocoa.scores import MISSING, leaderboard, markdown, published, write_scores

ABOUT = {
    "model": "runs/mine/final",
    "model_hash": "abc",
    "split": "test",
    "data_hash": {"GQA": "123"},
    "image": {"tokens": [4, 576], "resize": "aspect"},
    "versions": {"torch": "2"},
    "facts": {"backbone": "Qwen/Qwen2-VL-2B-Instruct", "billions": 2.21, "dimension": 1536, "max_length": 32768},
}


def all_scores(hit=0.5):
    return {name: {"hit@1": hit, "num_data": 10} for name in datasets()}


def table_of(text):
    """The first table of a page: row's name -> cells by group."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = rows[: next((i for i, row in enumerate(rows) if row[0].strip() == "data set"), len(rows))]
    groups = [cell.strip() for cell in rows[0][1:]]
    assert tuple(groups) == GROUPS
    return {row[0].strip(): dict(zip(groups, (c.strip() for c in row[1:]), strict=True)) for row in rows[2:]}


def test_score_files_are_flat_and_say_what_they_are_of(tmp_path):
    write_scores(tmp_path, {"GQA": {"hit@1": 0.25, "num_data": 4}, "mine": {"hit@1": 1.0}}, ABOUT)
    found = json.loads((tmp_path / "GQA_score.json").read_text())
    assert found == {
        "hit@1": 0.25,
        "num_data": 4,
        "about": {key: value for key, value in ABOUT.items() if key != "facts"} | {"data_hash": "123"},
    }
    assert "data_hash" not in json.loads((tmp_path / "mine_score.json").read_text())["about"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["image"] == ABOUT["image"] and summary["datasets"] == {"GQA": 25, "mine": 100}


def test_rows_left_out_and_candidates_gone_are_told_apart(tmp_path):
    bad = [
        {"dataset": "GQA", "row": 3, "reason": "query: no such image file", "left_out": True},
        {"dataset": "GQA", "row": 5, "reason": "candidate: not an image", "left_out": False},
    ]
    write_scores(tmp_path, {"GQA": {"hit@1": 0.25, "num_data": 4}}, ABOUT | {"bad_rows": bad})
    text = (tmp_path / "table.md").read_text()
    assert "leave out 1 row that could not be used:\n\n- GQA, row 3: query: no such image file\n" in text
    assert "1 wrong candidate could not be used, and left the lists:\n\n- GQA, row 5: candidate: not an image\n" in text


def test_the_leaderboard_gets_all_36_and_a_sign_for_what_is_missing():
    found = leaderboard({"GQA": {"hit@1": 0.25}, "mine": {"hit@1": 1.0}}, ABOUT)
    metadata, images = found["metadata"], found["metrics"]["image"]
    assert list(images) == list(datasets()) and len(images) == 36
    assert images["GQA"] == {"hit@1": 0.25} and images["ChartQA"] == MISSING == "FILE_N/A"
    assert (found["metrics"]["video"], found["metrics"]["visdoc"]) == ({}, {})
    assert metadata["model_name"] == "mine/final" and metadata["data_source"] == "Self-Reported"
    assert (metadata["model_size"], metadata["embedding_dimension"], metadata["max_length_tokens"]) == (
        2.21,
        1536,
        32768,
    )


def test_published_numbers_are_those_of_the_paper():
    found = {row["model"]: row for row in published()}
    assert len(found) == 16
    cocoa = found["CoCoA Qwen2-VL 2B"]
    assert [cocoa[group] for group in GROUPS] == [63.0, 57.4, 69.6, 85.8, 70.2, 60.7, 66.0]
    assert all(set(row) <= {"model", *GROUPS} and "All" in row for row in found.values())


def test_a_whole_run_stands_beside_published_numbers_with_the_gap(tmp_path):
    table = table_of(markdown(write_scores(tmp_path, all_scores(), ABOUT)))
    assert set(table["**this model**"].values()) == {"**50.0**"}
    assert table["CoCoA Qwen2-VL 2B"]["All"] == "66.0 (-16.0)"
    assert table["CLIP ViT-L"]["VQA"] == "19.7 (+30.3)"
    assert table["GME Qwen2-VL 2B"]["IND"] == "-"  # not published


def test_an_average_over_fewer_sets_is_marked_and_compared_with_nothing(tmp_path):
    scores = all_scores()
    del scores["GQA"]
    text = markdown(write_scores(tmp_path, scores, ABOUT))
    table = table_of(text)
    assert table["**this model**"] == {
        group: "**50.0**\\*" if group in ("VQA", "OOD", "All") else "**50.0**" for group in GROUPS
    }
    row = table["CoCoA Qwen2-VL 2B"]
    assert (row["All"], row["VQA"], row["Retrieval"]) == ("66.0", "57.4", "69.6 (-19.6)")
    assert "All: 35 of 36 data sets; missing: GQA" in text and "VQA: 9 of 10" in text


@pytest.mark.parametrize("names", [["mine"], list(datasets("scenes"))])
def test_what_is_not_mmeb_is_not_compared_with_it(tmp_path, names):
    text = markdown(write_scores(tmp_path, {name: {"hit@1": 0.5} for name in names}, ABOUT))
    assert "CoCoA" not in text and f"| {names[0]} | 50.0 |" in text
    assert ("missing" in text, "**this model**" in text) == (False, names != ["mine"])
