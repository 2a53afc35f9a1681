"""Files of pairs that are damaged, or hold what no pair does, are refused by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cocoa.bad_rows import BadRows
from cocoa.errors import CocoaError
from cocoa.mmeb import read_train
from cocoa.mmeb_eval import read_eval_dataset
from cocoa.pair_files import read_file

LINES = {
    "nested": ("[" * 100_000, r"mine\.json: not JSON \(nested too deep\)"),
    "nested in a line": ('{"qry": ' * 100_000, r"line 1: not JSON \(nested too deep\)"),
    "digits": (f'{{"qry": {"9" * 5000}}}', r"line 1: not JSON \(Exceeds the limit \(4300 digits\)"),
    "surrogate": ('{"qry": "\\ud800", "pos_text": "a"}', r"line 1: qry is not Unicode \(character 0\)"),
    "surrogate in a path": ('{"image_path": "\\ud800", "caption": "a"}', r"line 1, image_path: image is not Unicode"),
    "negatives": (
        '{"qry": "a", "pos_text": "b", "neg_image_path": [{}]}',
        r"line 1: neg_image_path is of type dict, not text",
    ),
    "a negative": ('{"qry": "a", "pos_text": "b", "neg_text": 3}', r"line 1: neg_text is 3, not text"),
    "long value": (f'{{"qry": ["{"x" * 9000}"]}}', r"line 1: qry is of type list, not text; write text"),
}


@pytest.mark.parametrize("kind", LINES)
def test_what_json_may_say_and_no_pair_does_is_refused(kind, tmp_path):
    text, message = LINES[kind]
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(CocoaError, match=message):
        read_file(tmp_path / "mine.json")


def test_a_csv_field_that_is_too_long_is_named(tmp_path):
    (tmp_path / "mine.csv").write_text(f"query_text,target_text\na,b\na,{'x' * 140_000}\n")
    with pytest.raises(CocoaError, match=r"mine\.csv, line \d: not CSV \(field larger"):
        read_file(tmp_path / "mine.csv")


def damaged_page(content, layout):
    """The first data page's head overwritten; what is at the end of the file still reads."""
    return content[:4] + b"\xff" * 30 + content[34:]


def damaged_text(content, layout):
    return content.replace(b"somewhere", b"\x8fomewhere")


def damaged_name(content, layout):
    return content.replace(b"another", b"\x8fnother")


@pytest.mark.parametrize("damage", [damaged_page, damaged_text, damaged_name], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("layout", ["train", "eval"])
def test_damaged_parquet_is_named(damage, layout, tmp_path):
    train = {"qry": ["somewhere"], "qry_image_path": [""], "pos_text": ["b"], "pos_image_path": [""]}
    evaluated = {"qry_text": ["somewhere"], "qry_img_path": [""], "tgt_text": [["b"]], "tgt_img_path": [[""]]}
    table = pa.table({**(train if layout == "train" else evaluated), "another": [""]})
    shard = tmp_path / "mine" / f"{'original' if layout == 'train' else 'test'}-00000-of-00001.parquet"
    shard.parent.mkdir()
    pq.write_table(table, shard, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    shard.write_bytes(damage(shard.read_bytes(), layout))
    with pytest.raises(CocoaError, match=r"-00000-of-00001\.parquet: not "):
        if layout == "train":
            read_train(tmp_path)
        else:
            read_eval_dataset(tmp_path, "mine", "test", None, BadRows("skip"))
    if layout == "train":
        with pytest.raises(CocoaError, match=r"-00000-of-00001\.parquet: "):
            read_file(shard)
