"""Many inputs at once: the same embeddings in any company."""

import json
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from cocoa.backbone import load_backbone
from cocoa.checkpoint import as_sentence_transformer, save_checkpoint
from cocoa.embedding import Embedder, load_embedder
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.pairs import Side
from cocoa.processes import WORKERS


def test_a_batch_of_nothing_is_a_mistake(tiny_backbone):
    backbone = tiny_backbone()
    with pytest.raises(CocoaError, match="batch size 0: must be 1 or more"):
        Embedder(as_sentence_transformer(backbone), backbone.images).embed([Side(text="a cup")], batch_size=0)


@pytest.mark.parametrize("form", ["cocoa", "reference"])
def test_a_long_text_is_shortened_without_the_tokenizer_that_is_embedding(tiny_backbone, form):
    """Which one thread switches to padding, while others render."""
    backbone = tiny_backbone()
    embedder = Embedder(as_sentence_transformer(backbone), backbone.images, 20, form)
    tokenizer = embedder.model.tokenizer.backend_tokenizer
    tokenizer.enable_padding(length=500)
    (message,) = embedder.render(Side(text="cup " * 100))
    assert len(message["content"][0]["text"]) < 200
    assert tokenizer.padding["length"] == 500


def test_tokens_are_counted_as_the_model_sees_them(tiny_backbone, pictures):
    backbone = tiny_backbone()
    model = as_sentence_transformer(backbone)
    sides = [
        Side("find", "a red cup"),
        Side(text="cat", image=pictures[0]),
        Side(image=pictures[1]),
        Side(text="x " * 50),
    ]
    seen = [len(backbone.encode_side(side)["input_ids"]) for side in sides]
    counted = Embedder(model, backbone.images).token_counts(sides)
    assert all(abs(a - b) <= 5 for a, b in zip(seen, counted, strict=True)), (seen, counted)


def test_embeddings_come_in_the_order_asked_whatever_the_batches(tiny_backbone, pictures, tmp_path):
    save_checkpoint(tiny_backbone(), tmp_path, {})
    model = SentenceTransformer(str(tmp_path), device="cpu")
    sides = [Side(text="word " * (i % 9 + 1), image=pictures[i % 3] if i % 2 else None) for i in range(17)]
    embedder = Embedder(model, ImageBudget((4, 16)))
    together = embedder.embed(sides, batch_size=4)
    alone = torch.cat([embedder.embed([side]) for side in sides])
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)


# ------------------------------------------------------------------------------------------ other ways of asking


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_the_reference_style_is_the_plain_text_with_plain_positions(tiny_backbone_path, pictures, model_type):
    """Against a forward pass by hand: no chat markers, no EOS, the last token, every position counts a token."""
    embedder = load_embedder(tiny_backbone_path(model_type), prompt_style="reference")
    sides = [
        Side(text="<|image_1|>\nfind a cat\n", image=pictures[0]),
        Side(text="<|image_1|>\nfind a cat on a table\n"),  # WebQA's stray marker: a token, no image
        Side(text="a red cup\n"),
        Side(text="<|image_1|>\nwhat is it?", image=pictures[2].resize((20, 60))),
    ]
    found = embedder.embed(sides, batch_size=2)
    backbone = load_backbone(tiny_backbone_path(model_type), attention="causal")
    for side, row in zip(sides, found, strict=True):
        image = side.image.resize((56, 56)) if side.image and min(side.image.size) < 28 else side.image
        text = side.text.replace("<|image_1|>", "<|image_pad|>")
        if image is None:
            inputs = backbone.tokenizer([text], return_tensors="pt")
        else:
            inputs = backbone.processor(text=[text], images=[image], return_tensors="pt")
        assert inputs["input_ids"][0, -1] == backbone.tokenizer(text)["input_ids"][-1]
        positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            states = backbone.model.eval().model(**inputs, position_ids=positions).last_hidden_state
        expected = torch.nn.functional.normalize(states[0, -1], dim=0)
        torch.testing.assert_close(row, expected, atol=5e-6, rtol=0)
        if image is not None:  # with M-RoPE it would be another embedding
            with torch.no_grad():
                other = backbone.model.model(**inputs).last_hidden_state[0, -1]
            assert (torch.nn.functional.normalize(other, dim=0) - row).abs().max() > 1e-4


def test_the_reference_style_takes_the_stock_image_budget(tiny_backbone_path, tmp_path, pictures):
    """Qwen2-VL's own allows 16,384 tokens an image: more than an input's length, which is the text's alone there."""
    shutil.copytree(tiny_backbone_path(), tmp_path / "stock")
    path = tmp_path / "stock" / "preprocessor_config.json"
    config = path if path.exists() else tmp_path / "stock" / "processor_config.json"
    content = json.loads(config.read_text())
    inner = content.get("image_processor", content)
    inner["size"] = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    config.write_text(json.dumps(content))
    embedder = load_embedder(tmp_path / "stock", prompt_style="reference")
    assert embedder.images.tokens[1] == 16384
    side = Side(text="<|image_1|>\nfind a cat\n", image=pictures[0])
    assert embedder.shortened([side]) == 0 and embedder.embed([side]).isfinite().all()


def test_models_with_other_tokenizers_are_asked_too_and_broken_ones_named(tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "cat": 1, "dog": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)], device="cpu").save(str(tmp_path / "static"))
    assert load_embedder(tmp_path / "static").embed([Side(text="cat"), Side(text="a dog")]).shape == (2, 8)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "modules.json").write_text((tmp_path / "static" / "modules.json").read_text())
    with pytest.raises(CocoaError, match=r"broken: cannot be loaded"):
        load_embedder(tmp_path / "broken")


def test_an_unknown_prompt_style_is_a_mistake(tiny_backbone_path):
    with pytest.raises(CocoaError, match="prompt-style 'plain': choose cocoa or reference"):
        load_embedder(tiny_backbone_path(), prompt_style="plain")


def test_a_model_that_is_not_ours_is_asked_as_its_library_would(foreign_path, pictures):
    embedder = load_embedder(foreign_path)
    assert embedder.form == "items"
    sides = [Side("find:", "a red cup", pictures[0]), Side("find:", "a cat"), Side(image=pictures[1]), Side(text="cat")]
    found = embedder.embed(sides, batch_size=4)
    model = SentenceTransformer(str(foreign_path), device="cpu")
    items = [{"image": pictures[0], "text": "find: a red cup"}, "find: a cat", pictures[1], "cat"]
    expected = torch.stack([model.encode([item], convert_to_tensor=True)[0] for item in items])
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=5e-6, rtol=0)


def test_a_model_that_reads_no_images_says_so(tiny_text_model_path, pictures):
    embedder = load_embedder(tiny_text_model_path)
    assert embedder.refuses(Side(text="a cat")) == ""
    assert "does not embed image with text (it knows text)" in embedder.refuses(Side(text="a", image=pictures[0]))
    assert torch.isfinite(embedder.embed([Side(text="a cat"), Side("find", "a dog")])).all()


def test_threads_that_prepare_inputs_share_no_processor(tiny_backbone, pictures):
    """One is switched between padding and none by every call."""
    backbone = tiny_backbone()
    embedder = Embedder(as_sentence_transformer(backbone), backbone.images)
    sides = [Side("Look.", "a cat " * n, pictures[n % 3]) for n in range(40)]
    alone = torch.cat([embedder.encode(embedder.prepare([embedder.render(side)])) for side in sides])
    torch.testing.assert_close(embedder.embed(sides, batch_size=1), alone, atol=1e-5, rtol=0)
    spare = [embedder._spare.get_nowait() for _ in range(embedder._spare.qsize())]
    assert 1 <= len(spare) <= WORKERS
    assert len({id(each.processor) for each in (*spare, embedder.model[0])}) == len(spare) + 1
    assert all(each.model is embedder.model[0].model for each in spare)


def test_a_full_memory_in_a_thread_that_prepares_is_told_with_what_takes_less(tiny_backbone, monkeypatch):
    backbone = tiny_backbone()
    embedder = Embedder(as_sentence_transformer(backbone), backbone.images)

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(type(embedder.model[0]), "preprocess", full)
    with pytest.raises(CocoaError, match=r"memory is full .*lower the batch size, or max_length"):
        embedder.embed([Side(text=f"{n}") for n in range(20)], batch_size=1)
