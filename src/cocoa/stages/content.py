"""Rows of the reconstruction stages and of compression: their arguments, and one row's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import IntervalStrategy

from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone
from cocoa.catalogue import StageRows, stage_rows
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair, Pair, Side
from cocoa.sources import read_pairs
from cocoa.stages.arguments import StageArguments

Rows = str | Path | Sequence[Pair] | Sequence[ContentPair]
"""What a stage's trainer takes: a file or folder, pairs, or content that was chosen of pairs."""


@dataclass
class ReconstructionArguments(StageArguments):
    """Arguments of the reconstruction stages and of compression, over `StageArguments`.

    `ddp_find_unused_parameters` defaults to False: every row has an image and a text, so every weight is used.
    """

    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_strategy != IntervalStrategy.NO or self.eval_on_start:
            raise CocoaError(
                "eval_strategy, eval_on_start: only the contrastive stage is validated while it runs; leave it out"
            )


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


def content_rows(
    pairs: Rows, stage: str, too_long: Callable[[ContentPair], bool] | None = None, never_cut: str = ""
) -> StageRows[ContentPair]:
    """What a stage rebuilds of pairs; rows of content are taken as they are.

    Args:
        pairs: or the file or folder that holds them.
        stage: its name, see `cocoa.catalogue.stage_rows`.
        too_long: whether a row cannot be used, since the part of it that is never cut leaves no room.
        never_cut: what that part is called.

    Raises:
        CocoaError: a mistake in the data.
    """
    found = read_pairs(pairs) if isinstance(pairs, str | Path) else pairs
    rows = stage_rows([row for row in found if isinstance(row, Pair)], stage)
    kept: StageRows[ContentPair] = StageRows()
    kept.left_out = rows.left_out
    for row in rows:
        if too_long is not None and too_long(row):
            kept.left_out.setdefault(row.dataset, Counter())[f"{never_cut} fills max_length"] += 1
        else:
            kept.append(row)
    kept.extend(row for row in found if isinstance(row, ContentPair))
    return kept


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
