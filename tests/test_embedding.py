"""Many inputs at once: batches of equal work, images decoded ahead, and the same embeddings in any company."""

import time

import pytest
import torch
from sentence_transformers import SentenceTransformer

from cocoa.checkpoint import as_sentence_transformer, save_checkpoint
from cocoa.embedding import AHEAD, MOST_SHORT, Embedder, equal_work, prepared
from cocoa.inputs import ImageBudget
from cocoa.pairs import Side


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_every_input_once_and_no_more_tokens_than_that_many_of_the_longest(batch_size):
    lengths = [(7 * i) % 50 + 1 for i in range(200)] + [300]
    batches = equal_work(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(201))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= batch_size * 300
        assert len(batch) <= batch_size * MOST_SHORT
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)  # what needs the most memory comes first


def test_equal_lengths_make_plain_batches_and_nothing_makes_none():
    assert equal_work([5] * 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert equal_work([], 3) == []


def test_batches_are_prepared_ahead_in_order_and_not_all_at_once():
    asked = []

    def prepare(batch):
        asked.append(batch[0])
        return batch[0] * 10

    found = prepared([[i] for i in range(20)], prepare)
    assert next(found) == ([0], 0)
    time.sleep(0.2)
    assert len(asked) <= AHEAD + 1
    assert list(found) == [([i], i * 10) for i in range(1, 20)]


def test_a_failure_to_prepare_is_raised():
    def prepare(batch):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(prepared([[0]], prepare))


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
