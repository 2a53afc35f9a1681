"""Values from YAML to dataclasses of ours, with errors that name the key and the one that was meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cocoa.errors import CocoaError

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str) -> T:
    """An instance of a dataclass of ours from a mapping, lists as tuples where the field is one.

    Raises:
        CocoaError: an unknown key, or a value whose type is not its default's.
    """
    values = as_mapping(values, where)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(values, known, f"{where}.")
    for key, f in known.items():
        if f.default is f.default_factory is dataclasses.MISSING and values.get(key) is None:
            raise CocoaError(f"{where}.{key}: missing")
    return cls(**{key: convert(value, known[key].type, f"{where}.{key}") for key, value in values.items()})


def convert(value: Any, annotation: Any, where: str) -> Any:
    """A YAML value as the field's annotation wants it; annotations beyond the simple ones pass as they are."""
    value = str(value) if isinstance(value, Path) else value
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = {part.strip() for part in name.replace("typing.", "").split("|")}
    if value is None and "None" in kinds:
        return None
    if any(kind.startswith("tuple") for kind in kinds):
        return tuple(as_list(value, where))
    if "list[str]" in kinds and isinstance(value, (list, tuple)):
        return [convert(item, "str", where) for item in value]
    kinds.discard("list[str]")
    types: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict}
    if kinds <= {*types, "None"}:
        if "float" in kinds and isinstance(value, str) and "str" not in kinds:
            try:
                return float(value)  # YAML reads 2e-5, without a dot, as text
            except ValueError:
                pass
        allowed = tuple(kind for name, kind in types.items() if name in kinds)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            return value
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise CocoaError(f"{where}: {value!r} is not {' or '.join(sorted(kinds - {'None'}))}")
    return value


def check_keys(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known, with the one that was meant."""
    known = list(known)
    for key in values:
        if key not in known:
            raise CocoaError(f"{where}{key}: unknown key{suggest(key, known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    if close := _nearest(name, known):
        return close
    return f"; there are: {', '.join(known)}" if len(known) < 20 else ""


def no_such_recipe(path: Path) -> CocoaError:
    """What is raised where a recipe is not there; it names the one beside it that may have been meant."""
    close = _nearest(str(path), map(str, path.parent.glob("*.yaml")))
    return CocoaError(f"{path}: no such recipe" + (close or "; recipes/ has some to start from"))


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """The value as a dictionary, refused where it is none."""
    if not isinstance(value, Mapping):
        raise CocoaError(f"{where}: a mapping of keys is needed, got {value!r}")
    return dict(value)


def as_list(value: Any, where: str) -> list[Any]:
    """The value as a list, refused where it is none."""
    if not isinstance(value, (list, tuple)):
        raise CocoaError(f"{where}: a list is needed, got {value!r}")
    return list(value)
