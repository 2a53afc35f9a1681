"""Bridges that are not the paper's: what makes the *final* state of EOS, the embedding, carry the content.

Each is a `Reconstructor` under another rule, or another way to hide a row; `lab.Phase.stage` names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cocoa.attention import bidirectional, causal
from cocoa.backbone import Backbone
from cocoa.corruption import IGNORE_INDEX
from cocoa.pairs import ContentPair
from cocoa.reconstruction import PatchDecoder, predict_tokens
from cocoa.stages.eos_bridge import bridge
from cocoa.stages.joint_reconstruction import hide_patches
from cocoa.stages.reconstruction import Prediction, Reconstructor

LATE_LAYERS = 2


class FinalState(Reconstructor):
    """B reads a projection of EOS' final state, in EOS' place, and nothing else of A: the embedding is the bridge.

    A second pass embeds B behind that vector; as in RetroMAE, but the decoder is the backbone itself.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        width = backbone.model.config.text_config.hidden_size
        self.projection = nn.Linear(width, width, device=backbone.model.device)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self._pad_token_id = backbone.tokenizer.pad_token_id

    def predict(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        eos_position: Tensor | None = None,
        compression_start: Tensor | None = None,
        hidden_units: Tensor | None = None,
    ) -> Prediction:
        """As `Reconstructor.predict`, for the bridge's batches."""
        assert eos_position is not None
        place = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        in_a = attention_mask * (place <= eos_position[:, None])  # A and EOS
        states = self.model.model(
            input_ids=torch.where(in_a.bool(), input_ids, self._pad_token_id),
            attention_mask=bidirectional(in_a),
            position_ids=self._rope_positions(input_ids, in_a, image_grid_thw),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            use_cache=False,
        ).last_hidden_state
        in_b = attention_mask * (place >= eos_position[:, None])  # EOS and B
        lengths = in_b.sum(1)
        order = eos_position[:, None] + torch.arange(int(lengths.max()), device=input_ids.device)  # (B, T')
        mask = torch.arange(order.shape[1], device=input_ids.device) < lengths[:, None]
        order = order.clamp(max=input_ids.shape[1] - 1)
        embeds = self.model.get_input_embeddings()(input_ids.gather(1, order))
        final = self.projection(states[rows, eos_position])  # (B, D)
        embeds = torch.cat([final[:, None].to(embeds.dtype), embeds[:, 1:]], dim=1)
        own = labels.gather(1, order).masked_fill(~mask, IGNORE_INDEX)
        decoded = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=bidirectional(mask),
            position_ids=torch.arange(order.shape[1], device=input_ids.device).expand(3, *order.shape),
            use_cache=False,
        ).last_hidden_state
        tokens = predict_tokens(decoded, self.model.lm_head, own, self._excluded_ids, self.shifted)
        return Prediction(tokens._replace(positions=tokens.positions + eos_position[tokens.rows]), None)


class LateBridge(Reconstructor):
    """The strict bridge in the last layers only: below them B sees B alone, so that what it reads is nearly final."""

    def __init__(self, backbone: Backbone, layers: int = LATE_LAYERS) -> None:
        super().__init__(backbone, layout="strict")
        self._cut: Tensor | None = None
        decoder = backbone.model.model.language_model.layers
        self._hooks = [
            layer.register_forward_pre_hook(self._hide_eos, with_kwargs=True)
            for layer in decoder[: len(decoder) - layers]
        ]

    def attention(
        self, attention_mask: Tensor, eos_position: Tensor | None, compression_start: Tensor | None
    ) -> Tensor:
        """(B, 1, T, T) of the last layers."""
        assert eos_position is not None
        allowed = super().attention(attention_mask, eos_position, compression_start)
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        in_b, is_eos = place > eos_position[:, None], place == eos_position[:, None]
        self._cut = allowed & ~(in_b[:, :, None] & is_eos[:, None, :])[:, None]
        return allowed

    def _hide_eos(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": self._cut}

    def release(self) -> None:
        """Take the hooks off the backbone."""
        for hook in self._hooks:
            hook.remove()


class WordByWord(Reconstructor):
    """The strict bridge, but B is shown and predicted from left to right: every word of it asks something of EOS."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, layout="strict")

    def attention(
        self, attention_mask: Tensor, eos_position: Tensor | None, compression_start: Tensor | None
    ) -> Tensor:
        """(B, 1, T, T)."""
        assert eos_position is not None
        in_b = torch.arange(attention_mask.shape[1], device=attention_mask.device) > eos_position[:, None]  # (B, T)
        allowed = super().attention(attention_mask, eos_position, compression_start)
        return allowed & (causal(attention_mask) | ~in_b[:, None, :, None])


def with_picture(
    backbone: Backbone,
    row: ContentPair,
    max_length: int,
    text_mask_ratio: float,
    patch_mask_ratio: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A, EOS and B; of half the rows B is the picture itself, in part hidden.

    What is hidden of it can be rebuilt from its other patches and from what EOS carries of the whole one.
    """
    sample = bridge(backbone, row, max_length, text_mask_ratio, generator)
    pixels, ids, eos = sample["pixel_values"], sample["input_ids"], int(sample["eos_position"])
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    if torch.rand((), generator=generator) < 0.5:
        return sample | {"hidden_units": nothing, "target_pixels": pixels.new_empty(0, backbone.unit_size)}
    corrupted, hidden = hide_patches(backbone, pixels, patch_mask_ratio, generator)
    config = backbone.model.config
    start, image, end = (getattr(config, f"{name}_token_id") for name in ("vision_start", "image", "vision_end"))
    ids = torch.cat([ids[: eos + 1], torch.tensor([start, *[image] * len(hidden), end])])
    return {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE_INDEX),
        "pixel_values": torch.cat([pixels, corrupted]),
        "image_grid_thw": sample["image_grid_thw"].repeat(2, 1),
        "eos_position": sample["eos_position"],
        "hidden_units": torch.cat([nothing[: eos + 2], hidden, torch.tensor([False])]),
        "target_pixels": pixels.reshape(len(hidden), -1)[hidden],
    }


def picture_model(backbone: Backbone) -> Reconstructor:
    """Rebuilds the texts and pictures of `with_picture`, under the strict bridge."""
    decoder = PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
    return Reconstructor(backbone, layout="strict", patch_decoder=decoder)
