"""`key=value` overrides of a recipe, dotted: `data.train=/data/MMEB-train`, `stages.contrastive.max_steps=100`."""

from __future__ import annotations

from typing import Any

from cocoa.errors import CocoaError
from cocoa.parsing import as_mapping
from cocoa.yaml_text import read_yaml


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted key of a recipe's mapping, in place.

    Raises:
        CocoaError: it is no `key=value`, or its key leads nowhere.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise CocoaError(f"{override!r}: an override is key=value, dotted, such as stages.contrastive.max_steps=100")
    *parents, last = dotted.split(".")
    node: Any = content
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = _stage_of(node, part, where)
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise CocoaError(f"{where}: not a mapping, so {override!r} cannot be applied")
    if isinstance(node, list):
        raise CocoaError(f"{override!r}: name a key of the stage, such as {dotted}.max_steps=100")
    if not isinstance(node, dict):
        raise CocoaError(f"{'.'.join(parents)}: not a mapping, so {override!r} cannot be applied")
    try:
        node[last] = read_yaml(text)
    except ValueError as error:
        raise CocoaError(f"{override!r}: the value is not YAML ({error}); put text in quotes") from None


def _stage_of(stages: list[Any], part: str, where: str) -> dict[str, Any]:
    """The keys of the stage that an override means, by number or name."""
    for index, entry in enumerate(stages):
        if isinstance(entry, str):
            stages[index] = entry = {entry: {}}
        name = next(iter(as_mapping(entry, f"stages.{index}")), None)
        if part in (name, str(index)):
            entry[name] = as_mapping(entry.get(name) or {}, f"stages.{name}")
            return entry[name]
    names = ", ".join(str(next(iter(stage), None)) for stage in stages)
    raise CocoaError(f"{where}: the recipe has no such stage; it has {names}")
