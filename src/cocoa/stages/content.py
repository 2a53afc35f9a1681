"""Rows of the reconstruction stages and of compression: their arguments, and one row's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import IntervalStrategy

from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair, Side
from cocoa.stages.arguments import StageArguments


@dataclass
class ReconstructionArguments(StageArguments):
    """Arguments of the reconstruction stages and of compression, over `StageArguments`.

    `ddp_find_unused_parameters` defaults to False: every row has an image and a text, so every weight is used.
    """

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

    def images(self) -> list[Side]:
        """Sides whose images are shown whole, so that a frozen tower's features can take their place."""
        return []

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
