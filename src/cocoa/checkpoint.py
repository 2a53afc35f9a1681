"""What passes between stages: a folder that transformers, sentence-transformers and the next stage all read.

The folder is the stock `ForConditionalGeneration` layout (sentence-transformers' own save would lose the
language-model head) with sentence-transformers' files beside it, all of stock classes, so that no reader
needs `cocoa` or `trust_remote_code`.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentence_transformers
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, WordWeights
from sentence_transformers.util import load_file_path
from transformers import PreTrainedModel

import cocoa
from cocoa.architectures import locate
from cocoa.backbone import Backbone, Form
from cocoa.errors import CocoaError, first_line
from cocoa.files import write_json
from cocoa.inputs import MAX_LENGTH
from cocoa.special_tokens import compression_names

RECORD_NAME = "cocoa.json"
"""File in a checkpoint that says how it was made; no reader needs it."""
LOG_NAME = "training_log.json"
"""File in a checkpoint that holds the trainer's log of the stage."""

_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
_SENTENCE_BERT_CONFIG = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": _FORWARD,
        "image": _FORWARD,
        "image+text": _FORWARD,
        "message": {**_FORWARD, "format": "structured"},
    },
    "module_output_name": "token_embeddings",
}


_PLAIN_TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message['content'] -%}"
    "{{- part['text'] if part['type'] == 'text' else '<|image_pad|>' -}}"
    "{%- endfor -%}{%- endfor -%}"
)


def save_checkpoint(backbone: Backbone, folder: Path, record: dict[str, Any]) -> None:
    """Write a checkpoint, in the dtype that the model's weights have now.

    Args:
        backbone: with adapters already merged.
        folder: made where it does not exist.
        record: what to say in `cocoa.json` beside versions and image budget.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backbone.model.save_pretrained(folder)
    _save_side_files(backbone, folder)
    record = {
        **record,
        **backbone.form._asdict(),
        "image": {"tokens": list(backbone.images.tokens), "resize": backbone.images.resize},
        "versions": versions(),
    }
    write_json(folder / RECORD_NAME, record)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = {"cocoa": cocoa, "torch": torch, "transformers": transformers}
    packages |= {"sentence_transformers": sentence_transformers}
    return {name: package.__version__ for name, package in packages.items()}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint of ours; empty for any other folder."""
    path = folder / RECORD_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def model_file(model: str | Path, name: str) -> Path | None:
    """A file of a checkpoint folder or hub id, or None where it has no such file.

    Raises:
        CocoaError: the hub refuses the name.
    """
    try:
        path = load_file_path(str(model), name)
    except HfHubHTTPError as error:
        reason = first_line(error)
        raise CocoaError(f"model {model}: cannot be read ({reason}); give a checkpoint folder or a hub id") from None
    return Path(path) if path else None


def find_record(model: str | Path) -> dict[str, Any] | None:
    """The record of a checkpoint of ours by folder, hub id or embedded name; None for any other model."""
    path = model_file(locate(str(model)), RECORD_NAME)
    return read_record(path.parent) if path else None


def training_part(record: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's record says of how it was trained, which evaluations repeat."""
    return {key: value for key, value in record.items() if key not in ("image", "versions")}


def recorded_form(model: str | Path) -> Form | None:
    """How a checkpoint of ours is read as an embedding model, by its record; None for any other model."""
    record = find_record(model)
    return form_of(record) if record else None


def form_of(record: dict[str, Any]) -> Form:
    """The part of a checkpoint's record that says how it is read as an embedding model."""
    return Form(**{key: record[key] for key in Form._fields if key in record})


def trained_length(record: dict[str, Any]) -> int:
    """The `max_length` that a checkpoint's stage was trained with, by its record."""
    return record.get("options", {}).get("max_length", MAX_LENGTH)


def as_sentence_transformer(backbone: Backbone, plain: bool = False) -> SentenceTransformer:
    """The backbone in memory as sentence-transformers' modules; the weights are shared, not copied.

    Args:
        backbone: the model.
        plain: VLM2Vec's form: nothing around the data's text, no EOS, and positions that count tokens (without a
            vision-start token its M-RoPE never sees an image). A batch is of inputs with an image each, or without;
            in a text without image an image token is one like any other.
    """

    class LoadedTransformer(Transformer):
        def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
            return backbone.model.model

        def preprocess(self, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            parts = [[part for message in messages for part in message["content"]] for messages in inputs if plain]
            if not parts or any(part["type"] == "image" for part in parts[0]):
                return super().preprocess(inputs, *args, **kwargs)
            texts = ["".join(part["text"] for part in content) for content in parts]  # the processor refuses markers
            return {**self.tokenizer(texts, padding=True, return_tensors="pt"), "modality": "message"}

        def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            if plain:
                mask = features["attention_mask"]  # (B, T)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                features["position_ids"] = positions.expand(3, *mask.shape)
            return super().forward(features, **kwargs)

    with TemporaryDirectory() as folder:
        backbone.model.config.save_pretrained(folder)
        _save_side_files(backbone, Path(folder))
        if plain:
            (Path(folder) / "chat_template.jinja").write_text(_PLAIN_TEMPLATE, encoding="utf-8")
        transformer = LoadedTransformer.load(folder)
    modules, device = [transformer, *_pooling(backbone)], str(backbone.model.device)
    return SentenceTransformer(modules=modules, device=device)  # which by itself would move the model to a GPU


def _pooling(backbone: Backbone) -> list[Module]:
    """What makes one vector of the final states, in stock modules.

    The mean over the compression tokens is a mean over all, each weighted: 1 for them and 0 for the rest.
    """
    dimension = backbone.model.config.text_config.hidden_size
    if backbone.pooling != "compression":
        return [Pooling(dimension, backbone.pooling), Normalize()]
    names, ids = compression_names(backbone.compression_tokens), backbone.compression_token_ids
    vocabulary = [""] * len(backbone.tokenizer)  # by id; the names of those that weigh nothing are not needed
    for name, token_id in zip(names, ids, strict=True):
        vocabulary[token_id] = name
    weights = WordWeights(vocabulary, dict.fromkeys(names, 1.0), unknown_word_weight=0.0)
    weights.requires_grad_(False)
    return [weights, Pooling(dimension, "mean"), Normalize()]


def _save_side_files(backbone: Backbone, folder: Path) -> None:
    """Write everything of a checkpoint but the weights and their config."""
    backbone.processor.save_pretrained(folder)
    kinds: list[type[Module]] = [Transformer]
    paths = [""]
    for index, module in enumerate(_pooling(backbone), 1):
        kinds.append(type(module))
        paths.append(f"{index}_{type(module).__name__}")
        (folder / paths[-1]).mkdir(exist_ok=True)
        module.save(str(folder / paths[-1]))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{kind.__module__}.{kind.__name__}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", _SENTENCE_BERT_CONFIG)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
