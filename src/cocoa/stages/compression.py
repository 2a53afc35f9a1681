"""CoMa's pre-training, compression: K tokens learn to hold of an image what questions on it ask for.

A sequence is the image (with its text, if it has one), a prompt that asks for a summary, the compression
tokens C1..CK, and a dialogue of several rounds. Attention is causal, and the dialogue sees nothing before C1,
so that the image reaches an answer only through the compression tokens; the loss is next-token
cross-entropy on the answers (arXiv 2511.08480).

Departures, where the paper is silent: no role header stands before the image, so that what is compressed
differs from what is embedded later by the prompt alone; the token that ends an answer is predicted too. The
released code also trains on the questions and leaves the mask causal; the paper's description is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cocoa.adapters import Lora
from cocoa.backbone import Backbone, Form
from cocoa.catalogue import StageRows
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.inputs import inert, most_tokens
from cocoa.pairs import ContentPair, Side, Turn
from cocoa.special_tokens import COMPRESSION_TOKENS, EOS_TOKEN
from cocoa.stages.arguments import check_range
from cocoa.stages.content import ContentDataset, ReconstructionArguments, Rows, content_rows
from cocoa.stages.reconstruction import ReconstructionTrainer, Reconstructor
from cocoa.stages.start import stage_adapters, stage_backbone

NAME = "compression"
PROMPT = "Summarize the above {content} in a few words."
"""`{content}` becomes what is compressed: `image`, or `image and text`."""
_TURN = ("<|im_start|>user\n", f"{EOS_TOKEN}\n<|im_start|>assistant\n", EOS_TOKEN, "\n")
"""What stands before a question, between it and its answer, and the two parts of what follows the answer."""


@dataclass
class CompressionArguments(ReconstructionArguments):
    """Arguments of CoMa's pre-training, over `ReconstructionArguments`.

    Args:
        compression_tokens: K, how many tokens hold the image; 32 is the paper's best of 1 to 64.
        prompt: what asks for a summary, behind the image and its text; `{content}` becomes what they are.

    Example:
        >>> import cocoa
        >>> cocoa.CompressionArguments(output_dir="trainer").compression_tokens
        32
    """

    compression_tokens: int = COMPRESSION_TOKENS
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("compression_tokens", self.compression_tokens, 0)
        if "{" in self.prompt.replace("{content}", ""):
            raise CocoaError(f"prompt {self.prompt!r}: the only name in braces that is known is {{content}}")

    def form(self, recorded: Form | None) -> Form:
        """Causal, and pooled over the compression tokens."""
        return Form("causal", "compression", self.compression_tokens)


class CompressionDataset(ContentDataset):
    """What is compressed, the compression tokens, and the dialogue; nothing is hidden, and no epoch differs."""

    args: CompressionArguments

    def images(self) -> list[Side]:
        """What of every row is compressed."""
        return [to_compress(row.side, self.args.prompt) for row in self.rows]

    def sample(self, row: ContentPair, epoch: int) -> dict[str, Tensor]:
        """Tensors of one row; see `Reconstructor.forward`, without the batch axis."""
        return converse(self.backbone, row, self.args.max_length, self.args.prompt)


def converse(backbone: Backbone, row: ContentPair, max_length: int, prompt: str = PROMPT) -> dict[str, Tensor]:
    """A row as the input of `Reconstructor.forward`, without batch axis.

    Args:
        backbone: encodes the row, and closes what is compressed with the compression tokens.
        row: an image, perhaps with text, and the turns on it.
        max_length: tokens the sequence may have; the dialogue is cut to fit, what is compressed never.
        prompt: asks for a summary.

    Raises:
        CocoaError: no token of an answer fits.
    """
    block = backbone.encode_side(to_compress(row.side, prompt))
    length = len(block["input_ids"])  # compression tokens included
    ids, labels = dialogue_tokens(backbone, row.turns)
    room = max(max_length - length, 0)
    ids, labels = ids[:room], labels[:room]
    if all(label == IGNORE_INDEX for label in labels):
        raise CocoaError(f"what is compressed has {length} tokens, no room for an answer in max_length {max_length}")
    return block | {
        "input_ids": torch.cat([block["input_ids"], torch.tensor(ids)]),
        "labels": torch.cat([torch.full((length,), IGNORE_INDEX), torch.tensor(labels)]),
        "compression_start": torch.tensor(length - backbone.compression_tokens),
    }


def to_compress(side: Side, prompt: str) -> Side:
    """An image, its text if it has one, and the prompt."""
    asked = prompt.replace("{content}", "image and text" if side.text.strip() else "image")
    return replace(side, text=f"{side.text.strip()} {asked}".strip())


def dialogue_tokens(backbone: Backbone, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue with its role headers, and labels: the answers' tokens and what ends each.

    The text is the same as Qwen's chat template writes, without a system message.
    """
    texts = [*_TURN, *(inert(text) for turn in turns for text in turn)]
    encoded = backbone.tokenizer(texts, add_special_tokens=False)["input_ids"]  # all in one call: rows are many
    before, between, end, after, *said = encoded
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in zip(said[::2], said[1::2], strict=True):
        asked = [*(after if ids else ()), *before, *question, *between]
        answer = [*answer, *end]
        ids += asked + answer
        labels += [IGNORE_INDEX] * len(asked) + answer
    return ids, labels


def too_long(backbone: Backbone, row: ContentPair, max_length: int, prompt: str = PROMPT) -> bool:
    """Whether what is compressed may fill a sequence so that no answer fits: such rows are left out."""
    room, text = backbone.room(True, max_length), to_compress(row.side, prompt).prompt()
    headers = sum(map(most_tokens, _TURN))
    if most_tokens(text) + most_tokens(row.turns[0].question) + headers < room:  # no need to tokenize
        return False
    _, labels = dialogue_tokens(backbone, row.turns[:1])
    return len(backbone.encode_text(text)) + labels.count(IGNORE_INDEX) >= room


def usable_rows(pairs: Rows, backbone: Backbone, args: CompressionArguments) -> StageRows[ContentPair]:
    """The images of pairs with their dialogues, none of them `too_long`."""
    return content_rows(
        pairs, NAME, lambda row: too_long(backbone, row, args.max_length, args.prompt), "what is compressed"
    )


class CompressionTrainer(ReconstructionTrainer):
    """The trainer of CoMa's pre-training.

    Args:
        model: to be trained: the folder, hub id or embedded name that it is loaded from, or a backbone that was loaded
            with `pooling="compression"`.
        args: of the stage.
        pairs: to train on, with dialogues; or a file or folder of pairs; or images with their dialogues.
        lora: adapters to train in place of all weights.

    Raises:
        CocoaError: a mistake in the data, fewer rows than a batch, or a backbone that does not pool as many
            compression tokens.

    Example:
        >>> import cocoa
        >>> from PIL import Image
        >>> colours = {name: Image.new("RGB", (84, 84), name) for name in ("red", "green", "blue", "white")}
        >>> said = [(image, [{"question": "what colour?", "answer": name}]) for name, image in colours.items()]
        >>> pairs = cocoa.read_pairs([{"query": {"image": image}, "dialogue": dialogue} for image, dialogue in said])
        >>> args = cocoa.CompressionArguments(output_dir="trainer", batch_size=4, max_steps=1, compression_tokens=4)
        >>> trainer = cocoa.CompressionTrainer("mini-qwen2-vl", args, pairs)
        >>> trainer.train().global_step
        1
        >>> trainer.save_checkpoint("compressed").name
        'compressed'
    """

    def __init__(
        self, model: Backbone | str | Path, args: CompressionArguments, pairs: Rows, lora: Lora | None = None
    ) -> None:
        backbone = stage_backbone(model, args, lora)
        rows = usable_rows(pairs, backbone, args)
        adapters = stage_adapters(backbone, args, lora)
        dataset = CompressionDataset(rows, backbone, args)
        super().__init__(NAME, Reconstructor(backbone), dataset, {"token": 1.0}, adapters)
        self.left_out = rows.left_out
