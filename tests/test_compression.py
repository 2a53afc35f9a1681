"""CoMa's pre-training on real models: the image reaches an answer only through the compression tokens."""

import pytest
import torch
from attention_paths import HeldKeysAndValues, final_states, gradients_before
from toy import arguments, pictures, row_of, states_of, with_adapters
from transformers import AutoTokenizer

from cocoa.backbone import Form, load_backbone
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.pairs import ContentPair, Side, Turn
from cocoa.stages.compression import (
    CompressionArguments,
    CompressionDataset,
    CompressionTrainer,
    converse,
    dialogue_tokens,
    to_compress,
    too_long,
)

ARCHITECTURES = ["qwen2_vl", "qwen2_5_vl"]
K = 4
TURNS = (Turn("what is red?", "the cup."), Turn("where is the cat?", "on the table"), Turn("how many cups?", "two"))


def rows(n):
    """Images with one turn, two turns, ..., the second of them with a text of its own."""
    return [
        ContentPair(Side(text="a note" if i == 1 else "", image=image), "", f"toy/{i}", TURNS[: 1 + i % 3])
        for i, image in enumerate(pictures(n))
    ]


@pytest.fixture
def compressing(tiny_backbone_path):
    """`compressing(architecture, count)`: a tiny backbone that is read through compression tokens."""

    def load(architecture="qwen2_vl", count=K, tied=True):
        path = tiny_backbone_path(architecture, tied)
        form = Form("causal", "compression", count)
        return load_backbone(path, ImageBudget((4, 16)), **form._asdict())

    return load


def batch_of(backbone, tmp_path, n=3):
    args = arguments(CompressionArguments, tmp_path, batch_size=n, compression_tokens=K)
    trainer = CompressionTrainer(backbone, args, rows(n))
    return trainer.model.eval(), row_of(trainer, [trainer.train_dataset[0, i] for i in range(n)])


def held_positions(batch):
    """(1, B * K) where the compression tokens stand."""
    return (batch["compression_start"][:, None] + torch.arange(K)).flatten()[None]


def around(batch):
    """(N,) booleans: what stands before each sample's compression tokens, and what behind them."""
    start = batch["compression_start"].repeat_interleave(batch["lengths"])
    place = torch.arange(len(start))
    return place < start, place >= start + K


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_dialogue_does_not_see_the_image_when_the_compression_tokens_are_held(compressing, tmp_path, architecture):
    model, batch = batch_of(compressing(architecture), tmp_path)
    shown, spoken = around(batch)
    other = {**batch, "pixel_values": torch.randint_like(batch["pixel_values"], 256)}
    with torch.no_grad():
        with HeldKeysAndValues(model, held_positions(batch)) as first:
            before = final_states(model, batch)
        free = final_states(model, other)
        with HeldKeysAndValues(model, held_positions(batch), replay=first.recorded):
            held = final_states(model, other)
    assert (held - before)[shown].abs().max() > 1e-2  # the image did change
    assert torch.equal(held[spoken], before[spoken])
    assert (free - before)[spoken].abs().max() > 1e-4  # and reaches the dialogue where they are free


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_of_an_answer_reaches_the_image_only_through_the_compression_tokens(
    compressing, tmp_path, architecture
):
    backbone = compressing(architecture)
    model, batch = batch_of(backbone, tmp_path)
    through, held = gradients_before(model, batch, held_positions(batch), around(batch)[0])
    assert through > 0
    assert held == 0


def test_the_compression_tokens_state_is_that_of_inference(compressing, tmp_path):
    """No dialogue reaches them: training differs from embedding by the prompt alone."""
    backbone = compressing()
    model, batch = batch_of(backbone, tmp_path, n=1)
    alone = states_of(backbone, to_compress(rows(1)[0].side, CompressionArguments.prompt))[-K:]
    with torch.no_grad():
        start = int(batch["compression_start"][0])
        torch.testing.assert_close(final_states(model, batch)[start : start + K], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_is_image_prompt_compression_tokens_dialogue(compressing, tmp_path, architecture):
    backbone = compressing(architecture)
    args = arguments(CompressionArguments, tmp_path, compression_tokens=K, prompt="Say of the {content}:")
    for row, asked in zip(
        rows(3), ("Say of the image:", "a note Say of the image and text:", "Say of the image:"), strict=True
    ):
        sample = CompressionDataset([row], backbone, args)[0, 0]
        ids, labels, start = sample["input_ids"], sample["labels"], int(sample["compression_start"])
        text = backbone.tokenizer.decode(ids[ids != backbone.model.config.image_token_id])
        spoken = "\n".join(
            f"<|im_start|>user\n{t.question}<|im_end|>\n<|im_start|>assistant\n{t.answer}<|im_end|>" for t in row.turns
        )
        closing = "".join(f"<|compress_{i}|>" for i in range(1, K + 1))
        assert text == f"<|vision_start|><|vision_end|>{asked}{closing}{spoken}"
        assert ids[start : start + K].tolist() == backbone.compression_token_ids
        predicted = backbone.tokenizer.decode(labels[labels != IGNORE_INDEX])
        assert predicted == "".join(f"{turn.answer}<|im_end|>" for turn in row.turns)
        assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
        whole = backbone.tokenizer(spoken, add_special_tokens=False)["input_ids"]
        assert dialogue_tokens(backbone, row.turns)[0] == whole  # as if tokenized in one


def test_a_dialogue_is_written_as_qwen_s_own_template_does(compressing):
    """Against the instruct checkpoint's template, which a mini backbone's files keep."""
    from cocoa.architectures import locate

    tokenizer = AutoTokenizer.from_pretrained(locate("mini-qwen2-vl"))
    backbone = load_backbone("mini-qwen2-vl", pooling="compression", compression_tokens=K)
    messages = [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert [*dialogue_tokens(backbone, TURNS)[0], *tokenizer("\n")["input_ids"]] == whole


def test_a_long_dialogue_is_cut_and_what_is_compressed_never(compressing):
    backbone = compressing()
    row = rows(3)[2]
    whole = converse(backbone, row, 4096)
    start = int(whole["compression_start"])
    first = int((whole["labels"] != IGNORE_INDEX).nonzero()[0])
    cut = converse(backbone, row, first + 1)
    assert torch.equal(cut["input_ids"], whole["input_ids"][: first + 1]) and cut["compression_start"] == start
    assert (cut["labels"] != IGNORE_INDEX).sum() == 1
    for less in (first, start + backbone.compression_tokens - 1, 1):
        with pytest.raises(CocoaError, match="no room for an answer"):
            converse(backbone, row, less)


def test_rows_that_leave_no_room_for_an_answer_are_too_long(compressing):
    backbone = compressing()
    row = rows(1)[0]
    tokens = len(converse(backbone, row, 4096)["input_ids"])
    image = int((backbone.encode_side(row.side)["input_ids"] == backbone.model.config.image_token_id).sum())
    longest = tokens - image + backbone.images.tokens[1]  # were its image the largest
    answer = len(backbone.encode_text(row.turns[0].answer)) + 1
    assert not too_long(backbone, row, longest - answer + 1)
    assert too_long(backbone, row, longest - answer)


def test_only_adapters_and_the_rows_of_the_compression_tokens_learn(compressing, tmp_path):
    backbone = compressing()
    with_adapters(backbone)
    args = arguments(CompressionArguments, tmp_path, compression_tokens=K, max_steps=2)
    trainer = CompressionTrainer(backbone, args, rows(8))
    embeddings = backbone.model.get_input_embeddings()
    before = embeddings(torch.arange(len(backbone.tokenizer))).detach().clone()
    trainer.train()
    moved = (embeddings(torch.arange(len(before))) - before).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == backbone.compression_token_ids


def test_arguments_are_checked(tmp_path):
    for options, said in (
        ({"compression_tokens": 0}, "compression_tokens: 0 must be above 0"),
        ({"prompt": "Sum up {image}"}, "prompt"),
    ):
        with pytest.raises(CocoaError, match=said):
            arguments(CompressionArguments, tmp_path, **options)
