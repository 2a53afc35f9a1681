"""YAML that was made to harm is refused by one line; what a recipe needs is read."""

import pytest
from fuzz_recipes import bomb

from cocoa.errors import CocoaError
from cocoa.recipe import load_recipe
from cocoa.yaml_text import MAX_CHARACTERS, read_yaml


def test_anchors_and_merges_are_read():
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}") == {"a": {"x": 1}, "b": {"x": 1, "y": [{"x": 1}] * 2}}
    assert read_yaml("") is None


HARMFUL = {
    "aliases of aliases": (bomb("laughs", 9, 9), "more than 20000 values"),
    "merges of merges": (bomb("merges", 30, 30), "more than 20000 values"),
    "itself": ("a: &a [*a]", "holds itself"),
    "brackets": ("[" * 3000, "nested too deep"),
    "dashes": ("- " * 20_000, "nested too deep"),
    "long": ("a" * (MAX_CHARACTERS + 1), "more than 50000 characters"),
    "no date": ("2001-99-99", "month must be"),
    "no timestamp": ("!!timestamp x", "groupdict"),
    "no float": ("!!float x", "could not convert"),
    "digits": ("9" * 5000, "4300 digits"),
    "no character": ('"\\ud800"', "surrogates not allowed"),
    "not YAML": ("[a", "while parsing"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_what_harms_is_refused(kind, tmp_path):
    text, reason = HARMFUL[kind]
    with pytest.raises(ValueError, match=reason) as error:
        read_yaml(text)
    assert "\n" not in str(error.value)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(CocoaError, match=rf"mine\.yaml: not YAML \(.*{reason}"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir [executed]", "python/name:os.system", "own x"])
def test_no_tag_is_executed(tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml(f"a: !!{tag}")
    assert not list(tmp_path.iterdir())
