"""What passes through some tokens alone: their keys and values recorded, and others' put in their place, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cocoa.stages.reconstruction import Reconstructor


class HeldKeysAndValues:
    """Records the keys and values of some tokens at every layer, or puts other ones in their place.

    Args:
        model: a `Reconstructor`.
        held: (B, K) positions of the tokens.
        replay: what another one has `recorded`.
    """

    def __init__(self, model: Reconstructor, held: Tensor, replay: Sequence[Tensor] | None = None) -> None:
        self.held, self.replay = held, replay
        self.recorded: list[Tensor] = []
        self.handles = []
        for layer in model.model.model.language_model.layers:
            for name in ("k_proj", "v_proj"):
                self.handles.append(getattr(layer.self_attn, name).register_forward_hook(self._hook))

    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        sequences = torch.arange(len(output))[:, None]
        self.recorded.append(output[sequences, self.held].detach().clone())
        if self.replay is None:
            return None
        output = output.clone()
        output[sequences, self.held] = self.replay[len(self.recorded) - 1]
        return output

    def __enter__(self) -> HeldKeysAndValues:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def mixed(own: Sequence[Tensor], other: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """What two have recorded, in one: the other's keys and values at these layers, one's own elsewhere."""
    chosen = {2 * layer + kind for layer in layers for kind in (0, 1)}
    return [other[i] if i in chosen else own[i] for i in range(len(own))]
