"""`cocoa search`: exact, filtered, and by the model that the store was made with."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import captions, pictures

pytest.importorskip("lancedb", reason="needs the extra `search`")

from cocoa.corpus_embedding import EmbedSettings
from cocoa.errors import CocoaError
from cocoa.pairs import Side
from cocoa.search import Searcher, as_json, open_search
from cocoa.search_index import FACTS_NAME, update_index


def write_corpus(folder: Path, texts: list[str]) -> Path:
    """Rows of texts, every third with an image, with a year, a place and a number."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n, (text, image) in enumerate(zip(texts, pictures(len(texts)), strict=True)):
        image.save(folder / f"{n}.png")
        row = {"id": f"row {n}", "text": text, "image": None if n % 3 else f"{n}.png", "year": 2000 + n}
        rows.append(row | {"place": "Rome" if n % 2 else "São Paulo", "score": float("nan") if n == 4 else n / 7})
    days = pa.array([datetime.date(2024, 1, 1 + n) for n in range(len(rows))])
    pq.write_table(pa.Table.from_pylist(rows).append_column("my day", days), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.fixture(scope="module")
def store(tiny_backbone_path: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    shutil.copytree(tiny_backbone_path(), folder / "model")
    settings = EmbedSettings(str(folder / "model"), write_corpus(folder / "data", captions(24)))
    update_index(settings, folder / "db")
    return folder / "db"


@pytest.fixture(scope="module")
def searcher(store: Path) -> Searcher:
    return open_search(store)


QUERIES = (
    Side(text="red cat sky"),
    Side(image=pictures(1, seed=3)[0]),
    Side("Find it.", "a green cup", pictures(1, seed=4)[0]),
)


@pytest.mark.parametrize("query", QUERIES, ids=("text", "image", "both with an instruction"))
def test_results_are_those_of_numpy(searcher: Searcher, query: Side) -> None:
    rows = searcher.table.to_arrow()
    scores = np.array(rows["vector"].to_pylist(), np.float32) @ searcher.embedder.embed([query])[0].numpy()
    order = np.argsort(-scores, kind="stable")
    hits = searcher.find(query, top_k=7)
    assert [hit.id for hit in hits] == rows["id"].take(order[:7]).to_pylist()
    assert np.abs([hit.score for hit in hits] - scores[order[:7]]).max() < 1e-6
    assert len(searcher.find(query, top_k=1000)) == len(rows) == 24
    kept = [i for i in order if rows["place"][int(i)].as_py() == "Rome" and rows["year"][int(i)].as_py() > 2005]
    found = searcher.find(query, 5, "place = 'Rome' AND year > 2005")
    assert [hit.id for hit in found] == [rows["id"][int(i)].as_py() for i in kept[:5]]  # filtered first, then the best


def test_a_row_finds_itself_with_all_that_is_known_of_it(searcher: Searcher, store: Path) -> None:
    image = store.parent / "data" / "3.png"
    (hit,) = searcher.find(Side(text=captions(24)[3], image=str(image)), 1)
    assert hit.id == "row 3" and hit.score == pytest.approx(1, abs=1e-5)
    assert hit.text == captions(24)[3] and hit.instruction == "" and hit.thumbnail is not None
    assert hit.metadata == {
        "path": str(image),
        "size": image.stat().st_size,
        "width": 84,
        "height": 84,
        "year": 2003,
        "place": "Rome",
        "score": 3 / 7,
        "my day": datetime.date(2024, 1, 4),
    }


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("`my day` >= date '2024-01-20'", 5),
        ("place LIKE 'São%' AND path IS NOT NULL", 4),
        ("year IN (2001, 2002) OR id = 'row 5'", 3),
        ("width IS NULL", 16),
        ("year > 3000", 0),
        (" ", 24),
    ],
)
def test_conditions(searcher: Searcher, where: str, count: int) -> None:
    assert len(searcher.find(Side(text="red"), 100, where)) == count


@pytest.mark.parametrize(
    "where",
    [
        *("yaer > 3", "year >", "place = 3", "year", "'; DROP TABLE rows", "vector > 3", "sleep(9) = 1"),
        *("1 / 0 = 1", "arrow_cast(place, 'Nope') = 'x'", "place LIKE"),
        *("(SELECT count(*) FROM rows) > 0", "read_csv('/etc/passwd') IS NULL"),
    ],
)
def test_what_is_no_condition_is_a_mistake_in_one_line(searcher: Searcher, where: str) -> None:
    with pytest.raises(CocoaError, match=r"^where .*write a condition of SQL$") as error:
        searcher.find(Side(text="red"), 3, where)
    assert "\n" not in str(error.value) and ".rs:" not in str(error.value) and searcher.table.count_rows() == 24


def test_queries_that_are_none(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_text("no image")
    for query, top_k, said in (
        (Side("Find it."), 3, "nothing to search for"),
        (Side(text="a"), 0, "top-k 0: must be 1 or more"),
        (Side(image=str(tmp_path / "torn.png")), 3, "torn.png: not a readable image"),
        (Side(image=str(tmp_path / "gone.png")), 3, "gone.png: no such image file"),
    ):
        with pytest.raises(CocoaError, match=said):
            open_search(searcher.db).find(query, top_k)  # before the model is loaded
    with pytest.raises(CocoaError, match=r"torn\.png: not a readable image .*; give another image to search for"):
        searcher.find(Side(image=str(tmp_path / "torn.png")))


def test_a_mistake_in_a_query_is_found_before_the_model_is_loaded(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocoa.embedding.load_embedder", lambda *_: pytest.fail("loaded"))
    for query, where in ((Side(text=" "), ""), (Side(image="gone.png"), ""), (Side(text="a"), "no column > 3")):
        with pytest.raises(CocoaError):
            open_search(store).find(query, where=where)


def test_hits_as_json(searcher: Searcher) -> None:
    found = as_json(searcher.find(Side(text="red"), 24))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [hit["rank"] for hit in found] == list(range(1, 25))
    (row,) = (hit for hit in found if hit["id"] == "row 4")
    assert row["metadata"]["score"] is None and row["metadata"]["my day"] == "2024-01-05"


def test_the_model_is_the_one_that_the_store_was_made_with(store: Path, tmp_path: Path) -> None:
    facts = json.loads((store / FACTS_NAME).read_text())
    shutil.copytree(store, tmp_path / "db")
    shutil.copytree(facts["model"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "db" / FACTS_NAME).write_text(json.dumps(facts | {"model": str(tmp_path / "model")}))
    with pytest.raises(CocoaError, match=rf"model {tmp_path}/model of hash \w+, which is another one now \(hash \w+\)"):
        open_search(tmp_path / "db").loaded()
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CocoaError, match="model: cannot be read"):
        open_search(tmp_path / "db").loaded()


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="none: no store of `cocoa index`; make one, or name another --db"):
        open_search(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_is_indexed_later_is_found_by_an_open_store(tiny_backbone_path: Any, tmp_path: Path) -> None:
    def index(texts: list[str]) -> None:
        update_index(EmbedSettings(str(tiny_backbone_path()), write_corpus(tmp_path / "data", texts)), tmp_path / "db")

    index(captions(6))
    searcher = open_search(tmp_path / "db")
    assert searcher.find(Side(text="a rocket on the moon"), 1)[0].id != "row 6"
    index([*captions(5), "other", "a rocket on the moon"])
    assert len(searcher.find(Side(text="red"), 100)) == 7
    index(captions(2))
    assert {hit.id for hit in searcher.find(Side(text="red"), 100)} == {"row 0", "row 1"}
