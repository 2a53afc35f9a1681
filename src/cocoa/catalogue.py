"""The tables of data sets (`data/mmeb.yaml`, `scenes.yaml`): their instructions, and which content feeds a stage.

`make_side` is the one place that tells instruction from content, for training and evaluation rows alike, so
that equal texts render equally; `stage_rows` is what a reconstruction stage calls. A data set that is in
neither is read with all their instructions known, and every other text in it is content.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import yaml

from cocoa.inputs import IMAGE_MARKER
from cocoa.pairs import ContentPair, Pair, Side, Turn, content_pairs

TABLES = ("mmeb", "scenes")
"""`data/<table>.yaml`: MMEB's 36 data sets, and those of the embedded world."""
CONTENT = "{text}"


@dataclass(frozen=True, slots=True)
class MMEBDataset:
    """One row of the table; the fields are explained in `data/mmeb.yaml`."""

    name: str
    meta_task: str
    ood: bool = False
    train_name: str = ""
    query: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    joint_reconstruction: str = "off"
    eos_bridge: str = "off"
    query_end: str = "\n"
    target_end: str = "\n"


def datasets(table: str = "mmeb") -> dict[str, MMEBDataset]:
    """The data sets of a table by their name in MMEB-eval, in its order: the 36 of MMEB-V1, or `scenes`."""
    return _read_table(table)


@cache  # not on `datasets`: with and without the default it would hold two copies
def _read_table(table: str) -> dict[str, MMEBDataset]:
    rows = yaml.safe_load(resources.files("cocoa").joinpath(f"data/{table}.yaml").read_text(encoding="utf-8"))
    for row in rows:
        row.update({side: tuple(row.get(side, ())) for side in ("query", "target")})
    return {row["name"]: MMEBDataset(**row) for row in rows}


def find_dataset(name: str) -> MMEBDataset | None:
    """The data set of this name in a table, spelled as in MMEB-eval or MMEB-train; None if it is in none."""
    for entry in (entry for table in TABLES for entry in datasets(table).values()):
        if name in (entry.name, entry.train_name):
            return entry
    return None


def scored_name(name: str) -> str:
    """A data set's name as it is scored: as in MMEB-eval, whichever spelling is given; of one in no table, itself."""
    entry = find_dataset(name)
    return entry.name if entry else name


def known_instructions() -> tuple[str, ...]:
    """Every instruction of the tables."""
    entries = (entry for table in TABLES for entry in datasets(table).values())
    return tuple(sorted({text for entry in entries for text in entry.query + entry.target}))


def split_instruction(text: str, instructions: Iterable[str]) -> tuple[str, str] | None:
    """Splits a text as it stands in the data into instruction and content, or None where no instruction fits.

    The image marker and outer whitespace are not part of either. The longest instruction that fits is taken;
    one without `{text}` fits only the whole text, a full stop more or less at its end aside (and is returned
    as it stands there).
    """
    text = clean(text)
    for instruction in sorted(instructions, key=len, reverse=True):
        prefix = instruction.removesuffix(CONTENT).rstrip()
        if not instruction.endswith(CONTENT):
            if text.rstrip(".") == prefix.rstrip("."):
                return text, ""
        elif text.startswith(prefix):
            content = text[len(prefix) :]
            if not (prefix[-1].isalnum() and content[:1].isalnum()):
                return prefix, content.strip()
    return None


def clean(text: str | None) -> str:
    """The text without image markers (MMEB puts one into some text-only queries too) and outer whitespace."""
    return (text or "").replace(IMAGE_MARKER, "").strip()


def make_side(text: str | None, image: str | None, instructions: tuple[str, ...], known: bool) -> Side:
    """A side from a text as it stands in the data.

    Args:
        text: instruction and content in one.
        image: the file's path.
        instructions: what this side of the data set may say; none for a side whose text is all content.
        known: the data set is in a table. There a text without a known instruction is a paraphrase of one
            (split `diverse_instruction`). It is an instruction as a whole where the content is the image
            alone; else it stays whole in `text`, marked as not to be rebuilt. Elsewhere it is content.
    """
    whole, path = clean(text), image or None
    split = split_instruction(whole, instructions) if whole and instructions else None
    if split is not None:
        instruction, content = split
        return Side(sys.intern(instruction), content, path)  # a million rows say the same
    if not (known and whole and instructions):
        return Side(text=whole, image=path)
    if path and not any(instruction.endswith(CONTENT) for instruction in instructions):
        return Side(instruction=sys.intern(whole), image=path)
    return Side(text=whole, image=path, text_is_content=False)


def reference_text(instruction: str, text: str, shown: bool, end: str) -> str:
    """Instruction and text of the split form of MMEB-eval as VLM2Vec joins them, which is what its plain form says.

    Args:
        instruction: as it stands in the data, markers included; empty in the plain form, whose texts stay as they are.
        text: as it stands in the data.
        shown: the side has an image.
        end: what this data set's sides end in.
    """
    if not instruction:
        return text
    if not shown:
        return f"{instruction} {text}{end}"
    said = instruction.replace(IMAGE_MARKER, "").strip()
    return f"{IMAGE_MARKER}\n{said} {text}".rstrip(" ").replace(" \n", "\n") + end


def instructions_of(name: str) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Is the data set in a table, and what may its queries and targets say?"""
    entry = find_dataset(name)
    if entry is None:
        return False, known_instructions(), known_instructions()
    return True, entry.query, entry.target


TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")


def pair_reader(name: str, locate: Callable[[str], str]) -> Callable[[dict[str, Any], int], Pair | str]:
    """A function from (record with MMEB-train's columns, row number) to a pair, or to the reason for none.

    A hard negative that is an image without text (VisDial's are) gets the instruction of its row's target:
    without it, the missing instruction alone would tell negatives from targets.
    """
    known, queries, targets = instructions_of(name)

    def side(text: str | None, path: str | None, instructions: tuple[str, ...]) -> Side:
        return make_side(text, locate(path) if path else None, instructions, known)

    def to_pair(record: dict[str, Any], row: int) -> Pair | str:
        query = side(record.get("qry"), record.get("qry_image_path"), queries)
        target = side(record.get("pos_text"), record.get("pos_image_path"), targets)
        for what, read in (("query", query), ("target", target)):
            if read.image is None and not read.text:
                return f"empty {what}"
        texts, paths = _as_list(record.get("neg_text")), _as_list(record.get("neg_image_path"))
        negatives = []
        for index in range(max(len(texts), len(paths))):
            text, path = (items[index] if index < len(items) else None for items in (texts, paths))
            negative = side(text, path, targets)
            if negative.image is not None and not negative.prompt():
                negative = replace(negative, instruction=target.instruction)
            if negative.image is not None or negative.text:
                negatives.append(negative)
        return Pair(query, target, tuple(negatives), name, row)

    return to_pair


def _as_list(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else [value or ""]


R = TypeVar("R", ContentPair, Pair)


class StageRows(list[R]):
    """The rows that a stage trains on, and `left_out`: data set -> reason -> rows."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[str, Counter[str]] = {}


def stage_rows(pairs: Iterable[Pair], stage: str) -> StageRows[ContentPair]:
    """What `joint_reconstruction`, `eos_bridge` or `compression` rebuilds of these pairs, by each data set's rule.

    Data sets that are not in the table follow `auto`. The same image and text, which several data sets may
    share under other instructions, is kept once.
    """
    rows: StageRows[ContentPair] = StageRows()
    rules: dict[str, str] = {}
    seen: set[tuple[int | str, str, str, tuple[Turn, ...]]] = set()
    for pair in pairs:
        if pair.dataset not in rules:
            entry = find_dataset(pair.dataset)
            rules[pair.dataset] = getattr(entry, stage) if entry and stage != "compression" else "auto"
        content = content_pairs(pair, stage, rules[pair.dataset])
        if isinstance(content, ContentPair):
            image = content.side.image
            key = image if isinstance(image, str) else Side(image=image).content_id()
            what = (key, content.side.text, content.text, content.turns)
            if what not in seen:
                seen.add(what)
                rows.append(content)
                continue
            content = "same image and text as an earlier row"
        rows.left_out.setdefault(pair.dataset, Counter())[content] += 1
    return rows
