"""A tiny random backbone of either architecture: for tests, and for seeing the machinery run.

It has learned nothing. Its files are those of a real checkpoint, its tokenizer is Qwen's kind (byte-level
BPE, the same control tokens) trained on the text it is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from cocoa.architectures import MODEL_CLASSES
from cocoa.special_tokens import EOS_TOKEN

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FREE_ROWS = 24
"""Embedding rows beyond the tokenizer's, as in the real checkpoints."""


def write_tiny_backbone(
    folder: Path,
    texts: Iterable[str],
    model_type: str = "qwen2_vl",
    *,
    hidden_size: int = 64,
    layers: int = 3,
    tied: bool = True,
    intermediate_size: int | None = None,
    vision: dict[str, Any] | None = None,
    vocabulary: int = 512,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised checkpoint of `qwen2_vl` or `qwen2_5_vl` and return its folder.

    Args:
        folder: made where it does not exist.
        texts: what the tokenizer is trained on.
        model_type: architecture.
        hidden_size: width of the text model.
        layers: of the text model.
        intermediate_size: of the text model's MLP, twice the hidden size by default.
        vision: what of the vision tower's config is to differ.
        tied: share the head's weight with the token embedding (as the 2B and 3B models do).
        vocabulary: size of the tokenizer's vocabulary before the control tokens, at most.
        seed: of the weights.
    """
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    tokenizer = Qwen2Tokenizer(**files, eos_token=EOS_TOKEN, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    processor_class = Qwen2VLProcessor if model_type == "qwen2_vl" else Qwen2_5_VLProcessor
    processor_class(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor()).save_pretrained(folder)

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    tower: dict[str, Any] = {"depth": 2, "num_heads": 2, "hidden_act": "silu"}
    if model_type == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": hidden_size, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 32, "out_hidden_size": hidden_size, "intermediate_size": 64}
        tower |= {"window_size": 56, "fullatt_block_indexes": [1]}
    heads = 4
    section = hidden_size // heads // 2  # rotary pairs of a head, split over time, height and width
    config = AutoConfig.for_model(
        model_type,
        vision_config=tower | (vision or {}),
        text_config={
            "vocab_size": len(tokenizer) + FREE_ROWS,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size or 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [section - 2 * (section * 3 // 8)] + [section * 3 // 8] * 2,
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        tie_word_embeddings=tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_CLASSES[model_type](config)
    model.save_pretrained(folder)
    return folder
