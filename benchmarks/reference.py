"""The reference path, the rival in every table: a plain and correct rendition of how the published codes train.

Batches are padded in the order they are drawn, attention is one dense mask through SDPA, logits are float32, of the
whole vocabulary at every position. Same weights, same loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cocoa.attention import BridgeLayout, eos_bridged
from cocoa.backbone import Backbone
from cocoa.corruption import IGNORE_INDEX


def bridge_loss(backbone: Backbone, samples: Sequence[dict[str, Tensor]], layout: BridgeLayout) -> Tensor:
    """Mean cross-entropy of the hidden tokens of a batch (EOS-bridged reconstruction)."""
    device, pad = backbone.model.device, backbone.tokenizer.pad_token_id
    ids, labels = (
        pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value).to(device)
        for name, value in (("input_ids", pad), ("labels", IGNORE_INDEX))
    )  # (B, T)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)  # (B, T)
    eos = torch.stack([sample["eos_position"] for sample in samples]).to(device)
    pixels, grids = (
        torch.cat([sample[name] for sample in samples]).to(device) for name in ("pixel_values", "image_grid_thw")
    )
    states = backbone.model.model(
        input_ids=ids,
        attention_mask=eos_bridged(eos, mask, layout),
        position_ids=backbone.rope_positions(ids, mask, grids),
        pixel_values=pixels.to(backbone.model.dtype),
        image_grid_thw=grids,
        use_cache=False,
    ).last_hidden_state
    logits = backbone.model.lm_head(states).float()  # (B, T, V)
    logits[..., backbone.mask_token_id] = float("-inf")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
