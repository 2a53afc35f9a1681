"""`cocoa validate`: what is found in folders of both layouts and in files of one's own, without a model."""

import json
import shutil

import pytest
from parquet_files import write, write_eval
from PIL import Image

from cocoa.data_check import check_data
from cocoa.errors import CocoaError

TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def test_the_photographs_are_whole_in_both_layouts(photo_data):
    evaluation = check_data(photo_data / "MMEB-eval")
    assert [report.name for report in evaluation if report.rows and report.images] == [r.name for r in evaluation]
    assert not any(report.bad or report.error for report in evaluation)
    train = {report.name: report for report in check_data(photo_data / "MMEB-train")}
    assert {report.split for report in train.values()} == {"original"}  # not older uploads, nor paraphrases
    assert train["VisualNews_t2i"].left_out == {"empty query": 1} and train["VisualNews_t2i"].rows == 7
    (paraphrased,) = check_data(photo_data / "MMEB-train", ["OK-VQA"], split="diverse_instruction")
    assert (paraphrased.rows, paraphrased.bad) == (1, [])


def test_missing_and_broken_images_are_listed_by_row(photo_data, tmp_path):
    shutil.copytree(photo_data / "MMEB-eval", tmp_path / "MMEB-eval")
    shutil.copytree(photo_data / "MMEB-train", tmp_path / "MMEB-train")
    images = tmp_path / "MMEB-eval" / "images" / "A-OKVQA"
    (images / "cat.jpg").write_bytes((images / "cat.jpg").read_bytes()[:1500])
    (images / "rocket.jpg").unlink()
    (report,) = check_data(tmp_path / "MMEB-eval", ["A-OKVQA"])
    assert report.rows == 6 and sorted(bad.reason.split(": ")[0] for bad in report.bad) == ["query", "query"]
    reasons = " ".join(bad.reason for bad in report.bad)
    assert "cat.jpg: not a readable image" in reasons and "rocket.jpg: no such image file" in reasons

    (tmp_path / "MMEB-train" / "images" / "A-OKVQA" / "Train" / "cat.jpg").write_bytes(b"")
    (report,) = check_data(tmp_path / "MMEB-train", "A-OKVQA")
    assert report.rows == 7
    assert [(bad.row, "cat.jpg: not an image" in bad.reason) for bad in report.bad] == [(1, True)]


def test_a_data_set_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    write_eval(tmp_path, "good", ("q", "", ["a"], [""]))
    write_eval(tmp_path, "hopeless", ("q", "", [], []))
    write_eval(tmp_path, "typed", (3, "", ["a"], [""]))
    write(tmp_path / "named" / "validation-00000-of-00001.parquet", TRAIN[:3], ("q", "", "a"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    found = {report.name: report for report in check_data(tmp_path)}
    assert "not a readable parquet file" in found["cut"].error
    assert (found["good"].rows, found["good"].error) == (1, "")
    assert "no usable row" in found["hopeless"].error and found["hopeless"].bad[0].row == 0
    assert "column qry_text holds int64" in found["typed"].error
    assert "no column pos_image_path" in found["named"].error and found["named"].split == "validation"


def test_a_file_has_no_parts(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(CocoaError, match="a file is one data set without splits; leave --subsets and --split out"):
        check_data(tmp_path / "mine.jsonl", split="test")


def test_a_file_of_ones_own_is_read_too(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "0.png")
    rows = [{"query": {"image": f"{i}.png"}, "target": {"text": "a square"}} for i in range(2)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (report,) = check_data(path)
    assert (report.name, report.rows, report.images) == ("mine", 1, 2)
    assert [(bad.row, "1.png: no such image file" in bad.reason) for bad in report.bad] == [(2, True)]
    path.write_text("{")
    (report,) = check_data(path)
    assert [(bad.row, "line 1: not JSON" in bad.reason) for bad in report.bad] == [(1, True)]
    with pytest.raises(CocoaError, match="no such folder"):
        check_data(tmp_path / "nowhere")
