"""`cocoa index` and `cocoa search` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import captions, pictures
from typer.testing import CliRunner

from cocoa.cli import app
from cocoa.errors import CocoaError

pytest.importorskip("lancedb", reason="needs the extra `search`")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.stdout


def test_index_and_search(tiny_backbone_path: Any, tmp_path: Path) -> None:
    source, db = tmp_path / "rows.jsonl", tmp_path / "db"
    pictures(1)[0].save(tmp_path / "a.png")
    rows = [{"id": f"[row] {n}", "text": text, "year": n} for n, text in enumerate(captions(4))]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"image": "a.png"}, {"image": "gone.png"}]))
    options = ("--db", db, "--on-bad-row", "skip", "--max-bad-share", 0.5)
    printed = run("index", tiny_backbone_path(), source, *options)
    assert "left out: rows.jsonl#6: " in printed and "gone.png: no such image file" in printed
    assert f"done: 5 added, 0 changed, 0 removed, 0 unchanged in {db}\n" in printed
    assert "done: 0 added, 0 changed, 0 removed, 5 unchanged" in run("index", tiny_backbone_path(), source, *options)

    found = json.loads(run("search", captions(4)[2], "--db", db, "--top-k", 3, "--where", "year >= 2", "--json"))
    assert [hit["id"] for hit in found] == ["[row] 2", "[row] 3"] and found[0]["metadata"]["year"] == 2
    (found,) = json.loads(run("search", "--image", tmp_path / "a.png", "--db", db, "--top-k", 1, "--json"))
    assert found["id"] == "rows.jsonl#5" and found["score"] == pytest.approx(1, abs=1e-5)
    assert found["metadata"]["path"] == str(tmp_path / "a.png") and found["text"] == ""
    table = run("search", captions(4)[2], "--db", db)
    assert "[row] 2" in table and "1.000" in table and captions(4)[2].split()[0] in table


@pytest.mark.parametrize("library", ["lancedb", "gradio"])
def test_what_is_not_installed_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("app", "search", "search_index", "search_store"):
        monkeypatch.delitem(sys.modules, f"cocoa.{name}", raising=False)
        monkeypatch.delattr(f"cocoa.{name}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CocoaError, match=rf"^{library} is not installed; pip install lancedb gradio$"):
        run("app", "--db", tmp_path)
