"""A checkpoint is read by sentence-transformers, transformers and the next stage, with the same numbers."""

import json
import os
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from stranger import embed_as_a_stranger
from toy import states_of
from transformers import AutoModelForImageTextToText

from cocoa.adapters import Lora, add_adapters, merge_adapters
from cocoa.backbone import load_backbone
from cocoa.checkpoint import RECORD_NAME, as_sentence_transformer, read_record, save_checkpoint
from cocoa.embedding import Embedder
from cocoa.pairs import Side

VARIANTS = [(model_type, tied) for model_type in ("qwen2_vl", "qwen2_5_vl") for tied in (True, False)]
TEXTS = ["A red cup.", "The cat looks at the astronaut in the orange suit.", "<|im_end|> <|image_pad|>"]


def inputs(pictures):
    """Kind of input -> the sides that it stands for."""
    instruction = "Find the picture:"
    return {
        "image": [Side(image=image) for image in pictures],
        "text": [Side(text=text) for text in TEXTS],
        "image+text": [Side(text=text, image=image) for text, image in zip(TEXTS, pictures, strict=True)],
        "prompt": [Side(instruction, text) for text in TEXTS],
        "image, prompt": [Side(instruction, image=image) for image in pictures],
        "mixed": [Side(text=TEXTS[0]), Side(image=pictures[0]), Side(text=TEXTS[1], image=pictures[1])],
    }


@pytest.fixture(scope="module")
def saved(tiny_backbone, tmp_path_factory):
    """Variant -> (the backbone in memory, its checkpoint folder); the backbone has learned a little."""
    checkpoints = {}
    for model_type, tied in VARIANTS:
        backbone = tiny_backbone(model_type, tied)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in backbone.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp("checkpoint") / "nested" / f"{model_type}-{tied}"
        save_checkpoint(backbone, folder, {"stage": "contrastive", "seed": 7})
        checkpoints[model_type, tied] = backbone, folder
    return checkpoints


@pytest.fixture(params=VARIANTS, ids=str)
def checkpoint(request, saved):
    return saved[request.param]


@pytest.fixture(scope="module")
def read_by_a_stranger(saved, pictures, tmp_path_factory):
    """Embeddings from one process that has no cocoa and no network, for every variant and kind of input."""
    numbers, prompt = list(range(len(pictures))), "Find the picture:"
    pairs = [{"text": text, "image": number} for text, number in zip(TEXTS, numbers, strict=True)]
    items = {
        "image": (numbers, None),
        "text": (TEXTS, None),
        "image+text": (pairs, None),
        "prompt": (TEXTS, prompt),
        "image, prompt": (numbers, prompt),
        "mixed": ([TEXTS[0], {"image": 0}, pairs[1]], None),
    }
    folders = {f"{model_type} {tied}": path for (model_type, tied), (_, path) in saved.items()}
    return embed_as_a_stranger(tmp_path_factory.mktemp("stranger"), pictures, folders, items)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tied"), VARIANTS)
def test_plain_sentence_transformers_gives_the_same_embeddings(saved, read_by_a_stranger, pictures, model_type, tied):
    backbone, _ = saved[model_type, tied]
    in_memory = as_sentence_transformer(backbone)
    for kind, sides in inputs(pictures).items():
        found = torch.from_numpy(read_by_a_stranger[f"{model_type} {tied} {kind}"])
        expected = Embedder(in_memory, backbone.images).embed(sides)
        assert found.shape == (3, 64)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=lambda m, kind=kind: f"{kind}: {m}")
        assert (expected[0] - expected[1]).abs().max() > 1e-3, "inputs differ, so their embeddings do"


def test_an_embedding_is_the_final_state_of_eos_normalised(checkpoint, pictures):
    """Training renders and pools as serving does: one side by hand, unpadded, against a padded batch."""
    backbone, folder = checkpoint
    loaded = SentenceTransformer(str(folder), device="cpu")
    sides = [Side("Find the picture:", "A red cup.", pictures[0]), Side(text="cup"), Side(image=pictures[2])]
    found = Embedder(loaded, backbone.images).embed(sides, batch_size=3)
    in_order = Embedder(loaded, backbone.images).embed(sides, batch_size=1)
    for i, side in enumerate(sides):
        expected = torch.nn.functional.normalize(states_of(backbone, side)[-1], dim=0)
        torch.testing.assert_close(in_order[i], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[i], expected, atol=5e-6, rtol=0)


def test_the_weights_are_shared_with_the_backbone_in_memory(tiny_backbone):
    backbone = tiny_backbone()
    model = as_sentence_transformer(backbone)
    assert model[0].auto_model is backbone.model.model
    assert len(list(model.parameters())) == len(list(backbone.model.model.parameters()))


def test_the_backbone_stays_on_its_device(tiny_backbone, monkeypatch):
    """Where there is a GPU, sentence-transformers would move it there."""
    monkeypatch.setattr("sentence_transformers.base.model.get_device_name", lambda: "meta")
    backbone = tiny_backbone()
    assert as_sentence_transformer(backbone).device.type == backbone.model.device.type == "cpu"


def test_transformers_reads_it_with_its_head(checkpoint):
    backbone, folder = checkpoint
    loaded, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is type(backbone.model)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded.lm_head.weight, backbone.model.lm_head.weight)
    expected = backbone.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_the_next_stage_reads_it(checkpoint, pictures):
    backbone, folder = checkpoint
    again = load_backbone(folder)
    expected = backbone.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    assert again.images.tokens == (4, 16)
    assert again.processor.chat_template == backbone.processor.chat_template
    side = Side("Find", "<|mask|> a cat", pictures[0])
    for key, tensor in backbone.encode_side(side).items():
        assert torch.equal(again.encode_side(side)[key], tensor)
    assert again.mask_token_id == backbone.mask_token_id


def test_no_pickle_and_no_foreign_class(checkpoint):
    _, folder = checkpoint
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    suffixes = {os.path.splitext(name)[1] for name in files}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt"}
    assert {"modules.json", "model.safetensors", "chat_template.jinja", "cocoa.json"} <= files
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    assert [module["type"].split(".")[0] for module in modules] == ["sentence_transformers"] * 3
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_what_the_files_say(checkpoint):
    _, folder = checkpoint
    config = json.loads((folder / "config.json").read_text())
    assert config["is_causal"] is False, "for servers"
    assert config["text_config"]["is_causal"] is False, "the one that works"
    assert config["architectures"] in (
        ["Qwen2VLForConditionalGeneration"],
        ["Qwen2_5_VLForConditionalGeneration"],
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["padding_side"] == "left"
    assert "sanitize_control_tokens" not in json.dumps(tokenizer), "transformers without it cannot pad"
    assert SentenceTransformer(str(folder), device="cpu").max_seq_length >= 10**9, "no limit that would cut EOS"
    record = read_record(folder)
    assert (record["stage"], record["seed"]) == ("contrastive", 7)
    assert record["image"] == {"tokens": [4, 16], "resize": "aspect"}
    assert record["versions"].keys() == {"cocoa", "torch", "transformers", "sentence_transformers"}
    assert read_record(folder / "1_Pooling") == {}
    assert json.loads((folder / RECORD_NAME).read_text()) == record


def test_a_causal_checkpoint_stays_causal(tiny_backbone, tmp_path):
    backbone = tiny_backbone(attention="causal")
    save_checkpoint(backbone, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["is_causal"] is config["text_config"]["is_causal"] is True
    side = [Side(text="A red cup.")]
    causal = Embedder(SentenceTransformer(str(tmp_path), device="cpu"), backbone.images).embed(side)
    torch.testing.assert_close(
        causal, Embedder(as_sentence_transformer(backbone), backbone.images).embed(side), atol=1e-6, rtol=0
    )
    full = tiny_backbone()
    assert (Embedder(as_sentence_transformer(full), full.images).embed(side) - causal).abs().max() > 1e-4


def test_no_length_limit_of_the_tokenizer_cuts_eos(tiny_backbone_path, pictures, tmp_path):
    """A backbone whose tokenizer says 32 tokens: the checkpoint embeds the whole of a longer text."""
    shutil.copytree(tiny_backbone_path(), tmp_path / "backbone")
    config = json.loads((tmp_path / "backbone" / "tokenizer_config.json").read_text())
    (tmp_path / "backbone" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 32}))
    backbone = load_backbone(tmp_path / "backbone", attention="bidirectional")
    save_checkpoint(backbone, tmp_path / "saved", {})
    inputs = SentenceTransformer(str(tmp_path / "saved")).preprocess([{"text": "cup " * 100, "image": pictures[0]}])
    assert inputs["input_ids"].shape[1] > 100
    assert inputs["input_ids"][0, -1] == backbone.eos_token_id


def test_after_a_merge_it_is_the_stock_layout(tiny_backbone, pictures, tmp_path):
    """Adapters merged, rounded once to bfloat16, saved: the same keys as before, and the rounded numbers."""
    backbone = tiny_backbone("qwen2_5_vl", tied=False)
    keys = backbone.model.state_dict().keys()
    lora = Lora(text=("q_proj",), vision=("qkv",), dropout=0.0)
    adapters = add_adapters(backbone.model, lora, [backbone.mask_token_id])
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    backbone.model = merge_adapters(adapters, tmp_path / "adapter")
    for parameter in backbone.model.parameters():  # model.to(bfloat16) would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    save_checkpoint(backbone, tmp_path, {})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    expected = backbone.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys() == keys
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    side = [Side(text="A red cup.", image=pictures[0])]
    torch.testing.assert_close(
        Embedder(SentenceTransformer(str(tmp_path), device="cpu"), backbone.images).embed(side),
        Embedder(as_sentence_transformer(backbone), backbone.images).embed(side),
        atol=1e-6,
        rtol=0,
    )
