"""The benchmarks compare like with like: both paths have the same loss."""

import json
import sys
from dataclasses import replace
from importlib import import_module

import counted
import pytest
import shapes
import torch

from cocoa.corruption import IGNORE_INDEX
from cocoa.estimate import LOGIT_BYTES

SMALL = {
    "reconstruction": ("--samples", "3", "--longest", "60"),
    "contrastive": ("--pairs", "4", "--longest", "16", "--mini-batch-size", "3", "--tokens-per-pass", "100"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"), [("reconstruction", ("--adapters", "dora", "--checkpointing")), ("contrastive", ())]
)
def test_both_paths_have_the_same_loss(monkeypatch, capsys, script, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which would compute in bfloat16
    found = []
    for path in ("ours", "reference"):
        given = [script, "--shape", "mini", "--repeats", "1", "--path", path, *SMALL[script], *options]
        monkeypatch.setattr(sys, "argv", given)
        import_module(script).main()
        found.append(json.loads(capsys.readouterr().out))
    ours, reference = found
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_what_is_counted_of_a_step_without_padding_differs_by_head_and_attention_alone():
    backbone = shapes.build(shapes.SHAPES["mini"], torch.device("meta"))
    shapes.add_lora(backbone)
    samples = 3 * shapes.bridge_samples(backbone, 1, 60)
    hidden = 3 * int((samples[0]["labels"] != IGNORE_INDEX).sum())
    ours, theirs = counted.reconstruction(backbone, samples, checkpointing=True)
    assert (ours.tokens, ours.kept, ours.times) == (theirs.tokens, theirs.kept, theirs.times)
    assert ours.predicted == (hidden, 3) and theirs.predicted == (theirs.tokens, 2)
    assert ours.scores < theirs.scores == 3 * len(samples[0]["input_ids"]) ** 2
    work = shapes.Floor(backbone)
    work.add_head(theirs.tokens)
    of_head = replace(theirs, predicted=(0, 0))
    assert theirs.operations(backbone, samples) - of_head.operations(backbone, samples) == 2 * work.forward
    logits = theirs.memory(backbone, True) - replace(theirs, logits=0).memory(backbone, True)
    assert logits == theirs.tokens * shapes.VOCABULARY * LOGIT_BYTES
