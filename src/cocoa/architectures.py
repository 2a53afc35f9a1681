"""The architectures that are supported: where a checkpoint is found, and how its config is read and changed."""

from __future__ import annotations

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from cocoa.attention import CHUNKED
from cocoa.errors import CocoaError, first_line

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
}
EMBEDDED = ("mini-qwen2-vl", "mini-qwen2.5-vl")
"""Backbones that ship in the package (`data/backbones/`), by the names that recipes call them."""

Attention = Literal["bidirectional", "causal"]
ATTENTIONS: tuple[str, ...] = get_args(Attention)


def locate(name: str) -> str:
    """Where a backbone is read from: the package's folder of an embedded one, else the name itself."""
    return str(resources.files("cocoa").joinpath("data/backbones", name)) if name in EMBEDDED else name


def load_config(name: str) -> PretrainedConfig:
    """The checkpoint's config, refused where the stages would be silently wrong on it.

    Raises:
        CocoaError: see `load_backbone`.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        like_a_path = name.count("/") > 1 or name.startswith((".", "/", "~"))  # a name of the hub has one slash
        reason = "no such folder" if like_a_path and not Path(name).exists() else first_line(error)
        remedy = f"give a hub id, a checkpoint folder, or one of {', '.join(EMBEDDED)}"
        raise CocoaError(f"backbone {name}: cannot be read ({reason}); {remedy}") from None
    if config.model_type not in MODEL_CLASSES:
        raise CocoaError(
            f"backbone {name}: architecture {config.model_type} is not supported; use one of {sorted(MODEL_CLASSES)}"
        )
    if config.text_config.use_sliding_window:
        raise CocoaError(f"backbone {name}: use_sliding_window is on, and its second mask is not supported")
    return config


def quicken_tower(model: PreTrainedModel | None) -> None:
    """Attend within all images at once, embed patches in one product: the same numbers. Not saved with the model."""
    if model is not None and model.config.model_type in MODEL_CLASSES:
        model.set_attn_implementation({"vision_config": CHUNKED})
        patches = model.base_model.visual.patch_embed
        patches.forward = partial(_embed_patches, patches.proj)


def recompute_activations(model: PreTrainedModel, **kwargs: Any) -> None:
    """Gradient checkpointing whose backward pass ends where nothing below is trained, as in front of a frozen tower.

    The library has embeddings and patches ask for gradients, which reentrant checkpointing alone needs.

    Args:
        model: with or without its head.
        **kwargs: of `activation_checkpointing_enable`.
    """
    model.activation_checkpointing_enable(**kwargs)
    if not (kwargs.get("activation_checkpointing_kwargs") or {}).get("use_reentrant"):
        model.disable_input_require_grads()


def _embed_patches(convolution: nn.Conv3d, patches: Tensor) -> Tensor:
    """(P, width) of patches (P, channels * frames * patch**2): a convolution whose steps are as wide as its kernel."""
    weight = convolution.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), convolution.bias)


def set_attention(config: PretrainedConfig, attention: Attention) -> None:
    """Switch the text model between causal and bidirectional attention; saved in `config.json`.

    The flag that works is the text config's; the top-level one is for servers that read that.
    """
    if attention not in ATTENTIONS:
        raise CocoaError(f"attention {attention!r}: choose bidirectional or causal")
    config.is_causal = config.text_config.is_causal = attention == "causal"
