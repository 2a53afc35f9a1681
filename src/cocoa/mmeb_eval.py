"""The reader of MMEB-eval, in both of its forms: who is compared with whom, every distinct input once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cocoa.bad_rows import BadRows
from cocoa.catalogue import clean, find_dataset, instructions_of, make_side, reference_text, scored_name
from cocoa.errors import CocoaError
from cocoa.image_files import image_locator
from cocoa.mmeb import LISTS, list_subsets, read_split, select_subsets
from cocoa.pairs import Side

EVAL_COLUMNS = ("qry_inst", "qry_img_path", "tgt_inst", "tgt_img_path")


@dataclass(frozen=True, slots=True)
class EvalDataset:
    """One evaluation data set: every distinct input once, and who is compared with whom.

    Attributes:
        name: of the data set, as in MMEB-eval.
        inputs: the distinct sides, by (instruction, text, image).
        queries: (rows,) index into `inputs`.
        candidates: for each row the (candidates,) indices into `inputs`; the right one comes first, and an
            exact duplicate of it has the same index.
        numbers: (rows,) where each row stands in its file; None where all of them are here.
    """

    name: str
    inputs: list[Side]
    queries: np.ndarray
    candidates: list[np.ndarray]
    numbers: np.ndarray | None = None

    def number(self, row: int) -> int:
        """Where a row stands in its file."""
        return row if self.numbers is None else int(self.numbers[row])

    def first_rows(self) -> list[int]:
        """Where the first row that each input stands in stands in its file: (inputs,)."""
        found = np.zeros(len(self.inputs), np.int64)
        for row in reversed(range(len(self.queries))):
            found[self.candidates[row]] = found[self.queries[row]] = self.number(row)
        return found.tolist()

    def renumbered(self, inputs: Sequence[Side], places: np.ndarray) -> tuple[EvalDataset, np.ndarray]:
        """The same over other inputs, and which of those it uses, ascending.

        Args:
            inputs: what the new indices are of.
            places: (inputs,) where in them each input of ours is now.
        """
        used, ids = np.unique(places[np.concatenate([self.queries, *self.candidates])], return_inverse=True)
        queries, *candidates = np.split(ids, np.cumsum([len(self.queries), *map(len, self.candidates[:-1])]))
        sides = [inputs[i] for i in used.tolist()]
        return replace(self, inputs=sides, queries=queries, candidates=candidates), used


def without(dataset: EvalDataset, faults: Mapping[int, str], bad: BadRows) -> EvalDataset:
    """The data set without inputs that cannot be used.

    A row whose query or right candidate is one of them is left out, and one to which no wrong candidate is left; from
    the others they leave the list.

    Args:
        dataset: who is compared with whom.
        faults: what is wrong with an input, by its index.
        bad: told about each row left out, and about the first row of those whose list is shorter.

    Raises:
        CocoaError: by the policy of `bad`, or no row is left.
    """
    if not faults:
        return dataset
    broken = np.zeros(len(dataset.inputs), bool)
    broken[list(faults)] = True
    rows = []
    shorter: dict[int, list[int]] = {}
    for row, (query, ids) in enumerate(zip(dataset.queries.tolist(), dataset.candidates, strict=True)):
        for what, i in (("query", query), ("right candidate", int(ids[0]))):
            if broken[i]:
                bad.add(dataset.name, [dataset.number(row)], f"{what}: {faults[i]}")
                break
        else:
            lost = ids[broken[ids]]
            if len(lost) and (ids[~broken[ids]] == ids[0]).all():
                said = f"candidate: {faults[int(lost[0])]} (no wrong one is left)"
                bad.add(dataset.name, [dataset.number(row)], said)
                continue
            rows.append(row)
            for i in set(ids[broken[ids]].tolist()):
                shorter.setdefault(i, []).append(dataset.number(row))
    for i, among in shorter.items():
        bad.add(dataset.name, among[:1], f"candidate: {faults[i]} (it stands in {len(among)} lists)", left_out=False)
    if not rows:
        raise CocoaError(f"data set {dataset.name}: no usable row; the first: {faults[min(faults)]}")
    kept = replace(
        dataset,
        queries=dataset.queries[rows],
        candidates=[ids[~broken[ids]] for ids in (dataset.candidates[row] for row in rows)],
        numbers=np.array([dataset.number(row) for row in rows]),
    )
    return kept.renumbered(dataset.inputs, np.arange(len(dataset.inputs)))[0]


def read_eval(
    folder: str | Path,
    subsets: str | Sequence[str] = "all",
    split: str = "test",
    image_root: str | Path | None = None,
    bad: BadRows | None = None,
    prompt_style: str = "cocoa",
) -> list[EvalDataset]:
    """Reads a folder in the layout of MMEB-eval, in both of its forms.

    Plain: `qry_text, qry_img_path, tgt_text[], tgt_img_path[]`, the instruction inside the texts. Split (with
    `qry_inst` and mostly `tgt_inst`): instructions apart; the image columns may be absent. Image paths are
    relative to `folder`, to `images` or `eval_images` in it, or to an archive in it, unless `image_root` is given.

    Args:
        folder: holds the data sets' folders.
        subsets: names of data sets, or `all`.
        split: which files of each folder to read.
        image_root: the folder or archive that image paths are relative to.
        bad: what to do about a row whose candidate lists are empty or differ in length, or whose query or
            candidate has neither image nor content; by default it is an error.
        prompt_style: `reference` keeps texts as they stand, marker and outer whitespace included, as VLM2Vec reads
            them; with `cocoa` instruction and content are told apart.

    Raises:
        CocoaError: a folder, subset, split or column is missing or of another type, or no row can be used.
    """
    folder, bad = Path(folder), bad or BadRows()
    names = select_subsets(subsets, list_subsets(folder), str(folder))
    found = [read_eval_dataset(folder, name, split, image_root, bad, prompt_style) for name in names]
    for name, count in Counter(dataset.name for dataset in found).items():
        if count > 1:
            raise CocoaError(f"{folder}: data set {name} is there twice, under two spellings; remove one folder")
    return found


def read_eval_dataset(
    folder: Path,
    name: str,
    split: str,
    image_root: str | Path | None,
    bad: BadRows,
    prompt_style: str = "cocoa",
) -> EvalDataset:
    """Reads one data set, as `read_eval` does; it is called as in MMEB-eval, whichever spelling its folder has."""
    table = read_split(folder / name, split, ("qry_text", "tgt_text"), EVAL_COLUMNS)
    called = scored_name(name)
    missing = [column for column in ("qry_img_path", "tgt_img_path") if column not in table.column_names]
    if missing and "qry_inst" not in table.column_names:
        raise CocoaError(f"data set {name}: no column {', '.join(missing)} in split {split!r}; download it again")
    if not len(table):
        raise CocoaError(f"data set {name}: no rows in split {split!r}; download it again")
    numbers = np.arange(len(table))
    lengths = {
        column: pc.fill_null(pc.list_value_length(table[column]), 0).to_numpy()
        for column in LISTS
        if column in table.column_names
    }
    counts = lengths["tgt_text"]
    paths = lengths.get("tgt_img_path", counts)
    for row in np.flatnonzero(counts != paths).tolist():
        bad.add(
            called,
            [row],
            f"{counts[row]} texts in tgt_text but {paths[row]} paths in tgt_img_path; give every candidate one of "
            "each, empty where absent",
        )
    bad.add(called, np.flatnonzero((counts == 0) & (paths == 0)).tolist(), "no candidates in tgt_text; drop the row")
    usable = (counts > 0) & (counts == paths)
    if not usable.any():
        raise CocoaError(f"data set {name}: no usable row in split {split!r}")
    if not usable.all():
        table, numbers = table.filter(pa.array(usable)), numbers[usable]
    dataset = _eval_dataset(name, table, counts[usable], folder, image_root, prompt_style)
    empty = {
        i: "neither image nor content"
        for i, side in enumerate(dataset.inputs)
        if side.image is None and not side.text.strip()
    }
    return without(replace(dataset, numbers=numbers), empty, bad)


def _eval_dataset(
    name: str, table: pa.Table, counts: np.ndarray, folder: Path, image_root: str | Path | None, prompt_style: str
) -> EvalDataset:
    """The data set of a table whose candidate lists are of the lengths `counts` (rows,)."""
    known, query_instructions, target_instructions = instructions_of(name)
    entry = find_dataset(name)
    query_end, target_end = (entry.query_end, entry.target_end) if entry else ("\n", "\n")
    columns = {
        column: pc.list_flatten(table[column]) if column in LISTS else table[column] for column in table.column_names
    }
    query_paths = _encode(columns.get("qry_img_path"), len(table))
    target_paths = _encode(columns.get("tgt_img_path"), counts.sum())
    locate = image_locator(folder, image_root)
    inputs: dict[Side, int] = {}

    def index(
        instruction: _Encoded, text: _Encoded, path: _Encoded, instructions: tuple[str, ...], end: str
    ) -> np.ndarray:
        """Adds the distinct sides to `inputs`; which one each row is (numbers: there are a million rows)."""
        key = (instruction[0] * len(text[1]) + text[0]) * len(path[1]) + path[0]
        distinct, inverse = np.unique(key, return_inverse=True)
        ids = np.empty(len(distinct), np.int64)
        for i, number in enumerate(distinct.tolist()):
            rest, p = divmod(number, len(path[1]))
            said, content = instruction[1][rest // len(text[1])], text[1][rest % len(text[1])]
            image = locate(path[1][p]) if path[1][p] else None
            if prompt_style == "reference":
                side = Side(text=reference_text(said, content, image is not None, end), image=image)
            elif clean(said):
                side = Side(clean(said), clean(content), image)
            else:
                side = make_side(content, image, instructions, known)
            ids[i] = inputs.setdefault(side, len(inputs))
        return ids[inverse]

    queries = index(
        _encode(columns.get("qry_inst"), len(table)),
        _encode(columns["qry_text"], len(table)),
        query_paths,
        query_instructions,
        query_end,
    )
    numbers, said = _encode(columns.get("tgt_inst"), len(table))
    texts = _encode(columns["tgt_text"], 0)
    targets = index((np.repeat(numbers, counts), said), texts, target_paths, target_instructions, target_end)
    return EvalDataset(scored_name(name), list(inputs), queries, np.split(targets, np.cumsum(counts)[:-1]))


_Encoded = tuple[np.ndarray, list[str]]  # (rows,) numbers of strings, and the distinct strings


def _encode(column: pa.ChunkedArray | None, rows: int) -> _Encoded:
    """A text column as numbers; nulls, and all `rows` of an absent column, are the empty string."""
    if column is None:
        return np.zeros(rows, np.int64), [""]
    encoded = pc.fill_null(pc.cast(column, pa.large_string()), "").combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
