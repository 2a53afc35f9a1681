"""`cocoa dialogues`: CoMa's training data, written by a multimodal LLM over images; captions for those without one.

For each image the model writes specific questions, and answers them one after another in one growing conversation.
Batches are fixed by the order of the images; each leaves a shard, whole or not at all, named by its place and by what
its images are. A run that was stopped writes the missing shards, and ends with the same file as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cocoa.batching import prepared
from cocoa.checkpoint import versions
from cocoa.conversations import Outcome, Prompts, Request, converse, counts, reason_to_drop
from cocoa.dialogue_files import DIALOGUE, FILE_NAME, as_records, write_dialogues_file
from cocoa.dialogue_parsing import Dropped
from cocoa.errors import CocoaError
from cocoa.files import claim_folder, write_json, writing
from cocoa.generation import Engine, identify, load_engine, shrink
from cocoa.image_listing import Listing, Picture, list_pictures, path_in, root_of
from cocoa.images import load_image
from cocoa.pairs import Turn
from cocoa.parquet import write_table
from cocoa.processes import counting, this_process, wait_for_files

logger = logging.getLogger(__name__)

WRITE = ("dialogues", "captions", "both")
SHARDS, SETTINGS_NAME, SUMMARY_NAME = "shards", "settings.json", "summary.json"
_DROPPED = pa.list_(pa.struct([(name, pa.string()) for name in Dropped._fields]))
_SHARD = pa.schema([("image", pa.string()), ("caption", pa.string()), ("dialogue", DIALOGUE), ("dropped", _DROPPED)])


@dataclass(frozen=True)
class Settings:
    """What a result depends on besides the images.

    Attributes:
        model: hub id, folder, or an embedded backbone.
        source: where the images are; see `cocoa.image_listing.list_pictures`.
        prompts: what the model is told.
        write: `dialogues`, `captions` or `both`.
        questions: asked for an image.
        batch_size: images that are asked about at once.
        max_new_tokens: of each reply.
        image_tokens: an image that takes more (28 x 28 px a token) is made smaller.
        temperature: of the questions; answers and captions are greedy.
        seed: of the questions.
        image_root: what image paths of a file are relative to, and must not leave; by default its folder.
    """

    model: str
    source: str
    prompts: Prompts
    write: str = "dialogues"
    questions: int = 4
    batch_size: int = 8
    max_new_tokens: int = 256
    image_tokens: int = 1024
    temperature: float = 0.7
    seed: int = 0
    image_root: str | None = None

    def __post_init__(self) -> None:
        if self.write not in WRITE:
            raise CocoaError(f"write {self.write!r}: choose {', '.join(WRITE)}")
        for key in ("questions", "batch_size", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise CocoaError(f"{key.replace('_', '-')} {getattr(self, key)}: must be 1 or more")
        if self.temperature < 0:
            raise CocoaError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        shrink(Image.new("RGB", (1, 1)), self.image_tokens)  # refuses too few

    def request(self, key: str) -> Request:
        """What is wanted of the batch of this key."""
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()) >> 1
        dialogues, captions = self.write != "captions", self.write != "dialogues"
        return Request(self.prompts, dialogues, captions, self.questions, self.max_new_tokens, self.temperature, seed)


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures that are asked about at once, and where what comes of it is written."""

    pictures: tuple[Picture, ...]
    key: str
    shard: Path


def write_dialogues(settings: Settings, output: Path, engine: Engine | None = None) -> dict[str, Any]:
    """Write `output/dialogues.parquet` and `output/summary.json`.

    Under `accelerate launch` the processes share the batches. Two runs in one folder at a time ask the model twice,
    and do no other harm.

    Args:
        settings: of the run.
        output: made where it does not exist.
        engine: what is asked; None loads the model when there is something to ask.

    Returns:
        The summary; of other processes than the main one nothing.

    Raises:
        CocoaError: a mistake in model or source, `output` is of another run, or nothing that was written is usable.
    """
    started, state = time.monotonic(), this_process()
    if state.is_main_process:
        _claim(settings, output)
    state.wait_for_everyone()
    if not (output / SETTINGS_NAME).is_file():
        raise CocoaError(f"{output}: not the same folder for all processes; choose one on a disk that they share")
    root = None if settings.image_root is None else Path(settings.image_root)
    listing = list_pictures(Path(settings.source), output, root)
    batches = plan(listing.pictures, settings.batch_size, output)
    missing = [batch for batch in batches if not batch.shard.exists()]
    left_out = f"{listing.duplicates} duplicates, {len(listing.unreadable)} unreadable"
    logger.info("%d images (left out: %s) in %d batches", len(listing.pictures), left_out, len(batches))
    logger.info("%d batches to ask about", len(missing))
    state.wait_for_everyone()  # before anyone writes: all must see the same shards missing
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        _fill(mine, settings, engine or load_engine(settings.model), state.is_main_process)
    if not state.is_main_process:
        return {}
    wait_for_files(batch.shard for batch in missing)
    return _join(settings, output, listing, batches, started)


def plan(pictures: Sequence[Picture], size: int, output: Path) -> list[Batch]:
    """Pictures in batches, in their order; the key stands for what they are and have, wherever they lie."""
    batches: list[Batch] = []
    for start in range(0, len(pictures), size):
        members = tuple(pictures[start : start + size])
        said = [(picture.digest, picture.caption, picture.turns) for picture in members]
        key = hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()
        batches.append(Batch(members, key, output / SHARDS / f"{len(batches):07}-{key}.parquet"))
    return batches


def _claim(settings: Settings, output: Path) -> None:
    """Mark the folder as this run's, see `claim_folder`."""
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(settings) | {"model_hash": identify(settings.model)}))
    wanted["source"] = os.path.abspath(settings.source)
    wanted["image_root"] = settings.image_root and os.path.abspath(settings.image_root)
    written = any((output / SHARDS).glob("*.parquet")) or (output / FILE_NAME).exists()
    claim_folder(output, SETTINGS_NAME, wanted, f"{FILE_NAME} or {SHARDS}" if written else "")


def _fill(batches: Sequence[Batch], settings: Settings, engine: Engine, shown: bool) -> None:
    """Ask about the pictures of these batches, and write a shard for each."""

    def images_of(numbers: list[int]) -> list[Image.Image]:
        pictures = (picture for number in numbers for picture in batches[number].pictures)
        return [shrink(load_image(picture.path), settings.image_tokens) for picture in pictures]

    batches[0].shard.parent.mkdir(exist_ok=True)
    with counting("images", sum(len(batch.pictures) for batch in batches), shown) as count:
        for (number,), images in prepared([[number] for number in range(len(batches))], images_of):
            batch = batches[number]
            write_shard(batch, converse(engine, batch.pictures, images, settings.request(batch.key)))
            count(len(images))


def write_shard(batch: Batch, outcomes: Sequence[Outcome]) -> None:
    """Write what came of a batch, a row a picture, and what was dropped."""
    rows = [
        {
            "image": picture.digest,
            "caption": outcome.caption or None,
            "dialogue": as_records(outcome.turns),
            "dropped": [dropped._asdict() for dropped in outcome.dropped],
        }
        for picture, outcome in zip(batch.pictures, outcomes, strict=True)
    ]
    with writing(batch.shard):
        write_table(batch.shard, pa.Table.from_pylist(rows, _SHARD))


def read_shard(path: Path) -> list[Outcome]:
    """What `write_shard` wrote."""
    return [
        Outcome(
            row["caption"] or "",
            [Turn(**turn) for turn in row["dialogue"] or ()],
            [Dropped(**dropped) for dropped in row["dropped"]],
        )
        for row in pq.read_table(path).to_pylist()
    ]


def _join(
    settings: Settings, output: Path, listing: Listing, batches: Sequence[Batch], started: float
) -> dict[str, Any]:
    """Write the result of all shards, and the summary, which it returns.

    Raises:
        CocoaError: no picture is left.
    """
    outcomes = [outcome for batch in batches for outcome in read_shard(batch.shard)]
    kept = [
        (picture.path, outcome)
        for picture, outcome in zip(listing.pictures, outcomes, strict=True)
        if not reason_to_drop(outcome, settings.write)
    ]
    root = root_of((path for path, _ in kept), output)
    summary = {
        "settings": json.loads((output / SETTINGS_NAME).read_text(encoding="utf-8")),
        **counts(listing, outcomes, settings.write),
        "unreadable": listing.unreadable,
        "image_root": root,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(output / SUMMARY_NAME, summary)
    if not summary["images"]["kept"]:
        said = ", ".join(f"{reason} ({count})" for reason, count in summary["images"]["dropped"].items())
        raise CocoaError(
            f"{output}: nothing that the model wrote can be used: {said}; see {SHARDS}, try other --prompts"
        )
    rows = [(path_in(path, output, root), outcome.caption, outcome.turns) for path, outcome in kept]
    write_dialogues_file(output / FILE_NAME, rows)
    return summary
