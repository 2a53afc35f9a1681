"""Embeddings of many inputs at once, and the last layer's work only where something is pooled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cocoa.backbone import Backbone
from cocoa.packing import PackedEmbedder, by_length, pack

AT_ONCE = 2048
"""Tokens of a row, at most."""


def embed(backbone: Backbone, encoded: Sequence[dict[str, Tensor]]) -> Tensor:
    """Embeddings (N, D) of sides that `Backbone.encode_side` has encoded."""
    model, parts = PackedEmbedder(backbone), by_length(encoded, AT_ONCE)
    vectors = []
    for part in parts:
        row = pack([encoded[place] for place in part], backbone)
        row = {name: value.to(backbone.model.device) for name, value in row.items()}
        with _last_layer_at(backbone, _pooled(backbone, row)):
            vectors.append(model(row))
    return torch.cat(vectors)[torch.tensor([place for part in parts for place in part]).argsort()]


def _pooled(backbone: Backbone, row: dict[str, Any]) -> Tensor:
    """(1, N) which tokens of a row are pooled."""
    ends = row["lengths"].cumsum(0).repeat_interleave(row["lengths"])  # (N,)
    place = torch.arange(len(ends), device=ends.device)
    return ((place >= ends - backbone.ending) | (backbone.pooling == "mean"))[None]


@contextmanager
def _last_layer_at(backbone: Backbone, wanted: Tensor) -> Iterator[None]:
    """Skip the last layer's MLP, most of its work, where nothing is pooled; `wanted` (1, N) says where something is."""
    mlp = backbone.model.model.language_model.layers[-1].mlp
    whole = mlp.forward

    def at_wanted(states: Tensor) -> Tensor:
        found = whole(states[wanted])
        return found.new_zeros(states.shape).index_put(wanted.nonzero(as_tuple=True), found)

    mlp.forward = at_wanted
    try:
        yield
    finally:
        del mlp.forward
