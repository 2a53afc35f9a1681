"""Fixtures that several test files share: tiny random backbones, pictures and the photographs' data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Before the libraries read them: no test may ask a hub, and tiny models gain nothing from a second thread.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizer

from cocoa.architectures import Attention
from cocoa.backbone import Backbone, load_backbone
from cocoa.inputs import ImageBudget
from cocoa.photos import write_photos
from cocoa.tiny import write_tiny_backbone

TINY_TEXTS = [
    "A red cup of coffee stands on a wooden table.",
    "The cat looks at the astronaut in the orange suit.",
    "Find an image that matches the given caption: a rocket on the launch pad",
    "What colour is the cup on the table? It is red.",
] * 4
TINY_IMAGES = ImageBudget((4, 16))


@pytest.fixture(scope="session")
def tiny_backbone_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_backbone_path(model_type, tied)`: folder of an untouched tiny one, written once; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[tuple[str, bool], Path] = {}

    def path(model_type: str = "qwen2_vl", tied: bool = True) -> Path:
        if (model_type, tied) not in written:
            name = f"{model_type}-{'tied' if tied else 'untied'}"
            written[model_type, tied] = write_tiny_backbone(folder / name, TINY_TEXTS, model_type, tied=tied)
        return written[model_type, tied]

    return path


@pytest.fixture(scope="session")
def tiny_backbone(tiny_backbone_path: Callable[..., Path]) -> Callable[..., Backbone]:
    """`tiny_backbone(model_type, tied, attention)`: a freshly loaded one, 4 to 16 tokens an image."""

    def load(
        model_type: str = "qwen2_vl", tied: bool = True, attention: Attention | None = "bidirectional"
    ) -> Backbone:
        return load_backbone(tiny_backbone_path(model_type, tied), TINY_IMAGES, attention=attention)

    return load


@pytest.fixture(scope="session")
def foreign_path(tiny_backbone_path: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multimodal model that sentence-transformers made by itself: mean pooling, another chat template."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(tiny_backbone_path(), folder / "backbone")
    (folder / "backbone" / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    )
    SentenceTransformer(str(folder / "backbone"), device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_text_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of sentence-transformers."""
    folder = tmp_path_factory.mktemp("text model")
    words = sorted({word for text in TINY_TEXTS for word in text.lower().split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder / "bert")
    SentenceTransformer(str(folder / "bert"), device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Three pictures of random pixels, unlike in size and shape; 8, 9 and 12 merged tokens within 4 to 16."""
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in ((112, 56), (84, 84), (84, 112))
    ]


@pytest.fixture(scope="session")
def photo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `write_photos` filled: `MMEB-train` and `MMEB-eval` in it. Read only."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def photo_dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a dialogue of two turns on each training photograph, in the folder that holds them."""
    root = write_photos(tmp_path_factory.mktemp("dialogues"))
    path = root / "talks.jsonl"
    turns = [{"question": "what is red?", "answer": "the cup"}, {"question": "how many?", "answer": "two"}]
    images = sorted((root / "MMEB-train").rglob("*.jpg"))
    path.write_text("".join(json.dumps({"image_path": str(image), "dialogue": turns}) + "\n" for image in images))
    return path
