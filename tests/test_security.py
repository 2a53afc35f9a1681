"""Attacks: what comes from data, or lies in a folder that somebody else has made, runs no code and fetches nothing.

Beside them: control tokens in texts (`test_backbone`, `test_checkpoint`), paths that leave their root
(`test_image_files`, `test_stage_data`, `test_corpus_embedding`), bombs and tags of YAML (`test_fuzz`, `test_recipe`).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from test_training import make_trainer
from toy import pictures

from cocoa.backbone import load_backbone
from cocoa.corpus_embedding import EmbedSettings, embed_corpus
from cocoa.corpus_files import FOLDER
from cocoa.embedding import load_embedder
from cocoa.errors import CocoaError
from cocoa.evaluation import CACHE_FOLDER, evaluate
from cocoa.pair_files import read_file
from cocoa.pairs import Side


class Evil:
    """Once unpickled it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that no test may find made."""
    path = tmp_path / "pwned"
    yield path
    assert not path.exists()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that has any picture, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            Image.new("RGB", (56, 56)).save(self.wfile, "PNG")

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}", asked
    found.shutdown()
    found.server_close()


def test_the_mark_would_be_made(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "made")))
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("foreign", [False, True])
def test_a_text_that_is_an_address_or_a_path_is_a_text(
    tiny_backbone_path: Any, foreign_path: Path, server: Any, tmp_path: Path, foreign: bool
) -> None:
    address, asked = server
    pictures(1)[0].save(tmp_path / "private.png")
    embedder = load_embedder(foreign_path if foreign else tiny_backbone_path())
    texts = [f"{address}/a.png", str(tmp_path / "private.png"), "data:image/png;base64,aaaa", f"{address}/a.mp4"]
    found = embedder.embed([Side(text=text) for text in texts])
    (tmp_path / "private.png").unlink()
    gone = embedder.embed([Side(text=text) for text in texts])
    assert torch.equal(found, gone) and not asked
    with_picture = embedder.embed([Side(text=texts[0], image=pictures(1)[0])])
    assert with_picture.isfinite().all() and not asked


def test_an_image_that_is_an_address_is_a_missing_file(tiny_backbone_path: Any, server: Any, tmp_path: Path) -> None:
    address, asked = server
    row = {"query": {"image": f"{address}/a.png"}, "target": {"text": "a cat"}}
    other = {"query": {"text": "a pet"}, "target": {"text": "a dog"}}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(other))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row["query"]))
    with pytest.raises(CocoaError, match="no such image file"):
        evaluate(tiny_backbone_path(), tmp_path / "pairs.jsonl", tmp_path / "scores")
    with pytest.raises(CocoaError, match="no such image file"):
        embed_corpus(EmbedSettings(str(tiny_backbone_path()), tmp_path / "rows.jsonl"), tmp_path / "out")
    side = read_file(tmp_path / "pairs.jsonl").pairs[0].query
    with pytest.raises(CocoaError, match="no such image file"):
        load_embedder(tiny_backbone_path()).embed([side])
    assert not asked


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_trainers_checkpoint_runs_nothing(tiny_backbone: Any, tmp_path: Path, mark: Path, name: str) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer("eos_bridge", tiny_backbone(), tmp_path / "trainer", **options).train_or_resume()
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-2")
    path = tmp_path / "trainer" / "checkpoint-1" / name
    assert path.is_file()
    torch.save(Evil(mark), path)
    with pytest.raises(CocoaError, match="checkpoint-1: holds more than numbers"):
        make_trainer("eos_bridge", tiny_backbone(), tmp_path / "trainer", **options).train_or_resume()


def test_weights_in_a_pickle_run_nothing(tiny_backbone_path: Any, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_backbone_path(), folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"lm_head.weight": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(CocoaError):
        load_backbone(folder)


@pytest.mark.parametrize("where", ["config.json", "modules.json"])
def test_code_beside_a_model_is_not_run(
    tiny_backbone_path: Any, foreign_path: Path, tmp_path: Path, mark: Path, where: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(foreign_path if where == "modules.json" else tiny_backbone_path(), folder)
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n"
    for name in ("evil.py", "configuration_evil.py"):
        (folder / name).write_text(code)
    content = json.loads((folder / where).read_text())
    if where == "modules.json":
        content[0]["type"] = "evil.Own"
    else:
        content |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Own", "AutoModel": "evil.Own"}}
    (folder / where).write_text(json.dumps(content))
    with pytest.raises(CocoaError):
        load_embedder(folder)


def test_what_is_written_holds_no_pickle(tiny_backbone_path: Any, tmp_path: Path) -> None:
    rows = [{"query": {"text": f"text {n}"}, "target": {"text": f"target {n}"}} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(tiny_backbone_path(), tmp_path / "pairs.jsonl", tmp_path / "scores")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    embed_corpus(EmbedSettings(str(tiny_backbone_path()), tmp_path / "rows.jsonl"), tmp_path / "out")
    caches = list((tmp_path / "scores" / CACHE_FOLDER).rglob("*.safetensors"))
    parts = list((tmp_path / "out" / FOLDER).iterdir())
    assert caches and parts
    for path in caches:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {"keys", "embeddings"}
    written = [path for folder in ("scores", "out") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {path.suffix for path in written if path.name != ".lock"} <= {".json", ".md", ".parquet", ".safetensors"}
