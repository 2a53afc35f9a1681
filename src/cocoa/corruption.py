"""Which text tokens and which image patches are hidden: pure functions with an explicit generator.

Departures from the papers, where they are silent: exactly `round(ratio * n)` elements are hidden (at
least one), not a coin toss each, so that a short text is never left whole; every hidden token becomes the
mask token (no 80/10/10 split, as published).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not predicted."""


def row_generator(seed: int, stage: str, epoch: int, row_id: str) -> torch.Generator:
    """The generator of one row's masks: the same row, epoch and seed hide the same elements anywhere.

    Drawn from what the row *is*, not from a running generator, so that masks do not depend on the worker,
    the device or a restart.
    """
    digest = hashlib.blake2b(f"{seed}\0{stage}\0{epoch}\0{row_id}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def choose(n: int, ratio: float, generator: torch.Generator) -> Tensor:
    """A random subset of `n` elements: (n,) boolean, True for `round(ratio * n)` of them, at least one.

    Raises:
        ValueError: `n` is 0, or the ratio is outside (0, 1].
    """
    if n < 1 or not 0 < ratio <= 1:
        raise ValueError(f"cannot choose a share of {ratio} out of {n} elements")
    count = max(1, round(ratio * n))
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.randperm(n, generator=generator)[:count]] = True
    return chosen


def mask_text(
    input_ids: Tensor,
    maskable: Tensor,
    ratio: float,
    mask_token_id: int,
    generator: torch.Generator,
    whole_up_to: int = 0,
) -> tuple[Tensor, Tensor]:
    """Hide a share of the text tokens (MNTP; CoCoA stages 1 and 2).

    Args:
        input_ids: (T,) token ids.
        maskable: (T,) boolean, True on text tokens; special, image and padding tokens are False.
        ratio: share of the maskable tokens to hide, in (0, 1].
        mask_token_id: id that takes the place of a hidden token.
        generator: decides which tokens.
        whole_up_to: hide every maskable token where there are no more than this many.

    Returns:
        corrupted: (T,) ids with hidden tokens replaced.
        labels: (T,) the original id where a token is hidden, `IGNORE_INDEX` elsewhere.
    """
    positions = maskable.nonzero().squeeze(-1)
    if len(positions) <= whole_up_to:
        ratio = 1.0
    hidden = positions[choose(len(positions), ratio, generator)]
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[hidden] = input_ids[hidden]
    corrupted = input_ids.clone()
    corrupted[hidden] = mask_token_id
    return corrupted, labels


def mask_patches(
    pixel_values: Tensor, ratio: float, generator: torch.Generator, merge: int, channels: int, temporal: int
) -> tuple[Tensor, Tensor]:
    """Replace a share of the image's merged patches with unit-Gaussian noise (MAE; CoCoA stage 1).

    The unit is a merged token, `merge * merge` consecutive rows of the processor's output (2 x 2 patches =
    28 x 28 px for Qwen2-VL), so that the language model sees no half-hidden token. A still image is one
    frame shown `temporal` times, so its noise is too.

    Args:
        pixel_values: (U * merge**2, channels * temporal * patch**2) normalised pixels of one image.
        ratio: share of the units to hide, in (0, 1].
        generator: decides which units, and the noise.
        merge: patches along each side of a unit.
        channels: colour channels.
        temporal: frames in a patch.

    Returns:
        corrupted: pixel values with the hidden units' rows replaced, same shape.
        hidden: (U,) boolean, True on the hidden units.
    """
    per_unit = merge * merge
    hidden = choose(pixel_values.shape[0] // per_unit, ratio, generator)
    rows = hidden.repeat_interleave(per_unit)
    width = pixel_values.shape[1] // (channels * temporal)
    noise = torch.randn(int(rows.sum()), channels, 1, width, generator=generator)
    corrupted = pixel_values.clone()
    corrupted[rows] = noise.expand(-1, -1, temporal, -1).reshape(len(noise), -1).to(pixel_values.dtype)
    return corrupted, hidden
