"""How a side becomes model input: its image fitted to a token budget, its text free of control tokens."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from cocoa.errors import CocoaError
from cocoa.images import load_image
from cocoa.pairs import Side


@dataclass(frozen=True, slots=True)
class ImageBudget:
    """How many merged tokens (28 x 28 px) an image may take, and how it is resized to fit.

    Args:
        tokens: least and most merged tokens an image; it is never cut, always resized.
        resize: `aspect` keeps the aspect ratio; `square` squashes every image to the largest square that
            fits, as the released code does.
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


def chat_messages(side: Side, images: ImageBudget, patch_size: int = 28) -> list[dict[str, Any]]:
    """The side as chat messages: the instruction as a system message, then image and text.

    Args:
        side: what to embed.
        images: says whether the image is squashed to a square.
        patch_size: side of a merged token in pixels.
    """
    content: list[dict[str, Any]] = []
    if side.image is not None:
        content.append({"type": "image", "image": fit_image(load_image(side.image), images, patch_size)})
    if text := side.text.strip():
        content.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if instruction := side.instruction.strip():
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": instruction}]})
    return messages


def inert(text: str) -> str:
    """The text as the chat template writes it: no outer whitespace, and no control token in it."""
    return text.strip().replace("<|", "< |")


def fit_image(image: Image.Image, images: ImageBudget, patch_size: int) -> Image.Image:
    """Squash an image where the budget says so, and pull extreme aspect ratios back.

    The processor keeps the aspect ratio; an image of a ratio that it cannot fit into the budget is stretched
    on its short side, never cut.
    """
    if images.resize == "square":
        side = math.isqrt(images.tokens[1]) * patch_size
        return image.resize((side, side), Image.Resampling.BICUBIC)
    width, height = image.size
    least = math.ceil(max(width, height) / images.widest)
    if min(width, height) < least:
        return image.resize((max(width, least), max(height, least)), Image.Resampling.BICUBIC)
    return image


def most_tokens(text: str) -> int:
    """No tokenizer of the family makes more tokens of a text: its bytes, normalised as they normalise it."""
    return len(unicodedata.normalize("NFC", inert(text)).encode())
