"""A preview as one self-contained HTML file: pictures inside, nothing from the network, light and dark."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Literal

import jinja2
from PIL import Image

from cocoa import preview_render as render
from cocoa.errors import CocoaError
from cocoa.preview import Preview
from cocoa.preview_samples import visible

THUMBNAIL = 448
"""Longest side of an embedded picture, in pixels."""


def write_html(preview: Preview, path: Path) -> None:
    """Write a preview to a file, making its folder.

    Raises:
        CocoaError: the file cannot be written.
    """
    write_page(to_html(preview), path)


def write_page(text: str, path: Path) -> None:
    """Write a page, making its folder.

    Raises:
        CocoaError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CocoaError(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def to_html(preview: Preview) -> str:
    """A preview as HTML; whatever comes from the data is escaped."""
    environment = page_environment()
    environment.filters |= {"size": render.size}
    return environment.get_template("preview.html.jinja").render(
        preview=preview, render=render, histogram=render.Histogram.of
    )


def page_environment() -> jinja2.Environment:
    """Where a page's template is found, with the filters that pages share; nothing from the data is markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cocoa", "data"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"data_uri": data_uri, "visible": visible}
    return environment


def data_uri(image: Image.Image, kind: Literal["JPEG", "PNG"] = "JPEG", longest: int = THUMBNAIL) -> str:
    """A picture to stand in `src`, no larger than `longest`; a PNG keeps every pixel of a small one."""
    small = image.copy()
    small.thumbnail((longest, longest))
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
