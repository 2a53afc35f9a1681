"""How much of an image reaches block B: the loss of B under another row's image, less that under its own, in nats.

B is hidden whole, so a token is known from its place, from the language, and from what EOS carries; the difference
between the two losses is what EOS carries of *this* image and B makes use of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone
from cocoa.catalogue import stage_rows
from cocoa.features import keep_features
from cocoa.inputs import MAX_LENGTH
from cocoa.mmeb_eval import EvalDataset
from cocoa.packing import pack
from cocoa.pairs import ContentPair, Pair
from cocoa.scenes.language import NUMBERS
from cocoa.scenes.world import CELLS, COLOURS, SHAPES, SIZES, TEXTURES
from cocoa.stages.eos_bridge import bridge
from cocoa.stages.reconstruction import Reconstructor

CLASSES = {
    "colour": set(COLOURS),
    "shape": set(SHAPES),
    "texture": set(TEXTURES),
    "size": set(SIZES),
    "count": set(NUMBERS),
    "place": {word for cell in CELLS for word in cell.split()} | {"left", "right", "above", "below"},
}
"""Words that tell of the picture, by what they tell; all others are `grammar`."""
AT_ONCE = 64


@dataclass
class Losses:
    """Of the tokens of several blocks B, in one order: cross-entropy in nats, and where each stands."""

    losses: Tensor
    """(M,)"""
    first: Tensor
    """(M,) whether it is the first of its block, which is decoded from EOS' final state."""
    ids: Tensor
    """(M,) the right token."""


def held_out_rows(datasets: Sequence[EvalDataset]) -> list[ContentPair]:
    """Image and text of every query of these data sets with its right candidate, for the bridge."""
    pairs = []
    for dataset in datasets:
        sides = dataset.inputs
        for row, (query, ids) in enumerate(zip(dataset.queries.tolist(), dataset.candidates, strict=True)):
            pairs.append(Pair(sides[query], sides[ids[0]], (), dataset.name, row))
    return list(stage_rows(pairs, "eos_bridge"))


def with_other_images(rows: Sequence[ContentPair], shift: int = 0) -> list[ContentPair]:
    """The same rows in the same order, each with the image of another row of its data set; its words stay.

    Args:
        rows: of data sets with at least two images each.
        shift: each number gives other images, up to the size of a data set.
    """
    by_dataset: dict[str, list[ContentPair]] = defaultdict(list)
    for row in rows:
        by_dataset[row.dataset].append(row)
    others = {}
    for members in by_dataset.values():
        for place, row in enumerate(members):
            steps = (1 + (shift + step) % (len(members) - 1) for step in range(len(members) - 1))
            following = (members[(place + step) % len(members)] for step in steps)
            image = next(other.side.image for other in following if other.side.image != row.side.image)
            others[row.row_id] = replace(row, side=replace(row.side, image=image))
    return [others[row.row_id] for row in rows]


def batch_of(backbone: Backbone, rows: Sequence[ContentPair], layout: BridgeLayout) -> dict[str, Any]:
    """Rows as the bridge's input, B hidden whole."""
    keep_features(backbone, [row.side for row in rows])
    samples = [bridge(backbone, row, MAX_LENGTH, 1.0, torch.Generator()) for row in rows]
    batch = pack(samples, backbone, layout)
    return {name: value.to(backbone.model.device) for name, value in batch.items()}


@torch.inference_mode()
def token_losses(
    backbone: Backbone, rows: Sequence[ContentPair], layout: BridgeLayout, model: Reconstructor | None = None
) -> Losses:
    """The loss of every token of B, B hidden whole; see `nats`."""
    model = (model or Reconstructor(backbone)).eval()
    parts = []
    for start in range(0, len(rows), AT_ONCE):
        batch = batch_of(backbone, rows[start : start + AT_ONCE], layout)
        tokens = model.predict(**batch).tokens
        first = torch.isin(tokens.positions, batch["eos_position"] + 1)
        parts.append((tokens.losses, first, batch["labels"][0, tokens.positions]))
    return Losses(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def token_classes(backbone: Backbone, ids: Tensor) -> list[str]:
    """What each token tells of (a key of `CLASSES`, or `grammar`)."""
    names = {}
    for token in ids.unique().tolist():
        word = backbone.tokenizer.decode([token]).strip()
        names[token] = next((name for name, words in CLASSES.items() if word in words), "grammar")
    return [names[token] for token in ids.tolist()]


def nats(
    backbone: Backbone, rows: Sequence[ContentPair], layout: BridgeLayout, model: Reconstructor | None = None
) -> dict[str, float]:
    """Nats a token, by class of token, of first tokens, and of all; `text` is nats a block B.

    Args:
        backbone: the model.
        rows: whose block B is hidden.
        layout: of the bridge.
        model: around the backbone, where B is not read as in the paper.
    """
    own = token_losses(backbone, rows, layout, model)
    other = token_losses(backbone, with_other_images(rows), layout, model)
    gain = other.losses - own.losses  # (M,)
    classes = token_classes(backbone, own.ids)
    result = {
        "token": gain.mean().item(),
        "text": gain.sum().item() / len(rows),
        "first": gain[own.first].mean().item(),
    }
    for name in (*CLASSES, "grammar"):
        mine = torch.tensor([each == name for each in classes])
        result[name] = gain[mine].mean().item()
    return result | {"loss": own.losses.mean().item()}
