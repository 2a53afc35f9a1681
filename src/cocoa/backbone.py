"""The backbone: a checkpoint of the Qwen2-VL family, made ready for reconstruction and embedding.

Nothing is added to the model's code. Loading sets a flag (bidirectional attention), adds special tokens on free
embedding rows, replaces the chat template and sets the image token budget; all of it is saved in stock files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from cocoa.architectures import MODEL_CLASSES, Attention, load_config, locate, quicken_tower, set_attention
from cocoa.errors import CocoaError, first_line
from cocoa.inputs import ImageBudget, chat_messages, fit_text, inert, most_tokens, room, shorten
from cocoa.pairs import Side
from cocoa.pixels import BYTES_ONLY, PixelFormat
from cocoa.special_tokens import (
    COMPRESSION_TOKENS,
    EOS_TOKEN,
    MASK_TOKEN,
    add_tokens,
    close_with_compression_tokens,
    compression_names,
    prepare_processor,
)

Pooling = Literal["lasttoken", "mean", "compression"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class Form(NamedTuple):
    """How a backbone is read as an embedding model.

    Attributes:
        attention: of the text model.
        pooling: which final states the embedding is made of: that of EOS, the mean of all, or the mean of the
            compression tokens, which then stand in EOS' place.
        compression_tokens: how many of those there are; 0 with another pooling.
    """

    attention: Attention = "bidirectional"
    pooling: Pooling = "lasttoken"
    compression_tokens: int = 0


@dataclass
class Backbone:
    """A model with its language-model head, its processor, and where they came from.

    Attributes:
        model: `Qwen2VLForConditionalGeneration` or `Qwen2_5_VLForConditionalGeneration`.
        processor: tokenizer, image processor and chat template.
        images: the image token budget in force.
        name: the hub id or folder it was loaded from.
        pooling: what the embedding is made of; see `Form`.
        compression_tokens: how many close an input in EOS' place; 0 unless they are what is pooled.
        encoded: what `encode_side` has made of each prompt and image, where it is to be kept; else None.

    Example:
        >>> import cocoa
        >>> backbone = cocoa.load_backbone("mini-qwen2-vl")
        >>> backbone.tokenizer.decode(backbone.encode_side(cocoa.Side("Find it.", "a red star"))["input_ids"])
        'Find it. a red star<|im_end|>'
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    images: ImageBudget
    name: str
    pooling: Pooling = "lasttoken"
    compression_tokens: int = 0
    encoded: dict[tuple[str, str | int | None], dict[str, Tensor]] | None = None

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def eos_token_id(self) -> int:
        """Id of `EOS_TOKEN`, whose final state is the embedding."""
        return self.tokenizer.convert_tokens_to_ids(EOS_TOKEN)

    @property
    def mask_token_id(self) -> int:
        """Id of `MASK_TOKEN`."""
        return self.tokenizer.convert_tokens_to_ids(MASK_TOKEN)

    @property
    def compression_token_ids(self) -> list[int]:
        """Ids of C1..CK, which close every input under `compression` pooling; else empty."""
        return self.tokenizer.convert_tokens_to_ids(compression_names(self.compression_tokens))

    @property
    def form(self) -> Form:
        """How this backbone is read as an embedding model."""
        causal = getattr(self.model.config.text_config, "is_causal", True)  # which published configs do not say
        attention: Attention = "causal" if causal else "bidirectional"
        return Form(attention, self.pooling, self.compression_tokens)

    @property
    def ending(self) -> int:
        """How many tokens close an input."""
        return self.compression_tokens or 1

    @property
    def patch_size(self) -> int:
        """Side of a merged token in pixels."""
        return self.processor.image_processor.patch_size * self.processor.image_processor.merge_size

    @property
    def pixels(self) -> PixelFormat:
        """How bytes become what the vision tower takes."""
        return PixelFormat(self.processor.image_processor)

    @property
    def unit_size(self) -> int:
        """Pixel values of one merged token: 4 x 1176 for Qwen2-VL, both frames of a still image counted."""
        return 3 * self.processor.image_processor.temporal_patch_size * self.patch_size**2

    def set_image_budget(self, images: ImageBudget) -> None:
        """Put a token budget into the image processor (and so into every checkpoint saved from here on)."""
        least, most = images.tokens
        area = self.patch_size**2
        self.processor.image_processor.size = {"shortest_edge": least * area, "longest_edge": most * area}
        if self.encoded is not None:
            self.encoded.clear()  # what was encoded under another budget
        self.images = images

    def messages(self, side: Side) -> list[dict[str, Any]]:
        """The side as chat messages, its image fitted to the budget."""
        return chat_messages(side, self.images, self.patch_size, exact=False)

    def encode_side(self, side: Side) -> dict[str, Tensor]:
        """One side through the chat template and the processor, without padding.

        Returns:
            `input_ids` (T,), which ends with the one EOS or the compression tokens, and, with an image,
            `pixel_values` (patches, bytes) and `image_grid_thw` (1, 3); `pixels.values` makes of the bytes what the
            model takes.
        """
        kept = self.kept_as(side)
        if self.encoded is not None and kept in self.encoded:
            return dict(self.encoded[kept])
        inputs = self.processor.apply_chat_template(
            [self.messages(side)],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=BYTES_ONLY if side.image is not None else None,
        )
        encoded = {"input_ids": inputs["input_ids"][0]}
        if side.image is not None:
            encoded["pixel_values"] = self.pixels.first_frame(inputs["pixel_values"])
            encoded["image_grid_thw"] = inputs["image_grid_thw"]
        if self.encoded is not None:
            self.encoded[kept] = dict(encoded)
        return encoded

    @staticmethod
    def kept_as(side: Side) -> tuple[str, str | int | None]:
        """The key of a side in `encoded`."""
        return side.prompt(), side.image if isinstance(side.image, str | None) else id(side.image)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, with control tokens made inert as the chat template does."""
        return self.tokenizer(inert(text), add_special_tokens=False)["input_ids"]

    def shorten(self, text: str, tokens: int) -> str:
        """A text as the template writes it, cut to at most `tokens` tokens."""
        return shorten(self.tokenizer, text, tokens)

    def room(self, image: bool, max_length: int) -> int:
        """Tokens left of `max_length` beside the ending and, if any, the largest image with its two markers."""
        return room(self.images, image, max_length, self.ending)

    def fit_text(self, side: Side, max_length: int) -> Side:
        """The side with its text shortened to fit into `max_length`; see `cocoa.inputs.fit_text`."""
        return fit_text(self.tokenizer, side, self.images, max_length, self.ending)

    def fits(self, side: Side, max_length: int) -> bool:
        """Whether image and instruction leave room for text, or need none."""
        room = self.room(side.image is not None, max_length)
        return room >= 0 and (
            most_tokens(side.instruction) < room or len(self.encode_text(side.instruction)) + bool(side.text) <= room
        )

    def rope_positions(self, input_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """M-RoPE positions (3, B, T) of a padded batch; padding gets position 0."""
        is_image = (input_ids == self.model.config.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(
            input_ids, mm_token_type_ids=is_image, image_grid_thw=image_grid_thw, attention_mask=attention_mask
        )
        return positions


def load_backbone(
    name: str | Path,
    images: ImageBudget | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attention: Attention | None = None,
    weights: bool = True,
    pooling: Pooling = "lasttoken",
    compression_tokens: int = COMPRESSION_TOKENS,
) -> Backbone:
    """Load a checkpoint of the Qwen2-VL family for training or embedding.

    Args:
        name: hub id or folder of a Qwen2-VL or Qwen2.5-VL checkpoint, untouched or saved by a stage, or the
            name of an embedded one.
        images: image token budget; None keeps what the checkpoint's image processor says, which knows no
            `resize: square`.
        dtype: of the weights in memory; `auto` takes the files'.
        attention: set the text model bidirectional or causal; None leaves it as the checkpoint says.
        weights: False leaves the weights on the meta device, for counting and rendering without them.
        pooling: what the embedding is made of; `compression` closes every input with the compression tokens.
        compression_tokens: how many, under that pooling; a checkpoint that has some has to have as many.

    Raises:
        CocoaError: no such checkpoint, another architecture, a sliding window, no free embedding row for
            a special token, another number of compression tokens, or weights missing from the files.

    Example:
        >>> import cocoa
        >>> cocoa.load_backbone("mini-qwen2-vl", cocoa.ImageBudget((4, 64)), attention="bidirectional").form
        Form(attention='bidirectional', pooling='lasttoken', compression_tokens=0)
    """
    name = str(name)
    source = locate(name)
    config = load_config(source)
    if attention is not None:
        set_attention(config, attention)
    config.use_cache = config.text_config.use_cache = False
    try:
        processor = AutoProcessor.from_pretrained(source)
        if weights:
            model, report = MODEL_CLASSES[config.model_type].from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                use_safetensors=True,  # the other format is a pickle
            )
            if missing := sorted(report["missing_keys"]):
                raise CocoaError(f"{name}: {len(missing)} weights missing from the checkpoint, first {missing[0]}")
            quicken_tower(model)
        else:
            with torch.device("meta"):
                model = MODEL_CLASSES[config.model_type](config)
    except OSError as error:
        raise CocoaError(f"backbone {name}: {first_line(error)}; is the checkpoint complete?") from None
    count = compression_tokens if pooling == "compression" else 0
    backbone = Backbone(model, processor, images or budget_of(processor), name, pooling, count)
    prepare_processor(processor, name)
    if images is not None:
        backbone.set_image_budget(images)
    embeddings = model.get_input_embeddings().weight
    add_tokens(embeddings, processor.tokenizer, [MASK_TOKEN], name)
    if count:
        close_with_compression_tokens(embeddings, processor, count, name)
    return backbone


def budget_of(processor: ProcessorMixin) -> ImageBudget:
    """The token budget that a processor's image size stands for."""
    size = processor.image_processor.size
    area = (processor.image_processor.patch_size * processor.image_processor.merge_size) ** 2
    return ImageBudget((max(1, size["shortest_edge"] // area), max(1, size["longest_edge"] // area)))
