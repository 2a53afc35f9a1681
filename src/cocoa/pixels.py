"""Pixels as bytes until a model looks at them: an eighth of the memory of what a vision tower takes.

A Qwen2-VL tower takes float32 pixels, normalised, each still image as two equal frames. Data loaders' workers, their
queues and a cache of encoded images hold the bytes of one frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHANNELS = 3
BYTES_ONLY = {"do_rescale": False, "do_normalize": False}
"""Options with which an image processor leaves bytes as they are."""


class PixelFormat:
    """What an image processor makes of bytes.

    Args:
        image_processor: of the Qwen2-VL family.
    """

    def __init__(self, image_processor: Any) -> None:
        scale = 1.0 / image_processor.rescale_factor
        self.mean, self.std = (
            torch.tensor(each)[:, None, None] * scale
            for each in (image_processor.image_mean, image_processor.image_std)
        )  # (channels, 1, 1)
        self.frames = image_processor.temporal_patch_size

    def first_frame(self, patches: Tensor) -> Tensor:
        """One frame of patches (P, channels * frames * patch**2): (P, channels * patch**2)."""
        return patches.unflatten(1, (CHANNELS, self.frames, -1))[:, :, 0].flatten(1)

    def values(self, pixels: Tensor) -> Tensor:
        """What the tower takes: (P, channels * frames * patch**2), float32.

        Args:
            pixels: bytes (P, channels * patch**2), uint8; anything else is taken to be values, and returned.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (each.to(pixels.device) for each in (self.mean, self.std))
        colours = pixels.unflatten(1, (CHANNELS, 1, -1)).float()  # (P, channels, 1, patch**2)
        return ((colours - mean) / std).expand(-1, -1, self.frames, -1).flatten(1)
