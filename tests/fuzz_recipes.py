"""Recipes: the shipped ones with their text mutated or values replaced, YAML made to harm, and overrides."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fuzzing import TEXTS, Kind, check_message, mutated
from hypothesis import strategies as st

from cocoa.errors import CocoaError
from cocoa.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
EXECUTED = "executed"
"""A folder that is there once a tag of a recipe was executed."""
SCALARS = (
    *(
        "~",
        "yes",
        "0x7fffffffffffffff",
        "1_000",
        "1e400",
        ".nan",
        "-.inf",
        "2001-99-99",
        "2001-01-01",
        "0o9",
        "190:20:30",
    ),
    *(
        "9" * 5000,
        "!!int x",
        "!!float x",
        "!!binary x",
        "!!timestamp x",
        "!!set {a}",
        "? a",
        "- a",
        "[a, b",
        "{a: ",
        "&a *a",
    ),
    *(
        "*none",
        "<<: *a",
        "!!python/none",
        "!x y",
        "|",
        ">-",
        "%YAML 9.9",
        "--- a",
        "\t",
        "'",
        '"\\ud800"',
        '"\\0"',
        "{1: 2}",
    ),
    *(
        "{[1]: 2}",
        "[]",
        "{}",
        "-1",
        "0",
        "1.5",
        "x",
        "[[[[]]]]",
        "a: b: c",
        "{? {a: b} : c}",
        "!!omap [a: b]",
        "!!str 1",
    ),
    *(f"!!python/object/apply:os.mkdir [{EXECUTED}]", f"!!python/object/new:os.mkdir [{EXECUTED}]"),
    *(
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!python/tuple [1]",
        "!!python/object:cocoa.pairs.Side {}",
    ),
)


class Written(NamedTuple):
    """A recipe's text, and overrides."""

    text: bytes
    overrides: tuple[str, ...] = ()


@cache
def recipes() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))}


def bomb(kind: str, width: int, depth: int) -> str:
    """A short text that stands for very much, or nests very deep."""
    if kind == "laughs":
        lines = ["a0: &a0 [" + ",".join("x" * width) + "]"]
        return "\n".join(lines + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)])
    if kind == "merges":
        lines = ["a0: &a0 {x: 1}"]
        return "\n".join(lines + [f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * width)}]}}" for i in range(1, depth)])
    if kind == "stages":
        laughs = bomb("laughs", width, depth)
        return f"{laughs}\nbackbone: *a{depth - 1}\noutput_dir: x\ndata: *a{depth - 1}\nstages: *a{depth - 1}"
    if kind == "itself":
        return "backbone: &a [*a]\noutput_dir: x\ndata: {train: *a}\nstages: &b [{contrastive: &c {data: *c}}, *b]"
    start, end = {"lists": "[]", "mappings": ("{a: ", "}"), "sequences": ("- ", ""), "questions": ("? ", "")}[kind]
    return start * width * depth + end * width * depth


@st.composite
def harmful(draw: st.DrawFn) -> Written:
    kind = draw(
        st.sampled_from(("laughs", "merges", "stages", "itself", "lists", "mappings", "sequences", "questions"))
    )
    text = bomb(kind, draw(st.integers(2, 30)), draw(st.integers(2, 30)))
    keys = "\nbackbone: x\noutput_dir: y\ndata: {train: z}\nstages: [contrastive]"
    return Written((text + draw(st.sampled_from(("", keys)))).encode())


@st.composite
def lines_changed(draw: st.DrawFn) -> Written:
    """Lines dropped, doubled, moved, indented, and values replaced."""
    lines = recipes()[draw(st.sampled_from(sorted(recipes())))].decode().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, value = lines[at].partition(": ")
        lines[at : at + 1] = draw(
            st.sampled_from(
                (
                    *([], [lines[at]] * 2, [f"  {lines[at]}"], [lines[at].lstrip()], [key], [f"{key}s{colon}{value}"]),
                    *(
                        [f"{key}: {scalar}"]
                        for scalar in draw(st.lists(st.sampled_from(SCALARS), min_size=12, max_size=12))
                    ),
                )
            )
        )
        lines = lines or [""]
    return Written("\n".join(lines).encode())


def values() -> st.SearchStrategy[Any]:
    scalar = (
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(TEXTS) | st.dates()
    )
    keys = st.sampled_from(("train", "r", "contrastive", "data", "batch_size")) | st.integers(0, 3) | st.none()
    return st.recursive(
        scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5
    )


def _dotted(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in items for place in [(*prefix, key), *_dotted(value, (*prefix, key))]]


@st.composite
def values_replaced(draw: st.DrawFn) -> Written:
    """Values of any type at any place of a recipe, and new keys of the stages."""
    content = yaml.safe_load(recipes()[draw(st.sampled_from(sorted(recipes())))])
    for _ in range(draw(st.integers(1, 3))):
        node, place = content, draw(st.sampled_from(_dotted(content)))
        for key in place[:-1]:
            node = node[key]
        key = draw(st.sampled_from(OPTIONS)) if isinstance(node, dict) and draw(st.booleans()) else place[-1]
        node[key] = draw(values())
    return Written(yaml.safe_dump(content).encode("utf-8", "surrogatepass"))


OPTIONS = (
    *("batch_size", "mini_batch_size", "max_steps", "num_train_epochs", "learning_rate", "warmup_steps", "temperature"),
    *("text_mask_ratio", "patch_mask_ratio", "layout", "report_to", "fsdp", "deepspeed", "optim", "lr_scheduler_type"),
    *("save_steps", "eval_steps", "logging_steps", "dataloader_num_workers", "lr_scheduler_kwargs", "adam_beta1"),
    *(
        "gradient_checkpointing",
        "torch_compile",
        "accelerator_config",
        "warmup_ratio",
        "sub_batch_size",
        "image",
        "lora",
    ),
)


@st.composite
def overridden(draw: st.DrawFn) -> Written:
    text = recipes()[draw(st.sampled_from(sorted(recipes())))]
    places = [".".join(map(str, place)) for place in _dotted(yaml.safe_load(text))]
    places += [f"stages.contrastive.{option}" for option in OPTIONS]
    value = st.sampled_from(SCALARS) | st.sampled_from(TEXTS) | st.sampled_from(("[" * 3000, bomb("laughs", 9, 9)))
    override = st.builds("{}={}".format, st.sampled_from(places) | st.sampled_from(("", ".", "a..b", "stages")), value)
    return Written(text, tuple(draw(st.lists(override | st.sampled_from(TEXTS), min_size=1, max_size=3))))


def read_recipe(case: Written, folder: Path) -> None:
    """A recipe loaded; one that is accepted is made into arguments and a fingerprint too, as `cocoa train` begins."""
    path = folder / "mine.yaml"
    path.write_bytes(case.text)
    try:
        recipe = load_recipe(path, case.overrides)
        for stage in recipe.stages:
            recipe.arguments(stage, folder / "trainer")
    except CocoaError as error:
        check_message(str(error))
        raise
    finally:
        assert not Path(EXECUTED).exists(), "a tag was executed"
    recipe.fingerprint(len(recipe.stages))


KINDS = {
    "recipes": Kind(
        mutated(recipes).map(lambda case: Written(case[1]))
        | lines_changed()
        | values_replaced()
        | overridden()
        | harmful(),
        read_recipe,
    )
}
