"""Input that nobody would write, and what counts as surviving it: shared by `test_fuzz.py` and `benchmarks/fuzz.py`.

A reader survives an input by reading it or by a `CocoaError`: one line, not too long, that says where the fault is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from cocoa.errors import CocoaError

LONGEST_MESSAGE = 2500
LONGEST_INPUT = 300_000
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
)
"""That stand at the edges of what a field holds."""
TEXTS = (
    *("", " ", "\0", "a\0b", "\n", "\r\n", "﻿", "‮", "é" * 300, "x" * 70_000, "../../etc/passwd", "/dev/zero", "CON"),
    *(
        "<|im_end|>",
        "<|image_pad|> a",
        "<|image_1|>",
        "<<||mask|>",
        "{{ x }}",
        "{%",
        "-1",
        "nan",
        "1e999",
        "null",
        "true",
    ),
    *(
        "\ud800",
        "a\udfffb",
        "😀",
        "9" * 5000,
        "0x",
        "a=b",
        "=",
        "a,b",
        '"',
        "'",
        "'''",
        "\\",
        "\x1b[2J",
        "%s %n",
        "${HOME}",
    ),
)


class Field(NamedTuple):
    """A number in a file: where it stands, and how many bytes it takes in which order."""

    offset: int
    width: int
    order: str = "big"


class Kind(NamedTuple):
    """One reader with its input: how a case is drawn, and how it is written into an empty folder and read."""

    cases: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]


def no_fields(content: bytes) -> list[Field]:
    return []


@st.composite
def mutated(
    draw: st.DrawFn,
    seeds: Callable[[], Mapping[str, bytes]],
    fields: Callable[[bytes], list[Field]] = no_fields,
    mend: Callable[[bytes], bytes] = bytes,
    most: int = 4,
) -> tuple[str, bytes]:
    """(name, content) of a valid file after some changes.

    Args:
        seeds: the valid files.
        fields: the numbers in a file that are worth overwriting.
        mend: makes checksums right again, so that what is behind them is reached.
        most: changes.
    """
    files = seeds()
    name = draw(st.sampled_from(sorted(files)))
    content = files[name]
    for _ in range(draw(st.integers(1, most))):
        change = draw(st.sampled_from((_flip, _cut, _drop, _repeat, _splice, _number, _field, _field, _field)))
        content = change(draw, content, files, fields)[:LONGEST_INPUT]
    return name, mend(content) if draw(st.booleans()) else content


def _place(draw: st.DrawFn, content: bytes) -> int:
    return draw(st.integers(0, max(len(content) - 1, 0)))


def _span(draw: st.DrawFn, content: bytes) -> tuple[int, int]:
    start = _place(draw, content)
    return start, min(len(content), start + draw(st.sampled_from((1, 2, 4, 16, 100, 1000, 10_000))))


def _flip(draw: st.DrawFn, content: bytes, *_: Any) -> bytes:
    place = _place(draw, content)
    return (
        content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
        if content
        else b""
    )


def _cut(draw: st.DrawFn, content: bytes, *_: Any) -> bytes:
    return content[: _place(draw, content)]


def _drop(draw: st.DrawFn, content: bytes, *_: Any) -> bytes:
    start, end = _span(draw, content)
    return content[:start] + content[end:]


def _repeat(draw: st.DrawFn, content: bytes, *_: Any) -> bytes:
    start, end = _span(draw, content)
    return content[:start] + content[start:end] * draw(st.sampled_from((2, 3, 10, 1000))) + content[end:]


def _splice(draw: st.DrawFn, content: bytes, files: Mapping[str, bytes], *_: Any) -> bytes:
    other = files[draw(st.sampled_from(sorted(files)))]
    start, end = _span(draw, other)
    place = _place(draw, content)
    return content[:place] + other[start:end] + content[place + draw(st.sampled_from((0, end - start))) :]


def _number(draw: st.DrawFn, content: bytes, *_: Any) -> bytes:
    width, order = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(("big", "little")))
    return _written(draw, content, Field(_place(draw, content), width, order))


def _field(draw: st.DrawFn, content: bytes, files: Any, fields: Callable[[bytes], list[Field]]) -> bytes:
    found = [field for field in fields(content) if field.offset + field.width <= len(content)]
    return _written(draw, content, draw(st.sampled_from(found))) if found else _flip(draw, content)


def _written(draw: st.DrawFn, content: bytes, field: Field) -> bytes:
    size = 1 << 8 * field.width
    number = draw(st.sampled_from(NUMBERS) | st.integers(0, size - 1)) % size
    return content[: field.offset] + number.to_bytes(field.width, field.order) + content[field.offset + field.width :]


def survives(kind: Kind, case: Any, folder: Path) -> str:
    """`accepted` or `refused`.

    Raises:
        MemoryError: the reader ran out of memory, and said something else.
        AssertionError: the refusal is no message for a user.
        Exception: whatever else the reader raises.
    """
    try:
        kind.read(case, folder)
    except CocoaError as error:
        fault: BaseException | None = error
        while fault is not None:
            if isinstance(fault, MemoryError):
                raise MemoryError(str(error)) from error
            fault = fault.__cause__ or fault.__context__
        check_message(str(error))
        return "refused"
    return "accepted"


def check_message(message: str, *names: str) -> None:
    """See that a refusal is one line of bearable length that names one of these."""
    assert len(message.splitlines()) == 1 and len(message) <= LONGEST_MESSAGE, f"{len(message)}: {message[:300]!r}"
    message.encode()  # it can be printed
    assert not names or any(name in message for name in names), f"names no place: {message!r}"
