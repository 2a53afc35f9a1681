"""Embeddings of inputs of unlike length in one pass: all tokens share the layers, groups of like length attend.

The layers see one long row of tokens, so that a step is a few large products instead of many small ones; only
attention is computed for each group, which is a slice of the row. That takes 0.7 of the time of a pass for each group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from cocoa.backbone import Backbone
from cocoa.stages.content import collate

GROUP_TOKENS = 40
"""What a group costs beside its tokens, in tokens: weighed against padding where a batch is cut in groups."""
AT_ONCE = 2048
"""Tokens of a pass, about."""
GROUPED = "grouped"
"""`attend` in transformers."""


def like_length(lengths: Sequence[int], at_most: int = 64) -> list[list[int]]:
    """Indices of inputs in groups of like length: those of least padding and fewest groups, see `GROUP_TOKENS`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    least, starts = [0.0], [0]  # of the first n in order: the cost, and where their last group starts
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        cost, start = min(
            (least[start] + (end - start) * longest + GROUP_TOKENS, start)
            for start in range(max(0, end - at_most), end)
        )
        least.append(cost)
        starts.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups


def embed(backbone: Backbone, encoded: Sequence[dict[str, Tensor]]) -> Tensor:
    """Embeddings (N, D) of sides that `Backbone.encode_side` has encoded."""
    groups: list[list[int]] = []
    for with_image in (False, True):  # the two are not mixed
        places = [i for i, each in enumerate(encoded) if ("pixel_values" in each) == with_image]
        groups += [[places[i] for i in group] for group in like_length([len(encoded[i]["input_ids"]) for i in places])]
    vectors = []
    for part in _passes(groups, encoded):
        vectors += _embed_groups(backbone, [[encoded[i] for i in group] for group in part])
    order = torch.tensor([i for group in groups for i in group])
    return F.normalize(torch.cat(vectors)[order.argsort()], dim=-1)


def _passes(groups: list[list[int]], encoded: Sequence[dict[str, Tensor]]) -> Iterator[list[list[int]]]:
    """The groups, in order, in parts of about `AT_ONCE` tokens."""
    part: list[list[int]] = []
    tokens = 0
    for group in groups:
        part.append(group)
        tokens += sum(len(encoded[i]["input_ids"]) for i in group)
        if tokens >= AT_ONCE:
            yield part
            part, tokens = [], 0
    if part:
        yield part


def _embed_groups(backbone: Backbone, groups: Sequence[list[dict[str, Tensor]]]) -> list[Tensor]:
    """For each group (S, D) what is pooled of its inputs, in one pass."""
    batches = [
        {
            name: value.to(backbone.model.device)
            for name, value in collate(group, backbone.tokenizer.pad_token_id).items()
        }
        for group in groups
    ]
    masks = [batch["attention_mask"] for batch in batches]  # (S, T) each
    positions = [
        backbone.rope_positions(batch["input_ids"], mask, batch.get("image_grid_thw"))  # (3, S, T)
        for batch, mask in zip(batches, masks, strict=True)
    ]
    if backbone.pooling == "mean":
        weights = masks
    else:  # the last tokens: EOS, or the compression tokens
        weights = [mask * (mask.flip(1).cumsum(1).flip(1) <= backbone.ending) for mask in masks]
    pictures = {
        name: torch.cat([batch[name] for batch in batches if name in batch])
        for name in ("pixel_values", "image_grid_thw")
        if any(name in batch for batch in batches)
    }
    causal = backbone.form.attention == "causal"  # then no token sees the padding behind it
    groups_of = [(mask.shape, None if causal or mask.all() else mask.bool()[:, None, None]) for mask in masks]
    with _in_groups(backbone), _last_layer_at(backbone, _row(weights).bool()):
        states = backbone.model.model(
            input_ids=_row([batch["input_ids"] for batch in batches]),
            attention_mask={"full_attention": groups_of},
            position_ids=torch.cat([each.flatten(1) for each in positions], 1)[:, None],  # (3, 1, N)
            use_cache=False,
            **pictures,
        ).last_hidden_state  # (1, N, D)
    parts = states[0].split([mask.numel() for mask in masks])
    return [
        (part.unflatten(0, weight.shape) * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)
        for part, weight in zip(parts, weights, strict=True)
    ]


def _row(values: Sequence[Tensor]) -> Tensor:
    """Tensors (S, T) of groups as one row (1, N)."""
    return torch.cat([value.flatten() for value in values])[None]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sequence[tuple[torch.Size, Tensor | None]],
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each input of each group, causal or not as the text model's config says.

    Args:
        module: the attention layer.
        query: (1, H, N, D), the groups one after another, each (S, T) padded on the right; `key` and `value` too.
        key: as query, with fewer heads.
        value: as key.
        attention_mask: of each group its S and T, and (S, 1, 1, T) True on real tokens, or None where all may be seen.
        options: `scaling` of the scores.

    Returns:
        (1, N, H, D), and no weights.
    """
    causal = module.config.is_causal
    sizes = [shape.numel() for shape, _ in attention_mask]
    parts = []
    for (shape, real), *own in zip(
        attention_mask, *(each[0].split(sizes, 1) for each in (query, key, value)), strict=True
    ):
        q, k, v = (each.unflatten(1, shape).transpose(0, 1) for each in own)  # (S, H, T, D)
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=real, is_causal=causal, scale=options["scaling"], enable_gqa=True
        )
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


AttentionInterface.register(GROUPED, attend)


@contextmanager
def _in_groups(backbone: Backbone) -> Iterator[None]:
    """Let the text model attend in groups."""
    config = backbone.model.model.language_model.config
    usual = config._attn_implementation
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = usual


@contextmanager
def _last_layer_at(backbone: Backbone, wanted: Tensor) -> Iterator[None]:
    """Skip the last layer's MLP, most of its work, where nothing is pooled; `wanted` (1, N) says where something is."""
    mlp = backbone.model.model.language_model.layers[-1].mlp
    whole = mlp.forward
    mlp.forward = lambda states: torch.zeros_like(states).index_put(
        wanted.nonzero(as_tuple=True), whole(states[wanted])
    )
    try:
        yield
    finally:
        del mlp.forward
