"""Stage 2, EOS-bridged reconstruction: rebuild a text through the EOS token alone.

A sequence is block A (an image with its instruction and text), one EOS, block B (the other side's
content). Attention is cut so that what B learns of A has passed through EOS. Departures from the paper,
where it is silent: a B of up to three tokens is hidden whole; `layout: strict` and `full` are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cocoa.adapters import Lora
from cocoa.attention import BRIDGE_LAYOUTS, BridgeLayout
from cocoa.backbone import Backbone
from cocoa.catalogue import StageRows
from cocoa.corruption import mask_text, row_generator
from cocoa.errors import CocoaError
from cocoa.inputs import most_tokens
from cocoa.pairs import ContentPair, Side
from cocoa.stages.arguments import check_range
from cocoa.stages.content import ContentDataset, ReconstructionArguments, Rows, content_rows, room_for_text
from cocoa.stages.reconstruction import ReconstructionTrainer, Reconstructor
from cocoa.stages.start import stage_adapters, stage_backbone

NAME = "eos_bridge"
WHOLE_UP_TO = 3
"""A block B of up to this many tokens is hidden whole."""


@dataclass
class EosBridgeArguments(ReconstructionArguments):
    """Arguments of stage 2, over `ReconstructionArguments`.

    Args:
        text_mask_ratio: share of block B's tokens that are hidden.
        layout: `published` (EOS sees A and B), `strict` (EOS sees A only, as at inference), or the control, `full`
            (nothing is cut: B sees A, and EOS need carry nothing).

    Example:
        >>> import cocoa
        >>> cocoa.EosBridgeArguments(output_dir="trainer", layout="strict").text_mask_ratio
        0.7
    """

    text_mask_ratio: float = 0.7
    layout: BridgeLayout = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("text_mask_ratio", self.text_mask_ratio, 0, 1)
        if self.layout not in BRIDGE_LAYOUTS:
            raise CocoaError(f"layout {self.layout!r}: choose one of {', '.join(BRIDGE_LAYOUTS)}")

    def new_tokens(self, backbone: Backbone) -> list[int]:
        """Id of the mask token."""
        return [backbone.mask_token_id]


class EosBridgeDataset(ContentDataset):
    """Block A, EOS, block B; tokens of B hidden."""

    args: EosBridgeArguments

    @property
    def layout(self) -> BridgeLayout:  # type: ignore[override]
        """As the stage's arguments say."""
        return self.args.layout

    def images(self) -> list[Side]:
        """Block A of every row."""
        return [row.side for row in self.rows]

    def sample(self, row: ContentPair, epoch: int) -> dict[str, Tensor]:
        """Tensors of one row; see `Reconstructor.forward`, without the batch axis."""
        args = self.args
        generator = row_generator(args.seed, NAME, epoch, row.row_id)
        return bridge(self.backbone, row, args.max_length, args.text_mask_ratio, generator)


def bridge(
    backbone: Backbone, row: ContentPair, max_length: int, text_mask_ratio: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Block A, EOS and B with tokens of B hidden: the input of `Reconstructor.forward` without batch axis.

    Args:
        backbone: encodes the row.
        row: block A and the text of block B.
        max_length: tokens the sequence may have; B is cut to fit, A never.
        text_mask_ratio: share of B's tokens to hide.
        generator: decides which.

    Raises:
        CocoaError: nothing of B fits.
    """
    block_a = backbone.encode_side(row.side)
    length_a = len(block_a["input_ids"])  # EOS included
    block_b = backbone.encode_text(row.text)[: max(max_length - length_a, 0)]
    if not block_b:
        raise CocoaError(f"block A of {length_a} tokens leaves no room for B in max_length {max_length}")
    input_ids = torch.cat([block_a["input_ids"], torch.tensor(block_b)])
    corrupted_ids, labels = mask_text(
        input_ids,
        torch.arange(len(input_ids)) >= length_a,
        text_mask_ratio,
        backbone.mask_token_id,
        generator,
        whole_up_to=WHOLE_UP_TO,
    )
    return block_a | {
        "input_ids": corrupted_ids,
        "labels": labels,
        "eos_position": torch.tensor(length_a - 1),
    }


def too_long(backbone: Backbone, row: ContentPair, max_length: int) -> bool:
    """Whether block A may fill a sequence so that nothing of B fits: such rows are left out, A is never cut."""
    room = room_for_text(backbone, max_length)
    prompt = row.side.prompt()
    return most_tokens(prompt) >= room and len(backbone.encode_text(prompt)) >= room


def usable_rows(pairs: Rows, backbone: Backbone, args: EosBridgeArguments) -> StageRows[ContentPair]:
    """What pairs give the bridge, none of it `too_long`."""
    return content_rows(pairs, NAME, lambda row: too_long(backbone, row, args.max_length), "block A")


class EosBridgeTrainer(ReconstructionTrainer):
    """The trainer of stage 2.

    Args:
        model: to be trained: a backbone, or the folder, hub id or embedded name that it is loaded from.
        args: of the stage.
        pairs: to train on; or a file or folder of pairs; or block A and the text of block B, each.
        lora: adapters to train in place of all weights.

    Raises:
        CocoaError: a mistake in the data, or fewer rows than a batch.

    Example:
        >>> import cocoa
        >>> from PIL import Image
        >>> colours = {name: Image.new("RGB", (84, 84), name) for name in ("red", "green", "blue", "white")}
        >>> sides = [({"image": image}, {"text": f"a {name} square"}) for name, image in colours.items()]
        >>> pairs = cocoa.read_pairs([{"query": query, "target": target} for query, target in sides])
        >>> args = cocoa.EosBridgeArguments(output_dir="trainer", batch_size=4, max_steps=1, layout="strict")
        >>> trainer = cocoa.EosBridgeTrainer("mini-qwen2-vl", args, pairs)
        >>> trainer.train().global_step
        1
        >>> trainer.save_checkpoint("bridged").name
        'bridged'
    """

    def __init__(
        self, model: Backbone | str | Path, args: EosBridgeArguments, pairs: Rows, lora: Lora | None = None
    ) -> None:
        backbone = stage_backbone(model, args, lora)
        rows = usable_rows(pairs, backbone, args)
        adapters = stage_adapters(backbone, args, lora)
        dataset = EosBridgeDataset(rows, backbone, args)
        super().__init__(NAME, Reconstructor(backbone), dataset, {"token": 1.0}, adapters)
        self.left_out = rows.left_out
