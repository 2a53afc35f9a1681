"""Which tokens and patches are hidden: exact counts, nothing else touched, the same on every machine."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from cocoa.corruption import IGNORE_INDEX, choose, mask_patches, mask_text, row_generator

MASK = 99
CHANNELS, TEMPORAL, PATCH, MERGE = 3, 2, 14, 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("n", "ratio", "count"),
    [
        (10, 0.2, 2),
        (100, 0.7, 70),
        (8, 0.7, 6),  # 5.6
        (3, 0.7, 2),  # 2.1
        (5, 0.5, 2),  # 2.5: Python rounds to even
        (7, 0.5, 4),  # 3.5
        (2, 0.2, 1),  # 0.4: at least one
        (1, 0.01, 1),
        (4, 1.0, 4),
    ],
)
def test_exact_count(n, ratio, count):
    for seed in range(20):
        chosen = choose(n, ratio, seeded(seed))
        assert chosen.shape == (n,)
        assert chosen.dtype == torch.bool
        assert chosen.sum() == count


def test_every_element_has_the_same_chance():
    share = torch.stack([choose(5, 0.4, seeded(seed)) for seed in range(2000)]).float().mean(0)
    assert (share - 0.4).abs().max() < 0.05  # standard error 0.011


@pytest.mark.parametrize(("n", "ratio"), [(0, 0.5), (5, 0.0), (5, -0.1), (5, 1.01)])
def test_impossible_shares_are_refused(n, ratio):
    with pytest.raises(ValueError, match="cannot choose"):
        choose(n, ratio, seeded())


# vision-start, image, image, vision-end, five words, EOS, padding
INPUT_IDS = torch.tensor([90, 91, 91, 92, 10, 11, 12, 13, 14, 95, 96])
MASKABLE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)


def test_text_is_hidden_where_it_may_be_and_labelled_only_there():
    seen = set()
    for seed in range(50):
        before = INPUT_IDS.clone()
        corrupted, labels = mask_text(INPUT_IDS, MASKABLE, 0.4, MASK, seeded(seed))
        assert torch.equal(INPUT_IDS, before), "the row itself is left as it is"
        hidden = [i for i in range(11) if corrupted[i] != INPUT_IDS[i]]
        assert len(hidden) == 2
        assert set(hidden) <= {4, 5, 6, 7, 8}
        assert corrupted[hidden].tolist() == [MASK, MASK]
        expected = [IGNORE_INDEX] * 11
        for i in hidden:
            expected[i] = i + 6  # the word at position i has id i + 6
        assert labels.tolist() == expected
        seen.update(hidden)
    assert seen == {4, 5, 6, 7, 8}


def test_ignore_index_is_cross_entropys():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX


def test_all_of_the_text():
    corrupted, labels = mask_text(INPUT_IDS, MASKABLE, 1.0, MASK, seeded())
    assert corrupted.tolist() == [90, 91, 91, 92, 99, 99, 99, 99, 99, 95, 96]
    assert labels.tolist() == [-100, -100, -100, -100, 10, 11, 12, 13, 14, -100, -100]


@pytest.mark.parametrize(
    ("words", "whole_up_to", "hidden"),
    [(1, 3, 1), (3, 3, 3), (4, 3, 1), (5, 3, 2), (2, 2, 2), (3, 2, 1), (1, 0, 1), (3, 0, 1)],
)
def test_short_texts_are_hidden_whole(words, whole_up_to, hidden):
    maskable = torch.arange(6) < words
    _, labels = mask_text(torch.arange(6), maskable, 0.3, MASK, seeded(), whole_up_to=whole_up_to)
    assert (labels != IGNORE_INDEX).sum() == hidden


def test_a_row_without_text_is_refused():
    with pytest.raises(ValueError, match="out of 0"):
        mask_text(INPUT_IDS, torch.zeros(11, dtype=torch.bool), 0.5, MASK, seeded())


# --- row_generator -----------------------------------------------------------------------------------

ROW = (42, "eos_bridge", 3, "MSCOCO_i2t/17")


def drawn(*row):
    return torch.randperm(1000, generator=row_generator(*row)).tolist()


def test_a_row_is_masked_the_same_anywhere():
    assert drawn(*ROW) == drawn(*ROW)
    digest = hashlib.blake2b(b"42\x00eos_bridge\x003\x00MSCOCO_i2t/17", digest_size=8).hexdigest()
    assert row_generator(*ROW).initial_seed() == int(digest, 16) // 2, "no process-dependent hash"


@pytest.mark.parametrize(
    "other",
    [
        (43, "eos_bridge", 3, "MSCOCO_i2t/17"),
        (42, "joint_reconstruction", 3, "MSCOCO_i2t/17"),
        (42, "eos_bridge", 4, "MSCOCO_i2t/17"),
        (42, "eos_bridge", 3, "MSCOCO_i2t/18"),
    ],
    ids=["seed", "stage", "epoch", "row"],
)
def test_each_part_of_a_rows_name_changes_its_masks(other):
    assert drawn(*ROW) != drawn(*other)


def test_parts_do_not_run_together():
    assert drawn(1, "stage", 12, "3") != drawn(1, "stage", 1, "23")


# --- mask_patches ------------------------------------------------------------------------------------


def processed(image):
    size = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}
    return Qwen2VLImageProcessor(size=size)(images=[image], return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def checkered():
    """6 x 4 merged tokens, each of one grey level of its own: 10, 20, ... 240 in reading order."""
    levels = np.arange(10, 250, 10, dtype=np.uint8).reshape(4, 6)
    return Image.fromarray(levels.repeat(28, 0).repeat(28, 1)).convert("RGB")


def test_the_processors_rows_are_laid_out_as_mask_patches_takes_them(checkered):
    """Four consecutive rows are a merged token; a row is channel, temporal, patch, patch; frames alike."""
    rows = processed(checkered).view(24, 4, CHANNELS, TEMPORAL, PATCH * PATCH)
    assert torch.equal(rows[:, :, :, 0], rows[:, :, :, 1])
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for unit in range(24):
        for channel in range(3):
            value = ((unit + 1) * 10 / 255 - mean[channel]) / std[channel]
            torch.testing.assert_close(rows[unit, :, channel], torch.full((4, 2, 196), value), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 12), (0.3, 7), (0.01, 1), (1.0, 24)])
def test_hidden_units_become_noise_and_others_stay(checkered, ratio, count):
    pixels = processed(checkered)
    before = pixels.clone()
    corrupted, hidden = mask_patches(pixels, ratio, seeded(), MERGE, CHANNELS, TEMPORAL)
    assert torch.equal(pixels, before)
    assert corrupted.shape == pixels.shape
    assert hidden.shape == (24,)
    assert hidden.sum() == count
    changed = (corrupted != pixels).view(24, 4, -1)
    assert torch.equal(changed.any(-1), hidden[:, None].expand(24, 4)), "all four rows of a unit, or none"
    assert changed[hidden].all(), "every value of a hidden row"
    frames = corrupted.view(24, 4, CHANNELS, TEMPORAL, PATCH * PATCH)
    assert torch.equal(frames[:, :, :, 0], frames[:, :, :, 1]), "a still image: both frames alike"


def test_noise_is_unit_gaussian_and_fresh_everywhere():
    pixels = torch.full((4 * 64, 1176), 7.0)
    corrupted, hidden = mask_patches(pixels, 0.5, seeded(), MERGE, CHANNELS, TEMPORAL)
    noise = corrupted.view(64, 4, 3, 2, 196)[hidden][:, :, :, 0]  # (32, 4, 3, 196): 75,264 values
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(noise.pow(4).mean() - 3) < 0.2, "the kurtosis of a Gaussian"
    patches = noise.reshape(-1, 196)
    alike = torch.corrcoef(patches).fill_diagonal_(0).abs().max()
    assert alike < 0.5, "no two patches or channels share their noise"  # 384 patches: 5.2 sigma is 0.37


def test_patches_depend_on_the_generator_alone():
    pixels = torch.zeros(4 * 10, 1176)

    def masked(seed):
        return mask_patches(pixels, 0.5, seeded(seed), MERGE, CHANNELS, TEMPORAL)

    (first, hidden), (again, hidden_again), (other, hidden_other) = masked(0), masked(0), masked(1)
    assert torch.equal(first, again)
    assert torch.equal(hidden, hidden_again)
    assert not torch.equal(first, other)
    assert not torch.equal(hidden, hidden_other)


def test_the_dtype_of_the_pixels_is_kept():
    pixels = torch.zeros(4 * 4, 1176, dtype=torch.bfloat16)
    corrupted, _ = mask_patches(pixels, 0.5, seeded(), MERGE, CHANNELS, TEMPORAL)
    assert corrupted.dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "ratio"), [(0, 0.5), (3, 0.5), (16, 0.0), (16, 1.5)])
def test_impossible_patch_shares_are_refused(rows, ratio):
    with pytest.raises(ValueError, match="cannot choose"):
        mask_patches(torch.zeros(rows, 1176), ratio, seeded(), MERGE, CHANNELS, TEMPORAL)
