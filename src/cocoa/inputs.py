"""How a side becomes model input: its image fitted to a token budget, its text free of control tokens."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from cocoa.errors import CocoaError
from cocoa.images import load_image
from cocoa.pairs import Side

MAX_LENGTH = 4096
"""Tokens of an input, image tokens included, where nothing else is said; in training as in embedding."""


@dataclass(frozen=True, slots=True)
class ImageBudget:
    """How many merged tokens (28 x 28 px) an image may take, and how it is resized to fit.

    Args:
        tokens: least and most merged tokens an image; it is never cut, always resized.
        resize: `aspect` keeps the aspect ratio; `square` squashes every image to the largest square that
            fits, as the released code does.

    Example:
        >>> import cocoa
        >>> cocoa.ImageBudget((4, 64)).tokens
        (4, 64)
    """

    tokens: tuple[int, int] = (4, 256)
    resize: Literal["aspect", "square"] = "aspect"

    def __post_init__(self) -> None:
        if len(self.tokens) != 2:
            raise CocoaError(f"image tokens {list(self.tokens)}: give the least and the most")
        least, most = self.tokens
        if not 1 <= least <= most:
            raise CocoaError(f"image tokens {list(self.tokens)}: need 1 <= least <= most")
        if self.resize not in ("aspect", "square"):
            raise CocoaError(f"image.resize {self.resize!r}: choose aspect or square")
        if self.resize == "square" and math.isqrt(most) ** 2 < least:
            square = math.isqrt(most) ** 2
            raise CocoaError(f"image tokens {list(self.tokens)}: the largest square has {square}; lower the least")
        if self.resize == "aspect" and most < (math.sqrt(least) + 1) ** 2:
            needed = math.ceil((math.sqrt(least) + 1) ** 2)
            raise CocoaError(
                f"image tokens {list(self.tokens)}: too tight to keep the aspect ratio; with at least {least} tokens "
                f"allow {needed} or more, or resize: square"
            )

    @property
    def widest(self) -> float:
        """The aspect ratio up to which the processor's own resizing stays within the budget.

        The processor refuses ratios over 200. It rounds the sides of an image that is too large down, but to
        one token at least, and those of one that is too small up: least + sqrt(least) (sqrt(r) + 1 / sqrt(r))
        + 1 tokens at most for a ratio r.
        """
        least, most = self.tokens
        slack = (most - least - 1) / math.sqrt(least)
        root = (slack + math.sqrt(max(slack**2 - 4, 0))) / 2
        return min(200, most, root**2)


def chat_messages(side: Side, images: ImageBudget, patch_size: int = 28, exact: bool = True) -> list[dict[str, Any]]:
    """The side as chat messages: the instruction as a system message, then image and text.

    Args:
        side: what to embed.
        images: says whether the image is squashed to a square.
        patch_size: side of a merged token in pixels.
        exact: False decodes the file of a JPEG no larger than it is shown (`load_image`), which is faster; the colours
            differ by less than one in 255.
    """
    content: list[dict[str, Any]] = []
    if side.image is not None:
        shown = None if exact else partial(shown_size, images=images, patch_size=patch_size)
        content.append({"type": "image", "image": fit_image(load_image(side.image, shown), images, patch_size)})
    if text := side.text.strip():
        content.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if instruction := side.instruction.strip():
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": instruction}]})
    return messages


IMAGE_MARKER = "<|image_1|>"
"""Where MMEB's texts say that the image stands."""
IMAGE_TOKEN = "<|image_pad|>"


def reference_messages(side: Side) -> list[dict[str, Any]]:
    """A side as VLM2Vec puts it, for the plain template: the data's text with the image where its marker stands.

    The marker of a text without image stays in it as an image token (WebQA's and EDIS' queries have one). An image
    with a side under 28 px is blown up to 56 x 56 px, as there; other control tokens in the text are made inert.
    """
    parts = [text.replace("<|", "< |") for text in side.text.split(IMAGE_MARKER)]
    if side.image is None:
        text = IMAGE_TOKEN.join(parts)
        return [{"role": "user", "content": [{"type": "text", "text": text}]}]
    image = load_image(side.image)
    if min(image.size) < 28:
        image = image.resize((56, 56))
    before, after = (parts[0], "".join(parts[1:])) if len(parts) > 1 else ("", parts[0])
    content: list[dict[str, Any]] = [{"type": "text", "text": before}, {"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": after}]}]


def inert(text: str) -> str:
    """The text as the chat template writes it: no outer whitespace, and no control token in it."""
    return text.strip().replace("<|", "< |")


def fit_image(image: Image.Image, images: ImageBudget, patch_size: int) -> Image.Image:
    """Squash an image where the budget says so, and pull extreme aspect ratios back (`fitted_size`)."""
    size = fitted_size(image.size, images, patch_size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def fitted_size(size: tuple[int, int], images: ImageBudget, patch_size: int) -> tuple[int, int]:
    """Width and height that an image is given before the processor, which keeps the aspect ratio, gets it.

    An image of a ratio that the processor cannot fit into the budget is stretched on its short side, never cut.
    """
    if images.resize == "square":
        side = math.isqrt(images.tokens[1]) * patch_size
        return side, side
    width, height = size
    least = math.ceil(max(width, height) / images.widest)
    return max(width, least), max(height, least)


def image_tokens(size: tuple[int, int], images: ImageBudget, patch_size: int = 28) -> int:
    """How many merged tokens an image of this width and height takes; the most, if the size is not known (0, 0)."""
    if not all(size):
        return images.tokens[1]
    width, height = shown_size(size, images, patch_size)
    return height * width // patch_size**2


def shown_size(size: tuple[int, int], images: ImageBudget, patch_size: int = 28) -> tuple[int, int]:
    """Width and height of what a model sees of an image: whole merged tokens, within the budget."""
    width, height = fitted_size(size, images, patch_size)
    least, most = (tokens * patch_size**2 for tokens in images.tokens)
    height, width = smart_resize(height, width, patch_size, least, most)
    return width, height


def most_tokens(text: str) -> int:
    """No tokenizer of the family makes more tokens of a text: its bytes, normalised as they normalise it."""
    return len(unicodedata.normalize("NFC", inert(text)).encode())


def cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The longest prefix of a text that takes at most `tokens` tokens, cut between tokens."""
    while True:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if len(encoded["input_ids"]) <= tokens:
            return text
        text = text[: encoded["offset_mapping"][tokens][0]].rstrip()


def shorten(tokenizer: Any, text: str, tokens: int) -> str:
    """A text as the template writes it, cut to at most `tokens` tokens.

    Shortening comes before rendering, so that it can never cut EOS or an image.
    """
    return cut(tokenizer, inert(text), tokens)


def room(images: ImageBudget, shown: bool, max_length: int, ending: int = 1) -> int:
    """Tokens left of `max_length` beside the ending and, if one is shown, the largest image with its two markers.

    Args:
        images: the budget of an image.
        shown: whether there is an image.
        max_length: tokens of the whole input.
        ending: tokens that close it: EOS, or the compression tokens.
    """
    return max_length - ending - (images.tokens[1] + 2 if shown else 0)


def fit_text(tokenizer: Any, side: Side, images: ImageBudget, max_length: int, ending: int = 1) -> Side:
    """The side with its text shortened so that image, instruction, text and ending fit into `max_length`.

    Raises:
        CocoaError: image and instruction alone do not fit.
    """
    tokens = room(images, side.image is not None, max_length, ending)
    if most_tokens(side.prompt()) <= tokens:
        return side
    instruction = inert(side.instruction)
    prompt = shorten(tokenizer, side.prompt(), max(tokens, 0))
    if tokens < 0 or len(prompt) < len(instruction):
        raise CocoaError(f"max_length {max_length} has no room for image and instruction; raise it")
    return replace(side, text=prompt[len(instruction) :])
