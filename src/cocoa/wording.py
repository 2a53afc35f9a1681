"""Numbers as people read them."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """A number of things: `1 row`, `1,200 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def short(number: float) -> str:
    """A number to three digits, whole from 100 on: `0.25`, `9.77`, `6,000`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def percent(part: float, whole: float) -> str:
    """A share, to two digits: `0.67 %`, `63 %`, `100 %`."""
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"


def size(number: float) -> str:
    """Bytes, to two or three digits: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def duration(hours: float) -> str:
    """A time to two digits, in minutes or hours."""
    if hours < 1 / 60:
        return "< 1 min"
    return f"≈ {hours * 60:.0f} min" if hours < 1 else f"≈ {hours:,.{1 if hours < 10 else 0}f} h"
