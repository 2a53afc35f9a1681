"""Inputs of unlike length in one row of tokens, one behind the other: what training and embedding compute.

No token is padding, so every one that is computed is real; attention is cut into the inputs' own blocks
(`cocoa.blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cocoa import blocks
from cocoa.architectures import recompute_activations
from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone
from cocoa.batching import filled
from cocoa.pixels import PixelFormat

OF_TOKENS = ("input_ids", "labels", "hidden_units")
"""Tensors (T,) of a sample that have a value for each token."""
PLACES = ("eos_position", "compression_start")
"""Tensors of a sample that are a place in it."""
IDLE_PIXELS, IDLE_GRID = "idle_pixels", "idle_grid_thw"
"""An image that is looked at and changes nothing, in a row without images."""


def by_length(samples: Sequence[dict[str, Tensor]], tokens: int) -> list[list[int]]:
    """Places of samples in passes: of like length, the shortest first, at most so many tokens (or one sample) each."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    order = sorted(range(len(samples)), key=lengths.__getitem__)
    return [[order[index] for index in part] for part in filled([lengths[place] for place in order], tokens)]


def pack(
    samples: Sequence[dict[str, Tensor]], backbone: Backbone, layout: BridgeLayout = "published"
) -> dict[str, Any]:
    """One row of all samples' tokens.

    Args:
        samples: tensors without a batch axis; those with an `eos_position` are bridged, those with a
            `compression_start` compressed, others attend as the backbone does.
        backbone: that they are for.
        layout: of a bridge.

    Returns:
        The samples' tensors, those of tokens (1, N), with `eos_position` and `compression_start` (B,) as places in the
        row; `lengths` (B,); `position_ids` (3, 1, N), M-RoPE positions of each sample from its own start; `attention`.
    """
    sizes = [len(sample["input_ids"]) for sample in samples]
    lengths = torch.tensor(sizes)
    batch: dict[str, Any] = {"lengths": lengths}
    for key in dict.fromkeys(key for sample in samples for key in sample):
        values = [sample[key] for sample in samples if key in sample]
        if key in OF_TOKENS:
            batch[key] = torch.cat(values)[None]
        elif key in PLACES:
            batch[key] = torch.stack(values) + lengths.cumsum(0) - lengths
        else:
            batch[key] = torch.cat(values)
    positions = [
        backbone.rope_positions(
            sample["input_ids"][None], torch.ones(1, size, dtype=torch.long), sample.get("image_grid_thw")
        )
        for sample, size in zip(samples, sizes, strict=True)
    ]
    if "eos_position" in batch:
        found = blocks.eos_bridged(sizes, batch["eos_position"].tolist(), layout)
    elif "compression_start" in batch:
        found = blocks.compressed(sizes, batch["compression_start"].tolist(), backbone.compression_tokens)
    else:
        found = blocks.own(sizes, causal=backbone.form.attention == "causal")
    return batch | {"position_ids": torch.cat(positions, dim=2), "attention": blocks.Layout(found)}


def final_states(
    model: Any, pixels: PixelFormat, input_ids: Tensor, position_ids: Tensor, attention: Any, images: dict[str, Tensor]
) -> Tensor:
    """The text model's final states of a row of `pack`.

    Args:
        model: without its language-model head; its text model attends in blocks.
        pixels: makes of bytes what the vision tower takes.
        input_ids: (1, N).
        position_ids: (3, 1, N).
        attention: a layout, or a boolean mask (1, 1, N, N).
        images: `pixel_values` (bytes or values) with `image_grid_thw`, or `image_features`, or `idle_pixels` with
            `idle_grid_thw`, or nothing.

    Returns:
        (1, N, D) post-norm states.
    """
    inputs: dict[str, Tensor] = {"input_ids": input_ids}
    if "image_features" in images:
        embeds = model.get_input_embeddings()(input_ids)
        is_image = (input_ids == model.config.image_token_id)[:, :, None]
        inputs = {"inputs_embeds": embeds.masked_scatter(is_image, images["image_features"].to(embeds.dtype))}
    elif "pixel_values" in images:
        inputs["pixel_values"] = pixels.values(images["pixel_values"])
        inputs["image_grid_thw"] = images["image_grid_thw"]
    elif IDLE_PIXELS in images:
        embeds = model.get_input_embeddings()(input_ids)
        idle = model.get_image_features(pixels.values(images[IDLE_PIXELS]), images[IDLE_GRID]).pooler_output
        inputs = {"inputs_embeds": embeds + 0 * torch.cat(idle).sum()}
    seen = {"full_attention": attention}
    return model(**inputs, attention_mask=seen, position_ids=position_ids, use_cache=False).last_hidden_state


class PackedEmbedder(nn.Module):
    """The backbone as an embedding model of packed rows; the same numbers as sentence-transformers' of padded batches.

    Args:
        backbone: whose text model attends in blocks from here on (padded batches as before); adapters, if any, already
            in place.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model.model
        self.model.set_attn_implementation({"text_config": blocks.IN_BLOCKS})
        self.whole = backbone.pooling == "mean"
        self.ending = backbone.ending
        self.pixels = backbone.pixels

    def anew(self, backbone: Backbone) -> PackedEmbedder:
        """The same around another backbone."""
        return PackedEmbedder(backbone)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the backbone's activations in the backward pass."""
        recompute_activations(self.model, **kwargs)

    def forward(self, *rows: Mapping[str, Any]) -> Tensor:
        """Embeddings of rows of `pack`, one row after the other: (B of all, D), pooled and normalised in float32."""
        return torch.cat([self._embed(**row) for row in rows])

    def _embed(
        self, input_ids: Tensor, position_ids: Tensor, attention: blocks.Layout, lengths: Tensor, **images: Tensor
    ) -> Tensor:
        states = final_states(self.model, self.pixels, input_ids, position_ids, attention, images)[0]
        if self.whole:
            vectors = torch.segment_reduce(states.float(), "mean", lengths=lengths, unsafe=True)  # looks at no lengths
        else:
            back = torch.arange(self.ending, 0, -1, device=lengths.device)
            vectors = states[lengths.cumsum(0)[:, None] - back].float().mean(1)  # of (B, ending, D)
        return F.normalize(vectors, dim=-1)
