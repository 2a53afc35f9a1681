"""`cocoa scenes`: the world as folders in the layouts of MMEB-train and MMEB-eval, and conversations on its images.

They are read like any other data. `MMEB-eval` has the splits `test` and `validation`; what to tune on is the
second one. The same seed and numbers give the same bytes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from cocoa.catalogue import CONTENT, NEGATIVE_COLUMNS, TRAIN_COLUMNS, datasets
from cocoa.dialogue_files import FILE_NAME, write_dialogues_file
from cocoa.errors import CocoaError
from cocoa.files import check_writable, write_text
from cocoa.inputs import IMAGE_MARKER
from cocoa.scenes.dialogues import training_dialogue
from cocoa.scenes.language import STYLES, caption
from cocoa.scenes.tasks import TASKS, Example, Item, all_answers, labels
from cocoa.scenes.world import Scene, Thing, crop, picture

CANDIDATES = 200
"""Candidates of a question, at least. In retrieval and grounding a query has the targets of the other queries."""
SPARE = 20
"""More targets among those, since the ones that might be right as well are left out."""
SPLITS = ("validation", "test")
"""Of MMEB-eval; what to tune on is the first one."""
TURNS = 4
"""Questions of a conversation; a caption is one more turn."""
FORMAT = 4
"""Raised whenever the same seed comes to mean other data."""
MARK = "scenes.json"
"""Holds the numbers that a folder was made by, or the format alone while it is being made."""


def write_scenes(
    output: Path,
    seed: int = 0,
    pairs: int = 20000,
    queries: int = 200,
    progress: bool = False,
    splits: Sequence[str] = SPLITS,
) -> None:
    """Write `output/MMEB-train`, `output/MMEB-eval` and `output/dialogues.parquet`.

    The last holds a caption and a conversation on each training image; what they say is true. What is there already
    by the same numbers is kept.

    Args:
        output: made where it does not exist.
        seed: of everything.
        pairs: training pairs over all data sets.
        queries: evaluation queries of each data set and split.
        progress: show a bar.
        splits: of the evaluation data; what a split holds does not depend on the others.

    Raises:
        CocoaError: the numbers are out of range, something else stands in `output`, or it cannot be written.
    """
    trained = [name for name in TASKS if not datasets("scenes")[name].ood]
    if pairs < len(trained) or queries < 2:
        raise CocoaError(f"scenes: at least {len(trained)} pairs and 2 queries, not {pairs} and {queries}")
    made = {"format": FORMAT, "seed": seed, "pairs": pairs, "queries": queries, "splits": list(splits)}
    folders = [output / "MMEB-train", output / "MMEB-eval"]
    shown: dict[Scene, str] = {}
    if _is_there(output, folders, made):
        return
    check_writable(output, is_folder=True)
    output.mkdir(parents=True, exist_ok=True)
    _mark(output, {"format": FORMAT})
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
    for name in track(TASKS, "scenes", disable=not progress):
        if name in trained:
            rows = pairs // len(trained) + (trained.index(name) < pairs % len(trained))
            shown = _write_train(folders[0], name, sample_examples(name, "train", seed, rows)) | shown
        for split in splits:
            _write_eval(folders[1], name, split, sample_queries(name, split, seed, queries))
    _write_dialogues(output, shown, seed)
    _mark(output, made)


def _mark(output: Path, made: dict[str, Any]) -> None:
    write_text(output / MARK, json.dumps(made))


def _is_there(output: Path, folders: Sequence[Path], made: dict[str, Any]) -> bool:
    """Whether the folders stand in `output`, made by these numbers.

    Raises:
        CocoaError: not so, and what stands there was not written by `write_scenes`, which would remove it.
    """
    mark = output / MARK
    found: Any = {}
    foreign = [output] if output.is_file() else []
    if mark.exists():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or not found.keys() <= made.keys():
            foreign.append(mark)
    spoken = output / FILE_NAME
    if found == made and spoken.is_file() and all(folder.is_dir() for folder in folders):
        return True
    if spoken.exists() and not mark.exists():
        foreign.append(spoken)
    for folder in (folder for folder in folders if folder.exists()):
        if mark.exists():
            inside = [path for root in (folder, folder / "images") if root.is_dir() for path in root.iterdir()]
            foreign += [path for path in inside if path.name not in (*TASKS, "images")]
        else:
            foreign.append(folder)
    if foreign:
        raise CocoaError(f"{foreign[0]}: not written by `cocoa scenes`; remove it, or choose another folder")
    return False


def sample_examples(name: str, split: str, seed: int, number: int) -> list[Example]:
    """Distinct examples of a data set, each from its own seed, so that fewer are the first of more."""
    found: dict[Hashable, Example] = {}
    attempt = 0
    while len(found) < number:
        example = TASKS[name](random.Random(f"{seed}/{name}/{split}/{attempt}"), split)
        facts = tuple(thing.facts for thing in example.query.scene.things) if example.query.scene else ()
        found.setdefault((example.query.text, facts, example.meaning), example)
        attempt += 1
    return list(found.values())


def sample_queries(name: str, split: str, seed: int, number: int) -> list[tuple[Example, list[Item]]]:
    """Distinct examples of a data set, each with its candidates: the right answer first, then the near misses."""
    entry, rng = datasets("scenes")[name], random.Random(f"{seed}/{name}/{split}/candidates")
    listed = entry.meta_task in ("Classification", "VQA")
    drawn = sample_examples(name, split, seed, number if listed else number + SPARE)
    found = []
    for example in drawn[:number]:
        if entry.meta_task == "Classification":
            others = [Item(label) for label in labels(novel=entry.ood)]
        elif entry.meta_task == "VQA":
            texts = [text for text in all_answers() if text not in example.meaning]
            others = [Item(text) for text in rng.sample(texts, CANDIDATES)]
        else:
            mine = example.meaning
            others = [other.target for other in drawn if not (mine <= other.meaning or other.meaning <= mine)]
        candidates = dict.fromkeys((example.target, *example.hard, *others))
        found.append((example, list(candidates)))
    return found


class _Pictures:
    """Writes each distinct picture once, and names it.

    Args:
        root: what names are relative to.
        folder: where in it pictures are written.
    """

    def __init__(self, root: Path, folder: str) -> None:
        self.root, self.folder = root, folder
        self.names: dict[tuple[Scene, Thing | None], str] = {}
        self.asked: dict[int, tuple[Item, str]] = {}  # by id: candidates come again and again, and hash slowly
        (root / folder).mkdir(parents=True, exist_ok=True)

    def name(self, item: Item) -> str:
        """The path of an item's picture; empty if it has none."""
        if item.scene is None:
            return ""
        if id(item) not in self.asked:
            self.asked[id(item)] = item, self._write(item.scene, item.thing)
        return self.asked[id(item)][1]

    def _write(self, scene: Scene, thing: Thing | None) -> str:
        key = (scene, thing)
        if key not in self.names:
            image = picture(scene) if thing is None else crop(scene, thing)
            self.names[key] = f"{self.folder}/{len(self.names):05}.png"
            image.save(self.root / self.names[key], compress_level=1)
        return self.names[key]


def _says(item: Item, instructions: tuple[str, ...]) -> str:
    """The text of one side as MMEB writes it: image marker, instruction and content in one string."""
    text = instructions[0].replace(CONTENT, item.text) if instructions else item.text
    return f"{IMAGE_MARKER}\n{text}" if item.scene is not None else text


def _write_train(root: Path, name: str, examples: list[Example]) -> dict[Scene, str]:
    """Write a data set; the scenes whose pictures are in it, with the paths from the folder that holds `root`."""
    entry, pictures = datasets("scenes")[name], _Pictures(root, f"images/{name}")
    rows: list[dict[str, Any]] = []
    for example in examples:
        wrong = example.hard[0] if example.hard and example.hard[0].scene is None else Item()
        negative = (wrong.text, "")
        values = []
        for item, instructions in ((example.query, entry.query), (example.target, entry.target)):
            values += [_says(item, instructions), pictures.name(item)]
        rows.append(dict(zip((*TRAIN_COLUMNS, *NEGATIVE_COLUMNS), (*values, *negative), strict=True)))
    _write_table(root / name / "original-00000-of-00001.parquet", rows)
    return {scene: f"{root.name}/{path}" for (scene, thing), path in pictures.names.items() if thing is None}


def _write_dialogues(output: Path, shown: dict[Scene, str], seed: int) -> None:
    """Write a caption and a conversation on each scene, each from its own seed."""
    rows = []
    for scene, path in sorted(shown.items(), key=lambda item: item[1]):
        rng = random.Random(f"{seed}/{path}/dialogue")
        rows.append((path, caption(scene, rng.choice(STYLES)), training_dialogue(rng, scene, TURNS)))
    write_dialogues_file(output / FILE_NAME, rows)


def _write_eval(root: Path, name: str, split: str, rows: list[tuple[Example, list[Item]]]) -> None:
    entry, pictures = datasets("scenes")[name], _Pictures(root, f"images/{name}/{split}")
    table: list[dict[str, Any]] = []
    for example, candidates in rows:
        row: dict[str, Any] = {"qry_text": _says(example.query, entry.query)}
        row |= {"qry_img_path": pictures.name(example.query)}
        row |= {"tgt_text": [_says(item, entry.target) for item in candidates]}
        table.append(row | {"tgt_img_path": [pictures.name(item) for item in candidates]})
    _write_table(root / name / f"{split}-00000-of-00001.parquet", table)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
