"""The page on a stage of one's own runs as it stands."""

import re
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

import cocoa
from cocoa.checkpoint import read_record

PAGE = Path(__file__).parents[1] / "docs" / "new_stage.md"


@pytest.mark.slow
def test_the_page_s_stage_learns_and_the_next_one_goes_on_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len([line for line in first.splitlines() if line.strip()]) <= 42
    values = {}
    exec(first, values)
    losses = [entry["token_loss"] for entry in values["trainer"].state.log_history if "token_loss" in entry]
    assert len(losses) == 4 and losses[-1] < 0.4 * losses[0]
    sample = values["dataset"][0, 0]
    predicted = sample["labels"][sample["labels"] != cocoa.corruption.IGNORE_INDEX]
    assert values["backbone"].tokenizer.decode(predicted) == "a red square<|im_end|>"
    record = read_record(tmp_path / "captioned")
    assert (record["stage"], record["steps"], record["attention"], record["rows"]) == (
        *("captioning", 20, "causal"),
        {"records": 4},
    )
    assert "No contrastive stage yet" in (tmp_path / "captioned" / "README.md").read_text()
    exec(second, values)
    record = read_record(tmp_path / "model")
    assert record["attention"] == "bidirectional" and [stage["stage"] for stage in record["history"]] == ["captioning"]
    assert SentenceTransformer("model", device="cpu").encode(["a red square"]).shape == (1, 128)
