"""Files of pairs, parquet and text: mutated, and whole but with values that nobody expects in them."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import TEXTS, Kind, check_message, mutated
from hypothesis import strategies as st

from cocoa.bad_rows import BadRows
from cocoa.mmeb import read_train
from cocoa.mmeb_eval import read_eval_dataset
from cocoa.pair_files import CSV_COLUMNS, read_file
from cocoa.pairs import PairSet, Side, check_images

EVAL = {"qry_text": False, "qry_img_path": False, "tgt_text": True, "tgt_img_path": True}
SPLIT = {**EVAL, "qry_inst": False, "tgt_inst": False}
TRAIN = dict.fromkeys(("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"), False)
DIALOGUE = {"image_path": False, "caption": False}
LAYOUTS = {"eval": EVAL, "split": SPLIT, "train": TRAIN, "negatives": TRAIN | {"neg_text": True}, "file": DIALOGUE}
"""Columns by layout, and whether each holds lists."""


class Rows(NamedTuple):
    """A table of a layout: the columns as Arrow arrays."""

    layout: str
    columns: dict[str, pa.Array]


def parquet(columns: dict[str, pa.Array], **options: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content, **options)
    return content.getvalue()


@cache
def tables() -> dict[str, bytes]:
    """Valid parquet files by name, whose first word is the layout."""
    ways: list[dict[str, Any]] = [{"compression": how} for how in ("none", "snappy", "zstd", "gzip", "brotli", "lz4")]
    ways += [{"use_dictionary": False, "compression": "none"}, {"row_group_size": 7, "data_page_version": "2.0"}]
    ways += [{"use_dictionary": False, "compression": "none", "column_encoding": "DELTA_BYTE_ARRAY"}]
    ways += [{"write_page_index": True, "write_page_checksum": True, "version": "1.0", "store_schema": False}]
    found = {}
    for layout, kinds in LAYOUTS.items():
        columns = {}
        for name, many in kinds.items():
            words = [f"A/{i}.png" if "im" in name else f"{name} of row {i % 5}" for i in range(20)]
            columns[name] = pa.array([[word, "another"] for word in words] if many else words)
        for number, way in enumerate(ways):
            found[f"{layout} {number}"] = parquet(columns, **way)
    return found


text = st.sampled_from(TEXTS) | st.text(max_size=20)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | text | st.binary(max_size=9) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("text", "image", "a", "")), inner, max_size=3)
    ),
    max_leaves=6,
)


def arrow(values: list[Any]) -> pa.Array:
    """The values as Arrow has them; those of mixed types, and texts that are not Unicode, as strings of raw bytes."""
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        raw = [None if v is None else str(v).encode("utf-8", "surrogatepass") for v in values]
        return pa.array(raw, pa.binary()).cast(pa.string(), safe=False)


@st.composite
def odd_tables(draw: st.DrawFn) -> tuple[str, bytes]:
    """A whole file of a layout with columns of odd types and values, columns too many or missing."""
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    count = draw(st.sampled_from((0, 1, 2, 5)))
    columns: dict[str, pa.Array] = {}
    for name, many in LAYOUTS[layout].items():
        plain = st.lists(text | st.none(), max_size=3) if many else text
        value = draw(
            st.sampled_from((plain, plain, plain, plain | st.none(), text, st.lists(text), anything, st.none()))
        )
        column = arrow(draw(st.lists(value, min_size=count, max_size=count)))
        if draw(st.integers(0, 9)) == 0:
            column = column.dictionary_encode() if not pa.types.is_nested(column.type) else column
        if draw(st.integers(0, 19)):
            columns[name] = column
    if draw(st.integers(0, 9)) == 0:
        columns[draw(text.filter(lambda name: name.isprintable()))] = pa.nulls(count)
    try:
        return layout, parquet(columns)
    except pa.ArrowException:  # some types cannot be written
        return layout, tables()[f"{layout} 0"]


def read_table(case: tuple[str, bytes], folder: Path) -> None:
    """A file as a shard of its layout, and as a file of one's own."""
    layout, content = case[0].split()[0], case[1]
    evaluated = layout in ("eval", "split")
    shard = folder / "mine" / f"{'test' if evaluated else 'original'}-00000-of-00001.parquet"
    shard.parent.mkdir()
    shard.write_bytes(content)
    if evaluated:
        for style in ("cocoa", "reference"):
            dataset = read_eval_dataset(folder, "mine", "test", None, BadRows("skip"), style)
            usable(dataset.inputs)
        return
    try:
        if layout != "file":
            usable_pairs(read_train(folder, subsets=["mine"], max_rows_per_subset=3))
            usable_pairs(read_train(folder))
    finally:
        usable_pairs(read_file(shard))


def usable(sides: list[Side]) -> None:
    """What a stage does with every side first: its id, its prompt."""
    for side in sides:
        side.content_id()
        side.prompt().encode()


def usable_pairs(found: PairSet) -> None:
    usable([side for pair in found.pairs for side in pair.sides])
    for pair in found.pairs:
        "".join(part for turn in pair.dialogue for part in turn).encode()
    check_found(found)


def check_found(found: PairSet) -> None:
    """Image files are looked for; none of them is there."""
    from cocoa.errors import CocoaError

    try:
        check_images(found.pairs)
    except CocoaError as error:
        check_message(str(error))


def _records() -> dict[str, list[dict[str, Any]]]:
    side = {"text": "a cat", "image": "A/0.png", "instruction": "find"}
    turns = [{"question": "what?", "answer": "a cat"}]
    return {
        "pairs": [{"query": side, "target": {"text": "x"}, "negatives": [{"text": "y"}]}] * 3,
        "dialogue": [{"query": side, "dialogue": turns}, {"image_path": "A/0.png", "dialogue": turns, "caption": "c"}],
        "released": [
            {
                "qry": "q",
                "qry_image_path": "A/0.png",
                "pos_text": "p",
                "neg_text": ["n"],
                "neg_image_path": ["A/1.png"],
            },
            {"image_path": "a", "caption": "c"},
        ],
    }


@cache
def texts() -> dict[str, bytes]:
    """Valid files of pairs by name, which ends in their suffix."""
    found = {}
    for name, records in _records().items():
        found[f"{name}.jsonl"] = "\n".join(map(json.dumps, records)).encode()
        found[f"{name}.json"] = json.dumps(records, indent=1).encode("utf-8-sig")
    found["pairs.csv"] = (",".join(CSV_COLUMNS) + '\n"a, ""b""",A/0.png,find,p,,\nq,,,,A/1.png,i\n').encode()
    return found


@st.composite
def odd_records(draw: st.DrawFn) -> tuple[str, bytes]:
    """Records whose values are replaced, at any depth, and values that a parser stumbles over."""
    name = draw(st.sampled_from(sorted(_records())))
    records = json.loads(json.dumps(_records()[name]))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = records
        while True:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not (isinstance(node[key], (dict, list)) and node[key]) or draw(st.integers(0, 3)) == 0:
                break
            node = node[key]
        value = draw(anything | st.sampled_from(("DEEP", "DIGITS")))
        node[draw(text) if isinstance(node, dict) and draw(st.integers(0, 9)) == 0 else key] = value
    ascii_only = draw(st.booleans())
    lines = [json.dumps(record, ensure_ascii=ascii_only, default=str) for record in records]
    depth = draw(st.sampled_from((100, 5000, 100_000)))
    joined = "\n".join(lines) if draw(st.booleans()) else f"[{', '.join(lines)}]"
    joined = joined.replace('"DEEP"', "[" * depth + "]" * depth).replace('"DIGITS"', "9" * depth)
    return f"{name}.{draw(st.sampled_from(('json', 'jsonl')))}", joined.encode("utf-8", "surrogatepass")


@st.composite
def odd_csv(draw: st.DrawFn) -> tuple[str, bytes]:
    """Columns and fields of any text, some of it quoted, in some encoding."""
    header = (
        draw(st.lists(st.sampled_from(CSV_COLUMNS) | text, max_size=7)) if draw(st.booleans()) else list(CSV_COLUMNS)
    )
    field = (text | text.map(lambda t: '"' + t.replace('"', '""') + '"')) | st.just("x" * 140_000)
    rows = [header, *draw(st.lists(st.lists(field, min_size=len(header), max_size=len(header) + 1), max_size=3))]
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-16", "utf-8-sig")))
    ends = draw(st.sampled_from(("\n", "\r\n", "\r")))
    return "pairs.csv", ends.join(map(",".join, rows)).encode(encoding, "surrogatepass")


def read_text(case: tuple[str, bytes], folder: Path) -> None:
    path = folder / case[0]
    path.write_bytes(case[1])
    usable_pairs(read_file(path))


KINDS = {
    "parquet, bytes": Kind(mutated(tables), read_table),
    "parquet, values": Kind(odd_tables(), read_table),
    "JSON and CSV": Kind(mutated(texts) | odd_records() | odd_records() | odd_csv(), read_text),
}
