"""DoRA at about the price of LoRA: peft's adapters, its weights and its merge, but another forward pass.

    y = m / |W + s B A| (W x + s B A x) + bias      (arXiv 2402.09353, eq. 5; no gradient through the length, 4.3)

peft forms the whole adapted weight in every pass to take the lengths of its rows, and where there is dropout it
multiplies by W a second time. Here lengths come from products of a rank's width, and what plain LoRA gives is scaled
by them. Dropout acts on the input of A alone; peft's acts on (m / |W + s B A| - 1) W x too, which is the same in
expectation.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional as F


def compute_leanly(model: nn.Module) -> None:
    """Let peft's new DoRA layers in a model compute as this module does."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in [name for name, variant in layer.lora_variant.items() if type(variant) is DoraLinearVariant]:
                _compute_leanly(layer, name)


def _compute_leanly(layer: Any, adapter: str) -> None:
    layer.lora_variant[adapter] = LeanDora()
    layer.cast_input_dtype_enabled = False  # the adapter computes in the precision of its layer
    weight = layer.get_base_layer().weight
    if not weight.is_meta:  # which it is in a preview
        a, b = (each[adapter].weight.detach() for each in (layer.lora_A, layer.lora_B))
        start = row_lengths(weight, a, b, layer.scaling[adapter])
        layer.lora_magnitude_vector[adapter].weight.data.copy_(start)  # peft's is rounded as the layer is


class LeanDora(DoraLinearVariant):
    """A DoRA layer's forward pass; what else it does is peft's."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """What the layer gives.

        Args:
            module: peft's layer.
            active_adapter: its name.
            x: (..., in).
            result: (..., out), of the frozen layer.
            **kwargs: not used.
        """
        base, scaling = module.get_base_layer(), module.scaling[active_adapter]
        a, b = (each[active_adapter].weight for each in (module.lora_A, module.lora_B))
        dropped = module.lora_dropout[active_adapter](x).to(result.dtype)
        update = F.linear(F.linear(dropped, a.to(result.dtype)), b.to(result.dtype))
        with torch.no_grad():
            lengths = row_lengths(base.weight, a, b, scaling)
        scale = module.lora_magnitude_vector[active_adapter].weight / lengths
        scaled: Tensor = _Scaled.apply(torch.add(result, update, alpha=scaling), scale, base.bias)
        return scaled


def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """(out,) float32 lengths of the rows of `weight + scaling * b @ a`, which is not formed.

    Args:
        weight: (out, in).
        a: (r, in).
        b: (out, r).
        scaling: of the update.
    """
    with torch.autocast(weight.device.type, enabled=False):
        a, b = a.float(), b.float()
        across = F.linear(weight, a.to(weight.dtype)).float()  # (out, r)
        own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        return (own + (b * (2 * scaling * across + scaling**2 * (b @ (a @ a.T)))).sum(1)).clamp(min=0).sqrt()


class _Scaled(torch.autograd.Function):
    """`scale * (x - bias) + bias`, keeping nothing in the precision of `scale`; (..., out), (out,), (out,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scale, bias)
        scaled = torch.mul(x, scale, out=torch.empty_like(x))
        return scaled if bias is None else scaled.add_((1 - scale) * bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, bias = ctx.saved_tensors
        rows = tuple(range(gradient.ndim - 1))
        for_scale = (gradient * x).sum(rows, dtype=scale.dtype)
        if bias is not None:
            for_scale -= gradient.sum(rows, dtype=scale.dtype) * bias
        return torch.mul(gradient, scale, out=torch.empty_like(gradient)), for_scale, None
