"""The pages as a site: it builds without a warning, loads nothing from elsewhere, and its tables say what is so."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainingArguments

from cocoa.adapters import Lora
from cocoa.recipe import STAGES, ImageConfig, load_recipe
from cocoa.sources import DataConfig
from cocoa.stages.arguments import StageArguments

ROOT = Path(__file__).parents[1]
RECIPES_PAGE = (ROOT / "docs" / "recipes.md").read_text()
NOT_A_RECIPES = {"on_bad_row", "max_bad_share", "hard_negatives"}
"""Arguments of stages that a recipe gives in `data:`."""
NEEDED = {
    "dataloader_drop_last",
    "remove_unused_columns",
    "ddp_broadcast_buffers",
    "ddp_find_unused_parameters",
    "eval_strategy",
}
"""Defaults unlike transformers' that the stages need as they are."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def shown(page):
    """A page of the site without its code, which may name any address."""
    return re.sub(r"<(code|pre)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(https?:)?//", shown(page))
        assert not loaded, page


@pytest.mark.slow
def test_what_github_shows_by_itself_is_shown_on_the_site(site):
    method = shown(site / "method" / "index.html")
    assert method.count("<math") > 10 and "arithmatex" not in method
    assert 'href="../api/#cocoa.attention"' in method
    assert 'id="cocoa.attention.eos_bridged"' in (site / "api" / "index.html").read_text()
    assert not re.findall(r'href="[^"]*\.\./\.\./(?:src|tests|recipes)', method)


@pytest.mark.parametrize(
    ("address", "module", "file"),
    [
        (None, "[`a`](api.md#cocoa.attention)", "the README"),
        (
            "https://example.org/r/",
            "[`a`](api.md#cocoa.attention)",
            "[the README](https://example.org/r/blob/HEAD/README.md#x)",
        ),
    ],
)
def test_links_that_leave_the_pages(address, module, file):
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / ".ci" / "site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    api = SimpleNamespace(content_string="# API\n\n::: cocoa.attention\n")
    files = SimpleNamespace(get_file_from_path=lambda name: api)
    page = "[`a`](../src/cocoa/attention.py), [the README](../README.md#x), [data](data.md), ![b](../b.png)"
    shown = hooks.on_page_markdown(page, config=SimpleNamespace(repo_url=address), files=files)
    assert shown == f"{module}, {file}, [data](data.md), ![b](../b.png)"


def defaults(arguments, base=None):
    """Default values of a dataclass by field, those alone that are not the base's."""
    known = {field.name: field.default for field in dataclasses.fields(base)} if base else {}
    return {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in dataclasses.fields(arguments)
        if known.get(field.name, dataclasses.MISSING) != field.default or field.name not in known
    }


TABLES = {
    "`data`": defaults(DataConfig),
    "`image`": defaults(ImageConfig),
    "`lora`": defaults(Lora),
    "Every stage": defaults(StageArguments, TrainingArguments),
} | {f"`{name}`": defaults(arguments, StageArguments) for name, arguments in STAGES.items()}


@pytest.mark.parametrize("heading", TABLES)
def test_the_keys_of_a_recipe_stand_on_their_page_with_their_defaults(heading):
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", RECIPES_PAGE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|", section, re.MULTILINE)
    inside = set() if heading == "`data`" else NOT_A_RECIPES
    expected = {key: value for key, value in TABLES[heading].items() if key not in inside | NEEDED}
    given = {
        key: dataclasses.MISSING if text == "required" else as_value(text, expected.get(key)) for key, text in rows
    }
    assert given == expected


def as_value(text, default):
    """A default as the page writes it; YAML 1.1 takes 2e-5 for a text."""
    return float(text) if isinstance(default, float) else yaml.safe_load(text)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_stands_on_the_page_as_it_is(path):
    recipe = load_recipe(path)
    stages = []
    for stage in recipe.stages:
        steps, epochs = stage.options.get("max_steps"), stage.options.get("num_train_epochs")
        length = f"{steps:,}" if steps else f"{epochs:g} epoch{'s' if epochs > 1 else ''}"
        stages.append(f"{stage.name} {length} x {stage.options['batch_size']:,}")
    row = f"| [`{path.stem}`](../recipes/{path.name}) | {recipe.backbone} | {', '.join(stages)} |"
    assert row in RECIPES_PAGE


def test_the_page_shows_the_server_that_is_tested():
    page = (ROOT / "docs" / "serving.md").read_text()
    assert f"```python\n{(ROOT / 'examples' / 'serve.py').read_text()}```" in page
