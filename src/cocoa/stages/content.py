"""Rows of the reconstruction stages and of compression: their arguments, one row's tensors, a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import IntervalStrategy

from cocoa import blocks
from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair
from cocoa.stages.training import StageArguments, check_range

OF_TOKENS = ("input_ids", "labels", "hidden_units")
"""Tensors (T,) of a sample that have a value for each token."""
PLACES = ("eos_position", "compression_start")
"""Tensors of a sample that are a place in it."""


@dataclass
class ReconstructionArguments(StageArguments):
    """Arguments of the reconstruction stages and of compression, over `StageArguments`.

    `ddp_find_unused_parameters` defaults to False: every row has an image and a text, so every weight is used.

    Args:
        tokens_per_pass: a device's share of a batch goes through the model in parts of at most so many tokens: bounds
            the memory, leaves the gradients as they are.
        cache_inputs: keep each row's encoded image and text in memory instead of encoding them in every epoch,
            for small data: 19 kB an image token, in every process and data loader worker.
    """

    tokens_per_pass: int = 16_384
    cache_inputs: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens_per_pass", self.tokens_per_pass, 0)
        if self.eval_strategy != IntervalStrategy.NO:
            raise CocoaError("eval_strategy: only the contrastive stage is validated while it runs; leave it out")


class ContentDataset(Dataset):
    """Rows of content, encoded and corrupted when asked for; the key is `(epoch, row)`.

    Args:
        rows: what to rebuild.
        backbone: encodes a row.
        args: of the stage, for seed, ratios and length.

    Attributes:
        layout: of a bridge.
    """

    layout: BridgeLayout = "published"

    def __init__(self, rows: Sequence[ContentPair], backbone: Backbone, args: ReconstructionArguments) -> None:
        self.rows = rows
        self.backbone = backbone
        self.args = args
        backbone.encoded = {} if args.cache_inputs else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        row = self.rows[index]
        try:
            return self.sample(row, epoch)
        except CocoaError as error:
            raise CocoaError(f"row {row.row_id}: {error}") from error

    def sample(self, row: ContentPair, epoch: int) -> dict[str, Tensor]:
        """Tensors of one row, corrupted as the epoch says."""
        raise NotImplementedError


def room_for_text(backbone: Backbone, max_length: int) -> int:
    """Tokens left for text beside the largest image, its two markers and EOS.

    Raises:
        CocoaError: none are left.
    """
    room = backbone.room(True, max_length)
    if room < 1:
        raise CocoaError(
            f"max_length {max_length} leaves no room for text beside an image of up to {backbone.images.tokens[1]} "
            "tokens; raise it or lower image.train_tokens"
        )
    return room


def passes(
    samples: Sequence[dict[str, Tensor]], backbone: Backbone, tokens: int, layout: BridgeLayout = "published"
) -> dict[str, list[dict[str, Any]]]:
    """A batch in `passes`, each a `pack` of samples of like length with at most so many tokens (or of one sample)."""
    parts: list[list[dict[str, Tensor]]] = []
    room = 0
    for sample in sorted(samples, key=lambda sample: len(sample["input_ids"])):
        length = len(sample["input_ids"])
        if not parts or length > room:
            parts.append([])
            room = tokens
        parts[-1].append(sample)
        room -= length
    return {"passes": [pack(part, backbone, layout) for part in parts]}


def pack(samples: list[dict[str, Tensor]], backbone: Backbone, layout: BridgeLayout = "published") -> dict[str, Any]:
    """One row of all samples' tokens, one sample behind the other, without padding: what training computes.

    Args:
        samples: of a data set of rows; those with an `eos_position` are bridged, those with a `compression_start`
            compressed, others bidirectional.
        backbone: that they are for.
        layout: of a bridge.

    Returns:
        The samples' tensors, those of tokens (1, N), with `eos_position` and `compression_start` (B,) as places in the
        row; `lengths` (B,); `position_ids` (3, 1, N), M-RoPE positions of each sample from its own start; `attention`.
    """
    sizes = [len(sample["input_ids"]) for sample in samples]
    lengths = torch.tensor(sizes)
    batch: dict[str, Any] = {"lengths": lengths}
    for key, values in _by_key(samples).items():
        if key in OF_TOKENS:
            batch[key] = torch.cat(values)[None]
        elif key in PLACES:
            batch[key] = torch.stack(values) + lengths.cumsum(0) - lengths
        else:
            batch[key] = torch.cat(values)
    positions = [
        backbone.rope_positions(
            sample["input_ids"][None], torch.ones(1, size, dtype=torch.long), sample.get("image_grid_thw")
        )
        for sample, size in zip(samples, sizes, strict=True)
    ]
    if "eos_position" in batch:
        found = blocks.eos_bridged(sizes, batch["eos_position"].tolist(), layout)
    elif "compression_start" in batch:
        found = blocks.compressed(sizes, batch["compression_start"].tolist(), backbone.compression_tokens)
    else:
        found = blocks.bidirectional(sizes)
    return batch | {"position_ids": torch.cat(positions, dim=2), "attention": blocks.Layout(found)}


def _by_key(samples: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    keys = dict.fromkeys(key for sample in samples for key in sample)
    return {key: [sample[key] for sample in samples if key in sample] for key in keys}
