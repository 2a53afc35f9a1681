"""The benchmarks compare like with like: both paths have the same loss."""

import json
import sys
from importlib import import_module

import pytest
import torch

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
