"""Asking a multimodal LLM: conversations in, texts out, each with whether the model ended it.

An engine is one function of the signature `Engine`. Ours is transformers' batched `generate`; that of a server would
take the same arguments (vLLM: `LLM.chat` with `SamplingParams(max_tokens, temperature, seed)`, finished where
`finish_reason` is `stop`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from cocoa.architectures import EMBEDDED, locate
from cocoa.checkpoint import find_record
from cocoa.dialogue_parsing import Reply
from cocoa.embedding_cache import hash_folder
from cocoa.errors import CocoaError, first_line
from cocoa.inputs import ImageBudget, fit_image
from cocoa.processes import this_process

TOKEN_SIDE = 28
"""Side of an image token in pixels, by which images are shrunk; that of the Qwen2-VL family."""


class Conversation(NamedTuple):
    """An image and what was said of it: user and model in turn, the user first and last."""

    image: Image.Image
    said: tuple[str, ...]


class Engine(Protocol):
    """One reply to each conversation, in their order."""

    def __call__(
        self, conversations: Sequence[Conversation], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Reply]:
        """Continue the conversations.

        Args:
            conversations: of any lengths.
            max_new_tokens: of a reply; one that reaches it without an end is not finished.
            temperature: 0 is greedy; else tokens are sampled from the whole distribution.
            seed: of the sampling; the same conversations and seed give the same replies.
        """


def load_engine(model: str) -> Engine:
    """The `generate` of transformers on this process' device.

    Args:
        model: hub id or folder of any `AutoModelForImageTextToText` with a chat template, or an embedded backbone.

    Raises:
        CocoaError: it cannot be loaded, has no chat template, lacks weights, or is an embedding model of ours.
    """
    source = locate(model)
    try:
        processor = AutoProcessor.from_pretrained(source)
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            source, dtype="auto", output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise _unreadable(model, error) from None
    if missing := sorted(report["missing_keys"]):
        raise CocoaError(f"model {model}: {len(missing)} weights missing from the checkpoint, first {missing[0]}")
    if not isinstance(processor, ProcessorMixin) or not processor.chat_template:
        raise CocoaError(f"model {model}: it has no chat template, so it cannot be asked; choose an instruct model")
    ends = _as_list(loaded.generation_config.eos_token_id) + _as_list(processor.tokenizer.eos_token_id)
    if not ends:
        raise CocoaError(f"model {model}: no end-of-turn token (eos_token_id) in its generation config; add it there")
    # A fresh one: published configs carry sampling of their own (Qwen2-VL's top_k is 1), which `generate` would add.
    padding = processor.tokenizer.pad_token_id
    loaded.generation_config = GenerationConfig(
        bos_token_id=loaded.generation_config.bos_token_id,
        eos_token_id=sorted(set(ends)),
        pad_token_id=ends[0] if padding is None else padding,
    )
    processor.tokenizer.padding_side = "left"
    return partial(generate, loaded.to(this_process().device).eval(), processor)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Reply]:
    """An `Engine` once model and processor are given: one batch, padded on the left."""
    inputs = processor.apply_chat_template(
        [messages(conversation) for conversation in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, dtype=model.dtype)
    # top_k 0 and top_p 1: transformers' own default would cut the distribution to 50 tokens
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **(sampling or {"do_sample": False}))
    ends = set(model.generation_config.eos_token_id)
    replies = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():  # (B, new tokens)
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        # Special tokens stay, so that a text that holds one is seen to.
        text = processor.tokenizer.decode(ids[:end], skip_special_tokens=False)
        replies.append(Reply(text.strip(), end is not None))
    return replies


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as chat messages, the image before the first text."""
    found = []
    for number, text in enumerate(conversation.said):
        image = [] if number else [{"type": "image", "image": conversation.image}]
        content = [*image, {"type": "text", "text": text}]
        found.append({"role": "assistant" if number % 2 else "user", "content": content})
    return found


def shrink(image: Image.Image, tokens: int) -> Image.Image:
    """The image, made smaller where it takes more than `tokens` tokens of 28 x 28 px, its aspect ratio kept.

    As everywhere, a very long or thin one is stretched on its short side (`cocoa.inputs.fit_image`).

    Raises:
        CocoaError: too few tokens to keep an aspect ratio.
    """
    image = fit_image(image, ImageBudget((1, tokens)), TOKEN_SIDE)
    if image.width * image.height <= tokens * TOKEN_SIDE**2:
        return image
    height, width = smart_resize(image.height, image.width, TOKEN_SIDE, TOKEN_SIDE**2, tokens * TOKEN_SIDE**2)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def identify(model: str) -> str:
    """What tells this model from others of its name: a hash of the folder's files, or the hub's commit.

    Raises:
        CocoaError: no such model, or an embedding model of ours, whose chat template asks nothing.
    """
    source = locate(model)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _unreadable(model, error) from None
    if find_record(model) is not None:
        raise CocoaError(f"model {model}: an embedding model of cocoa, which does not converse; name its backbone")
    return hash_folder(Path(source)) if Path(source).is_dir() else str(config._commit_hash)


def _unreadable(model: str, error: Exception) -> CocoaError:
    remedy = f"give a hub id or folder of an image-text-to-text model, or one of {', '.join(EMBEDDED)}"
    return CocoaError(f"model {model}: cannot be read ({first_line(error)}); {remedy}")


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
