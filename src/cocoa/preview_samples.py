"""What one row looks like to the model: its sequences and images, read back from a stage's own data set.

Nothing is encoded, masked or resized again here: the tensors that training would see are taken apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from cocoa.backbone import Backbone
from cocoa.contrastive_loss import FILLER_ID
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.inputs import inert
from cocoa.pairs import ContentPair, Pair
from cocoa.preview_pictures import Picture, picture_of
from cocoa.stages.arguments import StageArguments
from cocoa.stages.compression import dialogue_tokens
from cocoa.stages.content import ContentDataset, room_for_text
from cocoa.stages.contrastive import ContrastiveArguments, PairDataset

StageDataset: TypeAlias = ContentDataset | PairDataset
"""What a stage's trainer reads: of the reconstruction stages, or of the contrastive stage."""
Sequences = dict[str, dict[str, Tensor]]
"""A row's sequences by name, each with the tensors of `Reconstructor.forward` that it has (no batch axis)."""
Kind = Literal["text", "control", "eos", "image", "masked", "answer"]
Block = Literal["", "A", "EOS", "B", "C", "dialogue"]
BLOCKS: dict[Block, str] = {"A": "block A", "EOS": "EOS", "B": "block B", "C": "C1 … CK", "dialogue": "dialogue"}
"""How the parts of a sequence are headed."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is shown; an image's tokens are one.

    `text` is what the model sees, `target` what it must predict in place of a mask; an `answer` is predicted as it
    stands. `eos` is what the embedding is made of, compression tokens too, which are shown as one.
    """

    id: int
    text: str
    kind: Kind
    block: Block = ""
    count: int = 1
    target_id: int | None = None
    target: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence of a row."""

    name: str
    instruction: str
    tokens: tuple[Token, ...]
    picture: Picture | None = None
    note: str = ""

    def length(self) -> int:
        """Tokens of the sequence."""
        return sum(token.count for token in self.tokens)

    def blocks(self) -> list[tuple[Block, list[Token]]]:
        """Its tokens in runs of one block each; a single run where there are no blocks."""
        runs: list[tuple[Block, list[Token]]] = []
        for token in self.tokens:
            if not runs or runs[-1][0] != token.block:
                runs.append((token.block, []))
            runs[-1][1].append(token)
        return runs


@dataclass(frozen=True, slots=True)
class Measured:
    """Lengths of the sequences of some rows, in tokens.

    Attributes:
        rows: how many rows were looked at.
        counts: kind of sequence (`sequence`, or `query`, `target`, `negative`) -> what `token_counts` counts
            -> one number a sequence.
        shortened: rows whose text is cut to `max_length`.
    """

    rows: int
    counts: dict[str, dict[str, list[int]]]
    shortened: int

    def per_row(self, kind: str) -> float:
        """Tokens of a kind that a row has on average, over all its sequences."""
        return sum(sum(counts.get(kind, ())) for counts in self.counts.values()) / self.rows

    def longest(self, kind: str) -> int:
        """The most tokens of a kind in one sequence."""
        return max(max(counts[kind]) for counts in self.counts.values())


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, as its stage trains on it in the first epoch."""

    row_id: str
    parts: tuple[Part, ...]


def sequences(data: StageDataset, index: int) -> Sequences:
    """The sequences of one row in epoch 0, from the data set that the stage's trainer reads."""
    if isinstance(data, ContentDataset):
        return {"sequence": data[0, index]}
    return {column.replace("_", " "): side for column, side in data[index].items() if column != "label"}


def is_encoded(data: StageDataset, index: int) -> bool:
    """Whether a row can be encoded."""
    try:
        sequences(data, index)
    except CocoaError:
        return False
    return True


def token_counts(sequence: dict[str, Tensor], backbone: Backbone) -> dict[str, int]:
    """How many tokens of a sequence are the image's, how many text (masked ones too), and all of them.

    The total has the control tokens as well: an image's two markers and EOS. A bridged sequence counts `block B`
    too, a corrupted one its `masked` tokens, a dialogue its `answers`; all are part of the text (but for the
    answers' ends).
    """
    ids = sequence["input_ids"]
    image = int((ids == backbone.model.config.image_token_id).sum())
    special = torch.isin(ids, torch.tensor(backbone.tokenizer.all_special_ids))
    special &= ids != backbone.mask_token_id
    counts = {"image": image, "text": int((~special).sum())}
    if "eos_position" in sequence:
        counts["block B"] = len(ids) - int(sequence["eos_position"]) - 1
    if "labels" in sequence:
        name = "answers" if "compression_start" in sequence else "masked"
        counts[name] = int((sequence["labels"] != IGNORE_INDEX).sum())
    return counts | {"total": len(ids)}


def measure(
    data: StageDataset,
    rows: Sequence[Pair | ContentPair],
    indices: Sequence[int],
    backbone: Backbone,
    args: StageArguments,
) -> Measured:
    """Lengths of the rows that `indices` name."""
    counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    shortened = 0
    for index in indices:
        found = sequences(data, index)
        for name, sequence in found.items():
            for kind, count in token_counts(sequence, backbone).items():
                counts[name.split()[0]][kind].append(count)
        shortened += is_shortened(rows[index], found, backbone, args)
    return Measured(len(indices), {name: dict(kinds) for name, kinds in counts.items()}, shortened)


def is_shortened(row: Pair | ContentPair, found: Sequences, backbone: Backbone, args: StageArguments) -> bool:
    """Was the text of a row cut to fit `max_length`?"""
    if isinstance(row, Pair):
        assert isinstance(args, ContrastiveArguments)
        sides = [row.query, row.target, *row.negatives[: args.hard_negatives]]
        return any(inert(backbone.fit_text(side, args.max_length).text) != inert(side.text) for side in sides)
    if "compression_start" in found["sequence"]:
        length = int(found["sequence"]["compression_start"]) + backbone.compression_tokens
        return length + len(dialogue_tokens(backbone, row.turns)[0]) > args.max_length
    room = room_for_text(backbone, args.max_length)
    if "eos_position" in found["sequence"]:
        room = args.max_length - int(found["sequence"]["eos_position"]) - 1
    return len(backbone.encode_text(row.text)) > room


def sample(data: StageDataset, backbone: Backbone, index: int, row_id: str) -> Sample:
    """One row, to be shown."""
    instructions: dict[str, str] = {}
    notes: dict[str, str] = {}
    if isinstance(data, ContentDataset):
        instructions["sequence"] = data.rows[index].side.instruction.strip()
    else:
        pair, row = data.rows[index], data[index]
        ids = row.pop("label")
        for column, side, content_id in zip_longest(row, pair.sides[: len(row)], [None, *ids]):
            name = column.replace("_", " ")
            instructions[name] = side.instruction.strip() if side else ""
            if content_id == FILLER_ID:
                notes[name] = "left out of the loss: the row has no such negative, or it is the target"
    return Sample(
        row_id,
        tuple(
            Part(
                name,
                instructions.get(name, ""),
                tokens_of(sequence, backbone),
                picture_of(sequence, backbone),
                notes.get(name, ""),
            )
            for name, sequence in sequences(data, index).items()
        ),
    )


def tokens_of(sequence: dict[str, Tensor], backbone: Backbone) -> tuple[Token, ...]:
    """The tokens of a sequence, masks with the targets that the labels say, the image as one."""
    ids = sequence["input_ids"].tolist()
    labels = sequence["labels"].tolist() if "labels" in sequence else [IGNORE_INDEX] * len(ids)
    block_of = _blocks(sequence, backbone)
    closing = set(backbone.compression_token_ids) or {backbone.eos_token_id}
    special = set(backbone.tokenizer.all_special_ids)
    image = picture_of(sequence, backbone)
    shown: list[Token] = []
    for position, (token_id, label) in enumerate(zip(ids, labels, strict=True)):
        block = block_of[position]
        text = decode(backbone, token_id)
        if label == token_id:
            shown.append(Token(token_id, text, "answer", block))
        elif label != IGNORE_INDEX:
            shown.append(Token(token_id, text, "masked", block, 1, label, decode(backbone, label)))
        elif image is not None and token_id == backbone.model.config.image_token_id:
            if shown and shown[-1].kind == "image":
                continue
            count = image.columns * image.rows
            text = f"image {image.columns}x{image.rows} tokens"
            shown.append(Token(token_id, text, "image", block, count))
        elif token_id in closing:
            if backbone.compression_tokens and shown and shown[-1].kind == "eos":
                continue
            count = backbone.compression_tokens or 1
            text = f"{count} compression tokens" if backbone.compression_tokens else text
            shown.append(Token(token_id, text, "eos", block, count))
        else:
            shown.append(Token(token_id, text, "control" if token_id in special else "text", block))
    return tuple(shown)


def _blocks(sequence: dict[str, Tensor], backbone: Backbone) -> list[Block]:
    """The part of the sequence that each token belongs to; empty where a sequence has no parts."""
    length = len(sequence["input_ids"])
    parts: list[tuple[Block, int]] = [("", length)]
    if "eos_position" in sequence:
        eos = int(sequence["eos_position"])
        parts = [("A", eos), ("EOS", 1), ("B", length - eos - 1)]
    elif "compression_start" in sequence:
        start, count = int(sequence["compression_start"]), backbone.compression_tokens
        parts = [("A", start), ("C", count), ("dialogue", length - start - count)]
    return [block for block, size in parts for _ in range(size)]


def decode(backbone: Backbone, token_id: int) -> str:
    """A token's text, with what does not print made visible; part of a character as its byte-level name."""
    text = backbone.tokenizer.decode([token_id])
    if "\ufffd" in text:
        return f"⟨{backbone.tokenizer.convert_ids_to_tokens(token_id)}⟩"
    return visible(text)


def visible(text: str) -> str:
    """The text with line ends and tabs as arrows, and other characters that do not print as escapes."""
    arrows = {"\n": "⏎", "\t": "⇥"}
    return "".join(arrows.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)
