"""mkdocs hooks: what GitHub makes of a page by itself, and a site does not. Formulas, and links that leave `docs/`."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, *, config: Any, files: Any, **_: Any) -> str:
    """Links to files beside `docs/`: a module goes to the API page, another file to `repo_url`, or is mere text."""
    documented = re.findall(r"^::: (\S+)", files.get_file_from_path("api.md").content_string, re.MULTILINE)

    def elsewhere(link: re.Match[str]) -> str:
        text, target = link.groups()
        module = target.removeprefix("src/").removesuffix(".py").replace("/", ".")
        if module in documented:
            return f"[{text}](api.md#{module})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{target})" if config.repo_url else text

    return LINK.sub(elsewhere, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show by themselves."""

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(formula, content)
