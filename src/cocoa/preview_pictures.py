"""Images as the vision tower gets them, put together again from the tensors that training would see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cocoa.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in the pixels that the vision tower gets, on its grid of merged tokens.

    Attributes:
        columns: merged tokens side by side.
        rows: merged tokens one above another.
        image: the resized image.
        corrupted: the same with noise on the hidden tokens; None where none is hidden.
        hidden: by token, row by row; empty where none is hidden.
    """

    columns: int
    rows: int
    image: Image.Image
    corrupted: Image.Image | None = None
    hidden: tuple[bool, ...] = ()

    def describe(self) -> str:
        """Grid and size in one line, width first: `16 x 12 tokens (448 x 336 px)`."""
        width, height = self.image.size
        hidden = f", {sum(self.hidden)} of {len(self.hidden)} hidden" if self.hidden else ""
        return f"{self.columns} x {self.rows} tokens ({width} x {height} px){hidden}"


def picture_of(sequence: dict[str, Tensor], backbone: Backbone) -> Picture | None:
    """The image of a sequence, None where it has none; hidden tokens are restored from their targets."""
    if "pixel_values" not in sequence:
        return None
    pixels, grid = backbone.pixels.values(sequence["pixel_values"]), sequence["image_grid_thw"][0].tolist()
    merge = backbone.processor.image_processor.merge_size
    rows, columns = grid[1] // merge, grid[2] // merge
    if "hidden_units" not in sequence:
        return Picture(columns, rows, to_image(pixels, rows, columns, backbone))
    is_image = sequence["input_ids"] == backbone.model.config.image_token_id
    hidden = sequence["hidden_units"][is_image]  # (U,)
    clean = pixels.reshape(len(hidden), -1).clone()
    clean[hidden] = sequence["target_pixels"]
    image = to_image(clean.reshape(pixels.shape), rows, columns, backbone)
    return Picture(columns, rows, image, to_image(pixels, rows, columns, backbone), tuple(hidden.tolist()))


def to_image(pixels: Tensor, rows: int, columns: int, backbone: Backbone) -> Image.Image:
    """An image from the processor's output: its patches put together again, and normalisation undone.

    Args:
        pixels: (rows * columns * merge**2, channels * temporal * patch**2), merged tokens row by row.
        rows: merged tokens one above another.
        columns: merged tokens side by side.
        backbone: says the sizes, and what the pixels were normalised with.
    """
    processor = backbone.processor.image_processor
    # axes: token row and column, patch row and column in it, channel, frame, pixel row and column
    merge, patch, temporal = processor.merge_size, processor.patch_size, processor.temporal_patch_size
    patches = pixels.float().reshape(rows, columns, merge, merge, 3, temporal, patch, patch)[:, :, :, :, :, 0]
    picture = patches.permute(0, 2, 5, 1, 3, 6, 4)
    picture = picture.reshape(rows * merge * patch, columns * merge * patch, 3)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    values = ((picture * std + mean) * 255).round().clamp(0, 255)
    return Image.fromarray(values.to(torch.uint8).numpy())
