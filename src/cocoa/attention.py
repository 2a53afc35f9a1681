"""Who attends to whom: the attention layout of every stage as a boolean mask, which says what it is.

What training computes are the same layouts in blocks (`cocoa.blocks`), which tests hold against these.

A mask is (B, 1, T, T), True where the query row may attend to the key column: what `sdpa` takes. (`eager` would *add* a
boolean mask, and flash attention takes none.) Padding is never attended to. A padded query row attends to itself alone,
so that no row is empty; its output is never read.

Layouts are built from positions, never by looking for a token id, so that no text can imitate one.

The vision tower attends within images or windows; `chunked_attention` computes that in few calls.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cocoa import varlen

BridgeLayout = Literal["published", "strict", "full"]
BRIDGE_LAYOUTS: tuple[str, ...] = get_args(BridgeLayout)
CHUNKED = "chunked_as_flash"
"""`chunked_attention` in transformers, which loops over images unless the name has `flash` in it."""


def causal(attention_mask: Tensor) -> Tensor:
    """Each token sees itself and the tokens before it: the layout the backbone was trained with.

    Args:
        attention_mask: (B, T), nonzero on real tokens.

    Returns:
        (B, 1, T, T) boolean mask, True = attend.
    """
    length = attention_mask.shape[1]
    lower = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return _without_padding(lower.expand(attention_mask.shape[0], -1, -1), attention_mask)


def bidirectional(attention_mask: Tensor) -> Tensor:
    """Each token sees every token: joint reconstruction and embedding (CoCoA, stages 1 and 3).

    Args:
        attention_mask: (B, T), nonzero on real tokens.

    Returns:
        (B, 1, T, T) boolean mask, True = attend.
    """
    batch, length = attention_mask.shape
    everything = torch.ones(1, 1, 1, dtype=torch.bool, device=attention_mask.device)
    return _without_padding(everything.expand(batch, length, length), attention_mask)


def eos_bridged(eos_position: Tensor, attention_mask: Tensor, layout: BridgeLayout = "published") -> Tensor:
    """Two blocks that meet in one token only (CoCoA, stage 2: attention truncation).

    The sequence is block A, one EOS, block B. Inside a block attention is bidirectional; A sees EOS but
    not B; B sees EOS but not A. So what B learns of A has passed through EOS.

    Args:
        eos_position: (B,) index of the EOS between A and B in each row.
        attention_mask: (B, T), nonzero on real tokens.
        layout: `published` lets EOS see A and B, as the paper's figure does; some of B then reaches A
            through EOS. `strict` (ours) lets EOS see A only, which is what it sees at inference. `full` cuts
            nothing: the control that tells what the bridge itself adds.

    Returns:
        (B, 1, T, T) boolean mask, True = attend.
    """
    if layout == "full":
        return bidirectional(attention_mask)
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # (T,)
    in_a = position < eos_position[:, None]  # (B, T)
    in_b = position > eos_position[:, None]
    is_eos = position == eos_position[:, None]
    same_block = (in_a[:, :, None] & in_a[:, None, :]) | (in_b[:, :, None] & in_b[:, None, :])
    eos_sees = ~in_b[:, None, :] if layout == "strict" else torch.ones_like(in_b)[:, None, :]
    return _without_padding(same_block | is_eos[:, None, :] | (is_eos[:, :, None] & eos_sees), attention_mask)


def compressed(start: Tensor, count: int, attention_mask: Tensor) -> Tensor:
    """Causal, and what follows the compression tokens sees nothing before them (CoMa, compression pre-training).

    The sequence is what is compressed, `count` compression tokens, and a dialogue. So what the dialogue learns of
    the image has passed through the compression tokens.

    Args:
        start: (B,) index of the first compression token in each row.
        count: how many compression tokens there are.
        attention_mask: (B, T), nonzero on real tokens.

    Returns:
        (B, 1, T, T) boolean mask, True = attend.
    """
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # (T,)
    before = position < start[:, None]  # (B, T)
    after = position >= start[:, None] + count
    return causal(attention_mask) & ~(after[:, :, None] & before[:, None, :])[:, None]


def _without_padding(allowed: Tensor, attention_mask: Tensor) -> Tensor:
    """Cut padding out of a (B, T, T) layout, and give it its head axis."""
    real = attention_mask.bool()
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return ((allowed & real[:, :, None] & real[:, None, :]) | itself)[:, None]


def chunked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Vision attention within chunks (images, windows), all of them in one call, or all of one length in one.

    Args:
        module: not used.
        query: (1, H, N, D), all chunks one after the other; `key` and `value` too.
        key: as query.
        value: as query.
        attention_mask: not used: a token sees all of its chunk and nothing else.
        cu_seq_lens_q: (chunks + 1,) where each chunk starts, and N; int32.
        max_length_q: tokens of the longest chunk.
        scaling: of the scores, 1 / sqrt(D) if None.
        dropout: of the attention weights.

    Returns:
        (1, N, H, D), and no weights.
    """
    q, k, v = varlen.lowered(*(each[0].transpose(0, 1) for each in (query, key, value)))  # (N, H, D)
    if not dropout and varlen.works(q, k):
        chunks = varlen.Spans(cu_seq_lens_q, int(max_length_q))
        return varlen.attend(q, k, v, chunks, chunks, scale=scaling)[None], None
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    rows, parts = [], []
    for length in lengths.unique().tolist():
        same = (starts[lengths == length][:, None] + torch.arange(length, device=query.device)).flatten()
        rows.append(same)
        own_q, own_k, own_v = (
            each.index_select(0, same).unflatten(0, (-1, length)).transpose(1, 2) for each in (q, k, v)
        )
        attended = nn.functional.scaled_dot_product_attention(own_q, own_k, own_v, dropout_p=dropout, scale=scaling)
        parts.append(attended.transpose(1, 2).flatten(0, 1))  # (chunks, H, L, D) -> (chunks * L, H, D)
    return torch.cat(parts).index_select(0, torch.cat(rows).argsort())[None], None


AttentionInterface.register(CHUNKED, chunked_attention)
