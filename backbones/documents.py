"""What the mini backbones are trained on: random documents about scenes, as batches of tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cocoa.backbone import Backbone
from cocoa.scenes.dialogues import dialogue, questions
from cocoa.scenes.language import (
    ATTRIBUTE_KINDS,
    HELD_OUT_STYLES,
    STYLES,
    TEMPLATES,
    Question,
    caption,
    statement,
)
from cocoa.scenes.world import COLOURS, Scene, draw, sample_scene

IMAGE = "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>"
POOL = 16  # batches drawn at once and sorted by length, so that little is padding
# How often a kind of question is asked: what takes longest to learn, most.
OFTEN = {"cell": 12, "colour": 4, "presence": 4, "texture": 3}
KINDS = tuple(kind for kind in TEMPLATES for _ in range(OFTEN.get(kind, 2 if kind in ATTRIBUTE_KINDS else 1)))


@dataclass
class Document:
    """Pieces of text with whether they are predicted, and the scene of the image, if it has one."""

    scene: Scene | None
    pieces: list[tuple[str, bool]]


def conversation(turns: Sequence[tuple[str, str]], scene: Scene | None) -> Document:
    """Turns as the backbones' chat template writes them; the answers and what ends them are predicted."""
    pieces = []
    for i, (question, answer) in enumerate(turns):
        image = IMAGE if scene is not None and i == 0 else ""
        pieces += [(f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n", False)]
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    return Document(scene, pieces[:-1])


def draw_document(rng: random.Random) -> Document:
    """A random training document."""
    scene = sample_scene(rng, (1, 2, 2, 3, 3, 4, 4, 5), "train")
    kind = rng.random()
    if kind < 0.1:
        return plain(scene, caption(scene, rng.choice(STYLES + HELD_OUT_STYLES)))
    if kind < 0.3:  # what each name is said of cannot be told from the order, as it can in captions
        facts = [statement(rng, scene) for _ in range(12)]
        return plain(scene, ". ".join(dict.fromkeys(fact for fact in facts if fact)))
    if kind < 0.38:
        first, *rest = dialogue(rng, scene, 4)[1:]
        told = f"{caption(scene, 'full')}. {first.question}"
        return conversation([(told, first.answer), *rest], None)
    if kind < 0.8:  # captions have most of the predicted tokens, and would drown the questions' gradient
        asked = questions(rng, scene, 10, KINDS)
        kept = [question for question in asked if not learned_at_once(question) or rng.random() < 0.3]
        return conversation([(question.text, question.answer) for question in kept or asked], scene)
    return conversation(dialogue(rng, scene, rng.randint(3, 6)), scene)


def learned_at_once(question: Question) -> bool:
    """A place that is asked for by colour: right from early on, while those by shape and by texture lag."""
    return question.kind == "cell" and any(f"the {colour} object" in question.text for colour in COLOURS)


def plain(scene: Scene, text: str) -> Document:
    """An image and its text, all of which is predicted."""
    return Document(scene, [(IMAGE, False), (f"{text}<|im_end|>", True)])


class Batches:
    """Random batches, the documents of each of about the same length."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng = size, random.Random(seed)
        self.ready: list[list[Document]] = []

    def __next__(self) -> list[Document]:
        if not self.ready:
            documents = [draw_document(self.rng) for _ in range(self.size * POOL)]
            documents.sort(key=lambda d: sum(len(piece) for piece, _ in d.pieces))
            self.ready = [documents[i * self.size : (i + 1) * self.size] for i in range(POOL)]
            self.rng.shuffle(self.ready)
        return self.ready.pop()


def scenes_of(documents: list[Document]) -> list[Scene]:
    """The scenes of those that have an image, in the order of `pixel_values`."""
    return [document.scene for document in documents if document.scene is not None]


def collate(backbone: Backbone, documents: list[Document]) -> dict[str, Tensor]:
    """Right-padded tensors of documents, and `labels` (B, T): -100 where nothing is predicted."""
    pieces = [piece for document in documents for piece, _ in document.pieces]
    encoded = iter(backbone.tokenizer(pieces, add_special_tokens=False)["input_ids"])
    ids, labels = [], []
    for document in documents:
        row, wanted = [], []
        for _, predicted in document.pieces:
            tokens = next(encoded)
            row += tokens
            wanted += tokens if predicted else [-100] * len(tokens)
        ids.append(torch.tensor(row))
        labels.append(torch.tensor(wanted))
    pad = nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_value=backbone.tokenizer.pad_token_id)
    attention_mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    batch["labels"] = pad(labels, batch_first=True, padding_value=-100)
    scenes = scenes_of(documents)
    if scenes:
        batch |= pixels(backbone, scenes)
    batch["position_ids"] = backbone.rope_positions(input_ids, attention_mask, batch.get("image_grid_thw"))
    return batch


def pixels(backbone: Backbone, scenes: list[Scene]) -> dict[str, Tensor]:
    """The scenes' pictures through the image processor."""
    images = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2)
    return dict(backbone.processor.image_processor(list(images), return_tensors="pt"))
