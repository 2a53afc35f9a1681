"""The one record type for every source of data, and which of its content feeds which stage.

A `Pair` is a query and a target; each is a `Side`: what the data set says to every row (`instruction`),
this row's own content (`text`) and an image. The contrastive stage renders instruction + text; the
reconstruction stages rebuild *content only*, and `content_pairs` is the single place that chooses it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from cocoa.errors import CocoaError

ImageRef = str | Image.Image
"""An image in memory, or the absolute path of its file."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a pair; an absent text is the empty string, an absent image None."""

    instruction: str = ""
    text: str = ""
    image: ImageRef | None = None

    def prompt(self) -> str:
        """Instruction and text as the chat template joins them: one space between, none outside."""
        return " ".join(part for part in (self.instruction.strip(), self.text.strip()) if part)

    def content_id(self) -> int:
        """A 63-bit id of (text, image), equal across processes and runs; the instruction is no content."""
        digest = hashlib.blake2b(self.text.strip().encode(), digest_size=8)
        if isinstance(self.image, Image.Image):
            digest.update(f"\0{self.image.mode}{self.image.size}".encode() + self.image.tobytes())
        elif self.image is not None:
            digest.update(b"\0" + self.image.encode())
        return int.from_bytes(digest.digest()) >> 1


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, its target and optional hard negatives, with the data set and row they came from."""

    query: Side
    target: Side
    negatives: tuple[Side, ...] = ()
    dataset: str = ""
    row: int = 0


def load_image(image: ImageRef) -> Image.Image:
    """The image as upright RGB (EXIF rotation applied; CMYK, greyscale and palettes converted).

    Transparent pixels become white.

    Raises:
        CocoaError: the file is missing or no readable image; the message names it.
    """
    if isinstance(image, str):
        try:
            with Image.open(image) as opened:
                opened.load()
                image = opened
        except FileNotFoundError:
            raise CocoaError(f"{image}: no such image file; check the data folder or `image_root`") from None
        except OSError as error:
            raise CocoaError(f"{image}: not a readable image ({error}); replace it or drop its row") from None
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
