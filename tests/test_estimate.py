"""The estimates against numbers worked out by hand, and against what autograd really keeps."""

import pytest
import torch
from toy import VISION

from cocoa.adapters import Lora, add_adapters
from cocoa.architectures import MODEL_CLASSES, load_config
from cocoa.attention import bidirectional
from cocoa.estimate import (
    KEPT,
    Memory,
    Stack,
    activation_bytes,
    hours,
    stage_flops,
    stage_memory,
    training_flops,
    weight_bytes,
    whole_bytes,
)


def test_weights_are_float32_where_they_are_trained():
    assert weight_bytes(frozen=10, trained=3, frozen_bytes=2) == 10 * 2 + 3 * 4


def test_activations_of_one_layer():
    # bfloat16, full tuning of a text layer: 34 bytes for each of 8 units of width, 8 for each of 16 of the MLP
    assert activation_bytes("text", tokens=5, width=8, intermediate=16, tuning="full", element_bytes=2) == 5 * (
        34 * 8 + 8 * 16
    )


TEXT = Stack("text", layers=3, width=8, intermediate=16, trained=10, frozen=90, tokens=7.0, longest=5)


def test_memory_of_a_step_by_hand():
    frozen_tower = Stack("qwen2_vl", 2, 4, 8, trained=0, frozen=50, tokens=9.0, longest=9, reached=False)
    memory = stage_memory(
        [TEXT, frozen_tower],
        frozen=140,
        trained=10,
        frozen_bytes=2,
        element_bytes=2,
        tuning="dora",
        rows_at_once=4,
        logits=100.0,
    )
    layer = 4 * 5 * (48 * 8 + 14 * 16)  # 4 sequences of 5 tokens
    inputs = 3 * 4 * 5 * 8 * 2  # 3 layers keep their input of 8 bfloat16 values a token
    assert memory == Memory(140 * 2 + 10 * 4, 10 * 12, 3 * layer, inputs + layer, 1600)
    assert memory.total(False) == 320 + 120 + 3 * layer + 1600
    assert memory.total(True) == 320 + 120 + inputs + layer + 1600


def test_passes_that_are_kept_keep_their_own_inputs():
    sizes = {"frozen": 90, "trained": 10, "frozen_bytes": 2, "element_bytes": 2, "tuning": "lora", "logits": 0}
    one, three = (stage_memory([TEXT], rows_at_once=4, passes=passes, **sizes) for passes in (1, 3))
    layer = 4 * 5 * (52 * 8 + 12 * 16)
    assert three.activations == 3 * one.activations == 9 * layer
    assert three.checkpointed - layer == 3 * (one.checkpointed - layer)


def test_a_split_model_is_shared_but_for_what_is_whole():
    sizes = {"frozen": 90, "trained": 10, "frozen_bytes": 2, "element_bytes": 2, "tuning": "lora", "logits": 0}
    one, split = (stage_memory([TEXT], rows_at_once=4, **sizes, **how) for how in ({}, {"shares": 4, "whole": 30}))
    assert (split.weights, split.states) == ((90 * 2 + 10 * 4) // 4 + 30, 10 * 12 // 4)
    assert (split.activations, split.checkpointed) == (one.activations, one.checkpointed)
    passes = stage_memory([TEXT], rows_at_once=4, **sizes, exchanged=True)
    assert passes.states == one.states + 10 * 4  # gradients of several passes, beside those that are exchanged
    assert whole_bytes(frozen=5, trained=3, frozen_bytes=2) == 5 * 2 + 3 * 4 + 3 * 4  # the gradient with it


def test_the_residual_stream_of_full_tuning_is_float32():
    memory = stage_memory(
        [TEXT], frozen=0, trained=100, frozen_bytes=4, element_bytes=2, tuning="full", rows_at_once=1, logits=0
    )
    layer = 5 * (34 * 8 + 8 * 16)
    assert memory.checkpointed == 3 * 5 * 8 * 4 + layer
    assert memory.activations == 3 * layer + 100 * 2  # autocast's copies of the weights


def test_of_large_weights_the_copies_are_more_than_a_layer():
    memory = stage_memory(
        [TEXT], frozen=0, trained=2000, frozen_bytes=4, element_bytes=2, tuning="full", rows_at_once=1, logits=0
    )
    assert memory.checkpointed == 3 * 5 * 8 * 4 + 2000 * 2


@pytest.mark.parametrize(
    ("options", "trained", "frozen"),
    [
        ({}, 6, 4),
        ({"checkpointing": True}, 8, 6),
        ({"cached": 1.0}, 8, 6),
        ({"checkpointing": True, "cached": 0.5}, 9, 7),
    ],
)
def test_operations_a_token_and_parameter(options, trained, frozen):
    assert training_flops(1, 1000, 0, **options) == trained * 1000
    assert training_flops(1, 0, 1000, **options) == frozen * 1000
    assert training_flops(3, 10, 20, **options) == 3 * (trained * 10 + frozen * 20)


def test_a_frozen_tower_is_only_passed_through():
    assert training_flops(1, 0, 1000, reached=False, checkpointing=True) == 2000


def test_operations_of_a_stage_are_summed_over_its_stacks():
    head = Stack("text", 0, 8, 16, trained=0, frozen=40, tokens=0.5, longest=0)
    assert stage_flops([TEXT, head], pairs=10, checkpointing=False, cached=0.0) == 70 * (60 + 360) + 5 * 160


def test_hours():
    assert hours(400e12 * 3600, tflops=400) == 1
    assert hours(400e12 * 3600, tflops=100, devices=8) == 0.5


# --- what autograd keeps -----------------------------------------------------------------------------

TOKENS = 192
WIDTH, INTERMEDIATE = 256, 512


def kept_a_layer(config, text, tuning, element_bytes):
    """Bytes that autograd keeps for a token and layer, scores aside: three layers against one."""
    kept = []
    for layers in (1, 3):
        if text:
            config.text_config.num_hidden_layers = layers
            config.text_config.layer_types = ["full_attention"] * layers
        else:
            config.vision_config.depth = layers
        model = MODEL_CLASSES[config.model_type](config).train()
        if tuning != "full":
            model = model.to(torch.bfloat16 if element_bytes == 2 else torch.float32)
            add_adapters(model, Lora(dora=tuning == "dora", vision=VISION[config.model_type]), [3])
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved = {}

        def keep(tensor, weights=weights, saved=saved):
            storage = tensor.untyped_storage()
            square = tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2] == TOKENS
            if storage.data_ptr() not in weights and TOKENS in tensor.shape and not square:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address comes twice
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=element_bytes == 2),
        ):
            if text:
                real = torch.ones(1, TOKENS)
                model.model(
                    input_ids=torch.full((1, TOKENS), 65),
                    attention_mask=bidirectional(real),
                    position_ids=torch.arange(TOKENS).expand(3, 1, TOKENS),
                )
            else:
                pixels = torch.randn(TOKENS, 1176, dtype=model.dtype)
                model.model.visual(pixels, grid_thw=torch.tensor([[1, 12, TOKENS // 12]]))
        kept.append(sum(size for size, _ in saved.values()))
    return (kept[1] - kept[0]) / 2 / TOKENS


def sized(config):
    """The tiny config with layers wide enough for the adapters' own tensors to matter little."""
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size = WIDTH, INTERMEDIATE
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    vision.num_heads = 4
    if config.model_type == "qwen2_vl":
        vision.embed_dim, vision.mlp_ratio, vision.hidden_size = WIDTH, INTERMEDIATE // WIDTH, WIDTH
    else:
        vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = WIDTH, INTERMEDIATE, WIDTH
        vision.fullatt_block_indexes = [0, 1, 2]
    config._attn_implementation = "sdpa"
    return config


@pytest.mark.parametrize("element_bytes", [4, 2])
@pytest.mark.parametrize(("layer", "tuning"), list(KEPT))
def test_the_rule_of_thumb_is_near_what_autograd_keeps(tiny_backbone_path, layer, tuning, element_bytes):
    model_type = "qwen2_vl" if layer == "text" else layer
    config = sized(load_config(str(tiny_backbone_path(model_type))))
    measured = kept_a_layer(config, layer == "text", tuning, element_bytes)
    rule = activation_bytes(layer, 1, WIDTH, INTERMEDIATE, tuning, element_bytes)
    assert rule == pytest.approx(measured, rel=0.1)
