"""The contrastive stage: cached equals uncached gradients, equal targets are no negatives, rows render as served."""

import pytest
import torch
from PIL import Image
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch.nn import functional as F
from toy import MadeUp, arguments, prepared, states_of, toy_pairs, with_adapters

from cocoa.backbone import POOLINGS
from cocoa.checkpoint import as_sentence_transformer
from cocoa.contrastive_loss import FILLER_ID, cached_loss, info_nce
from cocoa.embedding import Embedder
from cocoa.errors import CocoaError
from cocoa.packing import PackedEmbedder
from cocoa.pairs import Pair, Side
from cocoa.stages.contrastive import ContrastiveArguments, ContrastiveTrainer, PairDataset, collate
from cocoa.validation import InPoolEvaluator

TEMPERATURE = 0.05


def batch_of(pairs, backbone, args):
    dataset = PairDataset(pairs, backbone, args)
    return collate([dataset[i] for i in range(len(dataset))], backbone, args.tokens_per_pass)


def messages_of(pairs, backbone, negatives=0):
    """Columns as sentence-transformers takes them."""
    sides = [[pair.query, pair.target, *pair.negatives, *[Side()] * negatives][: 2 + negatives] for pair in pairs]
    return [[backbone.messages(side) for side in column] for column in zip(*sides, strict=True)]


def uncached_loss(model, columns, labels, mask_equal_targets):
    """InfoNCE in one pass, negatives chosen by plain loops."""
    query, *documents = [model(model.preprocess(column))["sentence_embedding"] for column in columns]
    candidates = torch.cat(documents)
    ids = labels.flatten().tolist()
    losses = []
    for row in range(len(query)):
        kept = [row]
        for column in range(len(candidates)):
            equal = mask_equal_targets and ids[column] == ids[row]
            if column != row and ids[column] != FILLER_ID and not equal:
                kept.append(column)
        scores = F.cosine_similarity(query[row], candidates[kept]) / TEMPERATURE
        losses.append(-F.log_softmax(scores, 0)[0])
    return torch.stack(losses).mean()


def gradients_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def our_gradients(backbone, batch, mask_equal_targets=True, kept=1, dims=()):
    """The loss, the gradients by the backbone's names, and how often the model was asked."""
    model, asked = PackedEmbedder(backbone).train(), []
    model.register_forward_hook(lambda *_: asked.append(1))
    loss = cached_loss(
        model,
        batch["passes"],
        lambda vectors: info_nce(vectors[batch["places"]], batch["ids"], TEMPERATURE, mask_equal_targets, dims),
        kept,
    )
    loss.backward()
    return loss.item(), gradients_of(backbone.model.model), len(asked)


@pytest.mark.parametrize("mask_equal_targets", [True, False])
@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("tokens_per_pass", [1, 60, 10_000])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_are_those_of_one_padded_batch(
    tiny_backbone, tmp_path, mask_equal_targets, negatives, tokens_per_pass, pooling
):
    pairs = toy_pairs(6, negatives)
    pairs[3] = Pair(pairs[3].query, pairs[0].target, (), "toy0", 3)  # an equal target, and no negative of its own
    backbone = tiny_backbone()
    backbone.pooling = pooling
    if pooling == "compression":
        prepared(backbone, "matching")
    args = arguments(ContrastiveArguments, tmp_path, hard_negatives=negatives, tokens_per_pass=tokens_per_pass)
    batch = batch_of(pairs, backbone, args)
    model = as_sentence_transformer(backbone)
    expected = uncached_loss(model, messages_of(pairs, backbone, negatives), batch["ids"], mask_equal_targets)
    expected.backward()
    theirs = gradients_of(backbone.model.model)
    loss, ours, asked = our_gradients(backbone, batch, mask_equal_targets)
    assert asked == 2 * len(batch["passes"]) - 1
    assert len(batch["passes"]) == {1: 6 * (2 + negatives), 10_000: 1}.get(tokens_per_pass, len(batch["passes"]))
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert theirs.keys() == ours.keys() and theirs
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=2e-5, rtol=1e-4), name


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_gradients_are_those_of_sentence_transformers(tiny_backbone, tmp_path, model_type):
    pairs, backbone = toy_pairs(6), tiny_backbone(model_type)
    model = as_sentence_transformer(backbone)
    cached = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=2)
    expected = cached([model.preprocess(column) for column in messages_of(pairs, backbone)], None)
    expected.backward()
    theirs = gradients_of(backbone.model.model)
    args = arguments(ContrastiveArguments, tmp_path, tokens_per_pass=60)
    loss, ours, _ = our_gradients(backbone, batch_of(pairs, backbone, args))
    assert loss == pytest.approx(expected.item(), abs=1e-5) and theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=2e-5, rtol=1e-4), name


def test_matryoshka_is_that_of_sentence_transformers(tiny_backbone, tmp_path):
    """Its loss is the sum over the lengths, ours the mean."""
    pairs, backbone = toy_pairs(6), tiny_backbone()
    model, dims = as_sentence_transformer(backbone), [4, 12]
    whole = model.get_embedding_dimension()
    theirs_of = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE), [whole, *dims])
    expected = theirs_of([model.preprocess(column) for column in messages_of(pairs, backbone)], None) / 3
    expected.backward()
    theirs = gradients_of(backbone.model.model)
    args = arguments(ContrastiveArguments, tmp_path, tokens_per_pass=60, matryoshka_dims=dims)
    batch = batch_of(pairs, backbone, args)
    plain, _, _ = our_gradients(backbone, batch)
    for given in (dims, [whole, *dims, 4]):  # the whole is always among them, and each once
        loss, ours, _ = our_gradients(backbone, batch, dims=given)
        assert loss == pytest.approx(expected.item(), abs=1e-5) and loss != pytest.approx(plain, abs=1e-3)
        for name, gradient in theirs.items():
            assert torch.allclose(ours[name], gradient, atol=2e-5, rtol=1e-4), name


@pytest.mark.parametrize(
    ("dims", "message"),
    [(32, "must be a list"), ("32", "must be a list"), ([0], "above 0"), ([4096], r"\[4096\]: an embedding has \d+")],
)
def test_lengths_that_no_embedding_has_are_refused(tiny_backbone, tmp_path, dims, message):
    with pytest.raises(CocoaError, match=message):
        args = arguments(ContrastiveArguments, tmp_path, matryoshka_dims=dims)
        ContrastiveTrainer(tiny_backbone(), args, toy_pairs(6))


def test_passes_that_are_embedded_twice_have_the_same_dropout(tiny_backbone, tmp_path):
    """Dropout after the same seed in one pass, and in several: what is taken on is what the loss has seen."""
    backbone = tiny_backbone()
    with_adapters(backbone)
    for name, module in backbone.model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if name.endswith("lora_B.default"):  # else adapters are still without effect
            torch.nn.init.normal_(module.weight)
    args = arguments(ContrastiveArguments, tmp_path, tokens_per_pass=60)
    batch = batch_of(toy_pairs(6), backbone, args)
    model, seen = PackedEmbedder(backbone).train(), []
    model.register_forward_hook(lambda _, __, vectors: seen.append(vectors.detach()))
    cached_loss(model, batch["passes"], lambda vectors: info_nce(vectors[batch["places"]], batch["ids"], TEMPERATURE))
    passes = len(batch["passes"])
    for first, again in zip(seen[: passes - 1], seen[passes:], strict=True):
        torch.testing.assert_close(again, first)
    with torch.no_grad():
        assert not torch.allclose(model(batch["passes"][0]), seen[0])  # without it they would differ


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", [2, 100])
def test_passes_that_are_kept_are_embedded_once(tiny_backbone, tmp_path, kept, checkpointing):
    """With the same gradients; with checkpointing too, where a layer is computed again when its pass has its turn."""
    backbone = tiny_backbone()
    batch = batch_of(toy_pairs(6), backbone, arguments(ContrastiveArguments, tmp_path, tokens_per_pass=60))
    loss, gradients, _ = our_gradients(backbone, batch)
    if checkpointing:
        backbone.model.activation_checkpointing_enable()
    passes = []
    backbone.model.model.register_forward_hook(lambda *_: passes.append(1))
    again, same, _ = our_gradients(backbone, batch, kept=kept)
    count = len(batch["passes"])
    assert count > 2 and len(passes) == count + max(0, count - kept)
    assert again == pytest.approx(loss) and same.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(same[name], gradient, atol=1e-6, rtol=1e-5), name


def test_equal_targets_change_the_loss_only_where_masked(tiny_backbone, tmp_path):
    """Six rows of one target: masked, there is no negative left and the loss is zero."""
    image = toy_pairs(1)[0]
    pairs = [Pair(pair.query, image.target, (), "toy0", i) for i, pair in enumerate(toy_pairs(6))]
    backbone = tiny_backbone()
    batch = batch_of(pairs, backbone, arguments(ContrastiveArguments, tmp_path))
    for masked, expected in ((True, 0.0), (False, torch.log(torch.tensor(6.0)).item())):
        assert our_gradients(backbone, batch, masked)[0] == pytest.approx(expected, abs=1e-5)


def test_hard_negatives_become_columns_and_missing_ones_are_fillers(tiny_backbone, tmp_path):
    pairs, backbone = toy_pairs(2, negatives=2), tiny_backbone()
    equal = Pair(pairs[1].query, pairs[1].target, (pairs[1].target,), "toy0", 1)
    args = arguments(ContrastiveArguments, tmp_path, hard_negatives=2)
    full, short = (PairDataset([pairs[0], equal], backbone, args)[row] for row in (0, 1))
    assert list(full) == ["query", "target", "negative_1", "negative_2", "label"]
    assert full["label"] == [side.content_id() for side in (pairs[0].target, *pairs[0].negatives)]
    assert short["label"] == [equal.target.content_id(), FILLER_ID, FILLER_ID]  # equal to the target; absent
    assert short["negative_2"]["input_ids"].tolist() == [backbone.eos_token_id]


def test_rows_are_encoded_as_plain_sentence_transformers_does(tiny_backbone, tmp_path):
    pair = toy_pairs(1)[0]
    backbone = tiny_backbone()
    trained = PairDataset([pair], backbone, arguments(ContrastiveArguments, tmp_path))[0]["query"]
    model = as_sentence_transformer(backbone)
    served = model.preprocess([{"image": pair.query.image}], prompt=pair.query.instruction)
    assert torch.equal(trained["input_ids"], served["input_ids"][0])
    assert torch.equal(backbone.pixels.values(trained["pixel_values"]), served["pixel_values"])
    assert torch.equal(trained["image_grid_thw"], served["image_grid_thw"])


@pytest.mark.parametrize("tokens", [40, 10_000])
def test_a_batch_may_mix_rows_with_and_without_images(tiny_backbone, tmp_path, tokens):
    pairs = toy_pairs(8)
    pairs = [Pair(p.target, p.query, (), "toy0", p.row) if p.row % 2 else p for p in pairs]
    args = arguments(ContrastiveArguments, tmp_path, tokens_per_pass=tokens)
    trainer = ContrastiveTrainer(tiny_backbone(), args, pairs)
    trainer.train_or_resume()
    assert trainer.state.global_step == 4


def test_embedding_is_the_normalised_state_of_eos(tiny_backbone):
    backbone = tiny_backbone()
    side = toy_pairs(1)[0].query
    embedding = Embedder(as_sentence_transformer(backbone), backbone.images).embed([side])[0]
    assert torch.allclose(embedding, F.normalize(states_of(backbone, side)[-1], dim=0), atol=1e-6)


class Planted:
    """Embeds each side as the vector planted for its text."""

    def __init__(self, vectors):
        self.vectors = vectors

    def tokenizer(self, texts, **_):
        return {"input_ids": [[0] for _ in texts]}

    def encode(self, messages, **kwargs):
        return torch.stack([torch.tensor(self.vectors[m[-1]["content"][-1]["text"]]) for m in messages])


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ({"q0": [1.0, 0], "t0": [1.0, 0], "q1": [0, 1.0], "t1": [0, 1.0]}, 1.0),
        ({"q0": [1.0, 0], "t0": [1.0, 0], "q1": [1.0, 0], "t1": [0, 1.0]}, 0.5),
        ({"q0": [1.0, 0], "t0": [1.0, 0], "q1": [1.0, 0], "t1": [1.0, 0]}, 0.0),  # collapsed: all ties
    ],
)
def test_in_pool_hit_counts_ties_against_the_model(tiny_backbone, vectors, expected):
    pairs = [Pair(Side(text=f"q{i}"), Side(text=f"t{i}"), (), "toy", i) for i in range(2)]
    pairs += [Pair(Side(text="q0"), Side(text="t0"), (), "one target only", i) for i in range(2)]
    scores = InPoolEvaluator(pairs, MadeUp(Planted(vectors), tiny_backbone().images))()
    assert scores == {"validation_toy_hit@1": expected, "validation_hit@1": expected}


def test_content_ids_are_of_text_and_image_alone():
    white, black = (Image.new("RGB", (4, 4), colour) for colour in ("white", "black"))
    same = Side("one instruction", "text ", white).content_id()
    assert same == Side("another", " text", Image.new("RGB", (4, 4), "white")).content_id()
    others = {
        Side("", "text", black).content_id(),
        Side("", "texts", white).content_id(),
        Side("", "text").content_id(),
    }
    assert len(others | {same}) == 4 and all(0 <= i < 2**63 for i in others)


def test_held_out_rows_are_embedded_in_the_precision_of_training(tiny_backbone, tmp_path):
    trainer = ContrastiveTrainer(
        tiny_backbone(), arguments(ContrastiveArguments, tmp_path, bf16=True, max_steps=1), toy_pairs(8)
    )
    trainer.evaluator = lambda: {"autocast": float(torch.is_autocast_enabled("cpu"))}
    assert trainer.evaluate() == {"eval_autocast": 1.0}
