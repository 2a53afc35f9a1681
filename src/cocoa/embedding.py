"""A model of sentence-transformers and how it is asked: in batches of equal work, prepared while it is busy."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor
from torch.nn import functional as F

from cocoa.architectures import locate, quicken_tower
from cocoa.backbone import Backbone, load_backbone
from cocoa.batching import equal_work, prepared
from cocoa.checkpoint import as_sentence_transformer, find_record, form_of, model_file, trained_length
from cocoa.errors import CocoaError, first_line
from cocoa.failures import explained
from cocoa.images import image_size, load_image
from cocoa.inputs import (
    MAX_LENGTH,
    ImageBudget,
    chat_messages,
    cut,
    fit_text,
    image_tokens,
    most_tokens,
    reference_messages,
    room,
)
from cocoa.pairs import Side
from cocoa.processes import WORKERS, this_process

DEFAULT_IMAGES = ImageBudget((4, 576))
"""Image budget for a model that carries no record of ours."""
LESS_MEMORY = "lower the batch size, or max_length"
PROMPT_STYLES = ("cocoa", "reference")
"""How a side is put into tokens: through our chat template, or in VLM2Vec's plain form."""


@dataclass(frozen=True)
class Embedder:
    """A model and how it is asked.

    Attributes:
        model: of sentence-transformers.
        images: the token budget of an image, and how it is resized; for a model that is not ours, an estimate.
        max_length: tokens of an input; a longer text is shortened before it is rendered. A model that is not ours
            cuts where its own files say.
        form: `cocoa` and `reference` as in `PROMPT_STYLES`; `items` for a model that is not ours, which gets its image
            and text (instruction in front) as sentence-transformers' own input.
        folder: where its files lie; None where it was not loaded from any.
        record: what its checkpoint says of how it was made; empty for one that is not ours.
        ending: tokens that close an input: EOS, or the compression tokens.
        truncate_dim: length that embeddings are cut to; None leaves them whole.
    """

    model: SentenceTransformer
    images: ImageBudget
    max_length: int = MAX_LENGTH
    form: str = "cocoa"
    folder: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)
    ending: int = 1
    truncate_dim: int | None = None

    def render(self, side: Side) -> Any:
        """A side as `SentenceTransformer.encode` wants it, its image read."""
        if self.form == "reference":
            long = most_tokens(side.text) > self.max_length  # the image comes on top, as in VLM2Vec
            text = cut(self._own_tokenizer, side.text, self.max_length) if long else side.text
            return reference_messages(replace(side, text=text))
        if self.form == "cocoa":
            if most_tokens(side.prompt()) > self._room(side):
                side = fit_text(self._own_tokenizer, side, self.images, self.max_length, self.ending)
            return chat_messages(side, self.images)
        if side.image is None:
            text = side.prompt()  # which the library would fetch as a picture, where it is a URL or a path
            return {"text": text} if len(self.model.modalities) > 1 else text
        image = load_image(side.image)
        return {"image": image, "text": side.prompt()} if side.prompt() else image

    def shortened(self, sides: Sequence[Side]) -> int:
        """How many texts do not fit into `max_length` whole."""
        if self.form == "items":
            return 0
        long = [side for side in sides if most_tokens(side.prompt()) > self._room(side)]
        return sum(len(self._tokens([side.prompt()])[0]) > self._room(side) for side in long)

    def refuses(self, side: Side) -> str:
        """Why this model cannot embed such a side; empty where it can."""
        if self.form != "items":
            return ""
        kinds = tuple(kind for kind, there in (("image", side.image is not None), ("text", side.prompt())) if there)
        if self.model.supports(kinds[0] if len(kinds) == 1 else kinds):
            return ""
        return (
            f"the model does not embed {' with '.join(kinds)} (it knows {', '.join(map(str, self.model.modalities))})"
        )

    def cut_to(self, dim: int | None) -> Embedder:
        """The same with embeddings of that length; of use for a model that was trained with `matryoshka_dims`.

        Raises:
            CocoaError: the model's embeddings are shorter.
        """
        if dim is not None:
            self.check_dim(dim)
        return replace(self, truncate_dim=dim)

    def check_dim(self, dim: int) -> None:
        """See that embeddings can be cut to that length.

        Raises:
            CocoaError: the model's embeddings are shorter.
        """
        whole = self.model.get_embedding_dimension()
        if not 0 < dim <= (whole or dim):
            raise CocoaError(f"truncate-dim {dim}: must be from 1 to {whole}, the length of the model's embeddings")

    def token_counts(self, sides: Sequence[Side]) -> list[int]:
        """How many tokens each input takes, but for markers: its text's, and its image's as the budget allows."""
        counts = [len(ids) for ids in self._tokens([side.prompt() for side in sides])]
        shown = [i for i, side in enumerate(sides) if side.image is not None]
        with ThreadPoolExecutor(WORKERS) as pool:
            for i, size in zip(shown, pool.map(image_size, [sides[i].image for i in shown]), strict=True):
                counts[i] += image_tokens(size, self.images)
        return [min(count, self.max_length) for count in counts]

    def batches(self, sides: Sequence[Side], batch_size: int) -> list[list[int]]:
        """Indices of sides in batches of equal work (`equal_work`), that can be encoded together.

        Raises:
            CocoaError: a batch size of none.
        """
        if batch_size < 1:
            raise CocoaError(f"batch size {batch_size}: must be 1 or more")
        counts = self.token_counts(sides)
        kinds: dict[Any, list[int]] = defaultdict(list)
        for i, side in enumerate(sides):
            alone = self.form != "cocoa"  # only our template takes inputs with and without image in one batch
            kinds[(side.image is None, not side.prompt()) if alone else None].append(i)
        return [
            [members[i] for i in batch]
            for members in kinds.values()
            for batch in equal_work([counts[i] for i in members], batch_size)
        ]

    def embed(self, sides: Sequence[Side], batch_size: int = 8, progress: bool = False) -> Tensor:
        """Embeddings of sides, rendered as in training: (len(sides), D), float32, on the CPU.

        Args:
            sides: what to embed.
            batch_size: sides embedded at once where they are the longest; of shorter ones more.
            progress: show a bar on a terminal.
        """
        batches = self.batches(sides, batch_size)
        rows = [embeddings for _, embeddings in self.embed_batches(sides, batches, progress)]
        order = [index for batch in batches for index in batch]
        return torch.cat(rows)[torch.from_numpy(np.argsort(order))]

    def embed_batches(
        self, sides: Sequence[Side], batches: Sequence[list[int]], progress: bool = False
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The embeddings (n, D) of each batch of sides, as `embed` gives them, one after the other."""
        with Progress(disable=not (progress and sys.stderr.isatty())) as bar:
            task = bar.add_task("embedding", total=sum(map(len, batches)))
            for batch, inputs in prepared(batches, lambda batch: self.prepare([self.render(sides[i]) for i in batch])):
                yield batch, self.encode(inputs)
                bar.advance(task, len(batch))

    def prepare(self, items: list[Any]) -> dict[str, Any] | list[Any]:
        """What `encode` takes of rendered sides, made in any thread: tokens and pixels, of a model of ours."""
        if self.form == "items":
            return items
        try:
            module = self._spare.get_nowait()
        except Empty:
            module = copy.copy(self.model[0])
            module.processor = copy.deepcopy(module.processor)  # a thread switches its padding on and off
        try:
            with explained(LESS_MEMORY):
                return dict(module.preprocess(items))
        finally:
            self._spare.put(module)

    @cached_property
    def _spare(self) -> SimpleQueue[Any]:
        """Modules that prepare inputs, none of which a thread is using."""
        return SimpleQueue()

    def encode(self, inputs: dict[str, Any] | list[Any]) -> Tensor:
        """Embeddings (n, D) of what `prepare` gave, as one batch.

        Normalised once more in float32: in bfloat16 sentence-transformers' lengths are off by up to 0.4 %, enough
        to change who is nearest.
        """
        with explained(LESS_MEMORY):
            if isinstance(inputs, dict):
                encoded = self._forward(inputs)
            else:
                whole = {"batch_size": len(inputs), "convert_to_tensor": True, "show_progress_bar": False}
                encoded = self.model.encode(inputs, **whole)
        return truncated(encoded.float(), self.truncate_dim).cpu()

    def _forward(self, features: dict[str, Any]) -> Tensor:
        model, device = self.model.eval(), self.model.device
        for module in [*model][1:]:  # trainers move the model alone
            module.to(device)
        with torch.inference_mode():
            embeddings: Tensor = model(batch_to_device(features, device))["sentence_embedding"]
        return embeddings

    @cached_property
    def _own_tokenizer(self) -> Any:
        """A tokenizer that threads may share: the model's is switched between padding and none while it embeds."""
        own = copy.deepcopy(self.model.tokenizer)
        own("", padding=False, truncation=False)  # a later call of the kind has nothing left to switch off
        return own

    def _room(self, side: Side) -> int:
        if self.form == "reference":
            return self.max_length
        return room(self.images, side.image is not None, self.max_length, self.ending)

    def _tokens(self, texts: list[str]) -> Sequence[Sized]:
        """Token ids of texts; for a model that is not ours, words stand for them (its tokenizer may be of any kind)."""
        if self.form == "items":
            return [text.split() for text in texts]
        return self.model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def truncated(embeddings: Tensor, dim: int | None) -> Tensor:
    """The first `dim` numbers of embeddings (..., D), or all of them, normalised."""
    return F.normalize(embeddings[..., :dim], dim=-1)


def embedder_of(backbone: Backbone, max_length: int) -> Embedder:
    """A backbone as it stands in memory, to be asked as it is trained."""
    return Embedder(as_sentence_transformer(backbone), backbone.images, max_length, ending=backbone.ending)


def load_embedder(model: str | Path, max_length: int | None = None, prompt_style: str = "cocoa") -> Embedder:
    """A checkpoint by its sentence-transformers files; an untouched backbone causal, last token, our template.

    Any other model of sentence-transformers is asked as that library would.

    Args:
        model: checkpoint folder or hub id.
        max_length: tokens of an input; by default what its last stage was trained with.
        prompt_style: `reference` reads the checkpoint of a Qwen2-VL in VLM2Vec's plain form: `<|image_pad|>` and the
            data's text, no chat markers, the last token's state, positions that count tokens.

    Raises:
        CocoaError: neither can be loaded.
    """
    if prompt_style not in PROMPT_STYLES:
        raise CocoaError(f"prompt-style {prompt_style!r}: choose {' or '.join(PROMPT_STYLES)}")
    model = locate(str(model))
    if Path(model).is_file():
        raise CocoaError(f"model {model}: a file; give the checkpoint's folder or a hub id")
    device = this_process().device
    if prompt_style == "cocoa" and model_file(model, "modules.json") is not None:
        ours = find_record(model)
        record = ours or {}
        image = record.get("image", {})
        budget = ImageBudget(tuple(image.get("tokens", DEFAULT_IMAGES.tokens)), image.get("resize", "aspect"))
        length = max_length or trained_length(record)
        try:
            found = SentenceTransformer(str(model), device=str(device))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CocoaError(f"model {model}: cannot be loaded ({first_line(error)}); is it complete?") from None
        quicken_tower(found.transformers_model)
        form, ending = "cocoa" if ours is not None else "items", form_of(record).compression_tokens or 1
        return Embedder(found, budget, length, form, _folder_of(model), record, ending)
    plain = prompt_style == "reference"
    backbone = load_backbone(model, dtype="auto", attention="causal")
    least, most = backbone.images.tokens
    if not plain:
        backbone.set_image_budget(ImageBudget((least, min(most, DEFAULT_IMAGES.tokens[1]))))
    backbone.model.to(device)
    found = as_sentence_transformer(backbone, plain)
    return Embedder(found, backbone.images, max_length or MAX_LENGTH, prompt_style, _folder_of(model))


def _folder_of(model: str) -> Path | None:
    """The folder of a model whose files are on this machine by now."""
    path = model_file(model, "config.json") or model_file(model, "modules.json")
    return path.parent if path else None
