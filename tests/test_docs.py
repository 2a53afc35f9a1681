"""What the pages tell a reader to run."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image

from cocoa.cli import app
from cocoa.data_check import check_data
from cocoa.images import load_image
from cocoa.mmeb_eval import read_eval
from cocoa.pair_eval import read_pair_eval
from cocoa.pair_files import read_file
from cocoa.recipe import load_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def commands(page):
    """The arguments of each `cocoa` command in a page's bash blocks."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)).replace("\\\n", " ")
    for line in re.sub(r"&&|\$\(|;", "\n", blocks).splitlines():
        words = shlex.split(line.replace("-m cocoa.cli", "cocoa"), comments=True)
        if "cocoa" in words and not {"pip", "for"} & set(words):
            yield words[words.index("cocoa") + 1 :]


def test_ten_lines_write_a_data_set_of_ones_own(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(from pathlib.*?)```", (DOCS / "data.md").read_text(), re.S)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    (tmp_path / "mydata" / "photos").mkdir()
    for name in ("cat", "coffee"):
        Image.new("RGB", (60, 60)).save(tmp_path / "mydata" / "photos" / f"{name}.jpg")
    (report,) = check_data("mydata")
    assert (report.name, report.rows, report.images, report.bad, report.error) == ("Photos", 2, 2, [], "")
    (found,) = read_eval("mydata")
    sides = [found.inputs[i] for i in (found.queries[1], *found.candidates[1])]
    assert sides[0].prompt() == "Find the photo: a cup of coffee"
    assert [Path(side.image).name for side in sides[1:]] == ["coffee.jpg", "cat.jpg"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_options(page, monkeypatch):
    """Parsed, not run; recipes are read with their overrides."""
    monkeypatch.chdir(ROOT)
    known = typer.main.get_command(app)
    for name, *words in commands(page):
        context = known.commands[name].make_context(name, list(words))
        recipe = Path(context.params.get("recipe") or "")  # of an older typer, a text
        if recipe.parent.name == "recipes" and "$" not in recipe.name:
            load_recipe(recipe, context.params["overrides"] or [])


def test_pieces_of_photographs_are_held_out_to_the_pixel(tmp_path, monkeypatch):
    text = (DOCS / "finetune.md").read_text()
    (snippet,) = re.findall(r"```python\n(import json.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    folder = tmp_path / "runs" / "pieces"
    pairs, held = (read_file(folder / f"{name}.jsonl").pairs for name in ("pairs", "held-out"))
    assert f"{len(pairs)} pairs and {len(held)} held out" in text
    assert not {side.image for p in pairs for side in (p.query, p.target)} & {
        side.image for p in held for side in (p.query, p.target)
    }
    assert {load_image(pair.query.image).size for pair in (*pairs, *held)} == {(40, 40)}
    assert check_data(folder / "pairs.jsonl")[0].bad == []
    assert {len(ids) for ids in read_pair_eval(folder / "held-out.jsonl").candidates} == {11}
    served = ("cat-held-out", "grass-held-out", "rocket-held-out", "grass-held-out-0-0")
    assert all((folder / f"{name}.png").exists() for name in served)
