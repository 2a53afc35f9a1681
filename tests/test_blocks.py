"""Attention block by block against the dense masks: who sees whom, the numbers, the losses and gradients."""

import pytest
import torch
import toy
from torch.nn.functional import scaled_dot_product_attention

from cocoa import attention, blocks
from cocoa.packing import by_length, pack
from cocoa.stages import compression, eos_bridge, joint_reconstruction

LENGTHS, PLACES = [4, 4, 7, 3], [1, 2, 4, 1]
"""Inputs, and where EOS or the first of two compression tokens stands in each."""
IN_ROW = [1, 6, 12, 16]
PADDING = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
LAYOUTS = {
    "bidirectional": (blocks.own(LENGTHS), attention.bidirectional(PADDING)),
    "causal": (blocks.own(LENGTHS, causal=True), attention.causal(PADDING)),
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
    layout = blocks.Layout(blocks.own([5, 3, 5, 3, 3]))
    assert layout.groups == [(2, 5, 5, False), (3, 3, 3, False)]
    assert layout.queries is not None and blocks.Layout(blocks.own([3, 3, 5])).queries is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["joint", "published", "strict", "full", "compression"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_blocks_give_the_dense_mask_s_losses_and_gradients(tiny_backbone, model_type, stage, checkpointing):
    model, samples, backbone = reconstructor(tiny_backbone(model_type), stage)
    if checkpointing:
        model.activation_checkpointing_enable()
    row = pack(samples, backbone, stage if stage in attention.BRIDGE_LAYOUTS else "published")
    masks = [mask_of(sample, stage) for sample in samples]
    whole = torch.block_diag(*(mask.double() for mask in masks)).bool()[None, None]
    found = []
    for seen in (whole, row["attention"]):
        sums = model(**row | {"attention": seen})
        (sums["token"][0] + sums.get("patch", [0])[0]).backward()
        found.append((sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (dense, theirs), (blocked, ours) = found
    assert dense.keys() == blocked.keys() and theirs.keys() == ours.keys()
    for name, (total, count) in dense.items():
        torch.testing.assert_close(blocked[name][0], total, msg=name)
        assert blocked[name][1] == count
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_tied_head_needs_no_rows_that_are_excluded(tiny_backbone):
    """peft wraps it, to put the trained rows of the mask token into it."""
    backbone = tiny_backbone()
    toy.with_adapters(backbone, dropout=0.0)
    model, samples, _ = reconstructor(backbone, "published")
    wrapped, found = model.model.lm_head, []
    assert hasattr(wrapped, "original_module")
    for head in (wrapped, Through(wrapped)):
        model.model.lm_head = head
        loss = model(**pack(samples, backbone))["token"][0]
        found.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


class Through(torch.nn.Module):
    """A head with peft's wrapper in the way."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped, self.weight = [wrapped], wrapped.original_module.weight

    def forward(self, states):
        return self.wrapped[0](states)


@pytest.mark.parametrize("stage", ["joint", "published", "compression"])
def test_a_row_gives_what_its_samples_give_alone(tiny_backbone, stage):
    model, samples, backbone = reconstructor(tiny_backbone(), stage)
    with torch.no_grad():
        together = model(**pack(samples, backbone))
        alone = [model(**pack([sample], backbone)) for sample in samples]
    for name, sums in together.items():
        for ours, theirs in zip(sums, zip(*(each[name] for each in alone), strict=True), strict=True):
            torch.testing.assert_close(ours.float(), torch.stack(theirs).sum().float(), msg=name)


def test_passes_hold_every_sample_once_and_no_more_tokens_than_asked(tiny_backbone):
    _, samples, _ = reconstructor(tiny_backbone(), "published")
    sizes = [len(sample["input_ids"]) for sample in samples]
    for tokens in (1, max(sizes), 2 * max(sizes), 10_000):
        found = [[sizes[place] for place in part] for part in by_length(samples, tokens)]
        assert [size for part in found for size in part] == sorted(sizes)
        assert all(sum(part) <= tokens or len(part) == 1 for part in found)


def reconstructor(backbone, stage):
    """A stage's model and five samples, no two of one length."""
    known = {"output_dir": "unused", "batch_size": 4, "use_cpu": True}
    if stage == "joint":
        args = joint_reconstruction.JointReconstructionArguments(**known)
        trainer = joint_reconstruction.JointReconstructionTrainer(backbone, args, toy.content_rows(5, bridge=False))
    elif stage == "compression":
        args = compression.CompressionArguments(**known, compression_tokens=4)
        trainer = compression.CompressionTrainer(toy.prepared(backbone, stage), args, toy.dialogues(5))
    else:
        args = eos_bridge.EosBridgeArguments(**known, layout=stage)
        trainer = eos_bridge.EosBridgeTrainer(backbone, args, toy.content_rows(5, bridge=True))
    samples = [trainer.train_dataset[0, row] for row in range(5)]
    for number, sample in enumerate(samples):
        for name in ("input_ids", "labels", "hidden_units"):
            if name in sample:
                sample[name] = sample[name][: len(sample[name]) - number]
    return trainer.model.train(), samples, backbone


def mask_of(sample, stage):
    """(T, T) dense, of one sample."""
    real = torch.ones(1, len(sample["input_ids"]))
    if stage == "joint":
        return attention.bidirectional(real)[0, 0]
    if stage == "compression":
        return attention.compressed(sample["compression_start"][None], 4, real)[0, 0]
    return attention.eos_bridged(sample["eos_position"][None], real, stage)[0, 0]
