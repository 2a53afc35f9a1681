"""A preview as one self-contained HTML file: pictures inside, nothing from the network, light and dark."""

from __future__ import annotations

import base64
import io
from pathlib import Path

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
    text = to_html(preview)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CocoaError(f"{path}: cannot be written ({error.strerror}); choose another --html") from None


def to_html(preview: Preview) -> str:
    """A preview as HTML; whatever comes from the data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cocoa", "data"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"data_uri": data_uri, "visible": visible, "size": render.size}
    return environment.get_template("preview.html.jinja").render(
        preview=preview, render=render, histogram=render.Histogram.of
    )


def data_uri(image: Image.Image) -> str:
    """A picture to stand in `src`, no larger than `THUMBNAIL`."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
