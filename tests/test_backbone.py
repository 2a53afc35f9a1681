"""The backbone: attention and padding, the mask token, the chat template, and what fits into a sequence."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText

import cocoa.tiny
from cocoa.attention import CHUNKED
from cocoa.backbone import load_backbone
from cocoa.checkpoint import save_checkpoint
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget, fit_image
from cocoa.pairs import Side

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
LEAST, MOST = 4, 16  # tokens an image, of the fixture


@pytest.fixture(scope="module", params=[(m, tied) for m in MODEL_TYPES for tied in (True, False)], ids=str)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(variant, tiny_backbone):
    return tiny_backbone(*variant)


def states(backbone, encoded, side="left"):
    """Final states (T_i, D) of each sequence, from one batch padded on one side, padding cut off again."""
    length = max(len(e["input_ids"]) for e in encoded)
    ids = torch.full((len(encoded), length), backbone.tokenizer.pad_token_id)
    real = torch.zeros_like(ids)
    for i, e in enumerate(encoded):
        n = len(e["input_ids"])
        where = slice(length - n, length) if side == "left" else slice(0, n)
        ids[i, where], real[i, where] = e["input_ids"], 1
    vision = {}
    for key in ("pixel_values", "image_grid_thw"):
        if parts := [e[key] for e in encoded if key in e]:
            vision[key] = backbone.pixels.values(torch.cat(parts))
    positions = backbone.rope_positions(ids, real, vision.get("image_grid_thw"))
    with torch.no_grad():
        output = (
            backbone.model.eval()
            .model(input_ids=ids, attention_mask=real, position_ids=positions, **vision)
            .last_hidden_state
        )
    return [output[i, real[i].bool()] for i in range(len(encoded))]


def with_last_token(encoded, token):
    return {**encoded, "input_ids": torch.cat([encoded["input_ids"][:-1], torch.tensor([token])])}


def copy(path, folder, edit=lambda config: None):
    """A copy of a checkpoint, its config edited."""
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- attention and padding ---------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_whether_the_last_token_changes_the_first(variant, tiny_backbone, pictures, attention, padding):
    backbone = tiny_backbone(*variant, attention=attention)
    sequence = backbone.encode_side(Side("Find", "a cat", pictures[0]))
    others = [] if padding == "none" else [backbone.encode_side(Side(text="the red cup on the table " * 3))]
    (first, *_), (changed, *_) = (
        states(backbone, [s, *others], padding) for s in (sequence, with_last_token(sequence, 65))
    )
    if attention == "causal":
        assert torch.equal(first[0], changed[0])
    else:
        assert (first[0] - changed[0]).abs().max() > 1e-5
    assert (first[-1] - changed[-1]).abs().max() > 0.1, "the last token's own state"


def test_the_attention_flag_is_saved_and_kept(variant, tiny_backbone, tmp_path):
    tiny_backbone(*variant, attention="bidirectional").model.save_pretrained(tmp_path)
    tiny_backbone(*variant).processor.save_pretrained(tmp_path)
    for attention, sees in ((None, True), ("causal", False)):
        loaded = load_backbone(tmp_path, attention=attention)
        assert loaded.model.config.is_causal is loaded.model.config.text_config.is_causal is not sees
        sequence = loaded.encode_side(Side(text="a cat"))
        first, changed = (states(loaded, [s])[0] for s in (sequence, with_last_token(sequence, 65)))
        assert torch.equal(first[0], changed[0]) is not sees


def test_attention_stays_as_the_checkpoint_says(tiny_backbone):
    untouched = tiny_backbone(attention=None)
    assert untouched.form.attention == "causal"
    sequence = untouched.encode_side(Side(text="a cat"))
    first, changed = (states(untouched, [s])[0] for s in (sequence, with_last_token(sequence, 65)))
    assert torch.equal(first[0], changed[0]), "an untouched backbone is causal"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(backbone, pictures, side):
    sides = [Side("Find", "a cat", pictures[0]), Side(image=pictures[1]), Side(text="the red cup " * 9)]
    sides.append(Side(text="coffee", image=pictures[2]))
    encoded = [backbone.encode_side(s) for s in sides]
    for together, alone in zip(
        states(backbone, encoded, side), (states(backbone, [e])[0] for e in encoded), strict=True
    ):
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_vision_attention_over_all_images_at_once_is_that_over_each(model_type, tiny_backbone, tmp_path):
    """Pictures of several sizes, and with Qwen2.5-VL windows of several sizes."""
    backbone = tiny_backbone(model_type, True)
    assert backbone.model.config.vision_config._attn_implementation == CHUNKED
    images = [Image.new("RGB", size, colour) for size, colour in (((84, 84), "red"), ((112, 56), "blue"))] * 2
    pixels = backbone.processor.image_processor(images, return_tensors="pt")
    assert len(pixels["image_grid_thw"].unique(dim=0)) == 2
    pixels["pixel_values"] += torch.randn(pixels["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in (CHUNKED, "sdpa"):
        backbone.model.set_attn_implementation({"vision_config": name})
        features = torch.cat(list(backbone.model.model.get_image_features(**pixels).pooler_output))
        (gradient,) = torch.autograd.grad(features.square().sum(), backbone.model.model.visual.patch_embed.proj.weight)
        found[name] = features, gradient
    torch.testing.assert_close(found[CHUNKED], found["sdpa"])
    del backbone.model.model.visual.patch_embed.forward  # as transformers has it
    torch.testing.assert_close(
        torch.cat(list(backbone.model.model.get_image_features(**pixels).pooler_output)), found["sdpa"][0]
    )
    backbone.model.set_attn_implementation({"vision_config": CHUNKED})
    save_checkpoint(backbone, tmp_path / "out", {})
    assert CHUNKED not in (tmp_path / "out" / "config.json").read_text()


def test_rope_positions_by_hand(backbone, pictures):
    """<start> 3 x 3 image tokens <end> and EOS, padded left by two: time, height and width."""
    ids = backbone.encode_side(Side(image=pictures[1]))["input_ids"]
    ids = torch.cat([torch.full((2,), backbone.tokenizer.pad_token_id), ids])[None]
    real = torch.tensor([[0, 0] + [1] * 12])
    positions = backbone.rope_positions(ids, real, torch.tensor([[1, 6, 6]]))
    assert positions[:, 0, 2:].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5],
    ]
    assert positions[:, 0, :2].tolist() == [[0, 0]] * 3, "padding gets position 0"


# --- the mask token ----------------------------------------------------------------------------------


def test_the_mask_token_takes_the_next_free_row(variant, backbone, tiny_backbone_path):
    before = AutoModelForImageTextToText.from_pretrained(tiny_backbone_path(*variant))
    old, new = before.get_input_embeddings().weight, backbone.model.get_input_embeddings().weight
    row = backbone.mask_token_id
    assert row == len(backbone.tokenizer) - 1, "the row after the tokenizer's last"
    assert new.shape == old.shape, "never resized"
    torch.testing.assert_close(new[row], old[:row].mean(0), atol=1e-7, rtol=0)
    others = torch.arange(len(old)) != row
    assert torch.equal(new[others], old[others])
    assert backbone.tokenizer.encode("<|mask|>", add_special_tokens=False) == [row]
    assert {*cocoa.tiny.CONTROL_TOKENS, "<|mask|>"} <= set(backbone.tokenizer.all_special_tokens)
    assert (backbone.model.lm_head.weight.data_ptr() == new.data_ptr()) is variant[1]
    assert backbone.tokenizer.decode([backbone.eos_token_id]) == "<|im_end|>"
    assert backbone.eos_token_id != backbone.tokenizer.pad_token_id


def test_the_mask_token_is_added_once(variant, tiny_backbone, tmp_path):
    trained = tiny_backbone(*variant)
    with torch.no_grad():
        trained.model.get_input_embeddings().weight[trained.mask_token_id] = 7.0
    save_checkpoint(trained, tmp_path, {})
    again = load_backbone(tmp_path)
    assert again.mask_token_id == trained.mask_token_id
    assert len(again.tokenizer) == len(trained.tokenizer)
    learned = again.model.get_input_embeddings().weight[again.mask_token_id]
    assert (learned == 7).all()
    assert again.images.tokens == (LEAST, MOST)


@pytest.mark.parametrize("free", [0, 1])
def test_without_a_free_row_the_backbone_is_refused(monkeypatch, tmp_path, free):
    monkeypatch.setattr(cocoa.tiny, "FREE_ROWS", free)
    folder = cocoa.tiny.write_tiny_backbone(tmp_path, ["a"])
    if free:
        assert load_backbone(folder).mask_token_id == 264  # 256 bytes and 8 control tokens
    else:
        with pytest.raises(CocoaError, match=r"no free embedding row for <\|mask\|>"):
            load_backbone(folder)


# --- what is refused ---------------------------------------------------------------------------------


def flatten(config):
    """As the hub's checkpoints have it: the text model's keys at the top level."""
    text = config.pop("text_config")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text["rope_parameters"]["mrope_section"]}
    del text["model_type"], text["layer_types"], text["rope_parameters"]
    config.update({**text, **config})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_sliding_window_is_refused(tiny_backbone_path, tmp_path, model_type):
    path = tiny_backbone_path(model_type)
    nested = copy(path, tmp_path / "nested", lambda c: c["text_config"].update(use_sliding_window=True))
    flat = copy(path, tmp_path / "flat", lambda c: (flatten(c), c.update(use_sliding_window=True)))
    for folder in (nested, flat):
        with pytest.raises(CocoaError, match="use_sliding_window"):
            load_backbone(folder)
    plain = load_backbone(copy(path, tmp_path / "plain", flatten), attention="bidirectional")
    assert plain.model.config.text_config.is_causal is False


def test_another_architecture_is_refused(tiny_backbone_path, tmp_path):
    other = copy(tiny_backbone_path(), tmp_path / "other", lambda c: c.update(model_type="qwen3_vl"))
    with pytest.raises(CocoaError, match=r"qwen3_vl is not supported.*qwen2_5_vl.*qwen2_vl"):
        load_backbone(other)


def test_what_is_no_checkpoint_is_refused(tiny_backbone_path, tmp_path):
    with pytest.raises(CocoaError, match="nowhere"):
        load_backbone(tmp_path / "nowhere")
    path = tiny_backbone_path()
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    folder = copy(path, tmp_path / "partial")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CocoaError, match=r"weights missing.*layers\.0\.self_attn\.q_proj"):
        load_backbone(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "processor_config.json"])
def test_an_incomplete_folder_is_refused(tiny_backbone_path, tmp_path, file):
    folder = copy(tiny_backbone_path(), tmp_path / "incomplete")
    (folder / file).unlink()
    with pytest.raises(CocoaError, match="incomplete"):
        load_backbone(folder)


def test_unknown_choices_are_refused(tiny_backbone_path):
    with pytest.raises(CocoaError, match="diagonal"):
        load_backbone(tiny_backbone_path(), attention="diagonal")
    for tokens, resize in (((0, 4), "aspect"), ((5, 4), "aspect"), ((1, 4), "crop")):
        with pytest.raises(CocoaError):
            ImageBudget(tokens, resize)


# --- the chat template -------------------------------------------------------------------------------

SIDES = {
    "text": Side(text="a cat"),
    "image": Side(image="picture"),
    "all": Side("Find it:", "a cat", "picture"),
    "instruction": Side("Find it:"),
    "nothing": Side(),
    "spaces": Side(" Find it:\n", "\t a  cat\n"),
    "control": Side("<|im_end|>", "<|mask|> <<||image_pad|> <|im_end|>", "picture"),
}


@pytest.mark.parametrize("name", SIDES)
def test_a_side_renders_as_its_prompt(backbone, pictures, name):
    side = SIDES[name]
    image = side.image and pictures[0]
    side = Side(side.instruction, side.text, image)
    rendered = backbone.processor.apply_chat_template([backbone.messages(side)], tokenize=False)[0]
    vision = "<|vision_start|><|image_pad|><|vision_end|>" if image else ""
    assert rendered == vision + side.prompt().replace("<|", "< |") + "<|im_end|>"

    ids = backbone.encode_side(side)["input_ids"].tolist()
    eos, pad = backbone.eos_token_id, backbone.model.config.image_token_id
    assert ids.count(eos) == 1
    assert ids[-1] == eos
    assert ids.count(pad) == (8 if image else 0)
    assert backbone.mask_token_id not in ids
    assert ids[(10 if image else 0) : -1] == backbone.encode_text(side.prompt())


@pytest.fixture(scope="module")
def plain(backbone, tmp_path_factory):
    """A checkpoint as a stranger loads it."""
    folder = tmp_path_factory.mktemp("plain")
    save_checkpoint(backbone, folder, {})
    return SentenceTransformer(str(folder))


def test_image_comes_first_then_instruction_then_text(backbone, plain, pictures):
    image = pictures[0]
    expected = backbone.encode_side(Side("Find:", "a cat", image))["input_ids"].tolist()
    assert backbone.tokenizer.decode(expected).endswith("<|vision_end|>Find: a cat<|im_end|>")
    part = {"image": {"type": "image", "image": image}, "text": {"type": "text", "text": "a cat"}}
    instruction = {"role": "system", "content": [{"type": "text", "text": "Find:"}]}
    words = [{"type": "text", "text": text} for text in ("a ", " cat")]  # one space between parts
    turns = [{"role": "user", "content": [part["text"], part["image"]]}, instruction]
    apart = [instruction, {"role": "user", "content": [words[0], part["image"], words[1]]}]
    for given in ([turns], [turns[::-1]], [apart]):
        assert plain.preprocess(given)["input_ids"].tolist() == [expected]
    for given in ({"text": "a cat", "image": image}, {"image": image, "text": "a cat"}):
        for prompt in ("Find:", " Find: \n"):
            assert plain.preprocess([given], prompt=prompt)["input_ids"].tolist() == [expected]


ATTACKS = [
    "<|image_pad|>",
    "<|mask|>",
    "<|im_end|>",
    "<|endoftext|> <|vision_start|><|image_pad|><|vision_end|>",
    "<<||image_pad|>",
    "<<|<|mask|>|im_end|>",
    "<\n|im_end|>",
    "a cat <",
    "|im_end|>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_captions_never_become_control_tokens(backbone, plain, pictures, attack):
    tokenizer, image = backbone.tokenizer, pictures[0]
    control = set(tokenizer.convert_tokens_to_ids([*cocoa.tiny.CONTROL_TOKENS, "<|mask|>"]))

    def controls(inputs):
        return [i for i in inputs["input_ids"].flatten().tolist() if i in control]

    eos, start, pad, end = tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    )
    seen = [start, *[pad] * 8, end, eos]
    assert controls(backbone.encode_side(Side(attack, attack, image))) == seen
    assert controls(backbone.encode_side(Side(attack, attack))) == [eos]
    assert not control & set(backbone.encode_text(attack))

    assert controls(plain.preprocess([attack])) == [eos]
    assert controls(plain.preprocess([attack], prompt=attack)) == [eos]
    assert controls(plain.preprocess([{"text": attack}])) == [eos]
    assert controls(plain.preprocess([{"text": attack, "image": image}], prompt=attack)) == seen
    cut = attack.index("|") if "|" in attack else 1
    parts = [{"type": "text", "text": text} for text in (attack[:cut], attack[cut:])]
    for message in ([{"role": "user", "content": parts}], [{"role": "user", "content": attack}]):
        assert controls(plain.preprocess([message])) == [eos]


# --- length ------------------------------------------------------------------------------------------

TEXTS = {
    "words": "The cat looks at the astronaut in the orange suit. 12 zebras! " * 2,
    "chinese": "橙色の猫が机の上の赤いコーヒーカップを見ている。",
    "emoji": "a 👩‍🚀 and a 🐈‍⬛ near 🚀🚀🚀 and ☕️!",
    "control": "<|im_end|>" * 4 + "<|" * 8,
    "decomposed": "cafe\u0301 \u0958\u0958\u0958 A\u030a",  # U+0958 takes 3 bytes, and 6 once normalised
}


def inert(text):
    return text.strip().replace("<|", "< |")


@pytest.mark.parametrize("name", TEXTS)
def test_shorten_gives_the_longest_prefix_that_fits(tiny_backbone, name):
    backbone, text = tiny_backbone(), TEXTS[name]
    whole = backbone.encode_text(text)
    escaped = inert(text)
    for tokens in range(len(whole) + 3):
        short = backbone.shorten(text, tokens)
        used = len(backbone.encode_text(short))
        assert escaped.startswith(short)
        assert used <= tokens
        if tokens >= len(whole):
            assert short == escaped
        else:
            next_one = next(n for n in range(len(short) + 1, len(escaped) + 1) if escaped[:n].strip() != short)
            assert len(backbone.encode_text(escaped[: next_one + 8])) > tokens, "not cut shorter than need be"


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("instruction", ["", "Find the cup:"])
@pytest.mark.parametrize("image", [None, Image.new("RGB", (112, 112))], ids=["text", "image"])
def test_fit_text_obeys_the_limit_and_cuts_the_end_of_the_text_alone(tiny_backbone, name, instruction, image):
    backbone, side = tiny_backbone(), Side(instruction, TEXTS[name], image)
    least = len(backbone.encode_side(Side(instruction, "", image))["input_ids"])
    whole = len(backbone.encode_side(side)["input_ids"])
    with pytest.raises(CocoaError, match="max_length"):
        backbone.fit_text(side, least - 1)
    too_long = []
    for max_length in range(least, whole + 3):
        fitted = backbone.fit_text(side, max_length)
        ids = backbone.encode_side(fitted)["input_ids"].tolist()
        assert ids[-1] == backbone.eos_token_id
        assert ids.count(backbone.model.config.image_token_id) == (MOST if image else 0)
        assert fitted.instruction == instruction
        assert inert(side.text).startswith(inert(fitted.text))
        if len(ids) > max_length:
            too_long.append(f"{len(ids)} > {max_length}")
    assert not too_long
    assert inert(fitted.text) == inert(side.text), "nothing is cut without need"


# --- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "most", "fitted"),
    [
        ((200, 1), 256, (200, 1)),
        ((201, 1), 256, (201, 2)),  # the processor refuses ratios over 200
        ((1, 500), 256, (3, 500)),
        ((1001, 5), 256, (1001, 6)),
        ((160, 10), 16, (160, 10)),
        ((161, 10), 16, (161, 11)),  # and would take more than 16 tokens for a ratio over 16
        ((1, 1), 16, (1, 1)),
        ((640, 480), 16, (640, 480)),
    ],
)
def test_extreme_aspect_ratios_are_pulled_back(size, most, fitted):
    assert fit_image(Image.new("RGB", size), ImageBudget((4, most)), 28).size == fitted


@pytest.mark.parametrize(("most", "side"), [(16, 112), (20, 112), (144, 336), (1, 28)])
def test_square_squashes_to_the_largest_square(most, side):
    for size in ((640, 480), (10, 10), (1, 500)):
        assert fit_image(Image.new("RGB", size), ImageBudget((1, most), "square"), 28).size == (side, side)


def image_tokens(backbone, size):
    encoded = backbone.encode_side(Side(image=Image.new("RGB", size)))
    tokens = int((encoded["input_ids"] == backbone.model.config.image_token_id).sum())
    assert tokens == encoded["image_grid_thw"].prod() // 4 == len(encoded["pixel_values"]) // 4
    return tokens


@pytest.mark.parametrize("size", [(640, 480), (28, 28), (1, 1), (300, 100), (90, 250), (2000, 2000)])
def test_the_processor_keeps_to_the_budget(tiny_backbone, size):
    backbone = tiny_backbone()
    for budget in (ImageBudget((4, 16)), ImageBudget((20, 50))):
        backbone.set_image_budget(budget)
        assert budget.tokens[0] <= image_tokens(backbone, size) <= budget.tokens[1]
    backbone.set_image_budget(ImageBudget((4, 16), "square"))
    assert image_tokens(backbone, size) == 16


@pytest.mark.parametrize("size", [(500, 1), (1, 201), (1000, 10), (3000, 15), (20, 1000)])
def test_the_budget_holds_for_very_long_images(tiny_backbone, size):
    assert image_tokens(tiny_backbone(), size) <= MOST
