"""The reference path, the rival in every table: a plain and correct rendition of how the published codes train.

Batches are padded in the order they are drawn, attention is one dense mask through SDPA, logits are float32, of the
whole vocabulary at every position. Same weights, same loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shapes import precision
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cocoa.attention import BridgeLayout, eos_bridged
from cocoa.backbone import Backbone
from cocoa.corruption import IGNORE_INDEX


def collate(backbone: Backbone, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A padded batch: `input_ids`, `labels` and `attention_mask` (B, T), `position_ids` (3, B, T), EOS and images."""
    pad = backbone.tokenizer.pad_token_id
    ids, labels = (
        pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
        for name, value in (("input_ids", pad), ("labels", IGNORE_INDEX))
    )
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    pixels, grids = (torch.cat([sample[name] for sample in samples]) for name in ("pixel_values", "image_grid_thw"))
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "position_ids": backbone.rope_positions(ids, mask, grids),
        "eos_position": torch.stack([sample["eos_position"] for sample in samples]),
        "pixel_values": pixels,
        "image_grid_thw": grids,
    }


def bridge_loss(backbone: Backbone, batch: dict[str, Tensor], layout: BridgeLayout) -> Tensor:
    """Mean cross-entropy of the hidden tokens of a batch of `collate` (EOS-bridged reconstruction)."""
    batch = {name: value.to(backbone.model.device) for name, value in batch.items()}
    labels, eos, mask = (batch.pop(name) for name in ("labels", "eos_position", "attention_mask"))
    allowed = eos_bridged(eos, mask, layout)
    with precision(backbone.model.device):
        states = backbone.model.model(**batch, attention_mask=allowed, use_cache=False).last_hidden_state
        logits = backbone.model.lm_head(states).float()  # (B, T, V)
    logits[..., backbone.mask_token_id] = float("-inf")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
