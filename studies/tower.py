"""A frozen vision tower: a picture goes through it once, and its features then take the place of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cocoa.backbone import Backbone
from cocoa.pairs import Side

AT_ONCE = 256


def freeze_tower(backbone: Backbone) -> None:
    """Train the tower no more, and take features (N, D) where pixels (patches, values) are asked for."""
    tower = backbone.model.model.visual
    tower.requires_grad_(False)
    tower.forward = partial(_features_or_pixels, tower.forward, backbone.model.config.text_config.hidden_size)


def _features_or_pixels(see: Any, width: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if hidden_states.shape[-1] == width:
        return BaseModelOutputWithPooling(pooler_output=hidden_states)
    with torch.no_grad():
        return see(hidden_states, *args, **kwargs)


def keep_features(backbone: Backbone, sides: Sequence[Side]) -> None:
    """Encode sides into `backbone.encoded`, with features in place of pixels; nothing where the tower is trained."""
    if not isinstance(backbone.model.model.visual.forward, partial):
        return
    if backbone.encoded is None:
        backbone.encoded = {}
    known = set(backbone.encoded)
    for side in sides:
        backbone.encode_side(side)
    fresh = [kept for key, kept in backbone.encoded.items() if key not in known and "pixel_values" in kept]
    for start in range(0, len(fresh), AT_ONCE):
        part = fresh[start : start + AT_ONCE]
        pixels = torch.cat([kept["pixel_values"] for kept in part]).to(backbone.model.device)
        pixels = backbone.pixels.values(pixels)
        grids = torch.cat([kept["image_grid_thw"] for kept in part])
        with torch.no_grad():
            found = backbone.model.model.get_image_features(pixels, grids.to(pixels.device)).pooler_output
        for kept, features in zip(part, found, strict=True):
            kept["pixel_values"] = features.cpu().clone()
