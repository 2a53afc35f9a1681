"""A frozen vision tower sees an image once, and what is trained is the same."""

import pytest
import torch
from PIL import Image
from test_training import distance, make_trainer, weights

from cocoa import features
from cocoa.adapters import Lora, add_adapters
from cocoa.architectures import recompute_activations
from cocoa.features import keep_features
from cocoa.pairs import Side


@pytest.mark.parametrize(
    "stage",
    [
        "contrastive",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("eos_bridge", "compression", "matching")),
    ],
)
def test_cached_features_train_what_pixels_train(tiny_backbone, tmp_path, stage):
    trained, seen = [], []
    for cached in (False, True):
        backbone, images = tiny_backbone(), []
        torch.manual_seed(0)
        add_adapters(backbone.model, Lora(vision=(), dropout=0.0), [backbone.mask_token_id])
        backbone.model.model.visual.register_forward_hook(
            lambda module, args, output, images=images: images.append(len(output.pooler_output))
        )
        trainer = make_trainer(stage, backbone, tmp_path / str(cached), cache_inputs=cached, max_steps=5)
        trainer.train()
        trained.append(weights(trainer))
        seen.append(sum(images))
    assert distance(*trained) < 1e-5
    images = {id(side.image) for side in trainer.train_dataset.images() if side.image is not None}
    assert seen[1] == 9 * len(images) < seen[0]  # nine merged tokens an image


@pytest.mark.parametrize("stage", ["contrastive", pytest.param("eos_bridge", marks=pytest.mark.slow)])
def test_no_gradient_goes_through_a_frozen_tower(tiny_backbone, tmp_path, stage):
    """With gradient checkpointing neither, which trains the same."""
    trained = []
    for checkpointing in (False, True):
        backbone, reached = tiny_backbone(), []
        torch.manual_seed(0)
        add_adapters(backbone.model, Lora(vision=(), dropout=0.0), [backbone.mask_token_id])
        backbone.model.model.visual.register_forward_hook(
            lambda module, args, output, reached=reached: reached.append(output.pooler_output.requires_grad)
        )
        folder = tmp_path / str(checkpointing)
        trainer = make_trainer(stage, backbone, folder, gradient_checkpointing=checkpointing, max_steps=3)
        trainer.train()
        trained.append(weights(trainer))
        assert reached and not any(reached)
    assert distance(*trained) < 1e-5


def test_reentrant_checkpointing_has_the_gradients_that_it_needs(tiny_backbone):
    model = tiny_backbone().model
    model.requires_grad_(False)
    for reentrant in (False, True):
        recompute_activations(model, activation_checkpointing_kwargs={"use_reentrant": reentrant})
        assert model.get_input_embeddings()(torch.tensor([[1]])).requires_grad == reentrant


def test_what_is_known_of_other_sides_keeps_its_bytes(tiny_backbone):
    """For instance those of stage 1, which hides patches."""
    backbone = tiny_backbone()
    backbone.model.model.visual.requires_grad_(False)
    backbone.encoded = {}
    image = Image.new("RGB", (84, 84))
    shown, hidden = Side("shown", image=image), Side("hidden", image=image)
    backbone.encode_side(hidden)
    keep_features(backbone, [shown])
    assert "image_features" in backbone.encode_side(shown) and "pixel_values" in backbone.encode_side(hidden)


def test_a_trained_tower_keeps_the_bytes(tiny_backbone, tmp_path):
    trainer = make_trainer("contrastive", tiny_backbone(), tmp_path, cache_inputs=True, max_steps=1)
    trainer.train()
    kept = trainer.train_dataset.backbone.encoded.values()
    assert {each["pixel_values"].dtype for each in kept if "pixel_values" in each} == {torch.uint8}
    assert not any("image_features" in each for each in kept)


def test_pictures_go_through_the_tower_in_parts_that_are_bounded(tiny_backbone, monkeypatch):
    backbone, seen, pictures = tiny_backbone(), [], [Image.new("RGB", (84, 84), (n, 0, 0)) for n in range(5)]
    backbone.model.model.visual.requires_grad_(False)
    backbone.model.model.visual.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    monkeypatch.setattr(features, "PATCHES_AT_ONCE", 80)  # a picture has 36
    keep_features(backbone, [Side(image=each) for each in pictures])
    assert seen == [72, 72, 36]
    assert len({kept["image_features"].sum() for kept in backbone.encoded.values()}) == 5
