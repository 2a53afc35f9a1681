"""Joint reconstruction on real models: one doubly corrupted input, two losses, one forward pass."""

import numpy as np
import pytest
import torch
from toy import arguments, captions, content_rows, pictures, row_of

from cocoa import inputs
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.pairs import ContentPair, Side
from cocoa.stages.eos_bridge import EosBridgeArguments, EosBridgeTrainer
from cocoa.stages.joint_reconstruction import (
    JointReconstructionArguments,
    JointReconstructionDataset,
    JointReconstructionTrainer,
)


@pytest.fixture
def sample(tiny_backbone, tmp_path):
    backbone = tiny_backbone()
    row = ContentPair(Side(image=pictures(1)[0]), captions(1)[0], "toy/0")
    dataset = JointReconstructionDataset([row], backbone, arguments(JointReconstructionArguments, tmp_path))
    return backbone, row, dataset[0, 0]


def test_only_text_is_masked(sample):
    backbone, row, corrupted = sample
    clean = backbone.encode_side(Side(text=row.text, image=row.side.image))
    hidden = corrupted["labels"] != IGNORE_INDEX
    text = len(backbone.encode_text(row.text))
    assert hidden.sum() == round(0.2 * text)
    assert not hidden[: -text - 1].any() and not hidden[-1]  # vision tokens in front, EOS behind
    assert torch.equal(torch.where(hidden, corrupted["labels"], corrupted["input_ids"]), clean["input_ids"])
    assert (corrupted["input_ids"] == backbone.eos_token_id).sum() == 1


def test_half_of_the_patches_are_noise_and_the_target(sample):
    backbone, row, corrupted = sample
    clean = backbone.pixels.values(backbone.encode_side(row.side)["pixel_values"]).reshape(9, -1)
    pixels = corrupted["pixel_values"].reshape(9, -1)
    hidden = (pixels != clean).any(1)
    assert hidden.sum() == 4  # round(0.5 * 9)
    image_tokens = corrupted["input_ids"] == backbone.model.config.image_token_id
    assert torch.equal(corrupted["hidden_units"][image_tokens], hidden)
    assert not corrupted["hidden_units"][~image_tokens].any()
    assert torch.equal(corrupted["target_pixels"], clean[hidden])


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
def test_both_losses_come_from_one_forward_pass(tiny_backbone, tmp_path, architecture):
    backbone = tiny_backbone(architecture)
    args = arguments(JointReconstructionArguments, tmp_path, batch_size=4)
    trainer = JointReconstructionTrainer(backbone, args, content_rows(4, False))
    batch = row_of(trainer, [trainer.train_dataset[0, i] for i in range(4)])
    calls = []
    backbone.model.model.register_forward_hook(lambda *_: calls.append(1))
    sums = trainer.model(**batch)
    assert len(calls) == 1
    assert sums["token"][1] == (batch["labels"] != IGNORE_INDEX).sum()
    assert sums["patch"][1] == len(batch["target_pixels"])
    (sums["token"][0] + sums["patch"][0]).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in trainer.model.patch_decoder.parameters()
        if p.requires_grad
    )


def test_patch_loss_is_the_mean_squared_error_in_numpy(tiny_backbone, tmp_path):
    args = arguments(JointReconstructionArguments, tmp_path, batch_size=2)
    trainer = JointReconstructionTrainer(tiny_backbone(), args, content_rows(2, False))
    model, batch = trainer.model.eval(), None
    batch = row_of(trainer, [trainer.train_dataset[0, i] for i in range(2)])
    seen = {}
    model.patch_decoder.register_forward_hook(lambda m, i, o: seen.update(predicted=o))
    with torch.no_grad():
        total, count = model(**batch)["patch"]
    error = (seen["predicted"].numpy() - batch["target_pixels"].numpy()) ** 2
    assert np.isclose((total / count).item(), error.mean(), rtol=1e-5)


def test_no_room_for_text_is_an_error(tiny_backbone, tmp_path):
    with pytest.raises(CocoaError, match="max_length 18 leaves no room for text"):
        JointReconstructionTrainer(
            tiny_backbone(), arguments(JointReconstructionArguments, tmp_path, max_length=18), content_rows(8, False)
        )


def test_long_text_is_shortened_before_eos(tiny_backbone, tmp_path):
    backbone = tiny_backbone()
    row = ContentPair(Side(image=pictures(1)[0]), "coffee " * 200, "toy/0")
    args = arguments(JointReconstructionArguments, tmp_path, max_length=40)
    ids = JointReconstructionDataset([row], backbone, args)[0, 0]["input_ids"]
    assert len(ids) <= 40 and ids[-1] == backbone.eos_token_id


def test_a_broken_image_names_its_row(tiny_backbone, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    row = ContentPair(Side(image=str(tmp_path / "broken.jpg")), "text", "toy/7")
    dataset = JointReconstructionDataset([row], tiny_backbone(), arguments(JointReconstructionArguments, tmp_path))
    with pytest.raises(CocoaError, match=r"row toy/7: .*broken\.jpg: not a readable image"):
        dataset[0, 0]


@pytest.mark.parametrize(
    ("trainer", "cls"),
    [(JointReconstructionTrainer, JointReconstructionArguments), (EosBridgeTrainer, EosBridgeArguments)],
)
def test_kept_inputs_save_encoding_and_change_nothing(tiny_backbone, tmp_path, monkeypatch, trainer, cls):
    weights, encoded = [], []
    for kept in (False, True):
        backbone = tiny_backbone()
        rows, images = content_rows(8, bridge=cls is EosBridgeArguments), []
        load = inputs.load_image
        monkeypatch.setattr(
            inputs, "load_image", lambda *image, load=load, images=images: images.append(1) or load(*image)
        )
        trainer(backbone, arguments(cls, tmp_path / str(kept), cache_inputs=kept), rows).train()
        monkeypatch.undo()
        weights.append(backbone.model.state_dict())
        encoded.append(len(images))
    assert encoded == [32, 8]  # 4 epochs of 8 rows
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
