"""Files of pairs in every form that is read, a data set each.

JSONL, or a JSON list, of `{"query": {"text", "image", "instruction"}, "target": {...}}` and perhaps
`"negatives": [{...}]`, or `"dialogue": [{"question", "answer"}]` on the query's image, then with or without a target;
the two forms that the released CoCoA code reads, `image_path, caption` (stage 1) and `qry, qry_image_path, pos_text`
(stage 2); `image_path, dialogue` (CoMa), perhaps with a caption; parquet with any of these as columns; CSV with the
columns of `CSV_COLUMNS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cocoa.catalogue import NEGATIVE_COLUMNS, TRAIN_COLUMNS, pair_reader
from cocoa.errors import CocoaError
from cocoa.pairs import Pair, PairSet, Side, Turn
from cocoa.records import Broken, csv_records, json_records, parquet_records, read_text, refuse

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SIDE_KEYS = ("text", "image", "instruction")
CSV_COLUMNS = tuple(f"{side}_{key}" for side in ("query", "target") for key in SIDE_KEYS)


def read_file(path: str | Path, image_root: str | Path | None = None, broken: Broken = refuse) -> PairSet:
    """Reads one JSONL, JSON, CSV or parquet file; the data set is named by the file's stem.

    Args:
        path: the file.
        image_root: what image paths are relative to, and must not leave (which `check_images` sees to); by default
            the file's folder.
        broken: told about each row that is not of one of the forms, which is left out; by default an error.

    Raises:
        CocoaError: a row is not of one of the forms, or the file cannot be read; the message names file and line.
    """
    path = Path(path)
    root = os.path.abspath(image_root or path.parent)
    read = _csv_pairs if path.suffix == ".csv" else _json_pairs
    return PairSet(list(read(path, root, broken)), roots={path.stem: root})


def _csv_pairs(path: Path, root: str, broken: Broken) -> Iterator[Pair]:
    for line, where, record in csv_records(path, CSV_COLUMNS, broken):
        try:
            query, target = (
                _side({key: record.get(f"{name}_{key}") for key in SIDE_KEYS}, root, f"{where}, {name}")
                for name in ("query", "target")
            )
        except CocoaError as error:
            broken(line, error)
        else:
            yield Pair(query, target, (), path.stem, line)


def _json_pairs(path: Path, root: str, broken: Broken) -> Iterator[Pair]:
    mmeb_pair = pair_reader(path.stem, lambda image: os.path.join(root, image))
    for row, where, record in (parquet_records if path.suffix == ".parquet" else json_records)(path, broken):
        try:
            pair = json_pair(record, where, path.stem, row, root, mmeb_pair)
        except CocoaError as error:
            broken(row, error)
        else:
            yield pair


def json_pair(
    record: Any, where: str, dataset: str, row: int, root: str, mmeb_pair: Callable[[Any, int], Pair | str]
) -> Pair:
    """A record in any of the forms; the one of MMEB-train as `mmeb_pair` reads it."""
    if not isinstance(record, dict):
        raise CocoaError(f"{where}: not a JSON object; write one pair a line")
    keys = set(record)
    if keys & {"query", "target"}:
        _check_keys(record, ("query", "target", "negatives", "dialogue"), where)
        turns = read_turns(record.get("dialogue"), f"{where}, dialogue")
        query = _side(record.get("query"), root, f"{where}, query")
        spoken = turns and record.get("target") is None
        target = Side() if spoken else _side(record.get("target"), root, f"{where}, target")
        negatives = record.get("negatives") or []
        if not isinstance(negatives, list):
            raise CocoaError(f"{where}, negatives: not a list; write [{{...}}, ...]")
        others = tuple(_side(side, root, f"{where}, negatives") for side in negatives)
        return Pair(query, target, others, dataset, row, turns)
    if keys & {"image_path", "caption", "dialogue"}:
        _check_keys(record, ("image_path", "caption", "dialogue"), where)
        query = _side({"image": record.get("image_path")}, root, f"{where}, image_path")
        turns = read_turns(record.get("dialogue"), f"{where}, dialogue")
        spoken = not read_text(record, "caption", where) and turns
        target = Side() if spoken else _side({"text": record.get("caption")}, root, f"{where}, caption")
        return Pair(query, target, (), dataset, row, turns)
    _check_keys(record, (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS), where)
    for key in (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS):
        value = record.get(key)
        for each in value if key in NEGATIVE_COLUMNS and isinstance(value, list) else [value]:
            read_text({key: each}, key, where)
    pair = mmeb_pair(record, row)
    if isinstance(pair, str):
        raise CocoaError(f"{where}: {pair}: neither text nor image; fill it in or drop the row")
    return pair


def read_turns(value: Any, where: str) -> tuple[Turn, ...]:
    """A conversation, checked: every question and every answer is there."""
    if value is not None and not isinstance(value, list):
        raise CocoaError(f"{where}: not a list; write [{{question, answer}}, ...]")
    turns = []
    for number, turn in enumerate(value or (), 1):
        if not isinstance(turn, dict):
            raise CocoaError(f"{where}, turn {number}: not an object; write {{question, answer}}")
        _check_keys(turn, Turn._fields, f"{where}, turn {number}")
        said = Turn(*(read_text(turn, key, f"{where}, turn {number}") for key in Turn._fields))
        if not all(said):
            raise CocoaError(f"{where}, turn {number}: question or answer is empty; fill it in or drop the turn")
        turns.append(said)
    return tuple(turns)


def _side(value: Any, root: str, where: str) -> Side:
    if not isinstance(value, dict):
        raise CocoaError(f"{where}: not an object; write {{{', '.join(SIDE_KEYS)}}}, any of them left out")
    _check_keys(value, SIDE_KEYS, where)
    text, instruction = (read_text(value, key, where) for key in ("text", "instruction"))
    if isinstance(picture := value.get("image"), Image.Image):
        return Side(instruction, text, picture)
    image = read_text(value, "image", where)
    if not text and not image:
        raise CocoaError(f"{where}: neither text nor image; fill it in or drop the row")
    return Side(instruction, text, os.path.join(root, image) if image else None)


def _check_keys(record: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in record:
        if key not in known:
            raise CocoaError(f"{where}: unknown key {key!r}; the keys are {', '.join(known)}")
