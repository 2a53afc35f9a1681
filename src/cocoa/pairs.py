"""The one record type for every source of data, and which of its content feeds which stage.

A `Pair` is a query and a target; each is a `Side`: what the data set says to every row (`instruction`),
this row's own content (`text`) and an image. The contrastive stage renders instruction + text; the
reconstruction stages rebuild *content only*, and `content_pairs` is the single place that chooses it.
The readers are `cocoa.mmeb` (the MMEB layouts) and `cocoa.sources` (everything that `data.train` may name).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from PIL import Image

from cocoa.image_files import check_image_files
from cocoa.images import ImageRef


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a pair; an absent text is the empty string, an absent image None.

    `text_is_content` is False where a reader could not tell the instruction in `text` from the content
    (a paraphrase it does not know): the side is embedded as it is, and never rebuilt.

    Example:
        >>> import cocoa
        >>> cocoa.Side(instruction="Find the picture:", text="a red star").prompt()
        'Find the picture: a red star'
    """

    instruction: str = ""
    text: str = ""
    image: ImageRef | None = None
    text_is_content: bool = True

    def prompt(self) -> str:
        """Instruction and text as the chat template joins them: one space between, none outside."""
        return " ".join(part for part in (self.instruction.strip(), self.text.strip()) if part)

    def content_id(self) -> int:
        """A 63-bit id of (text, image), equal across processes and runs; the instruction is no content."""
        digest = hashlib.blake2b(self.text.strip().encode(), digest_size=8)
        if isinstance(self.image, Image.Image):
            digest.update(f"\0{self.image.mode}{self.image.size}".encode() + self.image.tobytes())
        elif self.image is not None:
            digest.update(b"\0" + (self.image.encode() if isinstance(self.image, str) else self.image))
        return int.from_bytes(digest.digest()) >> 1


class Turn(NamedTuple):
    """What a user says of an image, and the answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, its target and optional hard negatives, with the data set and row they came from.

    `row` counts the rows of a parquet split from 0, the lines (or list items) of a file from 1. `dialogue` is a
    conversation on the query's image (CoMa); such a row may have no target.

    Example:
        >>> import cocoa
        >>> cocoa.Pair(cocoa.Side(image="photos/1.jpg"), cocoa.Side(text="a red star"), dataset="mine", row=7).row_id
        'mine/7'
    """

    query: Side
    target: Side
    negatives: tuple[Side, ...] = ()
    dataset: str = ""
    row: int = 0
    dialogue: tuple[Turn, ...] = ()

    @property
    def row_id(self) -> str:
        """`dataset/row`: names this row in messages, and seeds its masks."""
        return f"{self.dataset}/{self.row}"

    @property
    def sides(self) -> tuple[Side, ...]:
        """Query, target and all negatives."""
        return (self.query, self.target, *self.negatives)


@dataclass(slots=True)
class PairSet:
    """What a reader found: the pairs in file order, and what it left out (data set -> reason -> rows).

    `roots` has the folder of each data set that its image files must not leave.
    """

    pairs: list[Pair] = field(default_factory=list)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def leave_out(self, dataset: str, reason: str) -> None:
        """Counts one row that is not in `pairs`."""
        self.left_out.setdefault(dataset, Counter())[reason] += 1


@dataclass(frozen=True, slots=True)
class ContentPair:
    """What a reconstruction stage rebuilds from one pair.

    In joint reconstruction `side` is an image alone and `text` the content text that belongs to it; in the
    EOS-bridge `side` is block A (instruction and text included) and `text` is block B. `text` never holds an
    instruction. In compression `side` is what is compressed, `turns` the conversation on it, and `text` empty.
    """

    side: Side
    text: str
    row_id: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def dataset(self) -> str:
        """The data set that the row came from."""
        return self.row_id.rpartition("/")[0]

    @property
    def row(self) -> int:
        """The row's number in it."""
        return int(self.row_id.rpartition("/")[2])


CONTENT_STAGES = ("joint_reconstruction", "eos_bridge")
"""Stages that rebuild a content text; the table of data sets has a rule for each."""


def content_pairs(pair: Pair, stage: str, rule: str = "auto") -> ContentPair | str:
    """The content of a pair that a reconstruction stage rebuilds, or the reason why it gives none.

    Args:
        pair: the row.
        stage: `joint_reconstruction`, `eos_bridge` or `compression` (which has no rule: it takes the dialogue).
        rule: which content, in the words of `data/mmeb.yaml`: an image and its texts
            (`query_image + query_text + target_text`), block A and B (`query -> target_text`; where both are
            of one side, A keeps only its image and instruction), or `off`. `auto` decides by where the images
            are: the texts of both sides belong to a query's image when the target has none; a target's image
            takes its own text, or else the query's. Two images have no text in common, so they give nothing
            to joint reconstruction. The bridge goes from the query if it has an image, else from the target.
    """
    if stage == "compression":
        if not pair.dialogue:
            return "no dialogue"
        if pair.query.image is None:
            return "no image"
        return ContentPair(replace(pair.query, instruction=""), "", pair.row_id, pair.dialogue)
    if stage not in CONTENT_STAGES:
        raise ValueError(
            f"{stage!r} rebuilds nothing; content_pairs is for {', '.join(CONTENT_STAGES)} and compression"
        )
    if rule == "auto":
        if stage == "eos_bridge":
            rule = "query -> target_text" if pair.query.image is not None else "target -> query_text"
        elif pair.query.image is None:
            rule = "target_image + target_text" if pair.target.text.strip() else "target_image + query_text"
        elif pair.target.image is None:
            rule = "query_image + query_text + target_text"
        else:
            return "both sides have an image"
    if rule == "off":
        return "its data set is not for this stage"

    sides = {"query": pair.query, "target": pair.target}
    first, *texts = rule.split(" + ") if stage == "joint_reconstruction" else rule.split(" -> ")
    source = sides[first.removesuffix("_image")]
    rebuilt = [sides[name.removesuffix("_text")] for name in texts]
    if source.image is None:
        return "no image"
    if any(side.text.strip() and not side.text_is_content for side in rebuilt):
        return "instruction not recognised"
    text = " ".join(side.text.strip() for side in rebuilt if side.text.strip())
    if not text:
        return "no content text"
    if stage == "joint_reconstruction":
        source = Side(image=source.image)
    elif any(side is source for side in rebuilt):
        source = replace(source, text="")
    return ContentPair(source, text, pair.row_id)


def hold_out(pairs: Sequence[Pair], rows: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into training and validation pairs, both in the given order.

    Of each data set `rows` are held out, but at most a fifth. Seed, data set and row number decide which,
    whatever the order and the other data sets. A chosen pair whose content stands in another training row of
    its data set goes back to training, so that no validation pair is trained on under another number.
    Data sets are not compared with each other: MSCOCO_i2t and _t2i, say, share captions under other image paths.
    """
    by_dataset: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_dataset[pair.dataset].append(pair)
    held: set[int] = set()
    for members in by_dataset.values():
        count = min(rows, len(members) // 5)
        members.sort(key=lambda pair: hashlib.blake2b(f"{seed}/{pair.row_id}".encode(), digest_size=8).digest())
        if count:
            trained = {(p.query.content_id(), p.target.content_id()) for p in members[count:]}
            chosen = (p for p in members[:count] if (p.query.content_id(), p.target.content_id()) not in trained)
            held.update(id(pair) for pair in chosen)
    return [p for p in pairs if id(p) not in held], [p for p in pairs if id(p) in held]


def limit_rows(pairs: Sequence[Pair], limit: int | None, seed: int) -> list[Pair]:
    """At most `limit` pairs of each data set, a random sample that the seed decides, in the given order."""
    if limit is None:
        return list(pairs)
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        by_dataset[pair.dataset].append(index)
    kept: set[int] = set()
    for dataset, members in by_dataset.items():
        kept.update(members[i] for i in sample_rows(len(members), limit, dataset, seed))
    return [pair for index, pair in enumerate(pairs) if index in kept]


def sample_rows(count: int, limit: int | None, dataset: str, seed: int) -> Sequence[int]:
    """Which of `count` rows to read, ascending: all, or a random sample of `limit` (data may be sorted)."""
    if limit is None or limit >= count:
        return range(count)
    return sorted(random.Random(f"{seed}/{dataset}").sample(range(count), limit))


def check_images(pairs: Iterable[Pair], roots: Mapping[str, str] | None = None) -> None:
    """Sees that every image file of the pairs exists, and lies in its data set's root; see `check_image_files`.

    Raises:
        CocoaError: names the first missing or straying file, its data set and row, and how many are missing.
    """
    sides = ((s, p) for p in pairs for s in p.sides)
    check_image_files(((s.image, p.dataset, p.row) for s, p in sides if isinstance(s.image, str)), roots)
