"""Attention block by block: the layouts of `cocoa.attention`, without a mask and without the scores they forbid.

Inputs stand one after another in one row of tokens, without padding. A layout is a list of blocks: queries that lie
together, and the keys, together too, that all of them see. Blocks of one size are computed in one call, and all of them
where there is a kernel for it (`cocoa.varlen`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cocoa import varlen
from cocoa.attention import BridgeLayout

IN_BLOCKS = "in_blocks"
"""`attend` in transformers."""


class Block(NamedTuple):
    """Queries and the keys they see, as places in the row.

    Attributes:
        queries: first place, and that behind the last.
        keys: as `queries`.
        causal: the last query sees all keys, each before it one key less.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False


def own(lengths: Sequence[int], causal: bool = False) -> list[Block]:
    """Each token sees its own input, or what of it stands before it."""
    return [Block(span, span, causal) for span in spans(lengths)]


def eos_bridged(lengths: Sequence[int], eos_places: Sequence[int], layout: BridgeLayout) -> list[Block]:
    """Blocks A and B of each input, that meet in its EOS; see `cocoa.attention.eos_bridged`.

    Args:
        lengths: tokens of each input.
        eos_places: in the row, of each input.
        layout: `published`, `strict` or `full`.
    """
    if layout == "full":
        return own(lengths)
    blocks = []
    for (start, end), eos in zip(spans(lengths), eos_places, strict=True):
        if layout == "strict":
            blocks.append(Block((start, eos + 1), (start, eos + 1)))
        else:
            blocks += [Block((start, eos), (start, eos + 1)), Block((eos, eos + 1), (start, end))]
        blocks.append(Block((eos + 1, end), (eos, end)))
    return [block for block in blocks if block.queries[0] < block.queries[1]]


def compressed(lengths: Sequence[int], first_places: Sequence[int], count: int) -> list[Block]:
    """Causal, what follows the compression tokens sees nothing before them; see `cocoa.attention.compressed`.

    Args:
        lengths: tokens of each input.
        first_places: in the row, of each input's first compression token.
        count: of them in an input.
    """
    blocks = []
    for (start, end), first in zip(spans(lengths), first_places, strict=True):
        behind = first + count
        blocks += [Block((start, behind), (start, behind), True), Block((behind, end), (first, end), True)]
    return [block for block in blocks if block.queries[0] < block.queries[1]]


def spans(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each input starts in the row, and where the next one does."""
    start = 0
    for length in lengths:
        yield start, start + length
        start += length


class InTurn(NamedTuple):
    """A layout as one call of `cocoa.varlen.attend` takes it: the blocks in the order of their queries.

    Attributes:
        queries: of each block.
        keys: of each block.
        places: (keys,) of the keys in the row; None where they are the row itself.
        causal: all blocks are.
    """

    queries: varlen.Spans
    keys: varlen.Spans
    places: Tensor | None
    causal: bool

    def to(self, device: torch.device, non_blocking: bool = False) -> InTurn:
        """Moved to a device."""
        places = None if self.places is None else self.places.to(device, non_blocking=non_blocking)
        queries, keys = (each.to(device, non_blocking) for each in self[:2])
        return InTurn(queries, keys, places, self.causal)


class Layout:
    """Who attends to whom in a row: blocks whose queries are every place of it once, in any order."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.in_turn = _in_turn(sorted(blocks))
        """None where some blocks are causal and others not."""
        alike: dict[tuple[int, int, bool], list[Block]] = defaultdict(list)
        for block in blocks:
            queries, keys = (end - start for start, end in block[:2])
            alike[queries, keys, block.causal and queries > 1].append(block)
        self.groups = [(len(own), *size) for size, own in alike.items()]
        """How many blocks there are of so many queries and keys, causal or not."""
        ordered = [block for own in alike.values() for block in own]
        self.queries = _places([block.queries for block in ordered])
        self.keys = _places([block.keys for block in ordered])
        """(N,) and (keys,) places in the order of the groups; None where the row has that order itself."""
        self.back = None if self.queries is None else self.queries.argsort()
        """(N,) where each place's query went."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Layout:
        """Move the places to a device, in place; what moves a batch calls it."""
        for name in ("queries", "keys", "back"):
            places = getattr(self, name)
            setattr(self, name, None if places is None else places.to(device, non_blocking=non_blocking))
        if self.in_turn is not None:
            self.in_turn = self.in_turn.to(device, non_blocking)
        return self


def _in_turn(blocks: Sequence[Block]) -> InTurn | None:
    causal = {block.causal for block in blocks}
    if len(causal) > 1:
        return None
    queries, keys = [block.queries for block in blocks], [block.keys for block in blocks]
    of_queries, of_keys = (varlen.spans_of([end - start for start, end in each]) for each in (queries, keys))
    return InTurn(of_queries, of_keys, _places(keys), causal.pop())


def _places(spans: Sequence[tuple[int, int]]) -> Tensor | None:
    if all(end == start for (_, end), (start, _) in pairwise(spans)) and spans[0][0] == 0:
        return None
    return torch.cat([torch.arange(*span) for span in spans])


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Layout | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of a row by its layout; of a padded batch with its mask, as transformers' `sdpa` does it.

    Args:
        module: the attention layer.
        query: (1, H, N, D); `key` and `value` too, perhaps with fewer heads.
        key: as query.
        value: as key.
        attention_mask: the layout.
        options: `scaling` of the scores and `dropout` of the weights.

    Returns:
        (1, N, H, D), and no weights.
    """
    if not isinstance(attention_mask, Layout):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layout, scale, dropout = attention_mask, options.get("scaling"), options.get("dropout", 0.0)
    q, k, v = varlen.lowered(*(each[0].transpose(0, 1) for each in (query, key, value)))  # (N, H, D)
    turn = layout.in_turn
    if turn is not None and not dropout and varlen.works(q, k):
        k, v = (_taken(each, turn.places) for each in (k, v))
        return varlen.attend(q, k, v, turn.queries, turn.keys, turn.causal, scale)[None], None
    q, k, v = _taken(q, layout.queries), _taken(k, layout.keys), _taken(v, layout.keys)
    q_sizes = [count * queries for count, queries, _, _ in layout.groups]
    k_sizes = [count * keys for count, _, keys, _ in layout.groups]
    parts = []
    for (count, queries, keys, causal), *own in zip(
        layout.groups, q.split(q_sizes), k.split(k_sizes), v.split(k_sizes), strict=True
    ):
        own_q, own_k, own_v = (each.unflatten(0, (count, -1)).transpose(1, 2) for each in own)  # (count, H, T, D)
        found = F.scaled_dot_product_attention(
            own_q,
            own_k,
            own_v,
            attn_mask=causal_lower_right(queries, keys) if causal and queries < keys else None,
            dropout_p=dropout,
            is_causal=causal and queries == keys,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(found.transpose(1, 2).flatten(0, 1))  # (count * T, H, D)
    return _taken(torch.cat(parts), layout.back)[None], None


def _taken(rows: Tensor, places: Tensor | None) -> Tensor:
    return rows if places is None else rows.index_select(0, places)


AttentionInterface.register(IN_BLOCKS, attend)
AttentionMaskInterface.register(IN_BLOCKS, sdpa_mask)
