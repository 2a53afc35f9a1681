"""Stage 1, joint reconstruction: learn to attend both ways by rebuilding masked text and masked patches.

One input is corrupted in both modalities at once, and both losses come from the same forward pass.
Departures from the paper, where it is silent: EOS closes the sequence (one template for all stages), the
patch decoder is MoCa's, and exactly `round(ratio * n)` elements are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from cocoa.adapters import Lora
from cocoa.backbone import Backbone
from cocoa.catalogue import StageRows
from cocoa.corruption import mask_patches, mask_text, row_generator
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair, Side
from cocoa.reconstruction import PatchDecoder
from cocoa.stages.arguments import check_range
from cocoa.stages.content import ContentDataset, ReconstructionArguments, Rows, content_rows, room_for_text
from cocoa.stages.reconstruction import ReconstructionTrainer, Reconstructor
from cocoa.stages.start import stage_adapters, stage_backbone

NAME = "joint_reconstruction"
DECODER_NAME = "patch_decoder/model.safetensors"
"""File in the stage's checkpoint that holds the trained patch decoder, in float32 (apart: some servers load every
safetensors file of a folder as weights)."""


@dataclass
class JointReconstructionArguments(ReconstructionArguments):
    """Arguments of stage 1, over `ReconstructionArguments`.

    Args:
        text_mask_ratio: share of the text tokens that are hidden (MNTP).
        patch_mask_ratio: share of the merged patches that are hidden (MAE).
        patch_loss_weight: weight of the patch loss beside the token loss.
        text_objective: `mntp` predicts a hidden token from the state before it; `mlm` from its own, as the released
            code of MoCa does.

    Example:
        >>> import cocoa
        >>> args = cocoa.JointReconstructionArguments(output_dir="trainer", text_mask_ratio=0.3, learning_rate=1e-4)
        >>> args.text_mask_ratio, args.patch_mask_ratio
        (0.3, 0.5)
    """

    text_mask_ratio: float = 0.2
    patch_mask_ratio: float = 0.5
    patch_loss_weight: float = 0.5
    text_objective: Literal["mntp", "mlm"] = "mntp"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("text_mask_ratio", self.text_mask_ratio, 0, 1)
        check_range("patch_mask_ratio", self.patch_mask_ratio, 0, 1)
        if self.patch_loss_weight < 0:
            raise CocoaError(f"patch_loss_weight: {self.patch_loss_weight} must be 0 or more")
        if self.text_objective not in ("mntp", "mlm"):
            raise CocoaError(f"text_objective {self.text_objective!r}: choose mntp or mlm")

    def new_tokens(self, backbone: Backbone) -> list[int]:
        """Id of the mask token."""
        return [backbone.mask_token_id]


class JointReconstructionDataset(ContentDataset):
    """An image with the content text that belongs to it, both corrupted."""

    args: JointReconstructionArguments

    def sample(self, row: ContentPair, epoch: int) -> dict[str, Tensor]:
        """Tensors of one row; see `Reconstructor.forward`, without the batch axis."""
        args = self.args
        generator = row_generator(args.seed, NAME, epoch, row.row_id)
        ratios = (args.text_mask_ratio, args.patch_mask_ratio)
        return corrupt(self.backbone, row, args.max_length, *ratios, generator)


def corrupt(
    backbone: Backbone,
    row: ContentPair,
    max_length: int,
    text_mask_ratio: float,
    patch_mask_ratio: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """An image and its text, encoded and hidden in part: the input of `Reconstructor.forward` without batch axis.

    Args:
        backbone: encodes the row.
        row: an image and the text that belongs to it.
        max_length: tokens the sequence may have; the text is shortened to fit.
        text_mask_ratio: share of the text tokens to hide.
        patch_mask_ratio: share of the merged patches to hide.
        generator: decides which.
    """
    text = backbone.shorten(row.text, room_for_text(backbone, max_length))
    clean = backbone.encode_side(Side(text=text, image=row.side.image))
    input_ids, pixel_values = clean["input_ids"], backbone.pixels.values(clean["pixel_values"])

    special = torch.tensor(backbone.tokenizer.all_special_ids)
    corrupted_ids, labels = mask_text(
        input_ids, ~torch.isin(input_ids, special), text_mask_ratio, backbone.mask_token_id, generator
    )
    corrupted_pixels, hidden = hide_patches(backbone, pixel_values, patch_mask_ratio, generator)
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


def hide_patches(
    backbone: Backbone, pixel_values: Tensor, ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`mask_patches` of one image, in the units of the backbone's image processor."""
    images = backbone.processor.image_processor
    return mask_patches(
        pixel_values, ratio, generator, images.merge_size, channels=3, temporal=images.temporal_patch_size
    )


class JointReconstructionTrainer(ReconstructionTrainer):
    """The trainer of stage 1.

    Args:
        model: to be trained: a backbone, or the folder, hub id or embedded name that it is loaded from.
        args: of the stage.
        pairs: to train on; or a file or folder of pairs; or an image and the text that belongs to it, each.
        lora: adapters to train in place of all weights.

    Raises:
        CocoaError: a mistake in the data, fewer rows than a batch, or no room for text in `max_length`.

    Example:
        >>> import cocoa
        >>> from PIL import Image
        >>> colours = {name: Image.new("RGB", (84, 84), name) for name in ("red", "green", "blue", "white")}
        >>> sides = [({"image": image}, {"text": f"a {name} square"}) for name, image in colours.items()]
        >>> pairs = cocoa.read_pairs([{"query": query, "target": target} for query, target in sides])
        >>> args = cocoa.JointReconstructionArguments(output_dir="trainer", batch_size=4, max_steps=1)
        >>> trainer = cocoa.JointReconstructionTrainer("mini-qwen2-vl", args, pairs)
        >>> trainer.train().global_step
        1
        >>> trainer.save_checkpoint("reconstructed").name
        'reconstructed'
    """

    def __init__(
        self, model: Backbone | str | Path, args: JointReconstructionArguments, pairs: Rows, lora: Lora | None = None
    ) -> None:
        rows = usable_rows(pairs)
        backbone = stage_backbone(model, args, lora)
        room_for_text(backbone, args.max_length)
        adapters = stage_adapters(backbone, args, lora)
        set_seed(args.seed)  # of the decoder's new weights
        decoder = PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
        reconstructor = Reconstructor(backbone, patch_decoder=decoder, shifted=args.text_objective == "mntp")
        weights = {"token": 1.0, "patch": args.patch_loss_weight}
        dataset = JointReconstructionDataset(rows, backbone, args)
        super().__init__(NAME, reconstructor, dataset, weights, adapters)
        self.left_out = rows.left_out

    def save_beside(self, folder: Path) -> None:
        """Write the patch decoder."""
        save_patch_decoder(self.model.patch_decoder, folder)


def usable_rows(pairs: Rows) -> StageRows[ContentPair]:
    """The images with a text of their own that pairs give."""
    return content_rows(pairs, NAME)


def save_patch_decoder(decoder: PatchDecoder, folder: Path) -> None:
    """Write the decoder's weights beside the checkpoint's, in float32."""
    weights = {name: value.detach().float().cpu().contiguous() for name, value in decoder.state_dict().items()}
    path = folder / DECODER_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def load_patch_decoder(folder: Path, backbone: Backbone) -> PatchDecoder:
    """The decoder that the stage trained, on the backbone's device.

    Args:
        folder: checkpoint of the stage.
        backbone: loaded from it; gives the decoder its shape.

    Raises:
        CocoaError: the folder holds none.
    """
    path = folder / DECODER_NAME
    if not path.is_file():
        raise CocoaError(f"{path}: no patch decoder here; name the checkpoint of a {NAME} stage, or train it again")
    decoder = PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
    decoder.load_state_dict(load_file(path))
    return decoder
