"""The EOS-bridge on real models: nothing of block A reaches block B but through EOS."""

import pytest
import torch
from attention_paths import HeldKeysAndValues, final_states, gradients_before
from toy import arguments, content_rows, row_of, states_of

from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair, Side
from cocoa.stages.eos_bridge import (
    WHOLE_UP_TO,
    EosBridgeArguments,
    EosBridgeDataset,
    EosBridgeTrainer,
    bridge,
    too_long,
)

ARCHITECTURES = ["qwen2_vl", "qwen2_5_vl"]
LAYOUTS = ["published", "strict"]


def batch_of(backbone, tmp_path, layout, n=3):
    rows = content_rows(n, bridge=True)
    args = arguments(EosBridgeArguments, tmp_path, layout=layout, batch_size=n)
    trainer = EosBridgeTrainer(backbone, args, rows)
    samples = [trainer.train_dataset[0, i] for i in range(n)]
    return trainer.model.eval(), row_of(trainer, samples)


def sides_of_eos(batch):
    """(N,) booleans: what stands before each sample's EOS, and what behind it."""
    eos = batch["eos_position"].repeat_interleave(batch["lengths"])
    place = torch.arange(len(eos))
    return place < eos, place > eos


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_b_does_not_see_a_when_eos_is_held(tiny_backbone, tmp_path, architecture, layout):
    model, batch = batch_of(tiny_backbone(architecture), tmp_path, layout)
    eos = batch["eos_position"][None]
    other = {**batch, "pixel_values": torch.randint_like(batch["pixel_values"], 256)}
    in_a, in_b = sides_of_eos(batch)
    with torch.no_grad():
        with HeldKeysAndValues(model, eos) as first:
            before = final_states(model, batch)
        free = final_states(model, other)
        with HeldKeysAndValues(model, eos, replay=first.recorded):
            held = final_states(model, other)
    assert (held - before)[in_a].abs().max() > 1e-2  # A did change
    assert torch.equal(held[in_b], before[in_b])
    assert (free - before)[in_b].abs().max() > 1e-4  # and reaches B where EOS is free


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_b_reaches_a_only_through_eos(tiny_backbone, tmp_path, architecture, layout):
    backbone = tiny_backbone(architecture)
    model, batch = batch_of(backbone, tmp_path, layout)
    batch["labels"][0, batch["eos_position"] + 1] = IGNORE_INDEX  # predicted from EOS' own state
    through_eos, held = gradients_before(model, batch, batch["eos_position"][None], sides_of_eos(batch)[0])
    assert through_eos > 0
    assert held == 0


def test_strict_eos_state_is_that_of_inference(tiny_backbone, tmp_path):
    """Under `strict`, EOS at training equals the embedding's EOS, where no B exists; under `published` not."""
    backbone = tiny_backbone()
    row = content_rows(1, bridge=True)[0]
    alone = states_of(backbone, row.side)[-1]
    with torch.no_grad():
        for layout, equal in (("strict", True), ("published", False)):
            model, batch = batch_of(backbone, tmp_path, layout, n=1)
            eos = final_states(model, batch)[batch["eos_position"][0]]
            assert torch.allclose(eos, alone, atol=1e-5) == equal


def test_nothing_is_cut_from_its_end_where_a_fills_everything(tiny_backbone):
    backbone = tiny_backbone()
    row = content_rows(1, bridge=True)[0]
    length = len(backbone.encode_side(row.side)["input_ids"])
    assert len(bridge(backbone, row, length + 1, 1.0, torch.Generator())["input_ids"]) == length + 1
    for less in (length, length - 1, 1):
        with pytest.raises(CocoaError, match=f"no room for B in max_length {less}"):
            bridge(backbone, row, less, 1.0, torch.Generator())


def test_sample_is_a_eos_b(tiny_backbone, tmp_path):
    backbone = tiny_backbone()
    args = arguments(EosBridgeArguments, tmp_path, text_mask_ratio=0.7)
    row = content_rows(1, bridge=True)[0]
    sample = EosBridgeDataset([row], backbone, args)[0, 0]
    ids, labels, eos = sample["input_ids"], sample["labels"], int(sample["eos_position"])
    assert (ids == backbone.eos_token_id).sum() == 1 and ids[eos] == backbone.eos_token_id
    original = torch.where(labels == IGNORE_INDEX, ids, labels)
    assert backbone.tokenizer.decode(original[eos + 1 :]) == row.text
    assert torch.equal(original[: eos + 1], backbone.encode_side(row.side)["input_ids"])
    hidden = labels != IGNORE_INDEX
    assert not hidden[: eos + 1].any()
    assert hidden.sum() == round(0.7 * (len(ids) - eos - 1))
    assert (ids[hidden] == backbone.mask_token_id).all()


def test_masks_change_with_the_epoch_alone(tiny_backbone, tmp_path):
    args = arguments(EosBridgeArguments, tmp_path)
    rows = content_rows(2, bridge=True)
    dataset = EosBridgeDataset(rows, tiny_backbone(), args)
    assert torch.equal(dataset[0, 1]["labels"], dataset[0, 1]["labels"])
    assert not torch.equal(dataset[0, 1]["labels"], dataset[1, 1]["labels"])
    alone = EosBridgeDataset(rows[1:], tiny_backbone(), args)
    assert torch.equal(dataset[0, 1]["labels"], alone[0, 0]["labels"])  # not its place in the data


def test_short_target_is_hidden_whole(tiny_backbone, tmp_path):
    backbone = tiny_backbone()
    args = arguments(EosBridgeArguments, tmp_path, text_mask_ratio=0.1)
    side = content_rows(1, bridge=True)[0].side
    short = EosBridgeDataset([ContentPair(side, "abc", "toy/0")], backbone, args)[0, 0]
    length = len(backbone.encode_text("abc"))
    assert length <= WHOLE_UP_TO
    assert (short["labels"] != IGNORE_INDEX).sum() == length


def test_length_cuts_b_and_never_a(tiny_backbone, tmp_path):
    backbone = tiny_backbone()
    row = content_rows(1, bridge=True)[0]
    length_a = len(backbone.encode_side(row.side)["input_ids"])
    args = arguments(EosBridgeArguments, tmp_path, max_length=length_a + 5)
    sample = EosBridgeDataset([row], backbone, args)[0, 0]
    assert len(sample["input_ids"]) == length_a + 5
    assert sample["eos_position"] == length_a - 1


def test_rows_whose_a_fills_the_sequence_are_too_long(tiny_backbone):
    backbone = tiny_backbone()
    side = Side("Describe the picture.", "word " * 50, content_rows(1, bridge=True)[0].side.image)
    tokens = len(backbone.encode_side(side)["input_ids"])
    row = ContentPair(side, "b", "toy/0")
    assert not too_long(backbone, row, backbone.images.tokens[1] + tokens)
    assert too_long(backbone, row, tokens - 9 + backbone.images.tokens[1])


def test_first_token_is_logged_apart(tiny_backbone, tmp_path):
    model, batch = batch_of(tiny_backbone(), tmp_path, "published")
    behind = batch["eos_position"] + 1
    first_hidden = batch["labels"][0, behind] != IGNORE_INDEX
    with torch.no_grad():
        sums = model(**batch)
        only_first = batch["labels"].clone()
        only_first[0, ~torch.isin(torch.arange(only_first.shape[1]), behind)] = IGNORE_INDEX
        expected = model(**{**batch, "labels": only_first})["token"]
    assert sums["first"][1] == first_hidden.sum() > 0
    assert torch.allclose(sums["first"][0], expected[0])
