"""The configs of the real backbones, as they lie on the hub, without their weights (meta device)."""

import json

import pytest
import torch

from cocoa.adapters import adapted_layers
from cocoa.architectures import MODEL_CLASSES, load_config, set_attention
from cocoa.recipe import load_recipe

SHARED = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
V2 = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "patch_size": 14}
V25 = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}


def text(hidden, intermediate, layers, heads, kv, vocabulary, tied):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }


CONFIGS = {
    "cocoa-qwen2-vl-2b": ("qwen2_vl", text(1536, 8960, 28, 12, 2, 151936, True), {**V2, "hidden_size": 1536}, 2.21),
    "cocoa-qwen2-vl-7b": ("qwen2_vl", text(3584, 18944, 28, 28, 4, 152064, False), {**V2, "hidden_size": 3584}, 8.29),
    "cocoa-qwen2.5-vl-3b": (
        "qwen2_5_vl",
        text(2048, 11008, 36, 16, 2, 151936, True),
        {**V25, "out_hidden_size": 2048},
        3.75,
    ),
    "cocoa-qwen2.5-vl-7b": (
        "qwen2_5_vl",
        text(3584, 18944, 28, 28, 4, 152064, False),
        {**V25, "out_hidden_size": 3584},
        8.29,
    ),
}


@pytest.mark.parametrize("recipe", CONFIGS)
def test_recipe_fits_the_real_backbone(recipe, tmp_path, request):
    model_type, text_config, vision_config, billions = CONFIGS[recipe]
    architecture = MODEL_CLASSES[model_type].__name__
    content = {**SHARED, **text_config, "vision_config": vision_config, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": [architecture]}))
    config = load_config(str(tmp_path))
    set_attention(config, "bidirectional")
    with torch.device("meta"):
        model = MODEL_CLASSES[model_type](config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == text_config["tie_word_embeddings"]
    assert model.model.language_model.config.is_causal is False

    layers = adapted_layers(model, load_recipe(request.config.rootpath / "recipes" / f"{recipe}.yaml").lora)
    assert len(layers["text"]) == 7 * text_config["num_hidden_layers"]
    assert len(layers["vision"]) == (3 if model_type == "qwen2_vl" else 4) * 32
