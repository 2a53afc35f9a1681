"""Who EOS attends to: its attention over a picture's patches and a text's words, before and after training.

The embedding is EOS' final state, so this is what it is made of, as far as one layer's attention weights can
tell: they do not say what the values carry, nor what the residual stream brings along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cocoa.backbone import Backbone, load_backbone
from cocoa.checkpoint import form_of, read_record, trained_length
from cocoa.failures import WITHOUT_GPU, explained
from cocoa.inputs import MAX_LENGTH, ImageBudget
from cocoa.pairs import Side
from cocoa.preview_pictures import picture_of
from cocoa.rebuild import starts_word

FULL = 3.0
"""A patch or word is coloured in full at so many times what an even spread would give it."""
TEXT_TOKENS = 512
"""Of an input, beside its image: the weights of all layers are in memory at once, each the square of its length."""
COLOUR, OPACITY = (224, 123, 0), 0.85
"""Of a patch that is coloured in full, over the picture in grey."""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """EOS' attention in one layer, the mean over heads.

    Attributes:
        layer: which one, 1 the first.
        shares: of all its attention, what goes to the picture, the text, itself, and the markers around a picture.
        picture: the picture in grey, its merged patches coloured by their weights; None without one.
        words: of the text, each with its leading space, and its weight: 1 where attention is spread evenly over
            the text's tokens.
    """

    layer: int
    shares: dict[str, float]
    picture: Image.Image | None
    words: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class EosAttention:
    """One input, and the maps that each model gives: its middle layer and its last one."""

    side: Side
    models: dict[str, list[AttentionMap]]


@explained(WITHOUT_GPU)
def eos_attention(models: Mapping[str, str | Path], sides: Sequence[Side], images: ImageBudget) -> list[EosAttention]:
    """Run a few inputs through several models and see where EOS looks.

    Args:
        models: by name, a checkpoint's folder (read as it was trained) or an untouched backbone (causal).
        sides: the inputs.
        images: the image budget of all models, so that their patches are the same.

    Raises:
        CocoaError: a model cannot be loaded, or an input cannot be encoded.
    """
    found: list[dict[str, list[AttentionMap]]] = [{} for _ in sides]
    for name, source in models.items():
        backbone = _load(source, images)
        length = min(trained_length(read_record(Path(source))), images.tokens[1] + TEXT_TOKENS)
        for maps, side in zip(found, sides, strict=True):
            maps[name] = attention_maps(backbone, side, length)
        del backbone  # before the next one is loaded
    return [EosAttention(side, maps) for side, maps in zip(sides, found, strict=True)]


def attention_maps(backbone: Backbone, side: Side, max_length: int = MAX_LENGTH) -> list[AttentionMap]:
    """The maps of one input, of the layer in the middle and the last one; `backbone` computes its text eagerly.

    Where compression tokens close an input, they stand for EOS: the mean over them. A longer text is shortened.
    """
    encoded = backbone.encode_side(backbone.fit_text(side, max_length))
    ids = encoded["input_ids"]  # (T,)
    weights = ending_attention(backbone, encoded)  # (L, T)
    place = torch.arange(len(ids))
    picture, itself = ids == backbone.model.config.image_token_id, place >= len(ids) - backbone.ending
    start = int(picture.nonzero().max()) + 2 if picture.any() else 0  # behind the marker of its end
    of = {"picture": picture, "text": (place >= start) & ~itself, "itself": itself}
    of["markers"] = (place < start) & ~picture
    seen, words = picture_of(encoded, backbone), _words(ids[of["text"]].tolist(), backbone)
    maps = []
    for layer in ((len(weights) + 1) // 2, len(weights)):
        own = weights[layer - 1]  # (T,)
        shares = {name: own[there].sum().item() for name, there in of.items() if there.any()}
        patches, tokens = even(own[of["picture"]]), even(own[of["text"]])
        means = [part.mean().item() for part in tokens.split([count for _, count in words])]
        drawn = None if seen is None else coloured(seen.image, patches.reshape(seen.rows, seen.columns))
        maps.append(AttentionMap(layer, shares, drawn, tuple(zip((word for word, _ in words), means, strict=True))))
    return maps


def ending_attention(backbone: Backbone, encoded: dict[str, Tensor]) -> Tensor:
    """(L, T) how much the tokens that close one input attend to each of its tokens, in every layer, on the CPU.

    Args:
        backbone: its text model computes eagerly: nothing else gives weights.
        encoded: what `Backbone.encode_side` gives.
    """
    inputs = {name: value.to(backbone.model.device) for name, value in encoded.items()}
    ids = inputs.pop("input_ids")[None]  # (1, T)
    everything = torch.ones_like(ids)
    positions = backbone.rope_positions(ids, everything, inputs.get("image_grid_thw"))
    if "pixel_values" in inputs:
        inputs["pixel_values"] = backbone.pixels.values(inputs["pixel_values"])
    with torch.inference_mode():
        layers = backbone.model.model(
            input_ids=ids, attention_mask=everything, position_ids=positions, output_attentions=True, **inputs
        ).attentions  # (1, heads, T, T) each
    return torch.stack([layer[0, :, -backbone.ending :].float().mean((0, 1)).cpu() for layer in layers])


def even(weights: Tensor) -> Tensor:
    """Weights (n,) as multiples of their mean: 1 everywhere where they are spread evenly."""
    return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)


def coloured(picture: Image.Image, weights: Tensor) -> Image.Image:
    """The picture in grey, each of its merged patches coloured by its weight (rows, columns): see `FULL`."""
    strength = (weights / FULL).clamp(max=1) * OPACITY * 255
    mask = Image.fromarray(strength.round().to(torch.uint8).numpy()).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, COLOUR), picture.convert("L").convert("RGB"), mask)


def _load(source: str | Path, images: ImageBudget) -> Backbone:
    record = read_record(Path(source))
    if record:
        backbone = load_backbone(source, images, dtype="auto", **form_of(record)._asdict())
    else:
        backbone = load_backbone(source, images, dtype="auto", attention="causal")
    backbone.model.eval().set_attn_implementation({"text_config": "eager"})
    if torch.cuda.is_available():
        backbone.model.to("cuda")
    return backbone


def _words(ids: list[int], backbone: Backbone) -> list[tuple[str, int]]:
    """Token ids as words, each with how many tokens it has."""
    words: list[list[int]] = []
    for token in ids:
        if not words or starts_word(backbone.tokenizer.decode([token])):
            words.append([])
        words[-1].append(token)
    return [(backbone.tokenizer.decode(word), len(word)) for word in words]
