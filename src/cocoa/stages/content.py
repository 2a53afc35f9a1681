"""Rows of the reconstruction stages and of compression: their arguments, one row's tensors, a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.trainer_utils import IntervalStrategy

from cocoa.backbone import Backbone
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair
from cocoa.stages.training import StageArguments


@dataclass
class ReconstructionArguments(StageArguments):
    """Arguments of the reconstruction stages and of compression, over `StageArguments`.

    `ddp_find_unused_parameters` defaults to False: every row has an image and a text, so every weight is used.

    Args:
        cache_inputs: keep each row's encoded image and text in memory instead of encoding them in every epoch,
            for small data: 19 kB an image token, in every process and data loader worker.
    """

    cache_inputs: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_strategy != IntervalStrategy.NO:
            raise CocoaError("eval_strategy: only the contrastive stage is validated while it runs; leave it out")


class ContentDataset(Dataset):
    """Rows of content, encoded and corrupted when asked for; the key is `(epoch, row)`.

    Args:
        rows: what to rebuild.
        backbone: encodes a row.
        args: of the stage, for seed, ratios and length.
    """

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


def pack(samples: list[dict[str, Tensor]], backbone: Backbone) -> dict[str, Tensor]:
    """One row (1, N) of all samples' tokens, without padding, the shortest first.

    Besides the samples' own tensors, with `eos_position` and `compression_start` (B,) as places in the row, it has
    `lengths` (B,), and `position_ids` (3, 1, N), the M-RoPE positions of each sample from its own start.
    """
    samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    batch: dict[str, Tensor] = {}
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key in ("input_ids", "labels", "hidden_units"):
            batch[key] = torch.cat(values)[None]
        elif key in ("eos_position", "compression_start"):
            batch[key] = torch.stack(values) + lengths.cumsum(0) - lengths
        else:
            batch[key] = torch.cat(values)
    positions = [
        backbone.rope_positions(ids[None], torch.ones_like(ids)[None], sample.get("image_grid_thw"))
        for sample in samples
        for ids in [sample["input_ids"]]
    ]
    return batch | {"lengths": lengths, "position_ids": torch.cat(positions, dim=2)}


def collate(samples: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad token tensors on the right, and concatenate images."""
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "hidden_units": False}
    batch: dict[str, Tensor] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key in fill:
            batch[key] = pad_sequence(values, batch_first=True, padding_value=fill[key])
        elif key in ("eos_position", "compression_start"):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.cat(values)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch
