"""What a frozen vision tower makes of images, computed once and kept in the place of their pixels."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from cocoa.backbone import Backbone
from cocoa.batching import filled
from cocoa.errors import CocoaError
from cocoa.pairs import Side

PATCHES_AT_ONCE = 2**16
"""Some 64 images of 256 tokens: a tower of real size takes 4 GB for them."""


@torch.no_grad()
def keep_features(backbone: Backbone, sides: Iterable[Side], progress: bool = False) -> None:
    """Encode sides into `backbone.encoded`, with `image_features` (merged tokens, D) in place of `pixel_values`.

    Nothing happens where the tower is trained. A side that cannot be encoded is left to whoever asks for it.

    Args:
        backbone: that keeps what it has encoded.
        sides: to be encoded; what is known of others is left alone.
        progress: show a bar on a terminal.
    """
    if any(parameter.requires_grad for parameter in backbone.model.model.visual.parameters()):
        return
    if backbone.encoded is None:
        backbone.encoded = {}
    own: dict[Any, dict[str, Tensor]] = {}
    for side in sides:
        with suppress(CocoaError):
            backbone.encode_side(side)
            key = backbone.kept_as(side)
            own[key] = backbone.encoded[key]
    features = {
        image: kept["image_features"] for (_, image), kept in backbone.encoded.items() if "image_features" in kept
    }
    pixels = {image: kept for (_, image), kept in own.items() if "pixel_values" in kept}
    fresh = [image for image in pixels if image not in features]
    sizes = [len(pixels[image]["pixel_values"]) for image in fresh]
    parts = [[fresh[index] for index in part] for part in filled(sizes, PATCHES_AT_ONCE)]
    for part in track(parts, "vision features", disable=not (progress and sys.stderr.isatty())):
        batch = torch.cat([pixels[image]["pixel_values"] for image in part]).to(backbone.model.device)
        grids = torch.cat([pixels[image]["image_grid_thw"] for image in part]).to(backbone.model.device)
        found = backbone.model.model.get_image_features(backbone.pixels.values(batch), grids).pooler_output
        features |= {image: feature.cpu().clone() for image, feature in zip(part, found, strict=True)}
    for (_, image), kept in own.items():
        if kept.pop("pixel_values", None) is not None:
            kept["image_features"] = features[image]
