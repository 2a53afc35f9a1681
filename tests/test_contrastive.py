"""The contrastive stage: cached equals uncached gradients, equal targets are no negatives, rows render as served."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from toy import arguments, toy_pairs

from cocoa.checkpoint import as_sentence_transformer
from cocoa.embedding import Embedder
from cocoa.pairs import Pair, Side
from cocoa.stages.contrastive import (
    FILLER_ID,
    ContrastiveArguments,
    EqualTargetsLoss,
    PairDataset,
    build_trainer,
)
from cocoa.validation import InPoolEvaluator

TEMPERATURE = 0.05


def columns_of(dataset):
    rows = [dataset[i] for i in range(len(dataset))]
    return {name: [row[name] for row in rows] for name in dataset.column_names}


def features_of(model, columns):
    return [model.preprocess(column) for column in columns]


def uncached_loss(model, features, labels, mask_equal_targets):
    """InfoNCE in one pass, negatives chosen by plain loops."""
    query, *documents = [model(dict(column))["sentence_embedding"] for column in features]
    candidates = torch.cat(documents)
    ids = labels.T.flatten().tolist()
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


@pytest.mark.parametrize("mask_equal_targets", [True, False])
@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize(("mini_batch_size", "passes"), [(2, 3 * 2), (6, 1)])
def test_cached_equals_uncached_gradients(
    tiny_backbone, tmp_path, mask_equal_targets, negatives, mini_batch_size, passes
):
    pairs = toy_pairs(6, negatives)
    pairs[3] = Pair(pairs[3].query, pairs[0].target, (), "toy0", 3)  # an equal target, and no negative of its own
    backbone = tiny_backbone()
    args = arguments(ContrastiveArguments, tmp_path, hard_negatives=negatives)
    rows = columns_of(PairDataset(pairs, backbone, args))
    labels = torch.tensor(rows.pop("label"))
    model = as_sentence_transformer(backbone)
    model.train()
    features = features_of(model, rows.values())

    expected = uncached_loss(model, features, labels, mask_equal_targets)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cached = EqualTargetsLoss(model, mask_equal_targets, scale=1 / TEMPERATURE, mini_batch_size=mini_batch_size)
    features, forwards = features_of(model, rows.values()), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    loss = cached(features, labels)
    loss.backward()
    assert len(forwards) == passes * len(features)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert gradients
    for name, p in model.named_parameters():
        if name in gradients:
            assert torch.allclose(p.grad, gradients[name], atol=2e-5, rtol=1e-4), name


def test_equal_targets_change_the_loss_only_where_masked(tiny_backbone, tmp_path):
    """Six rows of one target: masked, there is no negative left and the loss is zero."""
    image = toy_pairs(1)[0]
    pairs = [Pair(pair.query, image.target, (), "toy0", i) for i, pair in enumerate(toy_pairs(6))]
    backbone = tiny_backbone()
    rows = columns_of(PairDataset(pairs, backbone, arguments(ContrastiveArguments, tmp_path)))
    labels = torch.tensor(rows.pop("label"))
    model = as_sentence_transformer(backbone)
    for masked, expected in ((True, 0.0), (False, torch.log(torch.tensor(6.0)).item())):
        loss = EqualTargetsLoss(model, masked, scale=20.0, mini_batch_size=4)
        assert loss(features_of(model, rows.values()), labels).item() == pytest.approx(expected, abs=1e-5)


def test_hard_negatives_become_columns_and_missing_ones_are_fillers(tiny_backbone, tmp_path):
    pairs = toy_pairs(2, negatives=2)
    equal = Pair(pairs[1].query, pairs[1].target, (pairs[1].target,), "toy0", 1)
    args = arguments(ContrastiveArguments, tmp_path, hard_negatives=2)
    rows = columns_of(PairDataset([pairs[0], equal], tiny_backbone(), args))
    assert list(rows) == ["query", "target", "negative_1", "negative_2", "label"]
    assert rows["label"][0] == [side.content_id() for side in (pairs[0].target, *pairs[0].negatives)]
    assert rows["label"][1] == [equal.target.content_id(), FILLER_ID, FILLER_ID]  # equal to the target; absent
    assert rows["negative_2"][1] == [{"role": "user", "content": []}]


def test_rows_render_as_plain_sentence_transformers_does(tiny_backbone, tmp_path):
    pair = toy_pairs(1)[0]
    backbone = tiny_backbone()
    rows = columns_of(PairDataset([pair], backbone, arguments(ContrastiveArguments, tmp_path)))
    model = as_sentence_transformer(backbone)
    trained = model.preprocess(rows["query"])
    served = model.preprocess([{"image": pair.query.image}], prompt=pair.query.instruction)
    for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        assert torch.equal(trained[key], served[key]), key


@pytest.mark.parametrize("size", [3, 8])
def test_a_batch_may_mix_rows_with_and_without_images(tiny_backbone, tmp_path, size):
    pairs = toy_pairs(8)
    pairs = [Pair(p.target, p.query, (), "toy0", p.row) if p.row % 2 else p for p in pairs]
    trainer = build_trainer(tiny_backbone(), pairs, [], arguments(ContrastiveArguments, tmp_path, mini_batch_size=size))
    trainer.train_or_resume()
    assert trainer.state.global_step == 4


def test_embedding_is_the_normalised_state_of_eos(tiny_backbone):
    backbone = tiny_backbone()
    side = toy_pairs(1)[0].query
    inputs = backbone.encode_side(side)
    assert inputs["input_ids"][-1] == backbone.eos_token_id
    with torch.no_grad():
        states = (
            backbone.model.eval()
            .model(
                input_ids=inputs["input_ids"][None],
                attention_mask=torch.ones(1, len(inputs["input_ids"])).long(),
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
                mm_token_type_ids=(inputs["input_ids"] == backbone.model.config.image_token_id).int()[None],
            )
            .last_hidden_state
        )
    embedding = Embedder(as_sentence_transformer(backbone), backbone.images).embed([side])[0]
    assert torch.allclose(embedding, F.normalize(states[0, -1], dim=0), atol=1e-6)


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
    scores = InPoolEvaluator(pairs, tiny_backbone())(Planted(vectors))
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
