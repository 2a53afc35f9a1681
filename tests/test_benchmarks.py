"""The benchmarks compare like with like: both paths have the same loss and the same work."""

import json
import sys
from importlib import import_module

import pytest

SMALL = {
    "reconstruction": ("--samples", "3", "--longest", "60"),
    "contrastive": ("--pairs", "4", "--longest", "16", "--mini-batch-size", "3", "--tokens-per-pass", "100"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"), [("reconstruction", ("--adapters", "dora", "--checkpointing")), ("contrastive", ())]
)
def test_both_paths_have_the_same_loss_and_the_same_work(monkeypatch, capsys, script, options):
    found = []
    for path in ("ours", "reference"):
        given = [script, "--shape", "mini", "--repeats", "1", "--path", path, *SMALL[script], *options]
        monkeypatch.setattr(sys, "argv", given)
        import_module(script).main()
        found.append(json.loads(capsys.readouterr().out))
    ours, reference = found
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    assert ours["operations"] == reference["operations"] and ours["tokens"] == reference["tokens"]
