"""The tokens that an embedding backbone has beside the tokenizer's own, and the template that closes an input."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from cocoa.errors import CocoaError

EOS_TOKEN = "<|im_end|>"
"""Ours by name: `<|endoftext|>` is Qwen's padding token. The sources do not settle it."""
MASK_TOKEN = "<|mask|>"
COMPRESSION_TOKENS = 32
"""How many compression tokens close an input of CoMa, where nothing else is said."""
_COMPRESSION_PREFIX = "<|compress_"


def prepare_processor(processor: ProcessorMixin, name: str) -> None:
    """Give the processor our chat template, and lift length limits that would cut EOS."""
    if processor.tokenizer.convert_tokens_to_ids(EOS_TOKEN) in (None, processor.tokenizer.unk_token_id):
        raise CocoaError(
            f"backbone {name}: its tokenizer has no {EOS_TOKEN} token; take the one of its Instruct checkpoint"
        )
    template = resources.files("cocoa").joinpath("data/chat_template.jinja").read_text(encoding="utf-8")
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.tokenizer.model_max_length = VERY_LARGE_INTEGER


def add_tokens(embeddings: Tensor, tokenizer: Any, tokens: Sequence[str], name: str, spread: float = 0.0) -> None:
    """Put special tokens on the next free embedding rows (once; the matrix is never resized).

    Args:
        embeddings: (V, D) the model's token embeddings, changed in place.
        tokenizer: changed in place.
        tokens: those it has already stay as they are.
        name: of the backbone, for messages.
        spread: a new row is the mean embedding, and Gaussian noise of so many times the embeddings' own deviation;
            tokens that are to differ from each other need some. The noise is the same every time.

    Raises:
        CocoaError: the embedding has too few free rows.
    """
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    used = len(tokenizer)
    free = embeddings.shape[0] - used
    if len(new) > free:
        what = f"{new[0]} to {new[-1]} ({free} are free)" if len(new) > 1 else f"{new[0]} (all {used} are used)"
        raise CocoaError(f"backbone {name}: no free embedding row for {what}")
    if not new:
        return
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    with torch.no_grad():
        known = embeddings[:used].float()
        noise = torch.randn(len(new), known.shape[1], generator=torch.Generator().manual_seed(0))
        rows = known.mean(0) + spread * known.std(0) * noise.to(known.device)  # (new, D)
        embeddings[tokenizer.convert_tokens_to_ids(new)] = rows.to(embeddings.dtype)


def compression_names(count: int) -> list[str]:
    """The names of C1..CK."""
    return [f"{_COMPRESSION_PREFIX}{number}|>" for number in range(1, count + 1)]


def close_with_compression_tokens(embeddings: Tensor, processor: ProcessorMixin, count: int, name: str) -> None:
    """Close every input with `count` compression tokens in place of EOS (CoMa).

    Args:
        embeddings: (V, D) the model's token embeddings, changed in place.
        processor: its tokenizer gets the tokens, and its chat template the ending.
        count: K.
        name: of the backbone, for messages.

    Raises:
        CocoaError: the backbone has another number of them already, or no room for so many.
    """
    vocabulary = processor.tokenizer.get_vocab()
    there = sum(token.startswith(_COMPRESSION_PREFIX) for token in vocabulary)
    if there and there != count:
        raise CocoaError(f"backbone {name}: it has {there} compression tokens; set compression_tokens: {there}")
    names = compression_names(count)
    try:
        add_tokens(embeddings, processor.tokenizer, names, name, spread=1.0)
    except CocoaError as error:
        raise CocoaError(f"{error}; lower compression_tokens") from None
    end = f"'{EOS_TOKEN}'"
    template = processor.chat_template
    assert template.count(end) == 1, "the embedding template closes an input with EOS once"
    processor.chat_template = processor.tokenizer.chat_template = template.replace(end, f"'{''.join(names)}'")
