"""Bridges that are not the paper's: what makes the *final* state of EOS, the embedding, carry the content.

Each is a `Reconstructor` under another rule, or another way to hide a row; `lab.Phase.stage` names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cocoa.backbone import Backbone
from cocoa.blocks import Block, Layout, own, spans
from cocoa.corruption import IGNORE_INDEX
from cocoa.packing import final_states
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

    def predict(self, *args: Any, **batch: Any) -> Prediction:
        """As `Reconstructor.predict`, for the bridge's batches."""
        ids, eos, lengths = batch["input_ids"], batch["eos_position"], batch["lengths"]
        starts = lengths.cumsum(0) - lengths  # (B,)
        place = torch.arange(ids.shape[1], device=ids.device)  # (N,)
        own_eos = eos.repeat_interleave(lengths)  # (N,)
        in_a, in_b = place <= own_eos, place >= own_eos  # EOS in both
        of_a = eos - starts + 1  # (B,) tokens of A and EOS
        positions = batch["position_ids"][:, :, in_a]
        states = final_states(self.model.model, self.pixels, ids[:, in_a], positions, self._whole(of_a), batch)
        final = self.projection(states[0, of_a.cumsum(0) - 1])  # (B, D)
        of_b = lengths - of_a + 1  # (B,) tokens of EOS and B
        heads = of_b.cumsum(0) - of_b  # (B,)
        embeds = self.model.get_input_embeddings()(ids[0, in_b]).index_put((heads,), final)  # (N', D)
        decoded = self.model.model.language_model(
            inputs_embeds=embeds[None],
            attention_mask={"full_attention": self._whole(of_b)},
            position_ids=(place[in_b] - own_eos[in_b]).expand(3, 1, -1),
            use_cache=False,
        ).last_hidden_state
        tokens = predict_tokens(decoded, self.model.lm_head, batch["labels"][:, in_b], self._excluded_ids, self.shifted)
        return Prediction(tokens._replace(positions=place[in_b][tokens.positions]), None)

    def _whole(self, lengths: Tensor) -> Layout:
        return Layout(own(lengths.tolist())).to(self.model.device)


class LateBridge(Reconstructor):
    """The strict bridge in the last layers only: below them B sees B alone, so that what it reads is nearly final."""

    def __init__(self, backbone: Backbone, layers: int = LATE_LAYERS) -> None:
        super().__init__(backbone)
        self._cut: Layout | None = None
        decoder = backbone.model.model.language_model.layers
        self._hooks = [
            layer.register_forward_pre_hook(self._hide_eos, with_kwargs=True)
            for layer in decoder[: len(decoder) - layers]
        ]

    def predict(self, *args: Any, **batch: Any) -> Prediction:
        """As `Reconstructor.predict`, for batches of the strict bridge."""
        cut = []
        for (start, end), eos in _eos_of_each(batch):
            cut += [Block((start, eos + 1), (start, eos + 1)), Block((eos + 1, end), (eos + 1, end))]
        self._cut = Layout(cut).to(self.model.device)
        return super().predict(*args, **batch)

    def _hide_eos(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": self._cut}

    def release(self) -> None:
        """Take the hooks off the backbone."""
        for hook in self._hooks:
            hook.remove()


class WordByWord(Reconstructor):
    """The strict bridge, but B is shown and predicted from left to right: every word of it asks something of EOS."""

    def predict(self, *args: Any, **batch: Any) -> Prediction:
        """As `Reconstructor.predict`, for the bridge's batches."""
        return super().predict(*args, **batch | {"attention": Layout(word_by_word(batch)).to(self.model.device)})


def word_by_word(batch: dict[str, Any]) -> list[Block]:
    """A and EOS see each other; a word of B sees EOS, and B up to itself."""
    seen = []
    for (start, end), eos in _eos_of_each(batch):
        seen += [Block((start, eos + 1), (start, eos + 1)), Block((eos + 1, end), (eos, end), causal=True)]
    return seen


def _eos_of_each(batch: dict[str, Any]) -> Iterator[tuple[tuple[int, int], int]]:
    """Where each input of a row starts and ends, and the place of its EOS."""
    return zip(spans(batch["lengths"].tolist()), batch["eos_position"].tolist(), strict=True)


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
    pixels, ids, eos = backbone.pixels.values(sample["pixel_values"]), sample["input_ids"], int(sample["eos_position"])
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    if torch.rand((), generator=generator) < 0.5:
        rebuilt = {"hidden_units": nothing, "target_pixels": pixels.new_empty(0, backbone.unit_size)}
        return sample | rebuilt | {"pixel_values": pixels}  # values as the other half's, to stand in one row
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
    """Rebuilds the texts and pictures of `with_picture`."""
    decoder = PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
    return Reconstructor(backbone, patch_decoder=decoder)
