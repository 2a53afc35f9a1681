"""LoRA and DoRA adapters on the text model and the vision tower, by separate lists, and their exact merge."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa.dora import compute_leanly
from cocoa.errors import CocoaError, first_line

TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Lora:
    """The `lora:` block of a recipe; the defaults are CoCoA's (the vision names depend on the backbone).

    Args:
        r: rank.
        alpha: the update is scaled by `alpha / r`.
        dropout: on the adapter's input.
        dora: decompose the weight into magnitude and direction (DoRA).
        init: `gaussian`, or any other value of peft's `init_lora_weights`.
        text: names of the text model's linear layers to adapt.
        vision: names of the vision tower's block layers to adapt; empty freezes the tower.
        embeddings: `new` trains the rows of the tokens that a stage brings in (mask, compression tokens); `all` the
            whole matrix of token embeddings, as CoMa does (with a tied head, that too).

    Example:
        >>> import cocoa
        >>> lora = cocoa.Lora(r=16, vision=("qkv", "fc1", "fc2"))  # to a trainer: EosBridgeTrainer(..., lora=lora)
        >>> lora.r, lora.dora
        (16, True)
    """

    r: int = 8
    alpha: int = 64
    dropout: float = 0.1
    dora: bool = True
    init: str | bool = "gaussian"
    text: tuple[str, ...] = TEXT_PROJECTIONS
    vision: tuple[str, ...] = ()
    embeddings: Literal["new", "all"] = "new"

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 <= self.dropout < 1:
            raise CocoaError(f"lora: r {self.r} must be 1 or more, and dropout {self.dropout} from 0 to below 1")
        if self.embeddings not in ("new", "all"):
            raise CocoaError(f"lora.embeddings {self.embeddings!r}: choose new or all")


def adapted_layers(model: nn.Module, lora: Lora) -> dict[str, list[str]]:
    """The linear layers that a `lora:` block names: `text` and `vision` -> module paths in the model.

    Layers are found in the text model's layers and the tower's blocks apart, since some names stand in both.

    Raises:
        CocoaError: a name matches no linear layer, or no layer is named at all.
    """
    found: dict[str, list[str]] = {}
    for key, names, place in (
        ("text", lora.text, r"language_model\.layers\.\d+\."),
        ("vision", lora.vision, r"visual\.blocks\.\d+\."),
    ):
        inside = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(place, path)]
        for name in names:
            if not any(path.endswith(f".{name}") for path in inside):
                there = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in inside}))
                raise CocoaError(f"lora.{key}: {name!r} names no linear layer of this backbone; there are: {there}")
        found[key] = [path for path in inside if path.rsplit(".", 1)[-1] in names]
    if not any(found.values()):
        raise CocoaError("lora: neither text nor vision names a layer; leave `lora` out for full tuning")
    return found


def describe(layers: dict[str, list[str]]) -> str:
    """What is adapted, in one line: `text: q_proj x 28, ...; vision: qkv x 32, ...`."""
    parts = []
    for key, paths in layers.items():
        counts = Counter(path.rsplit(".", 1)[-1] for path in paths)
        parts.append(f"{key}: " + (", ".join(f"{name} x {n}" for name, n in counts.items()) or "frozen"))
    return "; ".join(parts)


def add_adapters(model: PreTrainedModel, lora: Lora, trainable_tokens: list[int]) -> PeftModel:
    """Put adapters into the model in place and freeze all else; adapter weights are float32.

    Args:
        model: the backbone with its head; it stays usable under its own name.
        lora: which layers, and how.
        trainable_tokens: rows of the token embedding to train as well, where the recipe does not train them all.

    Returns:
        The peft handle that saves and merges the adapters; a matrix that is trained whole is not in what it saves.
    """
    layers = adapted_layers(model, lora)
    whole = lora.embeddings == "all"
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        init_lora_weights=lora.init,
        target_modules=[path for paths in layers.values() for path in paths],
        trainable_token_indices={"embed_tokens": trainable_tokens} if trainable_tokens and not whole else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it is about to drop
            adapters = get_peft_model(model, config)
    except ValueError as error:
        raise CocoaError(f"lora: {first_line(error)}") from error
    compute_leanly(model)
    if whole:
        embeddings, dtype = model.get_input_embeddings(), model.dtype
        embeddings.weight.data = embeddings.weight.data.float()  # updates are too small for bfloat16
        embeddings.weight.requires_grad_()
        embeddings.register_forward_hook(partial(_in_dtype, dtype=dtype))
    return adapters


def _in_dtype(module: nn.Module, inputs: Any, output: Tensor, dtype: torch.dtype) -> Tensor:
    """A forward hook: what the layers see keeps the model's dtype. (A function, so that workers can be sent it.)"""
    return output.to(dtype)


def merge_adapters(adapters: PeftModel, folder: Path) -> PreTrainedModel:
    """Save the adapters to `folder` and fold them into the weights, in float32.

    Returns:
        The stock model in float32, on the CPU, since a GPU that trains it need not hold that; the caller rounds it
        once, to the dtype it saves.
    """
    adapters.save_pretrained(folder)
    return adapters.to("cpu", torch.float32).merge_and_unload()
