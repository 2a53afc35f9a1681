"""YAML that a user wrote, read without the harm that YAML can do.

`yaml.safe_load` executes nothing, but a few lines of aliases can stand for more values than memory holds, and a value
that is no date, say, ends it with whatever error its constructor stumbles over.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import yaml

MAX_CHARACTERS = 50_000
"""Of a text; it takes a second at most."""
MAX_DEPTH = 100
"""Of brackets in brackets; what each more costs grows with those around it."""
MAX_VALUES = 20_000
"""That a text may stand for, each counted as often as it is referred to."""


def read_yaml(text: str) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: it is not YAML, stands for too much, or holds text that is not Unicode; the message is one line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS} characters")
    steps = ((c in "[{") - (c in "]}") for c in text)
    if max(accumulate(steps, lambda depth, step: max(depth + step, 0)), default=0) > MAX_DEPTH:
        raise ValueError("nested too deep")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except Exception as error:  # constructors raise whatever they stumble over
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for.

    Args:
        node: perhaps referred to from several places.
        known: the counts of nodes, by their id; 0 while one is being counted.

    Raises:
        ValueError: they are too many, or endless, or one is no text.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("a value that holds itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # a lone surrogate, which no file name and no tokenizer takes
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    nodes = (each for part in parts for each in (part if isinstance(part, tuple) else (part,)))
    known[id(node)] = count = 1 + sum(_count(each, known) for each in nodes)
    if count > MAX_VALUES:
        raise ValueError(f"it stands for more than {MAX_VALUES} values; use fewer aliases")
    return count
