"""Where EOS looks: real attention weights, in the layout the model was trained with, drawn where they belong."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy import prepared

from cocoa.architectures import set_attention
from cocoa.eos_attention import COLOUR, FULL, OPACITY, attention_maps, coloured, ending_attention, even
from cocoa.pairs import Side


def eager(backbone):
    backbone.model.eval().set_attn_implementation({"text_config": "eager"})
    return backbone


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def backbone(request, tiny_backbone):
    return eager(tiny_backbone(request.param))


def test_weights_are_a_distribution_over_the_tokens(backbone, pictures):
    encoded = backbone.encode_side(Side("Find:", "a red cup", pictures[0]))
    weights = ending_attention(backbone, encoded)
    assert weights.shape == (backbone.model.config.text_config.num_hidden_layers, len(encoded["input_ids"]))
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)), atol=1e-5) and (weights >= 0).all()


def test_the_last_token_of_a_causal_model_sees_what_that_of_a_bidirectional_one_sees(tiny_backbone, pictures):
    """In the first layer alike; after it the states that it looks at differ."""
    side = Side("Find:", "a red cup", pictures[0])
    found = []
    for attention in ("causal", "bidirectional"):
        backbone = eager(tiny_backbone(attention=attention))
        found.append(ending_attention(backbone, backbone.encode_side(side)))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_the_weights_are_those_of_queries_and_keys_by_hand(tiny_backbone):
    """A text alone has plain rotary positions: the first layer's weights, computed from its projections."""
    backbone = eager(tiny_backbone())
    encoded = backbone.encode_side(Side(text="A red cup of coffee"))
    ids, text = encoded["input_ids"], backbone.model.model.language_model
    layer = text.layers[0]
    attention = layer.self_attn
    positions = torch.arange(len(ids)).expand(3, 1, -1)
    with torch.no_grad():
        states = layer.input_layernorm(text.embed_tokens(ids[None]))
        cos, sin = (part.flatten(0, -3)[0] for part in text.rotary_emb(states, positions))  # (T, head_dim)
        queries, keys = (
            project(states)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj)
        )
        turned = [
            each * cos + torch.cat([-each[..., each.shape[-1] // 2 :], each[..., : each.shape[-1] // 2]], -1) * sin
            for each in (queries, keys)
        ]
        queries, keys = turned[0], turned[1].repeat_interleave(len(queries) // len(keys), 0)
        weights = (queries[:, -1:] @ keys.transpose(1, 2) / attention.head_dim**0.5).softmax(-1).mean((0, 1))
    assert torch.allclose(ending_attention(backbone, encoded)[0], weights, atol=1e-5)


def test_shares_are_of_the_whole_and_words_are_the_text_s(backbone, pictures):
    side = Side("Find:", "a red cup", pictures[2])
    middle, last = attention_maps(backbone, side)
    layers = backbone.model.config.text_config.num_hidden_layers
    assert (middle.layer, last.layer) == ((layers + 1) // 2, layers)
    for one in (middle, last):
        assert set(one.shares) == {"picture", "text", "itself", "markers"}
        assert sum(one.shares.values()) == pytest.approx(1, abs=1e-5)
        assert "".join(word for word, _ in one.words) == side.prompt()
        assert one.picture.size == (84, 112)  # 3 x 4 tokens
    (alone, _) = attention_maps(backbone, Side(text="a red cup"))
    assert alone.picture is None and set(alone.shares) == {"text", "itself"}
    (cut, _) = attention_maps(backbone, Side(text="a red cup " * 50), 20)
    assert "".join(word for word, _ in cut.words).startswith("a red cup") and len(cut.words) < 20
    (wordless, _) = attention_maps(backbone, Side(image=pictures[0]))
    assert wordless.words == () and "text" not in wordless.shares


def test_compression_tokens_stand_for_eos(tiny_backbone, pictures):
    backbone = eager(prepared(tiny_backbone(), "compression"))
    encoded = backbone.encode_side(Side(image=pictures[0]))
    set_attention(backbone.model.config, "causal")
    ids, inner = encoded["input_ids"][None], backbone.model.model
    positions = backbone.rope_positions(ids, torch.ones_like(ids), encoded["image_grid_thw"])
    pixels = backbone.pixels.values(encoded["pixel_values"])
    with torch.no_grad():
        out = inner(
            input_ids=ids,
            position_ids=positions,
            pixel_values=pixels,
            image_grid_thw=encoded["image_grid_thw"],
            output_attentions=True,
        )
    expected = torch.stack([layer[0, :, -4:].mean((0, 1)) for layer in out.attentions])
    assert torch.allclose(ending_attention(backbone, encoded), expected, atol=1e-6)


def test_a_patch_is_coloured_by_how_often_an_even_spread_it_has():
    weights = even(torch.tensor([4.0, 0.0, 1.0, 0.0, 0.0, 1.0]))  # 4, 0, 1, ... of 6: even is 1
    assert weights.tolist() == [4, 0, 1, 0, 0, 1]
    drawn = np.asarray(coloured(Image.new("RGB", (84, 56), (100, 100, 100)), weights.reshape(2, 3)))
    full = np.array(COLOUR) * OPACITY + 100 * (1 - OPACITY)
    part = np.array(COLOUR) * OPACITY / FULL + 100 * (1 - OPACITY / FULL)
    for (x, y), colour in {(0, 0): full, (27, 27): full, (28, 0): [100] * 3, (56, 0): part, (83, 55): part}.items():
        assert drawn[y, x] == pytest.approx(colour, abs=1.5)
    assert torch.isfinite(even(torch.zeros(3))).all()
