"""Embeddings of inputs of unlike length, many in one row of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cocoa.backbone import Backbone
from cocoa.blocks import Layout, bidirectional
from cocoa.stages.content import passes

AT_ONCE = 2048
"""Tokens of a row, at most."""


def embed(backbone: Backbone, encoded: Sequence[dict[str, Tensor]]) -> Tensor:
    """Embeddings (N, D) of sides that `Backbone.encode_side` has encoded; the text model attends in blocks."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))  # that of `passes`
    vectors = [_pooled(backbone, row) for row in passes(encoded, backbone, AT_ONCE)["passes"]]
    return F.normalize(torch.cat(vectors)[torch.tensor(order).argsort()], dim=-1)


def _pooled(backbone: Backbone, row: dict[str, Any]) -> Tensor:
    """(S, D) the mean of the states that are pooled of each input of a row."""
    causal = backbone.form.attention == "causal"
    row["attention"] = Layout(bidirectional(row["lengths"].tolist(), causal))
    row = {name: value.to(backbone.model.device) for name, value in row.items()}
    ends = row["lengths"].cumsum(0)
    first = ends - (row["lengths"] if backbone.pooling == "mean" else backbone.ending)
    place = torch.arange(int(ends[-1]), device=ends.device)
    weights = (place >= first[:, None]) & (place < ends[:, None])  # (S, N)
    with _last_layer_at(backbone, weights.any(0)[None]):
        states = backbone.model.model(
            input_ids=row["input_ids"],
            attention_mask={"full_attention": row["attention"]},
            position_ids=row["position_ids"],
            use_cache=False,
            **{name: row[name] for name in ("pixel_values", "image_grid_thw") if name in row},
        ).last_hidden_state
    return weights.to(states.dtype) @ states[0] / weights.sum(1, keepdim=True)


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
