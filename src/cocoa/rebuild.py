"""Look at what the reconstruction stages learned: hidden patches, and captions through EOS alone, rebuilt.

Nothing is encoded, masked or predicted in a second way here: rows go through the stages' own functions
(`corrupt`, `bridge`, `pack`, `Reconstructor.predict`), in float32 and at the checkpoint's image budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone, load_backbone
from cocoa.checkpoint import read_record, trained_length
from cocoa.corruption import IGNORE_INDEX, row_generator
from cocoa.errors import CocoaError
from cocoa.failures import WITHOUT_GPU, explained
from cocoa.inputs import ImageBudget
from cocoa.packing import pack
from cocoa.pairs import ContentPair, Side
from cocoa.preview_pictures import picture_of, to_image
from cocoa.reconstruction import patch_loss
from cocoa.stages import eos_bridge, joint_reconstruction
from cocoa.stages.reconstruction import Reconstructor


@dataclass(frozen=True, slots=True)
class RebuiltImage:
    """A picture whose hidden patches were rebuilt from the visible ones and the text beside it.

    Attributes:
        row_id: names the row.
        text: that stood beside the picture, before a part of it was hidden too.
        original: as the vision tower would get it whole.
        masked: as it got it, noise on the hidden merged patches.
        rebuilt: predicted pixels on those, the original elsewhere.
        error: mean squared error on the hidden patches, of normalised pixels, as the stage's patch loss.
        flat_error: the same for a guess of the picture's mean colour everywhere.
    """

    row_id: str
    text: str
    original: Image.Image
    masked: Image.Image
    rebuilt: Image.Image
    error: float
    flat_error: float


@dataclass(frozen=True, slots=True)
class Word:
    """A piece of a rebuilt text, with its leading space; right where all its tokens are."""

    text: str
    right: bool


@dataclass(frozen=True, slots=True)
class RebuiltText:
    """A text that was rebuilt through EOS alone.

    Attributes:
        row_id: names the row.
        side: block A, all that EOS could learn from.
        truth: block B as the model would have read it.
        words: what the model made of it.
        tokens: of block B.
        tokens_right: how many of them were rebuilt, each in its place.
    """

    row_id: str
    side: Side
    truth: str
    words: tuple[Word, ...]
    tokens: int
    tokens_right: int

    @property
    def text(self) -> str:
        """The rebuilt text."""
        return "".join(word.text for word in self.words)

    @property
    def share(self) -> float:
        """Of the tokens that are right."""
        return self.tokens_right / self.tokens


@explained(WITHOUT_GPU)
def rebuild_images(
    folder: str | Path,
    rows: Sequence[ContentPair],
    seed: int = 0,
    patch_mask_ratio: float = 0.5,
    text_mask_ratio: float = 0.2,
    batch_size: int = 16,
) -> list[RebuiltImage]:
    """Hide patches of pictures as joint reconstruction does, and rebuild them with the decoder it trained.

    Args:
        folder: checkpoint of a joint reconstruction stage.
        rows: an image and the text that belongs to it, each.
        seed: decides what is hidden, as in the stage's first epoch.
        patch_mask_ratio: share of a picture's merged patches to hide.
        text_mask_ratio: share of the text's tokens to hide.
        batch_size: rows in a forward pass.

    Raises:
        CocoaError: the folder holds no patch decoder, or a row cannot be encoded.
    """
    if not rows:
        return []
    backbone = _load(folder)
    decoder = joint_reconstruction.load_patch_decoder(Path(folder), backbone)
    model = Reconstructor(backbone, patch_decoder=decoder).eval()
    length = trained_length(read_record(Path(folder)))

    def hide(row: ContentPair) -> dict[str, Tensor]:
        generator = row_generator(seed, joint_reconstruction.NAME, 0, row.row_id)
        return joint_reconstruction.corrupt(backbone, row, length, text_mask_ratio, patch_mask_ratio, generator)

    found: list[RebuiltImage] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        samples = [_sample(row, hide) for row in part]
        batch = _batch(samples, backbone)
        del batch["target_pixels"]
        with torch.inference_mode():
            pixels = model.predict(**batch).pixels
        assert pixels is not None
        predicted = pixels.cpu().split([len(sample["target_pixels"]) for sample in samples])  # (P, unit_size) each
        found += [_image(*each, backbone) for each in zip(part, samples, predicted, strict=True)]
    return found


@explained(WITHOUT_GPU)
def rebuild_texts(
    folder: str | Path, rows: Sequence[ContentPair], layout: BridgeLayout = "published", batch_size: int = 16
) -> list[RebuiltText]:
    """Hide block B whole, as the EOS-bridge hides most of it, and rebuild it: the likeliest token at each place.

    No token of B is given, so what is right was either learned by heart or has passed through EOS. The number
    of B's tokens is given.

    Args:
        folder: checkpoint of an EOS-bridge stage (or another one, to compare).
        rows: block A and the text of block B, each.
        layout: who sees whom; that of the stage's training, for a fair look.
        batch_size: rows in a forward pass.

    Raises:
        CocoaError: a row cannot be encoded.
    """
    if not rows:
        return []
    backbone = _load(folder)
    model = Reconstructor(backbone).eval()
    length = trained_length(read_record(Path(folder)))

    def hide(row: ContentPair) -> dict[str, Tensor]:
        return eos_bridge.bridge(backbone, row, length, 1.0, torch.Generator())  # all of B: nothing left to chance

    found: list[RebuiltText] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        samples = [_sample(row, hide) for row in part]
        with torch.inference_mode():
            tokens = model.predict(**_batch(samples, backbone, layout)).tokens
        truths = [sample["labels"][sample["labels"] != IGNORE_INDEX].tolist() for sample in samples]
        likeliest = tokens.likeliest.split([len(truth) for truth in truths])
        for row, truth, guess in zip(part, truths, likeliest, strict=True):
            guessed = guess.tolist()
            right = sum(a == b for a, b in zip(guessed, truth, strict=True))
            decoded, words = backbone.tokenizer.decode(truth), words_of(guessed, truth, backbone.tokenizer)
            found.append(RebuiltText(row.row_id, row.side, decoded, words, len(truth), right))
    return found


def swapped(rows: Sequence[ContentPair]) -> list[ContentPair]:
    """Each text with the block A of another row of its data set, to tell what is guessed from what is known.

    Rows that are alone in their data set are left out.
    """
    by_dataset: dict[str, list[ContentPair]] = defaultdict(list)
    for row in rows:
        by_dataset[row.dataset].append(row)
    return [
        replace(row, side=other.side)
        for members in by_dataset.values()
        if len(members) > 1
        for row, other in zip(members, [*members[1:], members[0]], strict=True)
    ]


def words_of(guessed: Sequence[int], truth: Sequence[int], tokenizer: Any) -> tuple[Word, ...]:
    """Guessed tokens as words; a new one starts where either token starts with a space or a sign.

    Args:
        guessed: (n,) ids.
        truth: (n,) ids that would be right in their places.
        tokenizer: of both.
    """
    words: list[tuple[list[int], bool]] = []
    for guess, true in zip(guessed, truth, strict=True):
        if not words or starts_word(tokenizer.decode([guess])) or starts_word(tokenizer.decode([true])):
            words.append(([], True))
        ids, right = words[-1]
        words[-1] = ([*ids, guess], right and guess == true)
    return tuple(Word(tokenizer.decode(ids), right) for ids, right in words)


def starts_word(text: str) -> bool:
    """Whether a token's text begins a word: with a space or a sign."""
    return text[:1].isascii() and not text[:1].isalnum()


def _load(folder: str | Path) -> Backbone:
    """A stage's checkpoint as the stage held it, with the image budget that embedding has."""
    images = read_record(Path(folder)).get("image")
    budget = ImageBudget(tuple(images["tokens"]), images["resize"]) if images else None
    backbone = load_backbone(folder, budget, attention="bidirectional")
    if torch.cuda.is_available():
        backbone.model.to("cuda")
    return backbone


def _sample(row: ContentPair, hide: Callable[[ContentPair], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return hide(row)
    except CocoaError as error:
        raise CocoaError(f"row {row.row_id}: {error}") from error


def _batch(samples: list[dict[str, Tensor]], backbone: Backbone, layout: BridgeLayout = "published") -> dict[str, Any]:
    batch = pack(samples, backbone, layout)
    return {name: value.to(backbone.model.device) for name, value in batch.items()}


def _image(row: ContentPair, sample: dict[str, Tensor], predicted: Tensor, backbone: Backbone) -> RebuiltImage:
    """One row's pictures; `predicted` is (P, unit_size) for its P hidden units."""
    seen = picture_of(sample, backbone)
    assert seen is not None and seen.corrupted is not None
    hidden, target = torch.tensor(seen.hidden), sample["target_pixels"]
    units = sample["pixel_values"].reshape(len(hidden), -1).clone()  # (U, unit_size)
    units[hidden] = target
    merge = backbone.processor.image_processor.merge_size
    colours = units.reshape(len(hidden), merge**2, 3, -1)
    flat = colours.mean((0, 1, 3), keepdim=True).expand_as(colours).reshape(units.shape)[hidden]
    units[hidden] = predicted
    return RebuiltImage(
        row_id=row.row_id,
        text=row.text,
        original=seen.image,
        masked=seen.corrupted,
        rebuilt=to_image(units.reshape(sample["pixel_values"].shape), seen.rows, seen.columns, backbone),
        error=(patch_loss(predicted, target) / len(target)).item(),
        flat_error=(patch_loss(flat, target) / len(target)).item(),
    )
