"""Stage 1, joint reconstruction: learn to attend both ways by rebuilding masked text and masked patches.

One input is corrupted in both modalities at once, and both losses come from the same forward pass.
Departures from the paper, where it is silent: EOS closes the sequence (one template for all stages), the
patch decoder is MoCa's, and exactly `round(ratio * n)` elements are hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import set_seed

from cocoa.backbone import Backbone
from cocoa.corruption import mask_patches, mask_text, row_generator
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair, Side
from cocoa.reconstruction import PatchDecoder
from cocoa.stages.reconstruction import (
    ContentDataset,
    ReconstructionArguments,
    ReconstructionTrainer,
    Reconstructor,
    room_for_text,
)
from cocoa.stages.training import check_range

NAME = "joint_reconstruction"


@dataclass
class JointReconstructionArguments(ReconstructionArguments):
    """Arguments of stage 1, over `ReconstructionArguments`.

    Args:
        text_mask_ratio: share of the text tokens that are hidden (MNTP).
        patch_mask_ratio: share of the merged patches that are hidden (MAE).
        patch_loss_weight: weight of the patch loss beside the token loss.
    """

    text_mask_ratio: float = 0.2
    patch_mask_ratio: float = 0.5
    patch_loss_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("text_mask_ratio", self.text_mask_ratio, 0, 1)
        check_range("patch_mask_ratio", self.patch_mask_ratio, 0, 1)
        if self.patch_loss_weight < 0:
            raise CocoaError(f"patch_loss_weight: {self.patch_loss_weight} must be 0 or more")


class JointReconstructionDataset(ContentDataset):
    """An image with the content text that belongs to it, both corrupted."""

    args: JointReconstructionArguments

    def sample(self, row: ContentPair, epoch: int) -> dict[str, Tensor]:
        """Tensors of one row; see `Reconstructor.forward`, without the batch axis."""
        backbone, args = self.backbone, self.args
        text = backbone.shorten(row.text, room_for_text(backbone, args.max_length))
        clean = backbone.encode_side(Side(text=text, image=row.side.image))
        input_ids, pixel_values = clean["input_ids"], clean["pixel_values"]

        generator = row_generator(args.seed, NAME, epoch, row.row_id)
        special = torch.tensor(backbone.tokenizer.all_special_ids)
        corrupted_ids, labels = mask_text(
            input_ids, ~torch.isin(input_ids, special), args.text_mask_ratio, backbone.mask_token_id, generator
        )
        images = backbone.processor.image_processor
        corrupted_pixels, hidden = mask_patches(
            pixel_values,
            args.patch_mask_ratio,
            generator,
            images.merge_size,
            channels=3,
            temporal=images.temporal_patch_size,
        )
        hidden_units = torch.zeros_like(input_ids, dtype=torch.bool)
        hidden_units[input_ids == backbone.model.config.image_token_id] = hidden
        return {
            "input_ids": corrupted_ids,
            "labels": labels,
            "pixel_values": corrupted_pixels,
            "image_grid_thw": clean["image_grid_thw"],
            "hidden_units": hidden_units,
            "target_pixels": pixel_values.reshape(len(hidden), -1)[hidden],
        }


def build_trainer(
    backbone: Backbone, rows: Sequence[ContentPair], args: JointReconstructionArguments
) -> ReconstructionTrainer:
    """The trainer of stage 1.

    Args:
        backbone: to be trained, adapters (if any) already in place.
        rows: an image and the text that belongs to it, each.
        args: of the stage.

    Raises:
        CocoaError: fewer rows than a batch, or no room for text in `max_length`.
    """
    room_for_text(backbone, args.max_length)
    set_seed(args.seed)  # of the decoder's new weights
    decoder = PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
    model = Reconstructor(backbone, patch_decoder=decoder)
    weights = {"token": 1.0, "patch": args.patch_loss_weight}
    return ReconstructionTrainer(NAME, model, JointReconstructionDataset(rows, backbone, args), weights)
