"""Attention block by block against the dense masks: who sees whom, the numbers, the losses and gradients."""

import pytest
import torch
import toy
from torch.nn.functional import scaled_dot_product_attention

from cocoa import attention, blocks
from cocoa.stages import compression, eos_bridge, joint_reconstruction
from cocoa.stages.content import collate, pack

LENGTHS, PLACES = [4, 4, 7, 3], [1, 2, 4, 1]
"""Inputs, and where EOS or the first of two compression tokens stands in each."""
IN_ROW = [1, 6, 12, 16]
PADDING = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
LAYOUTS = {
    "bidirectional": (blocks.bidirectional(LENGTHS), attention.bidirectional(PADDING)),
    "causal": (blocks.bidirectional(LENGTHS, causal=True), attention.causal(PADDING)),
    "compressed": (blocks.compressed(LENGTHS, IN_ROW, 2), attention.compressed(torch.tensor(PLACES), 2, PADDING)),
    **{
        layout: (
            blocks.eos_bridged(LENGTHS, IN_ROW, layout),
            attention.eos_bridged(torch.tensor(PLACES), PADDING, layout),
        )
        for layout in attention.BRIDGE_LAYOUTS
    },
}


def dense(masks):
    """(N, N) of a row from the masks (B, 1, T, T) of its inputs."""
    return torch.block_diag(*(mask[0, :n, :n].double() for mask, n in zip(masks, LENGTHS, strict=True))).bool()


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_see_what_the_mask_allows(name):
    found, masks = LAYOUTS[name]
    seen = torch.zeros(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
    for queries, keys, causal in found:
        for place in range(*queries):
            assert not seen[place].any()  # a query is in one block
            seen[place, keys[0] : keys[1] - (queries[1] - 1 - place if causal else 0)] = True
    assert torch.equal(seen, dense(masks))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_is_that_of_the_mask(name, kv_heads):
    found, masks = LAYOUTS[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    weight = torch.randn(1, sum(LENGTHS), 4, 8)
    ours, _ = blocks.attend(None, q, k, v, blocks.Layout(found), scaling=0.3, dropout=0.0)
    theirs = scaled_dot_product_attention(q, k, v, dense(masks), scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_blocks_of_one_size_are_one_call():
    layout = blocks.Layout(blocks.bidirectional([5, 3, 5, 3, 3]))
    assert layout.groups == [(2, 5, 5, False), (3, 3, 3, False)]
    assert layout.queries is not None and blocks.Layout(blocks.bidirectional([3, 3, 5])).queries is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["joint", "published", "strict", "full", "compression"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_a_packed_batch_gives_the_padded_one_s_losses_and_gradients(tiny_backbone, model_type, stage, checkpointing):
    backbone = tiny_backbone(model_type)
    if stage == "joint":
        args = joint_reconstruction.JointReconstructionArguments(output_dir="unused", batch_size=4, use_cpu=True)
        trainer = joint_reconstruction.build_trainer(backbone, toy.content_rows(5, bridge=False), args)
    elif stage == "compression":
        args = compression.CompressionArguments(output_dir="unused", batch_size=4, use_cpu=True)
        trainer = compression.build_trainer(toy.prepared(backbone, stage), toy.dialogues(5), args)
    else:
        args = eos_bridge.EosBridgeArguments(output_dir="unused", batch_size=4, layout=stage, use_cpu=True)
        trainer = eos_bridge.build_trainer(backbone, toy.content_rows(5, bridge=True), args)
    model = trainer.model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    samples = [trainer.train_dataset[0, row] for row in range(5)]
    samples[1] = {  # a shorter one
        name: value[:-1] if name in ("input_ids", "labels", "hidden_units") else value
        for name, value in samples[1].items()
    }
    found = []
    layout = stage if stage in attention.BRIDGE_LAYOUTS else "published"
    for batch in (collate(samples, backbone.tokenizer.pad_token_id), pack(samples, backbone, layout)):
        sums = model(**batch)
        (sums["token"][0] + sums.get("patch", [0])[0]).backward()
        found.append((sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (padded, theirs), (packed, ours) = found
    assert padded.keys() == packed.keys() and theirs.keys() == ours.keys()
    for name, (total, count) in padded.items():
        torch.testing.assert_close(packed[name][0], total, msg=name)
        assert packed[name][1] == count
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
