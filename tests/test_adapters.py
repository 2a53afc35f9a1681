"""Adapters: put where they are named and nowhere else, one trainable embedding row, an exact merge."""

import pickle
import re

import pytest
import torch
from peft import PeftModel

from cocoa.adapters import TEXT_PROJECTIONS, Lora, adapted_layers, add_adapters, describe, merge_adapters
from cocoa.errors import CocoaError
from cocoa.pairs import Side

VISION = {"qwen2_vl": ("qkv", "fc1", "fc2"), "qwen2_5_vl": ("qkv", "gate_proj", "up_proj", "down_proj")}
VARIANTS = [(model_type, tied) for model_type in VISION for tied in (True, False)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)  # the adapters' initial values


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request):
    return request.param


def cocoa_lora(model_type, **options):
    return Lora(**{"vision": VISION[model_type], "dropout": 0.0, **options})


def forward(backbone, pictures):
    """Hidden states and logits of an image, an instruction and a text with the mask token in it."""
    encoded = backbone.encode_side(Side("Find", "the red cup", pictures[0]))
    ids = encoded["input_ids"].clone()
    ids[-3] = backbone.mask_token_id
    ids, real = ids[None], torch.ones(1, len(ids), dtype=torch.long)
    positions = backbone.rope_positions(ids, real, encoded["image_grid_thw"])
    states = backbone.model.model(
        input_ids=ids,
        attention_mask=real,
        position_ids=positions,
        pixel_values=backbone.pixels.values(encoded["pixel_values"]),
        image_grid_thw=encoded["image_grid_thw"],
    ).last_hidden_state
    return states, backbone.model.lm_head(states)


def train(backbone, adapters, pictures, lr=0.003):
    """Two large steps (in the first one LoRA's A gets no gradient, since B is zero)."""
    optimizer = torch.optim.SGD((p for p in adapters.parameters() if p.requires_grad), lr=lr)
    target = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        states, logits = forward(backbone, pictures)
        loss = (states - target).square().mean() * 10 + logits.logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# --- which layers ------------------------------------------------------------------------------------


def test_text_and_vision_are_separate_lists(variant, tiny_backbone):
    model_type, _ = variant
    model = tiny_backbone(*variant).model
    found = adapted_layers(model, Lora(text=("gate_proj", "q_proj"), vision=()))
    assert found == {
        "text": [
            "model.language_model.layers.0.self_attn.q_proj",
            "model.language_model.layers.0.mlp.gate_proj",
            "model.language_model.layers.1.self_attn.q_proj",
            "model.language_model.layers.1.mlp.gate_proj",
            "model.language_model.layers.2.self_attn.q_proj",
            "model.language_model.layers.2.mlp.gate_proj",
        ],
        "vision": [],
    }
    name = VISION[model_type][1]  # Qwen2.5-VL's gate_proj stands in the text model too
    found = adapted_layers(model, Lora(text=(), vision=(name,)))
    assert found == {
        "text": [],
        "vision": [f"model.visual.blocks.0.mlp.{name}", f"model.visual.blocks.1.mlp.{name}"],
    }


def test_what_is_adapted_is_said(tiny_backbone):
    model = tiny_backbone("qwen2_5_vl").model
    layers = adapted_layers(model, Lora(text=("q_proj", "down_proj"), vision=("qkv",)))
    assert describe(layers) == "text: q_proj x 3, down_proj x 3; vision: qkv x 2"
    assert describe(adapted_layers(model, Lora(text=("q_proj",)))) == "text: q_proj x 3; vision: frozen"


def test_only_named_layers_carry_adapters(variant, tiny_backbone):
    backbone = tiny_backbone(*variant)
    adapters = add_adapters(backbone.model, cocoa_lora(variant[0]), [backbone.mask_token_id])
    adapted = {
        re.sub(r"\.\d+\.", ".N.", name).removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in adapters.named_modules()
        if name.endswith(".lora_A")
    }
    text = {f"model.language_model.layers.N.self_attn.{p}_proj" for p in "qkvo"}
    text |= {f"model.language_model.layers.N.mlp.{p}_proj" for p in ("gate", "up", "down")}
    vision = {"model.visual.blocks.N.attn.qkv"}
    vision |= {f"model.visual.blocks.N.mlp.{name}" for name in VISION[variant[0]][1:]}
    assert adapted == text | vision, "never the merger, vision attn.proj, the patch embedding or the head"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            Lora(text=("q_proj", "query")),
            r"lora\.text: 'query' names no .*: down_proj, .*, q_proj, up_proj, v_proj",
        ),
        (Lora(vision=("fc1", "merger")), r"lora\.vision: 'merger' names no .*there are: fc1, fc2, proj, qkv"),
        (Lora(vision=("gate_proj",)), r"lora\.vision: 'gate_proj' names no .*there are: fc1, fc2, proj, qkv"),
        (Lora(text=("fc1",)), r"lora\.text: 'fc1' names no"),
        (Lora(text=("proj",)), r"lora\.text: 'proj' names no"),
        (Lora(text=("lm_head",)), r"lora\.text: 'lm_head' names no"),
        (Lora(text=(), vision=()), "leave `lora` out"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(tiny_backbone, lora, message):
    with pytest.raises(CocoaError, match=message):
        add_adapters(tiny_backbone("qwen2_vl").model, lora, [])


def test_the_defaults_are_cocoas():
    lora = Lora()
    assert (lora.r, lora.alpha, lora.dropout, lora.dora, lora.init) == (8, 64, 0.1, True, "gaussian")
    assert set(TEXT_PROJECTIONS) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


# --- what trains -------------------------------------------------------------------------------------


def test_only_adapters_and_the_mask_row_train(variant, tiny_backbone, pictures):
    backbone = tiny_backbone(*variant)
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    row = backbone.mask_token_id
    adapters = add_adapters(backbone.model, cocoa_lora(variant[0]), [row])
    trainable = {name: p for name, p in adapters.named_parameters() if p.requires_grad}
    rows = [p for name, p in trainable.items() if "trainable_tokens" in name]
    assert [p.shape for p in rows] == [(1, 64)], "one row of the embedding, once"
    assert all(re.search(r"\.lora_(A|B|magnitude_vector)\.|trainable_tokens", name) for name in trainable)

    train(backbone, adapters, pictures)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values()), "each of them learns"
    frozen = {
        re.sub(r"\.(base_layer|token_adapter)\b", "", name): p
        for name, p in adapters.get_base_model().named_parameters()
        if not p.requires_grad
    }
    assert frozen.keys() == before.keys()
    for name, p in before.items():
        assert torch.equal(frozen[name], p), f"{name} is frozen"


def test_the_mask_row_trains_without_moving_the_others(variant, tiny_backbone, pictures, tmp_path):
    backbone = tiny_backbone(*variant)
    row, tied = backbone.mask_token_id, variant[1]
    old = backbone.model.get_input_embeddings().weight.detach().clone()
    head = backbone.model.lm_head.weight.detach().clone()
    adapters = add_adapters(backbone.model, cocoa_lora(variant[0]), [row])
    train(backbone, adapters, pictures)
    merged = merge_adapters(adapters, tmp_path)
    new = merged.get_input_embeddings().weight
    others = torch.arange(len(old)) != row
    assert torch.equal(new[others], old[others])
    assert (new[row] - old[row]).abs().max() > 1e-4
    if tied:
        assert merged.lm_head.weight.data_ptr() == new.data_ptr()
    else:
        assert torch.equal(merged.lm_head.weight, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_embeddings_train_in_float32(variant, tiny_backbone, pictures, tmp_path, dtype):
    """CoMa's option: the whole matrix, and a tied head with it; what the layers see keeps the model's dtype."""
    _, tied = variant
    backbone = tiny_backbone(*variant)
    backbone.model.to(dtype)
    old = backbone.model.get_input_embeddings().weight.detach().float().clone()
    adapters = add_adapters(backbone.model, cocoa_lora(variant[0], embeddings="all"), [backbone.mask_token_id])
    weight = backbone.model.get_input_embeddings().weight
    assert weight.requires_grad and weight.dtype == torch.float32
    assert (backbone.model.lm_head.weight is weight) == tied
    pickle.dumps(backbone)  # as data loader workers get it where they are not forked
    ids = torch.arange(len(old))[None]
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    states = backbone.model.model(input_ids=ids).last_hidden_state
    assert states.dtype == dtype
    states.float().square().mean().backward()
    optimizer.step()
    merged = merge_adapters(adapters, tmp_path)
    new = merged.get_input_embeddings().weight
    assert ((new - old).abs().amax(1) > 0).float().mean() > 0.9  # in bfloat16 steps of 1e-4 would be lost
    assert (new - old).abs().max() < 1e-3


def test_without_tokens_the_embedding_is_frozen(tiny_backbone):
    adapters = add_adapters(tiny_backbone().model, Lora(text=("q_proj",)), [])
    trainable = [name for name, p in adapters.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 3  # A, B and magnitude of three layers
    assert all(".q_proj.lora_" in name for name in trainable)


# --- merge and reload --------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_merged_equals_unmerged(variant, tiny_backbone, pictures, tmp_path, dora):
    backbone = tiny_backbone(*variant)
    with torch.no_grad():
        untrained, _ = forward(backbone, pictures)
    adapters = add_adapters(backbone.model, cocoa_lora(variant[0], dora=dora), [backbone.mask_token_id])
    train(backbone, adapters, pictures)
    backbone.model.eval()
    with torch.no_grad():
        states, logits = forward(backbone, pictures)
        assert (states - untrained).abs().max() > 0.05, "the steps did something"
        merged = merge_adapters(adapters, tmp_path)
        merged_states, merged_logits = forward(backbone, pictures)
    assert merged is backbone.model
    assert type(merged).__module__.startswith("transformers.")
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(merged_states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged_logits, logits, atol=1e-5, rtol=0)


def test_a_bfloat16_model_is_merged_in_float32(tiny_backbone, pictures, tmp_path):
    backbone = tiny_backbone()
    backbone.model.to(torch.bfloat16)
    base = backbone.model.model.language_model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapters = add_adapters(backbone.model, cocoa_lora("qwen2_vl", dora=False), [])
    layer = backbone.model.model.language_model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(0))
        expected = base.float() + (b @ a) * 8  # alpha / r
    merged = merge_adapters(adapters, tmp_path)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    weight = merged.model.language_model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)


def test_the_adapter_folder_reloads_on_the_original_backbone(variant, tiny_backbone, pictures, tmp_path):
    backbone = tiny_backbone(*variant)
    adapters = add_adapters(backbone.model, cocoa_lora(variant[0]), [backbone.mask_token_id])
    train(backbone, adapters, pictures)
    backbone.model.eval()
    with torch.no_grad():
        states, logits = forward(backbone, pictures)
        merge_adapters(adapters, tmp_path)
        original = tiny_backbone(*variant)
        PeftModel.from_pretrained(original.model, tmp_path).eval()
        reloaded_states, reloaded_logits = forward(original, pictures)
    torch.testing.assert_close(reloaded_states, states, atol=1e-6, rtol=0)
    torch.testing.assert_close(reloaded_logits, logits, atol=1e-6, rtol=0)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("values", [{"r": 0}, {"dropout": 1.0}])
def test_values_out_of_range_are_mistakes(values):
    with pytest.raises(CocoaError, match="lora: r"):
        Lora(**values)


def test_an_unknown_initialisation_is_a_mistake(tiny_backbone):
    with pytest.raises(CocoaError, match="lora: "):
        add_adapters(tiny_backbone().model, Lora(init="zeros"), [])
