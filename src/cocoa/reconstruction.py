"""What is predicted from the hidden states: masked tokens (MNTP), tokens of an answer, masked patches (MAE).

Losses are *sums* with their element counts; the trainer divides by the count of the global batch, so that
the same batch gives the same gradients on any number of devices and accumulation steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cocoa.corruption import IGNORE_INDEX

LOGITS_AT_ONCE = 2**26
"""Of all predicted tokens and the whole vocabulary: 0.25 GiB in float32, so that a batch's size does not bound it."""


class TokenPrediction(NamedTuple):
    """The M tokens of a batch that are predicted, and how well, in row-major order."""

    losses: Tensor
    """(M,) cross-entropy in nats, float32."""
    correct: Tensor
    """(M,) boolean, True where the likeliest token is the right one."""
    rows: Tensor
    """(M,) the sequence each token belongs to."""
    positions: Tensor
    """(M,) the position each token stands at."""
    likeliest: Tensor
    """(M,) id of the likeliest token, never an excluded one."""


def predict_tokens(
    hidden_states: Tensor, head: Any, labels: Tensor, excluded_ids: Sequence[int], shifted: bool = True
) -> TokenPrediction:
    """Predict the labelled tokens from the state just before each, through the language model's own head.

    With masked tokens that is masked next-token prediction (MNTP, LLM2Vec; CoCoA stages 1 and 2), with the tokens
    of an answer under a causal layout next-token prediction (CoMa). The head is applied to those states alone: at
    a vocabulary of 152k it would else be most of a step. Tokens of ours are left out of the softmax: they are never
    a target, and with an untied head their output rows are untrained.

    Args:
        hidden_states: (B, T, D) post-norm states of the language model.
        head: the language model's own head, (…, D) -> (…, V).
        labels: (B, T) ids of the tokens to predict, `IGNORE_INDEX` elsewhere; column 0 is ignored, since nothing
            stands before it.
        excluded_ids: rows of the softmax to leave out.
        shifted: False predicts a token from its own state, as masked language modelling does (MLM; MoCa's code).

    Returns:
        One entry per predicted token; empty tensors where there is none.
    """
    rows, before = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)  # (M,), (M,)
    positions = before + 1
    targets = labels[rows, positions]  # (M,)
    states = hidden_states[rows, before if shifted else positions]  # (M, D)
    at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    score = partial(_score, head, torch.tensor(excluded_ids, dtype=torch.long, device=states.device))
    if len(states) > at_once and torch.is_grad_enabled():  # logits are computed again in the backward pass
        score = partial(checkpoint, score, use_reentrant=False)
    parts = [score(*part) for part in zip(states.split(at_once), targets.split(at_once), strict=True)]
    losses, likeliest = (torch.cat(each) for each in zip(*parts, strict=True))
    return TokenPrediction(losses, likeliest == targets, rows, positions, likeliest)


def _score(head: Any, excluded: Tensor, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) losses and likeliest ids."""
    logits = head(states).float().index_fill_(1, excluded, float("-inf"))  # (M, V)
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)


class PatchDecoder(nn.Module):
    """Rebuild the pixels of hidden patches from the language model's final states (MoCa's decoder).

    One decoder layer copied from the middle of the backbone, run without causality over the whole
    sequence, then a linear layer to the pixels of one merged token. CoCoA does not publish its decoder.
    No later stage uses it; stage 1 leaves it in its checkpoint to look at what was rebuilt (`cocoa.rebuild`).

    Args:
        language_model: the backbone's text model; its middle layer is copied, in float32 and without
            adapters; nothing is shared.
        unit_size: pixel values of one merged token (4 x 1176 for Qwen2-VL).
    """

    def __init__(self, language_model: Any, unit_size: int) -> None:
        super().__init__()
        config = language_model.config
        middle = language_model.layers[len(language_model.layers) // 2]
        # The plain weights, also where adapters are in place by now.
        weights = {n.replace(".base_layer.", "."): w for n, w in middle.state_dict().items() if "lora_" not in n}
        with torch.device(next(middle.parameters()).device):
            self.layer: nn.Module = type(middle)(config, layer_idx=0)
            self.to_pixels = nn.Linear(config.hidden_size, unit_size)
        self.layer.load_state_dict(weights)
        self.rotary: nn.Module = copy.deepcopy(language_model.rotary_emb)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor, hidden_units: Tensor
    ) -> Tensor:
        """Predict the pixels of the hidden units.

        Args:
            hidden_states: (B, T, D) post-norm states.
            attention_mask: (B, 1, T, T) boolean layout, bidirectional.
            position_ids: (3, B, T) M-RoPE positions.
            hidden_units: (B, T) boolean, True on the image tokens whose patches were hidden.

        Returns:
            (P, unit_size) predicted pixels, in row-major order of `hidden_units`.
        """
        decoded = self.layer(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=self.rotary(hidden_states, position_ids),
        )
        return self.to_pixels(decoded[hidden_units])


def patch_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error on the hidden patches alone (MAE), summed over units, averaged over a unit's values.

    Args:
        predicted: (P, unit_size) predicted pixels of the P hidden units.
        target: (P, unit_size) their pixels as the processor normalised them.

    Returns:
        A scalar, float32.
    """
    return (predicted.float() - target.float()).square().mean(-1).sum()
