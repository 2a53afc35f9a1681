"""Attention in one call: the same as call by call, and used only where it gives the same."""

import logging
from types import SimpleNamespace

import pytest
import torch
import toy
from test_blocks import LAYOUTS, LENGTHS, dense
from torch.nn.attention.bias import causal_upper_left
from torch.nn.functional import scaled_dot_product_attention

from cocoa import attention, blocks, varlen
from cocoa.pairs import Side

HEADS = (4, 2, 16)
"""Of queries, of keys, and how wide they are."""


def rendition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=True, mask=None):
    """What PyTorch says that its kernel does, which a CPU does not have."""
    q_sizes, k_sizes = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max(q_sizes), max(k_sizes)) == (max_q, max_k) and window_size in ((-1, -1), (-1, 0))
    found = []
    for own in zip(query.split(q_sizes), key.split(k_sizes), value.split(k_sizes), strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in own)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        if window_size == (-1, 0):
            seen = seen.tril(k.shape[2] - q.shape[2]) if mask is None else mask(q.shape[2], k.shape[2])
        output = scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        found.append(output[0].transpose(0, 1))
    return torch.cat(found)


def taken_to_work(monkeypatch):
    """The rendition in the kernel's place; what it is called with."""
    made = []

    def call(*args, **options):
        made.append(args)
        return rendition(*args, **options)

    monkeypatch.setattr(varlen, "_kernel", call)
    monkeypatch.setattr(varlen, "works", lambda query, key: True)
    return made


@pytest.fixture
def calls(monkeypatch):
    """What the rendition, taken to work, is called with."""
    return taken_to_work(monkeypatch)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_one_call_and_gives_what_its_mask_does(name, calls):
    found, masks = LAYOUTS[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8, requires_grad=True) for heads in (4, 2, 2))
    weight = torch.randn(1, sum(LENGTHS), 4, 8)
    ours, _ = blocks.attend(None, q, k, v, blocks.Layout(found).to("cpu"), scaling=0.3, dropout=0.0)
    assert len(calls) == 1
    theirs = scaled_dot_product_attention(q, k, v, dense(masks), scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        *(torch.autograd.grad((each * weight).sum(), (q, k, v)) for each in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_keys_that_are_the_row_itself_are_not_copied():
    assert blocks.Layout(blocks.own([5, 3, 5])).in_turn.places is None
    assert blocks.Layout(blocks.eos_bridged([5, 3], [2, 6], "published")).in_turn.places is not None


def test_blocks_of_which_some_are_causal_are_not_one_call(calls):
    mixed = blocks.Layout([blocks.Block((0, 2), (0, 2), True), blocks.Block((2, 4), (2, 4))])
    q = torch.randn(1, 2, 4, 8)
    blocks.attend(None, q, q, q, mixed)
    assert mixed.in_turn is None and not calls


def test_dropout_is_left_to_the_attention_that_has_it(calls):
    q = torch.randn(1, 2, 4, 8)
    blocks.attend(None, q, q, q, blocks.Layout(blocks.own([2, 2])), dropout=0.5)
    attention.chunked_attention(None, q, q, q, None, torch.tensor([0, 2, 4], dtype=torch.int32), 2, dropout=0.5)
    assert not calls


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_the_tower_s_features_are_those_of_an_image_alone(tiny_backbone, model_type, calls):
    backbone = tiny_backbone(model_type)
    tower, found = backbone.model.model, []
    encoded = [backbone.encode_side(Side(image=each)) for each in toy.pictures(3)]
    pixels = backbone.pixels.values(torch.cat([each["pixel_values"] for each in encoded]))
    grid = torch.cat([each["image_grid_thw"] for each in encoded])
    for name in ("sdpa", attention.CHUNKED):
        backbone.model.set_attn_implementation({"vision_config": name})
        found.append(torch.cat(tower.get_image_features(pixels, grid).pooler_output))
    assert len(calls) == backbone.model.config.vision_config.depth
    torch.testing.assert_close(*found)


def test_autocast_lowers_what_it_lowers_elsewhere(calls):
    """Adapters' inputs are float32, and queries and keys with them, whose places are float32 too."""
    layout = blocks.Layout(blocks.own([2, 2]))
    q, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = blocks.attend(None, q, q, v, layout)
        chunked, _ = attention.chunked_attention(None, q, q, v, None, torch.tensor([0, 2, 4], dtype=torch.int32), 2)
    assert {each.dtype for call in calls for each in call[:3]} == {ours.dtype} == {torch.bfloat16}
    torch.testing.assert_close(ours, chunked)


def test_a_kernel_that_gives_other_numbers_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(varlen, "_kernel", rendition)
    assert varlen.error("cpu", torch.float32, *HEADS) < 1e-5
    assert varlen.error("cpu", torch.bfloat16, *HEADS) < varlen.LARGEST_ERROR / 2
    assert varlen._works.__wrapped__("cpu", torch.bfloat16, *HEADS)

    def wrong_diagonal(*args, **options):
        return rendition(*args, **options, mask=causal_upper_left)

    monkeypatch.setattr(varlen, "_kernel", wrong_diagonal)
    assert not varlen._works.__wrapped__("cpu", torch.bfloat16, *HEADS)
    assert "computed length by length" in caplog.text


@pytest.mark.parametrize("reason", [RuntimeError("no kernel"), TypeError("no such argument")])
def test_a_kernel_that_fails_is_not_used(monkeypatch, caplog, reason):
    def fail(*args, **options):
        raise reason

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(varlen, "_kernel", fail)
    assert not varlen._works.__wrapped__("cpu", torch.bfloat16, *HEADS)
    assert str(reason) in caplog.text


def test_the_trial_does_not_depend_on_who_asks(monkeypatch):
    """Under hooks, as in a forward pass that is computed again later, and in inference mode."""
    monkeypatch.setattr(varlen, "_kernel", rendition)
    state = torch.get_rng_state()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        assert varlen._works.__wrapped__("cpu", torch.float32, *HEADS)
    with torch.inference_mode():
        assert varlen._works.__wrapped__("cpu", torch.float32, *HEADS)
    assert not saved and torch.equal(state, torch.get_rng_state())


def test_on_a_cpu_and_in_float32_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(varlen, "_kernel", None)
    query = torch.randn(4, 2, 8)
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert not varlen.works(query.bfloat16(), query.bfloat16()) and not varlen.works(on_gpu, on_gpu)
