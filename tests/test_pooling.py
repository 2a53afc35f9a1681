"""Embeddings of other tokens than EOS: the mean of all (MoCa), the mean of the compression tokens (CoMa)."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from stranger import embed_as_a_stranger
from toy import arguments, states_of, toy_pairs, with_adapters

from cocoa.backbone import Form, load_backbone
from cocoa.checkpoint import as_sentence_transformer, form_of, read_record, recorded_form, save_checkpoint
from cocoa.embedding import load_embedder
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.pairs import Side
from cocoa.stages.contrastive import ContrastiveArguments, ContrastiveTrainer
from cocoa.stages.weights import trainable

K = 5
FORMS = [Form("bidirectional", "mean"), Form("causal", "compression", K)]
VARIANTS = [(model_type, form) for model_type in ("qwen2_vl", "qwen2_5_vl") for form in FORMS]
TEXTS = ["A red cup.", "The cat looks at the astronaut in the orange suit.", "<|im_end|> <|compress_1|> <|image_pad|>"]
LONG = "The cat looks at the astronaut. " * 40


@pytest.fixture(scope="module")
def saved(tiny_backbone_path, tmp_path_factory):
    """Variant -> (the backbone in memory, its checkpoint folder); the backbone has learned a little."""
    checkpoints = {}
    for model_type, form in VARIANTS:
        backbone = load_backbone(tiny_backbone_path(model_type), ImageBudget((4, 16)), **form._asdict())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in backbone.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp("checkpoint") / f"{model_type}-{form.pooling}"
        save_checkpoint(backbone, folder, {"stage": "contrastive"})
        checkpoints[model_type, form] = backbone, folder
    return checkpoints


def by_hand(backbone, side):
    """The embedding of one side, unpadded, from the final states and the definition."""
    states = states_of(backbone, side)
    if backbone.pooling == "compression":
        assert backbone.encode_side(side)["input_ids"][-K:].tolist() == backbone.compression_token_ids
        states = states[-K:]
    return torch.nn.functional.normalize(states.mean(0), dim=0)


def sides(pictures):
    mixed = [Side(text=TEXTS[0]), Side(image=pictures[0]), Side(text=TEXTS[1], image=pictures[1]), Side(text=TEXTS[2])]
    return [*mixed, Side(text=LONG)]


@pytest.mark.slow
def test_plain_sentence_transformers_gives_the_same_embeddings(saved, pictures, tmp_path):
    folders = {f"{model_type} {form.pooling}": saved[model_type, form][1] for model_type, form in VARIANTS}
    mixed = [TEXTS[0], {"image": 0}, {"text": TEXTS[1], "image": 1}, TEXTS[2], LONG]
    found = embed_as_a_stranger(tmp_path, pictures, folders, {"mixed": (mixed, None)})
    for model_type, form in VARIANTS:
        backbone, _ = saved[model_type, form]
        expected = torch.stack([by_hand(backbone, side) for side in sides(pictures)])
        read = torch.from_numpy(found[f"{model_type} {form.pooling} mixed"])
        torch.testing.assert_close(read, expected, atol=1e-6, rtol=0)  # padded on the left, images and none in a batch
        assert (expected[0] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_training_and_serving_pool_alike(saved, pictures, variant):
    backbone, folder = saved[variant]
    expected = torch.stack([by_hand(backbone, side) for side in sides(pictures)])
    embedder = load_embedder(folder)
    assert embedder.ending == (K if variant[1].pooling == "compression" else 1)
    torch.testing.assert_close(embedder.embed(sides(pictures)), expected, atol=1e-6, rtol=0)
    in_memory = as_sentence_transformer(backbone)
    encoded = in_memory.encode([backbone.messages(side) for side in sides(pictures)], convert_to_tensor=True)
    torch.testing.assert_close(encoded, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_record_says_how_a_checkpoint_is_read_and_the_next_stage_does(saved, variant, tmp_path):
    _, folder = saved[variant]
    assert recorded_form(folder) == form_of(read_record(folder)) == variant[1]
    kept = arguments(ContrastiveArguments, tmp_path).form(recorded_form(folder))
    assert kept == variant[1]
    assert load_backbone(folder, **kept._asdict()).form == variant[1]
    said = arguments(ContrastiveArguments, tmp_path, attention="bidirectional", pooling="lasttoken")
    assert said.form(recorded_form(folder)) == Form()


def test_what_is_not_ours_is_read_as_cocoa_s(tiny_backbone_path, tmp_path):
    assert recorded_form(tiny_backbone_path()) is None
    assert arguments(ContrastiveArguments, tmp_path).form(None) == Form("bidirectional", "lasttoken", 0)
    assert arguments(ContrastiveArguments, tmp_path, pooling="compression").form(None).compression_tokens == 32


def test_truncation_never_costs_a_compression_token(saved, pictures):
    for model_type in ("qwen2_vl", "qwen2_5_vl"):
        backbone, folder = saved[model_type, FORMS[1]]
        for side in (Side("Find it:", LONG, pictures[0]), Side(text=LONG)):
            for length in (40, 41, 47):
                fitted = backbone.fit_text(side, length)
                ids = backbone.encode_side(fitted)["input_ids"]
                assert ids[-K:].tolist() == backbone.compression_token_ids
                assert length - backbone.images.tokens[1] - 6 < len(ids) <= length
                found = load_embedder(folder, max_length=length).embed([side])[0]
                torch.testing.assert_close(found, by_hand(backbone, fitted), atol=1e-6, rtol=0)
        served = SentenceTransformer(str(folder), device="cpu")
        features = served.preprocess([LONG * 20])  # more tokens than any limit of the tokenizer's
        assert features["input_ids"][0, -K:].tolist() == backbone.compression_token_ids


def test_numbers_of_compression_tokens_that_cannot_be(saved, tiny_backbone_path):
    with pytest.raises(CocoaError, match="it has 5 compression tokens; set compression_tokens: 5"):
        load_backbone(saved[VARIANTS[1]][1], pooling="compression", compression_tokens=8)
    with pytest.raises(
        CocoaError, match=r"no free embedding row for .*compress_1.* \(23 are free\); lower compression_"
    ):
        load_backbone(tiny_backbone_path(), pooling="compression", compression_tokens=24)
    assert load_backbone(tiny_backbone_path(), pooling="compression", compression_tokens=23).compression_tokens == 23


def test_compression_tokens_begin_unlike_each_other(saved):
    backbone, _ = saved[VARIANTS[1]]
    rows = backbone.model.get_input_embeddings().weight[backbone.compression_token_ids]
    assert torch.pdist(rows).min() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_contrastive_stage_trains_through_its_pooling(saved, variant, tmp_path):
    """Adapters learn (and the compression tokens' rows), the fixed weights of the pooling do not."""
    form = variant[1]
    backbone = load_backbone(saved[variant][1], ImageBudget((4, 16)), **form._asdict())
    with_adapters(backbone)
    options = {key: value for key, value in form._asdict().items() if value}
    args = arguments(ContrastiveArguments, tmp_path, tokens_per_pass=80, max_steps=2, **options)
    trainer = ContrastiveTrainer(backbone, args, toy_pairs(8, datasets=2))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    learned = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert learned <= {name for name, _ in trainable(trainer.model)}
    assert any("lora_B" in name for name in learned) and not any("emb_layer" in name for name in learned)
    rows = [name for name in learned if "trainable_tokens" in name]
    assert bool(rows) == (form.pooling == "compression")
